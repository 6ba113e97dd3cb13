"""A table that grows row by row, and that a job which was killed goes on with: the finished file has the same bytes.

    x.tsv.part, x.tsv.checkpoint  --all rows-->  x.tsv

The checkpoint says how many rows are in the file for certain (see mambaverse/engine/resumable.py). It is not taken up
by a job with other settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambaverse.engine.resumable import ResumableFile
from mambaverse.errors import UserError


class ResumableTable(ResumableFile):
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
        refuse_finished(path, overwrite)
        super().__init__(path)
        self._about = {**about, "columns": list(columns)}
        state = None if overwrite else self._read_state()
        self.rows = 0 if state is None else int(state["rows"])
        self._open(None if state is None else state["bytes"], "\t".join(columns) + "\n")

    def write(self, rows: Sequence[Sequence[str]]) -> None:
        """Append rows of cells.

        Raises:
            SaveError: the file cannot be written.
        """
        with self._piece():
            self._append("".join("\t".join(row) + "\n" for row in rows))
            self.rows += len(rows)

    def _state(self) -> dict[str, Any]:
        return {"about": self._about, "rows": self.rows}

    def _read_state(self) -> dict[str, Any] | None:
        """Return the checkpoint of a job that was cut off, if there is one."""
        try:
            if (state := self._read_mark()) is None:
                return None
            about, size, rows = state["about"], int(state["bytes"]), int(state["rows"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self._mark}: damaged; delete it and {self._part}, or give --overwrite") from None
        if about != self._about and rows == 0:  # it holds nothing: a job that was stopped by a wrong file, say
            return None
        if about != self._about:
            other = [key for key in {**about, **self._about} if about.get(key) != self._about.get(key)]
            raise UserError(
                f"{self._part}: a job that was cut off left it, with another {', '.join(other)}; go on with what it "
                "had, name another file with --out, or give --overwrite"
            )
        if self._part.stat().st_size < size:
            raise UserError(f"{self._part}: shorter than {self._mark} says; give --overwrite to begin anew")
        found: dict[str, Any] = state
        return found


def refuse_finished(path: Path, overwrite: bool) -> None:
    """Raise UserError if `path` is there and is not to be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path}: is there already, finished; name another file with --out, or give --overwrite")


def fingerprint(path: Path) -> list[Any]:
    """Return what tells one version of a file from another: name, bytes, and when it was changed."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]
