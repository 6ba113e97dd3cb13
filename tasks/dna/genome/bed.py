"""BED: intervals of a genome as text, 3 to 12 columns between tabs, 0-based and half-open.

    chrom <tab> start <tab> end [<tab> name, score, strand, thickStart, thickEnd, itemRgb, blockCount, sizes, starts]

Lines that begin with `#`, or with the word `track` or `browser`, are headers. Columns beyond the third are kept as they
are written. In the files of splits that Caduceus and Enformer train on, the fourth is the split: train, valid, test.

Source: the BED format specification of GA4GH (samtools/hts-specs, BEDv1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.files import check_file, read_lines
from mambaverse.tasks.dna.genome.fasta import Genome
from mambaverse.tasks.dna.genome.regions import Region
from mambaverse.tasks.dna.genome.skipped import Skipped, check_on_error, report

MOST_COLUMNS = 12
HEADER = re.compile(rb"#|(track|browser)(\s|$)")  # a chromosome may be called track1


@dataclass(frozen=True)
class BedRow:
    """One line of a BED file.

    Attributes:
        region: Where it is, on the strand of column 6, + where that is "." or not there. Its chromosome has the name of
            the genome, if one was given.
        columns: Columns 4 and on, as written.
        where: File and line, for messages.
    """

    region: Region
    columns: tuple[str, ...]
    where: str

    @property
    def label(self) -> str:
        """Column 4, the name (in files of splits: the split); empty if it is not there."""
        return self.columns[0] if self.columns else ""

    def blocks(self) -> list[Region]:
        """Return the blocks of columns 10 to 12 (exons), ascending; the whole row where there are none.

        Raises:
            UserError: they are no numbers, as many as column 10 says, ascending and apart, from start to end.
        """
        if len(self.columns) < MOST_COLUMNS - 3:
            return [self.region]
        whole = self.region
        try:
            count = int(self.columns[6])
            sizes, starts = ([int(n) for n in text.rstrip(",").split(",")] for text in self.columns[7:9])
        except ValueError:
            raise UserError(f"{self.where}: blocks {self.columns[6:9]}: expected numbers between commas") from None
        if len(sizes) != count or len(starts) != count:
            raise UserError(f"{self.where}: {len(sizes)} block sizes and {len(starts)} starts; column 10 says {count}")
        places = [whole.start + start for start in starts]
        ends = [place + size for place, size in zip(places, sizes, strict=True)]
        apart = all(end <= place for end, place in zip(ends, places[1:], strict=False))
        if places[0] != whole.start or ends[-1] != whole.end or not apart or min(sizes) < 0:
            raise UserError(f"{self.where}: blocks do not go up from the row's start to its end without overlap")
        return [Region(whole.name, a, b, whole.strand) for a, b in zip(places, ends, strict=True)]


def read_bed(
    path: Path,
    *,
    genome: Genome | None = None,
    in_order: bool = False,
    on_error: str = "raise",
    skipped: Skipped | None = None,
) -> Iterator[BedRow]:
    """Yield the rows of a BED file, one at a time, plain or compressed (.gz, .xz, .bz2).

    Args:
        path: The file.
        genome: Checks the chromosomes and ends, and gives the chromosomes its names.
        in_order: Demand rows sorted by start, each chromosome in one piece.
        on_error: "raise", or "skip" to count a row that cannot be used in `skipped` and go on.
        skipped: The account of these; without it, a warning at the end.

    Raises:
        UserError: no such file, a damaged one, no rows; with "raise" a row that cannot be used: file, line and why.
    """
    skip = check_on_error(on_error)
    check_file(path, "a BED file")
    with report(skipped) as account:
        columns = rows = 0
        order = Order() if in_order else None
        for number, raw in enumerate(read_lines(path), 1):
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if not line.strip() or HEADER.match(raw):
                continue
            rows += 1
            where = f"{path}, line {number:,}"
            try:
                cells = line.split("\t") if "\t" in line else line.split()
                columns = columns or len(cells)
                row = _row(cells, columns, where, genome)
                if order is not None:
                    order.check(row.region.name, row.region.start, where)
            except UserError as error:
                if not skip:
                    raise
                account.add("bad rows", where, str(error).removeprefix(f"{where}: "))
                continue
            yield row
        if not rows:
            raise UserError(f"{path}: holds no rows; expected chromosome, start and end between tabs")


def read_splits(path: Path, *, genome: Genome | None = None) -> dict[str, list[Region]]:
    """Return the regions of each split that column 4 names, in the file's order: {"train": [...], "valid": [...]}.

    Raises:
        UserError: what `read_bed` raises; a row without a fourth column.
    """
    splits: dict[str, list[Region]] = {}
    for row in read_bed(path, genome=genome):
        if not row.label:
            raise UserError(f"{row.where}: no column 4; expected the split, such as train, valid or test")
        splits.setdefault(row.label, []).append(row.region)
    return splits


def split_named(splits: dict[str, list[Region]], name: str, where: str) -> list[Region]:
    """Return the regions of one split; "valid" finds "validation", "val" and "dev" too.

    Raises:
        UserError: no such split.
    """
    same = {"valid", "validation", "val", "dev", "eval"}
    for other in (name, *(sorted(same) if name in same else ())):
        if other in splits:
            return splits[other]
    raise UserError(f"{where}: no split {name!r} in column 4{suggest(name, splits)}")


class Order:
    """Checks that rows come sorted: each chromosome in one piece, its starts ascending."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._name, self._start = "", 0

    def check(self, name: str, start: int, where: str) -> None:
        """Raise UserError if a row at `start` of chromosome `name` may not follow the one before."""
        if name != self._name:
            if name in self._seen:
                raise UserError(f"{where}: not sorted: {name} was there before {self._name}; {SORT}")
            self._seen.add(name)
        elif start < self._start:
            raise UserError(f"{where}: not sorted: {name}:{start + 1:,} behind {name}:{self._start + 1:,}; {SORT}")
        self._name, self._start = name, start


SORT = "sort the file: sort -k1,1 -k2,2n FILE (a BED file), bcftools sort FILE (a VCF file)"


def _row(cells: list[str], columns: int, where: str, genome: Genome | None) -> BedRow:
    if len(cells) < 3 or len(cells) != columns:
        expected = f"{columns}, as in the rows above" if columns >= 3 else "chromosome, start and end between tabs"
        raise UserError(f"{where}: {len(cells)} columns; expected {expected}: a line that was cut short?")
    if columns > MOST_COLUMNS:
        raise UserError(f"{where}: {columns} columns; BED has at most {MOST_COLUMNS}")
    name, *span = cells[:3]
    try:
        start, end = (int(cell) if cell.isascii() and cell.isdigit() else int("") for cell in span)
    except ValueError:
        raise UserError(f"{where}: start {span[0]!r}, end {span[1]!r}: expected whole numbers from 0") from None
    if start > end:
        raise UserError(f"{where}: start {start:,} behind end {end:,}; expected start <= end, counted from 0")
    strand = cells[5] if columns >= 6 else "."
    if strand not in ("+", "-", "."):
        raise UserError(f"{where}: strand {strand!r} in column 6; expected +, - or .")
    if genome is not None:
        try:
            name = genome.resolve(name)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if end > (length := genome.lengths[name]):
            raise UserError(
                f"{where}: end {end:,} is past the end of {name}, which has {length:,} bases in {genome.path}"
            )
    return BedRow(Region(name, start, end, "-" if strand == "-" else "+"), tuple(cells[3:]), where)
