"""The rows of a benchmark, as a table on the screen and as a CSV file.

What no row has (a GPU's numbers on a CPU, the ratio to a package that is not installed) gets no column.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from mambaverse.bench.timing import (
    BYTES_PER_S,
    EXPONENTIALS_PER_S,
    FLOOR_DEVICE,
    Clock,
    Function,
    Times,
    floor_ms,
)
from mambaverse.errors import UserError
from mambaverse.kernels.backend import BackendError

WRONG = "wrong: not timed"


@dataclass
class Row:
    """One function at one case; NaN is what was not measured."""

    case: str
    name: str
    note: str = ""  # why something was not measured
    error: float = math.nan  # the largest relative RMS error against float64, over outputs and gradients
    worst: str = ""  # what has that error
    forward: Times = field(default_factory=Times)  # without gradients
    step: Times = field(default_factory=Times)  # forward and backward
    gb_per_s: float = math.nan  # of forward: inputs read and outputs written
    floor_ms: float = math.nan  # of forward
    peak_mb: float = math.nan  # of forward and backward, beyond inputs and output gradients
    ratios: dict[str, tuple[float, float]] = field(default_factory=dict)  # others' times over this one's: forward, step
    x: float = math.nan  # where a plot of lines puts it

    @property
    def floor_share(self) -> float:
        """The floor over the forward's time: 1 is as fast as can be."""
        return self.floor_ms / self.forward.ms

    def measure(
        self,
        clock: Clock,
        forward: Function,
        step: Function | None,
        *,
        graph: bool = True,
        moved_bytes: int = 0,
        exponentials: int = 0,
    ) -> None:
        """Time `forward` and `step` (None: it is left out) and fill in what follows from that.

        Args:
            clock: Of the device.
            forward: Runs without gradients.
            step: Runs forward and backward.
            graph: Whether to take times of CUDA graphs too.
            moved_bytes: Inputs read and outputs written by `forward`; 0: not known.
            exponentials: That `forward` needs.
        """
        if step is not None:
            self.peak_mb = clock.peak_mb(step)
        self.forward = clock.times(forward, graph=graph)
        if step is not None:
            self.step = clock.times(step, graph=graph)
        if moved_bytes:
            self.gb_per_s = moved_bytes / self.forward.ms / 1e6
            self.floor_ms = floor_ms(clock.name, moved_bytes, exponentials)

    def passes(self, tolerance: float) -> bool:
        """Return whether the error is within `tolerance`; where it is not (or is NaN), note it."""
        right = self.error <= tolerance
        if not right:
            self.note = WRONG
        return right

    def compare(self, name: str, other: Row) -> None:
        """Note `other`'s times over this one's under `name`: graph beside graph where both have one."""
        self.ratios[name] = _ratio(other.forward, self.forward), _ratio(other.step, self.step)


@contextmanager
def noting(row: Row) -> Iterator[None]:
    """Make a note of the row's of running out of memory, or of an operator that has no kernel for the device."""
    try:
        yield
    except torch.OutOfMemoryError:
        row.note = "out of memory"
    except BackendError as error:
        row.note = str(error)


@contextmanager
def noting_all(row: Row) -> Iterator[None]:
    """Make a note of whatever another package raises: it is no failure of ours, but is told."""
    try:
        yield
    except Exception as error:
        row.note = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:60]}"


