"""BGZF: gzip in blocks of up to 64 KiB, so that any place in a compressed genome can be read without what is before it.

    block = gzip member whose extra field "BC" holds its size - 1;  the file ends in an empty block of 28 bytes
    .gzi  = count, then (place in the file, place in the content) of each block but the first, all uint64 little endian

`python -m mambaverse.tasks.dna.genome.bgzf genome.fa.gz` makes genome.fa.bgz of a plain or gzip file, as `bgzip` would.

Source: SAM format specification, section 4.1, "The BGZF compression format"; the .gzi of htslib's bgzip.
"""

from __future__ import annotations

import argparse
import os
import sys
import weakref
import zlib
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from mambaverse.engine.files import PART, saving
from mambaverse.errors import UserError
from mambaverse.tasks.dna.files import DAMAGES, block_size, damage, open_binary, refuse_cut
from mambaverse.tasks.dna.genome.handle import Handle
from mambaverse.tasks.dna.genome.index import BadIndexError

CACHED_BLOCKS = 256  # inflated, of one open file: 16 MiB
PIECE = 1 << 16


class BgzfHandle(Handle):
    """A BGZF file, read at places of its content."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._places = np.zeros((1, 2), np.int64)  # in the file and in the content, of each block
        self.size = 0  # of the content; known once there is an index
        refuse_cut(path)

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """Yield (place in the file, content) of all blocks, read from start to end."""
        at = 0
        while at < self.file_size:
            size, data = self._inflate(at)
            yield at, data
            at += size

    def index(self, places: list[tuple[int, int]], size: int) -> None:
        """Take over the places of the blocks with content, the first included, and the content's size."""
        self._places, self.size = np.array(places or [(0, 0)], np.int64), size
        self._cache()

    def read_index(self, data: bytes) -> None:
        """Take over the content of a .gzi file.

        Raises:
            BadIndexError: it is not this file's.
        """
        numbers = np.frombuffer(data[: len(data) // 8 * 8], "<u8").astype(np.int64)
        if len(data) % 8 or not len(numbers) or len(numbers) != 1 + 2 * numbers[0]:
            raise BadIndexError(".gzi: not a count and as many pairs")
        places = np.concatenate((np.zeros((1, 2), np.int64), numbers[1:].reshape(-1, 2)))
        if (np.diff(places[:, 0]) <= 0).any() or (np.diff(places[:, 1]) < 0).any() or places[-1, 0] >= self.file_size:
            raise BadIndexError(".gzi: its places do not rise, or lie behind the file's end")
        self._places = places
        last = len(places) - 1
        try:
            if last:
                step, data = self._inflate(0)
                while step < places[1, 0] and not (more := self._inflate(step))[1]:  # empty blocks
                    step += more[0]
                if [step, len(data)] != places[1].tolist():
                    raise BadIndexError(".gzi: the first block has another size")
            at, size = int(places[last, 0]), int(places[last, 1])
            while at < self.file_size:
                step, data = self._inflate(at)
                at, size = at + step, size + len(data)
        except UserError as error:
            raise BadIndexError(f".gzi: {error}") from None
        self.index(places.tolist(), size)

    def index_bytes(self) -> bytes:
        """Return the content of the .gzi file."""
        pairs = self._places[1:]
        return np.concatenate(([len(pairs)], pairs.reshape(-1))).astype("<u8").tobytes()

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the content from `offset` on, fewer at its end."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        number = int(np.searchsorted(self._places[:, 1], offset, side="right")) - 1
        skip = offset - int(self._places[number, 1])
        data = self._block(number)[skip : skip + length]
        if len(data) == length:
            return data
        parts = [data]
        while (length := length - len(parts[-1])) > 0:
            number += 1
            parts.append(self._block(number)[:length])
        return b"".join(parts)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in super().__getstate__().items() if key != "_block"}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._cache()

    def _cache(self) -> None:
        # lru_cache is C: threads share it, a fork finds no lock held. With a proxy it does not hold the file open.
        self._block = lru_cache(CACHED_BLOCKS)(partial(BgzfHandle._checked_block, weakref.proxy(self)))

    def _checked_block(self, number: int) -> bytes:
        """Return the content of a block, which must be as long as the index says."""
        at, start = self._places[number].tolist()
        end = int(self._places[number + 1, 1]) if number + 1 < len(self._places) else self.size
        there = block_size(self.pread(at, PIECE)) is not None
        if not there or len(data := self._inflate(at)[1]) != end - start:
            raise UserError(
                f"{self.path}.gzi: does not fit the block at byte {at:,} of its file; delete it, it is made anew"
            )
        return data

    def _inflate(self, at: int) -> tuple[int, bytes]:
        """Return the size in the file and the content of the block at `at`."""
        raw = self.pread(at, PIECE)
        size = block_size(raw)
        if size is None or size > len(raw):
            what = "cut short in" if size else "no BGZF block"
            raise UserError(f"{self.path}: damaged: {what} at byte {at:,}; get the file again")
        begin = 12 + int.from_bytes(raw[10:12], "little")
        try:
            data = zlib.decompress(raw[begin : size - 8], wbits=-15, bufsize=PIECE)
        except zlib.error as error:
            raise UserError(f"{self.path}: damaged: block at byte {at:,}: {error}; get the file again") from None
        crc, count = (int.from_bytes(raw[size - 8 + i : size - 4 + i], "little") for i in (0, 4))
        if count != len(data) or crc != zlib.crc32(data):
            raise UserError(f"{self.path}: damaged: block at byte {at:,}: its checksum is another; get the file again")
        return size, data


def to_bgzf(source: Path, target: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write a file, plain or compressed (.gz, .xz, .bz2), as BGZF, and return where.

    Args:
        source: The file.
        target: Where to; default: beside it, as genome.fa.bgz.
        overwrite: Replace what is there.

    Raises:
        UserError: no such file, a damaged one, or a target that is there already.
        SaveError: the target cannot be written.
    """
    from Bio.bgzf import BgzfWriter

    if not source.is_file():
        raise UserError(f"{source}: no such file")
    stem = source.with_suffix("") if source.suffix.lower() in (".gz", ".xz", ".bz2", ".bgz") else source
    target = target or stem.with_name(stem.name + ".bgz")
    if target.exists() and not overwrite:
        raise UserError(f"{target}: is there already; name another target, or delete it")
    part = target.with_name(target.name + PART)
    try:
        with saving(target), part.open("wb") as file:
            writer = BgzfWriter(fileobj=file)
            for piece in _pieces(source):
                writer.write(piece)
            writer.close()
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with open_binary(path) as file:
            while piece := file.read(PIECE):
                yield piece
    except DAMAGES as error:
        raise UserError(f"{path}: {damage(error)}") from None


def main(arguments: list[str] | None = None) -> int:
    """Convert a file to BGZF: what `python -m mambaverse.tasks.dna.genome.bgzf` runs."""
    parser = argparse.ArgumentParser(
        prog="python -m mambaverse.tasks.dna.genome.bgzf", description="Write a plain or gzip file as BGZF."
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", help="default: beside it, as genome.fa.bgz")
    given = parser.parse_args(arguments)
    try:
        print(to_bgzf(given.source, given.target))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
