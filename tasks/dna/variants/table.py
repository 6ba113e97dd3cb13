"""A table that grows row by row, and that a job which was killed goes on with: the finished file has the same bytes.

    x.tsv.part, x.tsv.checkpoint  --all rows-->  x.tsv

The checkpoint says how many rows are in the file for certain, and how long it was then; what was written behind that is
cut away when the job goes on. It is not taken up by a job with other settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, BinaryIO

from mambaverse.engine.files import PART, saving, write_atomic
from mambaverse.errors import UserError

CHECKPOINT = ".checkpoint"
EVERY_S = 10.0  # between two checkpoints: what a killed job loses at most


class ResumableTable:
    """Writes one tab-separated table; leaving its block finishes it, unless by an error.

    Args:
        path: Of the table.
        columns: Its header.
        about: What the numbers depend on, as JSON: a job goes on only with the same.
        overwrite: Replace a finished table, and begin anew where one was cut off.

    Attributes:
        rows: In the table so far; those of the job that was cut off at the start.

    Raises:
        UserError: a finished table is there, or a part of one with other settings.
        SaveError: the file cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], about: dict[str, Any], *, overwrite: bool = False) -> None:
        if path.exists() and not overwrite:
            raise UserError(f"{path}: is there already, finished; name another file with --out, or give --overwrite")
        self.path = path
        self._part, self._mark = (path.with_name(path.name + ending) for ending in (PART, CHECKPOINT))
        self._about = {**about, "columns": list(columns)}
        self._whole = True  # no row is written in part
        state = None if overwrite else self._read_state()
        self.rows = 0 if state is None else int(state["rows"])
        self._saved_s = monotonic()
        with saving(self._part):
            if state is None:
                self._mark.unlink(missing_ok=True)
                self._file: BinaryIO = self._part.open("wb")
                self._file.write(("\t".join(columns) + "\n").encode())
            else:
                self._file = self._part.open("r+b")
                self._file.truncate(state["bytes"])
                self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> ResumableTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif not self._file.closed:
            if self._whole:
                self.checkpoint()
            self._file.close()

    def write(self, rows: Sequence[Sequence[str]]) -> None:
        """Append rows of cells.

        Raises:
            SaveError: the file cannot be written.
        """
        self._whole = False
        with saving(self._part):
            self._file.write("".join("\t".join(row) + "\n" for row in rows).encode())
        self.rows, self._whole = self.rows + len(rows), True
        if monotonic() - self._saved_s >= EVERY_S:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Make what is written so far what a job goes on from.

        Raises:
            SaveError: the file cannot be written.
        """
        self._sync()
        state = {"about": self._about, "rows": self.rows, "bytes": self._file.tell()}
        write_atomic(self._mark, json.dumps(state))
        self._saved_s = monotonic()

    def _sync(self) -> None:
        with saving(self._part):
            self._file.flush()
            os.fsync(self._file.fileno())

    def _finish(self) -> None:
        self._sync()
        with saving(self.path):
            self._file.close()
            os.replace(self._part, self.path)
            self._mark.unlink(missing_ok=True)

    def _read_state(self) -> dict[str, Any] | None:
        """Return the checkpoint of a job that was cut off, if there is one."""
        if not self._mark.exists() or not self._part.exists():
            return None
        try:
            state = json.loads(self._mark.read_text())
            about, size, _ = state["about"], int(state["bytes"]), int(state["rows"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self._mark}: damaged; delete it and {self._part}, or give --overwrite") from None
        if about != self._about:
            other = [key for key in {**about, **self._about} if about.get(key) != self._about.get(key)]
            raise UserError(
                f"{self._part}: a job that was cut off left it, with another {', '.join(other)}; go on with what it "
                "had, name another file with --out, or give --overwrite"
            )
        if self._part.stat().st_size < size:
            raise UserError(f"{self._part}: shorter than {self._mark} says; give --overwrite to begin anew")
        return state


def fingerprint(path: Path) -> list[Any]:
    """Return what tells one version of a file from another: name, bytes, and when it was changed."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]
