r"""Data frames out of R's .rda files: the little of R's serialisation that they use.

A file is compressed, begins with "RDX2\n" or "RDX3\n" and "X\n" (XDR, big-endian), and holds one pair list, name by
name. An item is a word of flags, whose low byte is its type, bit 9 "has attributes" and bit 10 "has a tag", and a body.

Source: R Internals, section 1.8 "Serialization Formats".
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from pathlib import Path
from typing import Any

import numpy as np

from mambaverse.errors import UserError

NIL, REF, SYMBOL, PAIRS, CHARS, LOGICAL, INTEGER, REAL, STRINGS, LIST = 254, 255, 1, 2, 9, 10, 13, 14, 16, 19
ATTRIBUTES, TAG = 1 << 9, 1 << 10
MAGIC = {b"\x1f\x8b": gzip.decompress, b"BZ": bz2.decompress, b"\xfd7": lzma.decompress}
HEADS = {b"RDX2\nX\n": False, b"RDX3\nX\n": True}  # whether the encoding's name follows


def read_rda(path: Path) -> dict[str, dict[str, list[Any]]]:
    """Return the data frames of an .rda file by name, each a list of values by column; factors as their labels.

    Raises:
        UserError: another format, or damaged.
    """
    data = path.read_bytes()
    try:
        data = MAGIC.get(data[:2], bytes)(data)
        if data[:7] not in HEADS:
            raise ValueError("it does not begin as an .rda file does")
        return {name: frame for name, frame in _Reader(data[7:], HEADS[data[:7]]).pairs() if isinstance(frame, dict)}
    except (ValueError, IndexError, struct.error, OSError, EOFError, lzma.LZMAError, RecursionError) as error:
        raise UserError(f"{path}: not readable as R data ({error}); get the package again") from None


class _Reader:
    """Walks through the serialised bytes."""

    def __init__(self, data: bytes, named_encoding: bool) -> None:
        self.data, self.at, self.symbols = data, 12, []  # type: bytes, int, list[str]  # behind three version words
        if named_encoding:
            self.at += 4 + struct.unpack_from(">i", data, self.at)[0]

    def pairs(self) -> list[tuple[str, Any]]:
        """Return the (tag, value) pairs of the pair list that stands here."""
        found = []
        while (flags := self._word()) & 0xFF == PAIRS:
            if flags & ATTRIBUTES:
                self._item()
            tag = self._item() if flags & TAG else ""
            found.append((tag, self._item()))
        return found

    def _word(self) -> int:
        self.at += 4
        return struct.unpack_from(">i", self.data, self.at - 4)[0]

    def _array(self, kind: str, size: int) -> np.ndarray:
        count = self._word()
        self.at += count * size
        return np.frombuffer(self.data, kind, count, self.at - count * size)

    def _item(self) -> Any:
        flags = self._word()
        kind = flags & 0xFF
        if kind == NIL:
            return None
        if kind == REF:
            return self.symbols[(flags >> 8) - 1]
        if kind == SYMBOL:
            self.symbols.append(self._item())
            return self.symbols[-1]
        if kind == CHARS:
            size = max(self._word(), 0)
            self.at += size
            return self.data[self.at - size : self.at].decode("latin-1")
        if kind == PAIRS:
            self.at -= 4
            return dict(self.pairs())
        value: Any
        if kind in (LOGICAL, INTEGER):
            value = self._array(">i4", 4)
        elif kind == REAL:
            value = self._array(">f8", 8)
        elif kind in (STRINGS, LIST):
            value = [self._item() for _ in range(self._word())]
        else:
            raise ValueError(f"an item of type {kind}")
        return self._dressed(value, dict(self.pairs()) if flags & ATTRIBUTES else {})

    @staticmethod
    def _dressed(value: Any, attributes: dict[str, Any]) -> Any:
        """Return a factor as its labels, a data frame as its columns."""
        if "levels" in attributes:
            levels = attributes["levels"]
            return [levels[i - 1] for i in value.tolist()]
        if isinstance(value, list) and "names" in attributes:
            return dict(zip(attributes["names"], value, strict=True))
        return value
