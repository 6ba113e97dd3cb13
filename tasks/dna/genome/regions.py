"""Places on a genome: regions as people write them, and the several names that one chromosome has.

    text    chr1:1,001-2,000(-)     1-based, both ends inside
    ours    chr1, 1000, 2000, "-"   0-based, half-open: the same 1,000 bases, read on the other strand

`chr1:1000` is that one base, as in genome browsers; samtools reads it as "from there to the end", which is written
`chr1:1000-` here. Known without a table: chr1 = 1, and chrM = MT = M = chrMT. (UCSC's hg19 is the trap: its chrM is
another sequence than MT of GRCh37; a check of REF finds it.) Further names, such as RefSeq's, come from a table of the
form of UCSC's chromAlias.txt: tab-separated, the names of one chromosome in a row; or alias, chromosome, source.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.files import check_file, read_lines

STRANDS = ("+", "-")
MITOCHONDRIA = ("chrM", "MT", "M", "chrMT")
SOURCES = {"ucsc", "assembly", "genbank", "refseq", "ensembl", "ncbi", "insdc", "gencode"}  # third column, old tables
_STRAND = re.compile(r"(?:\(([+-])\)|:([+-]))$")
_SPAN = re.compile(r"([0-9][0-9,]{0,99})(?:(-)([0-9][0-9,]{0,99})?)?")  # int() refuses numbers of thousands of digits


@dataclass(frozen=True, order=True)
class Region:
    """A stretch of a chromosome, 0-based and half-open.

    Attributes:
        name: Of the chromosome.
        start: First base.
        end: Behind the last base; equal to `start` in an empty region, such as a place between two bases.
        strand: "+", or "-" to be read on the other strand.
    """

    name: str
    start: int
    end: int
    strand: str = "+"

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise UserError(f"region {self.name}: start {self.start:,}, end {self.end:,}; expected 0 <= start <= end")
        if self.strand not in STRANDS:
            raise UserError(f"region {self.name}: strand {self.strand!r}; expected '+' or '-'")

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.name}:{self.start + 1:,}-{self.end:,}" + ("(-)" if self.strand == "-" else "")


def parse_region(text: str, lengths: Mapping[str, int] | None = None) -> Region:
    """Read a region such as chr1:1,000-2,000, chr1:1000, chr1:1000-, chr1; (-) or :- behind it: the other strand.

    Args:
        text: What a person wrote.
        lengths: Bases of each chromosome. What has no end needs it; the names are then checked, and the end.

    Raises:
        UserError: not of that form, an unknown chromosome, a start behind the end or an end behind the chromosome's.
    """
    given, strand = text.strip(), "+"
    if (found := _STRAND.search(given)) and given not in (lengths or ()):  # a name may end in what looks like a strand
        given, strand = given[: found.start()], found[1] or found[2]
    name, colon, span = given.rpartition(":")
    whole = not colon or (lengths is not None and given in lengths)  # names such as HLA:00001 hold colons
    if whole:
        name, span = given, "1-"
    if not name:
        raise UserError(f"region {text!r}: no chromosome; expected a form such as chr1:1,000-2,000")
    if lengths is not None and name not in lengths:
        raise UserError(f"region {text!r}: no chromosome {name!r}{suggest(name, lengths)}")
    found = _SPAN.fullmatch(span)
    if found is None:
        raise UserError(f"region {text!r}: no positions in {span!r}; expected a form such as {name}:1,000-2,000")
    first = int(found[1].replace(",", ""))
    if found[3]:
        last = int(found[3].replace(",", ""))
    elif not found[2]:
        last = first
    elif lengths is None:
        raise UserError(f"region {text!r}: has no end, and the chromosome's is not known; expected {name}:FIRST-LAST")
    else:
        last = lengths[name]
    if first < 1:
        raise UserError(f"region {text!r}: position 0; positions count from 1")
    if lengths is not None and max(first, last) > lengths[name]:
        past = max(first, last)
        raise UserError(
            f"region {text!r}: position {past:,} is past the end of {name}, which has {lengths[name]:,} bases"
        )
    if first > last:
        raise UserError(
            f"region {text!r}: starts at {first:,}, behind its end at {last:,}; expected {name}:{last}-{first}"
        )
    return Region(name, first - 1, last, strand)


class Aliases:
    """Which names mean the same chromosome.

    Args:
        groups: Names that belong together, chromosome by chromosome; groups that share a name are one.
    """

    def __init__(self, groups: Iterable[Collection[str]] = ()) -> None:
        self._group: dict[str, set[str]] = {}
        for names in groups:
            merged: set[str] = set(names)
            for name in names:
                merged |= self._group.get(name, set())
            for name in merged:
                self._group[name] = merged

    @classmethod
    def read(cls, path: Path) -> Aliases:
        """Read a table of the form of UCSC's chromAlias.txt, plain or compressed.

        Raises:
            UserError: no such file, damaged, or a row of one name only.
        """
        check_file(path, "a table of chromosome names such as chromAlias.txt")
        rows = []
        for number, raw in enumerate(read_lines(path), 1):
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if line.startswith("#") or not line.strip():
                continue
            cells = [cell.strip() for cell in line.split("\t")]
            if len(cells) < 2:
                raise UserError(f"{path}, line {number:,}: one name, {cells[0]!r}; expected two or more, between tabs")
            rows.append(cells)
        sources = all(len(row) == 3 and set(row[2].lower().split(",")) <= SOURCES for row in rows)
        return cls([name for name in (row[:2] if sources else row) if name] for row in rows)

    def of(self, name: str) -> list[str]:
        """Return the other names of a chromosome, those of the table first."""
        found = [name, *sorted(self._group.get(name, set()) - {name})]
        for known in tuple(found):
            if known in MITOCHONDRIA:
                found += MITOCHONDRIA
            found.append(known.removeprefix("chr") if known.startswith("chr") else f"chr{known}")
        return [other for other in dict.fromkeys(found) if other and other != name]


def resolve(name: str, known: Collection[str], aliases: Aliases, where: str) -> str:
    """Return the name that a chromosome has among `known`: its own, or one of its others.

    Raises:
        UserError: none of them is known, or the table gives it several that are.
    """
    if name in known:
        return name
    found = [other for other in aliases.of(name) if other in known]
    if not found:
        remedy = "; a table such as chromAlias.txt, given as aliases, tells which names mean the same"
        raise UserError(f"{where}: no record {name!r}{suggest(name, known)}{remedy}")
    if len(found) > 1:
        raise UserError(f"{where}: {name!r} could be {' or '.join(map(repr, found))}; name the one that is meant")
    return found[0]
