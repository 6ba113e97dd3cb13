"""Text that a long job writes piece by piece, and goes on with after a kill: the finished file has the same bytes.

    x.part, x.checkpoint  --all pieces-->  x

The checkpoint is JSON: what the writer needs to go on, and "bytes", how long the file was then. What a killed job wrote
behind that is cut away when it goes on. Two jobs do not write one file: whoever opened it has its lock.
"""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, BinaryIO, Self

from mambaverse.engine.files import PART, locked, saving, sync, write_atomic
from mambaverse.errors import NO_TEXT, UserError

CHECKPOINT = ".checkpoint"
EVERY_S = 10.0  # between two checkpoints: what a killed job loses at most, beside the piece it was in


class ResumableFile(ABC):
    """Base of such writers; leaving the block finishes the file, unless by an error: then it stays as far as it went.

    A subclass reads what was left (`_read_mark`), then calls `_open`; it writes within `_piece`.

    Args:
        path: Of the finished file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part, self._mark = (path.with_name(path.name + ending) for ending in (PART, CHECKPOINT))
        self._whole = True  # no piece is written in part
        self._file: BinaryIO

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif not self._file.closed:
            if self._whole:  # an error within a piece leaves half of it: then the last checkpoint holds
                self.checkpoint()
            self._file.close()

    def checkpoint(self) -> None:
        """Make what is written so far what a job goes on from.

        Raises:
            SaveError: the file cannot be written.
        """
        if (state := self._state()) is None:
            return
        with saving(self._part):
            sync(self._file)
        write_atomic(self._mark, json.dumps({**state, "bytes": self._file.tell()}))
        self._saved_s = monotonic()

    def finish(self) -> None:
        """Give the file its name, and forget the checkpoint.

        Raises:
            SaveError: a file cannot be written.
        """
        if self._file.closed:
            return
        with saving(self._part):
            self._file.write(self._rest().encode(errors=NO_TEXT))
            sync(self._file)
            self._file.close()
        for path, text in self._beside().items():
            write_atomic(path, text)
        with saving(self.path):
            os.replace(self._part, self.path)
            self._mark.unlink(missing_ok=True)

    @abstractmethod
    def _state(self) -> dict[str, Any] | None:
        """Return what to go on from, as JSON; None: nothing yet."""

    def _rest(self) -> str:
        """Return what still belongs at the end."""
        return ""

    def _beside(self) -> dict[Path, str]:
        """Return the files that belong beside the finished one."""
        return {}

    def _read_mark(self) -> Any:
        """Return what the checkpoint of a job that was cut off says, None if there is none.

        Raises:
            ValueError: it is no JSON.
        """
        if not self._mark.exists() or not self._part.exists():
            return None
        return json.loads(self._mark.read_text())

    def _open(self, size: int | None, header: str = "") -> None:
        """Go on behind `size` bytes of what is there; None: begin anew, with a header.

        Raises:
            UserError: another job writes the file.
        """
        self._saved_s = monotonic()
        with saving(self._part):
            self._file = self._part.open("a+b")
            if not self._is_claimed(size or 0):
                self._file.close()
                raise UserError(f"{self.path}: another job writes it; wait for its end, or name another file")
            if size is None:
                self._mark.unlink(missing_ok=True)
            self._file.truncate(size or 0)
            self._file.seek(0, os.SEEK_END)
            if size is None:
                self._file.write(header.encode())

    def _is_claimed(self, size: int) -> bool:
        """Return whether no other job has the open file, or has finished it since its checkpoint was read."""
        if not locked(self._file, inherited=True):
            return False
        found = os.fstat(self._file.fileno())
        return self._part.exists() and os.path.samestat(found, self._part.stat()) and found.st_size >= size

    @contextmanager
    def _piece(self) -> Iterator[None]:
        """Within it a piece is written and taken note of; behind it comes a checkpoint, if it is time for one."""
        self._whole = False
        yield
        self._whole = True
        if monotonic() - self._saved_s >= EVERY_S:
            self.checkpoint()

    def _append(self, text: str) -> None:
        with saving(self._part):
            self._file.write(text.encode(errors=NO_TEXT))


@contextmanager
def tells_how_to_go_on(path: Path, *, overwrite: bool = False) -> Iterator[None]:
    """Where the job that writes `path` within the block is interrupted, say on stderr how it goes on.

    Args:
        path: Of the finished file.
        overwrite: Whether the job replaces a finished file; given again, it would begin anew.
    """
    try:
        yield
    except KeyboardInterrupt:
        if path.with_name(path.name + CHECKPOINT).exists():
            finished = f", with the finished {path} out of the way" if path.exists() else ""
            how = f" without --overwrite{finished}" if overwrite else ""
            print(f"\nStopped. To go on with {path.name + PART}: the same command{how}", file=sys.stderr)
        raise
