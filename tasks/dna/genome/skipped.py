"""What a bulk job left out: counted by kind, and written down row by row as it happens, in constant memory.

    kind <tab> where <tab> reason        e.g.  REF mismatches   x.vcf, line 17, chr1:1001   REF is A, ... has G

`--on-error raise` stops at the first input that cannot be used; `--on-error skip` goes on and leaves this account.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from mambaverse.engine.files import saving
from mambaverse.errors import UserError, suggest, warn

ON_ERROR = ("raise", "skip")
HEADER = "kind\twhere\treason\n"


class RecordError(UserError):
    """One record of a file cannot be used; the others can.

    Attributes:
        kind: What is wrong, in the plural: "REF mismatches".
        where: File, line and place.
        reason: What is wrong with this one.
    """

    def __init__(self, kind: str, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.kind, self.where, self.reason = kind, where, reason


class Skipped:
    """A counted account of what was skipped.

    Args:
        path: The table that gets a row for each, if any; it is made when the first one is skipped, so that a job that
            skips nothing leaves no file.

    Attributes:
        counts: How many were skipped, by kind.
        first: (where, reason) of the first of each kind.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first: dict[str, tuple[str, str]] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> Skipped:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __bool__(self) -> bool:
        return bool(self.counts)

    @property
    def total(self) -> int:
        """How many were skipped, of all kinds."""
        return self.counts.total()

    def add(self, kind: str, where: str, reason: str) -> None:
        """Count one.

        Raises:
            SaveError: the table cannot be written.
        """
        self.counts[kind] += 1
        self.first.setdefault(kind, (where, reason))
        if self.path is None:
            return
        with saving(self.path):
            if self._file is None:
                self._file = self.path.open("w", encoding="utf-8")
                self._file.write(HEADER)
            self._file.write("\t".join(" ".join(cell.split()) for cell in (kind, where, reason)) + "\n")

    def close(self) -> None:
        """Finish the table."""
        if self._file is not None:
            with saving(self.path or Path()):
                self._file.close()
            self._file = None

    def summary(self) -> str:
        """Return "skipped 3: symbolic alleles 2 (first: x.vcf, line 17: ALT <DEL>), ...", by how many."""
        if not self:
            return "skipped none"
        parts = []
        for kind, count in self.counts.most_common():
            where, reason = self.first[kind]
            parts.append(f"{kind} {count:,} (first: {where}: {reason})")
        written = f"; all are in {self.path}" if self.path else ""
        return f"skipped {self.total:,}: {', '.join(parts)}{written}"


@contextmanager
def report(account: Skipped | None) -> Iterator[Skipped]:
    """Give a reader its account: the caller's, or one of its own that is a warning at the end, so nothing is silent."""
    own = Skipped()
    yield own if account is None else account
    if own:
        warn(own.summary())


def check_on_error(value: str) -> bool:
    """Return whether `on_error` says to skip.

    Raises:
        UserError: it is neither "raise" nor "skip".
    """
    if value not in ON_ERROR:
        raise UserError(f"on_error {value!r}: expected raise or skip{suggest(value, ON_ERROR)}")
    return value == "skip"
