"""metrics.jsonl, and TensorBoard's files beside it.

A line is written whole and never changed. A resumed run first cuts off what was written after its state was saved, so
that no step is reported twice.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambaverse.engine.files import saving
from mambaverse.errors import UserError, warn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, Any]


class MetricsLog:
    """Appends rows to metrics.jsonl, and to TensorBoard if a folder for it is given.

    Args:
        path: metrics.jsonl.
        keep: Bytes of it to keep: 0 for a new run, the length at the last saved state for a resumed one.
        step: Optimizer steps already taken.
        tensorboard: Folder of the event files.
    """

    def __init__(self, path: Path, *, keep: int = 0, step: int = 0, tensorboard: Path | None = None) -> None:
        self.path = path
        with saving(path):
            self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
            self._file.truncate(min(keep, path.stat().st_size))
        self._board = None if tensorboard is None else _summary_writer(tensorboard, step)

    def write(self, row: Row) -> None:
        """Append one row; what is not finite becomes null."""
        plain = {key: _plain(value) for key, value in row.items()}
        with saving(self.path):
            self._file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
            self._file.flush()
        if self._board is not None:
            for key, value in plain.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def sync(self) -> int:
        """Put what was written on the disk, and return the length of the file."""
        with saving(self.path):
            os.fsync(self._file.fileno())
            return self.path.stat().st_size

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a metrics.jsonl; a damaged line is left out with a warning, a last one cut off without."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line)
                rows.append({"kind": row["kind"], **row})
            except (ValueError, KeyError, TypeError):
                warn(f"{path}, line {number}: expected a row of metrics; left out")
    return rows


def require_tensorboard() -> None:
    """Raise UserError if TensorBoard is not installed."""
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        raise UserError("trainer.tensorboard: tensorboard is not installed: pip install 'mambaverse[tensorboard]'")


def _summary_writer(folder: Path, step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
