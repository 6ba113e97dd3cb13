"""A file that threads, forked children and unpickled copies read at any place: pread on a descriptor has no position.

A forked child uses the descriptor it inherits, an unpickled copy (a data loader's worker) opens its own. A file that is
written to while it is open is an error, since its index may no longer be true.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from mambaverse.errors import UserError

MOST = 1 << 30  # bytes of one call; Linux reads at most 2 GiB


class Handle:
    """A plain file, read at places of its content, which for it are those of the file.

    Attributes:
        path: Of the file.
        file_size: In bytes.
        size: Of its content, in bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()
        self.file_size, self.modified_ns = self._status()
        self.size = self.file_size

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the content from `offset` on, fewer at its end."""
        return self.pread(offset, length)

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the file from `offset` on, fewer at its end.

        Raises:
            UserError: the file was closed, has changed since it was opened, or cannot be read.
        """
        if self._closed.alive is False:
            raise UserError(f"{self.path}: was closed; open it again")
        try:
            if self._status() != (self.file_size, self.modified_ns):
                raise UserError(f"{self.path}: has changed since it was opened; open it again")
            data = os.pread(self._descriptor, min(length, MOST), offset)
            if len(data) == length:
                return data
            parts = [data]
            while parts[-1] and length > (have := sum(map(len, parts))):
                parts.append(os.pread(self._descriptor, min(length - have, MOST), offset + have))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
        return b"".join(parts)

    def close(self) -> None:
        """Give the descriptor back; it goes by itself with the object too."""
        self._closed()

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_descriptor", "_closed")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()
        if self._status() != (self.file_size, self.modified_ns):
            raise UserError(f"{self.path}: has changed since it was opened; open it again")

    def _open(self) -> None:
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
        self._closed = weakref.finalize(self, os.close, self._descriptor)

    def _status(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns
