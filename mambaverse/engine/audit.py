"""What of an evaluation was seen in training: the leaks that a task finds between its sets, as a line, a table, a file.

A task says what it looks for (`Task.audit`); here is how that is counted, printed and written down.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table

from mambaverse.config import RunConfig
from mambaverse.engine.files import output_path, write_atomic
from mambaverse.engine.folder import make_task
from mambaverse.engine.progress import Screen, format_seconds

COLUMNS = ("set", "finding", "name", "label", "other", "other_label", "similarity")


@dataclass(frozen=True)
class Leak:
    """How many samples of a set one finding concerns: `items` of `total`."""

    set: str  # "train", "eval" or "test"
    finding: str  # such as "exact copies"
    items: int
    total: int

    @property
    def share(self) -> float:
        """Return items / total; 0 for an empty set."""
        return self.items / self.total if self.total else 0.0


@dataclass(frozen=True)
class Pair:
    """A sample and a training sample that it should not resemble."""

    set: str
    finding: str
    name: str
    label: str
    other: str
    other_label: str
    similarity: float  # 1: the same; what it is of is the finding's


@dataclass
class Audit:
    """All findings, those without items too; `notes` say what could not be compared, and how it was done."""

    leaks: list[Leak] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return the findings in one line: "test: 43 exact copies (0.7 %); train: none"."""
        parts = []
        for name in dict.fromkeys(leak.set for leak in self.leaks):
            found = [
                f"{leak.items:,} {leak.finding} ({leak.share:.1%})"
                for leak in self.leaks
                if leak.set == name and leak.items
            ]
            parts.append(f"{name}: {', '.join(found) or 'none'}")
        return "; ".join([*parts, *self.notes])


def audit_table(audit: Audit) -> Table:
    """Return a row for each finding."""
    table = Table("set", "finding", "samples", "of", "share")
    for column in table.columns[2:]:
        column.justify = "right"
    for leak in audit.leaks:
        table.add_row(leak.set, leak.finding, f"{leak.items:,}", f"{leak.total:,}", f"{leak.share:.2%}")
    return table


def pairs_csv(pairs: Sequence[Pair]) -> str:
    """Return the pairs as CSV text, one a line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for pair in pairs:
        cells = (pair.set, pair.finding, pair.name, pair.label, pair.other, pair.other_label)
        writer.writerow((*cells, f"{pair.similarity:.4f}"))
    return text.getvalue()


def audit_config(
    config: RunConfig, *, similarity: float | None = None, output: Path | None = None, console: Console | None = None
) -> Audit:
    """Open the data of `config`, and print what is in its evaluation sets that training saw.

    Args:
        config: The run.
        similarity: From which on samples are near neighbours, 0 to 1; None: the task's own.
        output: A CSV file for the pairs.
        console: Where to print; None: stdout.

    Raises:
        UserError: a task that has no audit; a file that cannot be written.
    """
    console = console or Screen()
    output_path("--output", output, (".csv",), [Path(config.data.root)] if config.data.root else ())
    task = make_task(config)
    task.can_audit()
    task.setup()
    start = perf_counter()
    audit = task.audit(similarity)
    seconds = perf_counter() - start
    console.print(audit_table(audit))
    for note in audit.notes:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(f"audited in {format_seconds(seconds)}", highlight=False)
    if output is not None:
        write_atomic(output, pairs_csv(audit.pairs))
        console.print(f"{output}: {len(audit.pairs):,} pairs", highlight=False, soft_wrap=True)
    return audit
