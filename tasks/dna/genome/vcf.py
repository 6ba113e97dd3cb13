"""VCF, one variant at a time, in constant memory: .vcf, .vcf.gz (BGZF or gzip), .xz.

    #CHROM <tab> POS <tab> ID <tab> REF <tab> ALT <tab> QUAL <tab> FILTER <tab> INFO [<tab> FORMAT and samples]

POS counts from 1; an indel has the base before it as anchor. A record with several alternatives becomes as many
variants. What has no letters is left out, with a count: `*` (a deletion upstream), symbolic alleles (<DEL>), breakends
(G]17:198]), and `.` (no alternative). Samples are not read.

Source: the VCF specification 4.5 (samtools/hts-specs).
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from mambaverse.errors import UserError
from mambaverse.tasks.dna.files import LOST, check_file, read_lines
from mambaverse.tasks.dna.genome.bed import Order
from mambaverse.tasks.dna.genome.fasta import Genome
from mambaverse.tasks.dna.genome.skipped import RecordError, Skipped, check_on_error, report
from mambaverse.tasks.dna.genome.variants import IUPAC, Variant, check_reference

COLUMNS = ("#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO")
ALLELES = set("ACGTN")
AMBIGUOUS = set(IUPAC)
BCF = "BCF, the binary form; expected VCF: bcftools view -O z -o NEW.vcf.gz OLD.bcf"


def read_vcf(
    path: Path,
    *,
    genome: Genome | None = None,
    in_order: bool = False,
    on_error: str = "raise",
    skipped: Skipped | None = None,
) -> Iterator[Variant]:
    """Yield the variants of a VCF file, one for each alternative allele.

    Args:
        path: The file.
        genome: Checks chromosomes, positions and REF, and gives the chromosomes its names.
        in_order: Demand records sorted by position, each chromosome in one piece.
        on_error: "raise", or "skip" to count a record or an allele that cannot be used in `skipped` and go on.
        skipped: The account of these, and of the alleles without letters; without it, a warning at the end.

    Raises:
        UserError: no such file, a damaged one or one cut short, BCF, no header.
        RecordError: with "raise", a record that cannot be used: file, line, place and why.
    """
    skip = check_on_error(on_error)
    check_file(path, "a VCF file")
    if path.suffix.lower() == ".bcf":  # within BGZF
        raise UserError(f"{path}: {BCF}")
    order = Order() if in_order else None
    width = 0
    with report(skipped) as account:
        for number, raw in enumerate(read_lines(path), 1):
            if raw.startswith(b"##") or not raw.strip():
                continue
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            where = f"{path}, line {number:,}"
            if not width:
                width = _header(line, raw, where)
                continue
            try:
                variants = _record(line.split("\t"), width, where, genome, order)
            except RecordError as error:
                if not skip:
                    raise
                account.add(error.kind, error.where, error.reason)
                continue
            for variant in variants:
                if kind := _without_letters(variant.alt):
                    account.add(kind, variant.where, f"ALT {variant.alt}")
                elif reason := _bad_allele(variant):
                    if not skip:
                        raise RecordError("bad records", variant.where, reason)
                    account.add("bad records", variant.where, reason)
                else:
                    yield variant
    if not width:
        raise UserError(f"{path}: no header; expected a line {' '.join(COLUMNS)}, between tabs, before the records")


def _header(line: str, raw: bytes, where: str) -> int:
    """Return the number of columns that the line #CHROM names."""
    if raw.startswith(b"BCF"):
        raise UserError(f"{where}: {BCF}")
    cells = line.split("\t")
    if cells[0] != COLUMNS[0]:
        raise UserError(f"{where}: no header before this record; expected a line {' '.join(COLUMNS)}, between tabs")
    if tuple(cells[:8]) != COLUMNS:
        missing = next(name for i, name in enumerate(COLUMNS) if cells[i : i + 1] != [name])
        raise UserError(f"{where}: no column {missing} where it should be; expected {' '.join(COLUMNS)}, between tabs")
    return len(cells)


def _record(cells: Sequence[str], width: int, where: str, genome: Genome | None, order: Order | None) -> list[Variant]:
    """Return the variants of a record, those without letters too."""
    if len(cells) != width:
        reason = f"{len(cells)} columns; the header has {width}: a line that was cut short, or spaces for tabs?"
        raise RecordError("bad records", where, reason)
    chrom, pos, identifier, ref, alts, qual, filters, info = cells[:8]
    place = f"{where}, {chrom}:{pos}"
    if not (pos.isascii() and pos.isdigit() and len(pos) < 100):  # int() refuses numbers of thousands of digits
        raise RecordError("bad records", where, f"POS {reprlib.repr(pos)}; expected a whole number, counted from 1")
    if LOST in chrom:
        raise RecordError("bad records", where, f"CHROM {chrom!r} is not UTF-8 text; save the file as UTF-8")
    position = int(pos)
    if not ref or not set(ref.upper()) <= AMBIGUOUS:
        raise RecordError("bad records", place, f"REF {ref!r}; expected letters such as A, C, G, T")
    letters = any(not _without_letters(alt) for alt in alts.split(","))
    if letters and position == 0:
        raise RecordError("bad records", place, "position 0; positions count from 1")
    name = chrom
    if genome is not None and letters:
        try:
            name = genome.resolve(chrom)
        except UserError as error:
            raise RecordError("unknown chromosomes", place, str(error)) from None
    if order is not None:
        try:
            order.check(name, position - 1, where)
        except UserError as error:
            raise RecordError("unsorted records", place, str(error).removeprefix(f"{where}: ")) from None
    start = position - 1
    variants = [
        Variant(name, start, ref, alt, chrom, identifier, qual, filters, info, number, place)
        for number, alt in enumerate(alts.split(","), 1)
    ]
    if genome is not None and letters:
        check_reference(variants[0], genome)
    return variants


def _bad_allele(variant: Variant) -> str:
    """Return what is wrong with an allele that has letters; "" if nothing is."""
    if not set(variant.alt.upper()) <= ALLELES:
        return f"ALT {variant.alt!r}; expected A, C, G, T or N"
    return f"ALT {variant.alt} is REF: no variant" if variant.alt.upper() == variant.ref.upper() else ""


def _without_letters(alt: str) -> str:
    """Return what kind of allele has no letters to put in; "" if it has."""
    if alt in (".", ""):
        return "records without ALT"
    if alt == "*" or alt == "<*>":
        return "alleles *"
    if alt.startswith("<"):
        return "symbolic alleles"
    return "breakends" if "[" in alt or "]" in alt or alt.startswith(".") or alt.endswith(".") else ""