@dataclass
class Report:
    """What was measured where, and the rows."""

    what: str  # "norm"
    dtype: str
    device: str  # the clock's name
    label: str  # what a row's name is: "backend"
    rows: list[Row]
    captions: list[str] = field(default_factory=list)  # printed below the table
    lines: bool = False  # whether to plot lines over the rows' x rather than bars

    @property
    def title(self) -> str:
        """One line: what, in which dtype, on which device."""
        return f"{self.what}, {self.dtype}, {self.device}"

    def explain_wrong(self, allowed: str) -> None:
        """Add a caption that says what "wrong" means, if a row is: an error over what is `allowed`."""
        if any(row.note == WRONG for row in self.rows):
            self.captions.append(f"wrong: the error is over the {allowed} that {self.dtype} is allowed")

    def print(self, console: Console) -> None:
        """Print the table and its captions."""
        table = self.table()
        captions = [*self.captions]
        if any(row.floor_ms > 0 for row in self.rows):
            captions.append(
                f"of floor: the larger of bytes / {BYTES_PER_S / 1e12:.1f} TB/s and exponentials / "
                f"{EXPONENTIALS_PER_S / 1e12:.1f}e12 a second, which are an {FLOOR_DEVICE}'s, over forward"
            )
        if any(row.peak_mb >= 0 for row in self.rows):
            captions.append("peak MB: forward + backward, beyond the inputs and the outputs' gradients")
        table.caption, table.caption_justify = "\n".join(captions) or None, "left"
        console.print(table)

    def table(self) -> Table:
        """Return the table, a section for each case."""
        columns = [(head, cell) for head, cell, shown in self._columns() if shown]
        table = Table("case", self.label, title=self.title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for head, _ in columns:
            left = head in ("", "error (of)")
            table.add_column(head, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
        table.columns[0].no_wrap = table.columns[1].no_wrap = True
        for i, row in enumerate(self.rows):
            first = i == 0 or self.rows[i - 1].case != row.case
            if first and i:
                table.add_section()
            table.add_row(row.case if first else "", row.name, *[cell(row) for _, cell in columns])
        return table

    def _columns(self) -> list[tuple[str, Callable[[Row], str], bool]]:
        def ratio_to(name: str) -> Callable[[Row], str]:
            return lambda row: _pair(*row.ratios.get(name, (math.nan, math.nan)), form=_times)

        rows, both = self.rows, "fwd / fwd+bwd"
        graph = any(row.forward.graph_ms > 0 or row.step.graph_ms > 0 for row in rows)
        named = dict.fromkeys(n for row in rows for n, pair in row.ratios.items() if not all(map(math.isnan, pair)))
        return [
            ("error (of)", _error, any(row.worst for row in rows)),
            (f"ms\n{both}", lambda r: _pair(r.forward.eager_ms, r.step.eager_ms), True),
            (f"graph ms\n{both}", lambda r: _pair(r.forward.graph_ms, r.step.graph_ms), graph),
            ("GB/s\nfwd", lambda r: _number(r.gb_per_s), any(row.gb_per_s > 0 for row in rows)),
            ("of\nfloor", lambda r: _percent(r.floor_share), any(row.floor_ms > 0 for row in rows)),
            ("peak\nMB", lambda r: _number(r.peak_mb), any(row.peak_mb >= 0 for row in rows)),
            *[(f"faster than\n{name}\n{both}", ratio_to(name), True) for name in named],
            ("", lambda r: f"[yellow]{r.note}", any(row.note for row in rows)),
        ]

    def write_csv(self, path: Path) -> None:
        """Write a line a row, with the names of what was run and where in each.

        Raises:
            UserError: if the file cannot be written.
        """
        rows = [self._flat(row) for row in self.rows]
        names = [
            n
            for n in dict.fromkeys(n for row in rows for n in row)
            if any(row.get(n) not in ("", None) for row in rows)
        ]
        try:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=names, extrasaction="ignore", restval="")
                writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            raise UserError(f"--csv {path}: {error.strerror}") from None

    def _flat(self, row: Row) -> dict[str, str]:
        numbers = {
            "error": row.error,
            "forward_ms": row.forward.eager_ms,
            "forward_graph_ms": row.forward.graph_ms,
            "step_ms": row.step.eager_ms,
            "step_graph_ms": row.step.graph_ms,
            "gb_per_s": row.gb_per_s,
            "floor_ms": row.floor_ms,
            "floor_share": row.floor_share,
            "peak_mb": row.peak_mb,
        }
        for name, (forward, step) in row.ratios.items():
            key = name.replace(" ", "_")
            numbers |= {f"forward_ratio_{key}": forward, f"step_ratio_{key}": step}
        about = {"what": self.what, "dtype": self.dtype, "device": self.device, "case": row.case, self.label: row.name}
        return about | {"worst": row.worst, **{k: _plain(v) for k, v in numbers.items()}, "note": row.note}


def _ratio(other: Times, own: Times) -> float:
    ratio = other.graph_ms / own.graph_ms
    return other.eager_ms / own.eager_ms if math.isnan(ratio) else ratio


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _number(value: float) -> str:
    """Three digits that count: 1,234 or 12.3 or 1.23 or 0.123."""
    if math.isnan(value):
        return "-"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def _times(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{_number(value) if value >= 10 else f'{value:.2f}' if value >= 0.1 else f'{value:.2g}'}x"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def _pair(first: float, second: float, form: Callable[[float], str] = _number) -> str:
    return "-" if math.isnan(first) and math.isnan(second) else f"{form(first)} / {form(second):>5}"


def _error(row: Row) -> str:
    return f"{row.error:.1e} ({row.worst})" if row.worst else "-"
