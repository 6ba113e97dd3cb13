"""GenBank files: the features of a record as regions, spliced and on their strand; biopython reads the file.

    CDS    complement(join(30..35,40..45))  ->  (39, 45, "-"), (29, 35, "-"): its parts, in the order of reading

So the sequence of a feature is its parts, each on its own strand, one behind the other; that holds for genes on either
strand, across the origin of a circle (join(55..60,1..4)), and for trans-splicing. Places are 0-based and half-open.

Source: the DDBJ/ENA/GenBank feature table definition, section 3.4 (locations).
"""

from __future__ import annotations

import io
import lzma
import warnings
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mambaverse.errors import UserError
from mambaverse.tasks.dna.files import check_file, open_binary
from mambaverse.tasks.dna.genome.regions import Region
from mambaverse.tasks.dna.genome.skipped import RecordError, Skipped, check_on_error, report
from mambaverse.tasks.dna.tokens import reverse_complement

NAMES = ("gene", "locus_tag", "standard_name", "label", "product")  # qualifiers that name a feature, the first wins
SHORT = ("Expected sequence length", "Premature end")  # biopython's warnings of a record that breaks off


class Fetches(Protocol):
    """What has sequences to be cut out of: a `Genome`, or the record itself."""

    def fetch(self, name: Region, /) -> bytes:
        """Return the letters of a region, on its strand."""


@dataclass(frozen=True)
class Feature:
    """A feature of a record.

    Attributes:
        type: gene, CDS, tRNA, ...
        name: Its gene, locus tag, label or product; empty if it has none.
        parts: Its stretches, in the order in which they are read.
        qualifiers: All that is said of it.
        joined: Whether the parts are one sequence; False where the record gives them by order(...).
        partial: Whether it goes on beyond an end that is given (`<5..20`).
        where: File, record and place, for messages.
    """

    type: str
    name: str
    parts: tuple[Region, ...]
    qualifiers: dict[str, list[str]] = field(repr=False)
    joined: bool
    partial: bool
    where: str

    @property
    def strand(self) -> str:
        """The strand of all parts, "." if they differ."""
        strands = {part.strand for part in self.parts}
        return strands.pop() if len(strands) == 1 else "."

    @property
    def span(self) -> Region:
        """From the first base to the last, introns included; + where the parts' strands differ."""
        start, end = min(part.start for part in self.parts), max(part.end for part in self.parts)
        return Region(self.parts[0].name, start, end, "-" if self.strand == "-" else "+")

    def extract(self, source: Fetches) -> bytes:
        """Return its letters, spliced, on its strand, from the record or a genome of the same sequence.

        Raises:
            UserError: what `source.fetch` raises; parts that are not one sequence.
        """
        if not self.joined:
            raise UserError(f"{self.where}: its parts are given by order(...), which does not say that they are joined")
        return b"".join(source.fetch(part) for part in self.parts)


@dataclass(frozen=True)
class Annotated:
    """A record of a GenBank file.

    Attributes:
        name: Accession and version, as in FASTA files of the same sequence.
        letters: The sequence; empty if the file has none.
        circular: Whether its ends meet.
        features: Those that were asked for, in the file's order.
        where: File and record, for messages.
    """

    name: str
    letters: bytes = field(repr=False)
    circular: bool
    features: list[Feature]
    where: str

    def fetch(self, region: Region) -> bytes:
        """Return the letters of a region, on its strand.

        Raises:
            UserError: a region that is not in the record, or a record without a sequence.
        """
        if not self.letters:
            raise UserError(
                f"{self.where}: holds no sequence (CONTIG alone?); get the full record, or open its FASTA file"
            )
        if region.name != self.name or region.end > len(self.letters):
            raise UserError(f"{self.where}: {region} is not in this record of {len(self.letters):,} bases")
        letters = self.letters[region.start : region.end]
        return reverse_complement(letters) if region.strand == "-" else letters


def read_genbank(
    path: Path,
    types: Collection[str] = ("gene",),
    *,
    on_error: str = "raise",
    skipped: Skipped | None = None,
) -> Iterator[Annotated]:
    """Yield the records of a GenBank file, plain or compressed, one at a time.

    Args:
        path: The file.
        types: Which features: "gene", "CDS", ...
        on_error: "raise", or "skip" to count a feature that cannot be used in `skipped` and go on.
        skipped: The account of these; without it, a warning at the end.

    Raises:
        UserError: no such file, no GenBank, a record that breaks off.
        RecordError: with "raise", a feature whose place cannot be read, or lies in another record.
    """
    skip = check_on_error(on_error)
    check_file(path, "a GenBank file")
    with report(skipped) as account:
        for record in _records(path):
            where = f"{path}, record {record.id!r}"
            features = []
            for feature in record.features:
                if feature.type not in types:
                    continue
                try:
                    features.append(_feature(feature, record.id, where))
                except RecordError as error:
                    if not skip:
                        raise
                    account.add(error.kind, error.where, error.reason)
            circular = record.annotations.get("topology") == "circular"
            yield Annotated(record.id, _letters(record), circular, features, where)


def _records(path: Path) -> Iterator[Any]:
    """Yield biopython's records; what it only warns of, a record that breaks off, is an error."""
    from Bio import BiopythonWarning, SeqIO

    count = 0
    with open_binary(path) as raw, io.TextIOWrapper(raw, encoding="utf-8", errors="replace") as file:
        parser = SeqIO.parse(file, "genbank")
        while True:
            last = f"after {count:,} records"
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", BiopythonWarning)
                try:
                    record = next(parser, None)
                except (ValueError, AttributeError, AssertionError) as error:
                    raise UserError(f"{path}: not readable as GenBank {last}: {_one_line(error)}") from None
                except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                    raise UserError(f"{path}: damaged {last}: {_one_line(error)}; get the file again") from None
            for warning in caught:
                if any(words in str(warning.message) for words in SHORT):
                    raise UserError(f"{path}: cut short {last}: {_one_line(warning.message)}; get the file again")
            if record is None:
                break
            count += 1
            yield record
    if not count:
        raise UserError(f"{path}: holds no GenBank records; expected a line LOCUS at the start of each")


def _feature(feature: Any, record: str, where: str) -> Feature:
    qualifiers = dict(feature.qualifiers)
    name = next((qualifiers[key][0] for key in NAMES if qualifiers.get(key)), "")
    place = f"{where}, {feature.type} {name}".rstrip()
    location = feature.location
    if location is None:
        raise RecordError(
            "unreadable places", place, "its place cannot be read; expected a form such as join(1..5,9..12)"
        )
    parts = []
    for part in location.parts:
        if part.ref is not None and part.ref != record:
            raise RecordError("places in other records", place, f"a part lies in record {part.ref!r}: {location}")
        try:
            parts.append(Region(record, int(part.start), int(part.end), "-" if part.strand == -1 else "+"))
        except (TypeError, ValueError):
            raise RecordError("unreadable places", place, f"{location}: no place in numbers") from None
    partial = any(type(end).__name__ != "ExactPosition" for p in location.parts for end in (p.start, p.end))
    joined = getattr(location, "operator", "join") == "join"
    return Feature(feature.type, name, tuple(parts), qualifiers, joined, partial, place)


def _letters(record: Any) -> bytes:
    from Bio.Seq import UndefinedSequenceError

    try:
        return bytes(record.seq)
    except UndefinedSequenceError:
        return b""


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
