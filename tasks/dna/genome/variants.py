"""A variant: some bases of the reference and what stands there instead; checked against a genome, and in normal form.

    normal form    no shorter alleles say the same (parsimonious), and no alleles further left do (left-aligned)

Two variants give the same sequence if and only if their normal forms are equal. An indel slides left as long as the
base before it is its last one: ...ACACAC, the last CA deleted = ...ACACAC, the first one deleted. At the start of a
chromosome, where no base is left to anchor an indel, the base behind it does, as the VCF specification says.

An ambiguous letter of the genome agrees with each base that it stands for, N with any (the specification has REF give
one base for it); N in REF agrees with ambiguous letters alone. Case does not count.

Source: Tan, Abecasis and Kang 2015, "Unified representation of genetic variants", Bioinformatics 31(13).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mambaverse.tasks.dna.genome.fasta import Genome
from mambaverse.tasks.dna.genome.skipped import RecordError

IUPAC = {"A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC"}
IUPAC |= {"B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT"}
SHOWN = 20  # letters of an allele in a message
CONTEXT = 64  # bases that are fetched at first to slide an indel over; twice as many each time


@dataclass(frozen=True)
class Variant:
    """One alternative allele.

    Attributes:
        name: Of the chromosome, as the genome calls it if there is one.
        start: First base of `ref`, from 0; the POS of VCF is `pos`.
        ref: Letters of the reference.
        alt: What stands there instead.
        chrom, id, qual, filter, info: As the file has them.
        allele: Which of its record's alternatives this is, from 1.
        where: File, line and place, for messages.
    """

    name: str
    start: int
    ref: str
    alt: str
    chrom: str = ""
    id: str = "."
    qual: str = "."
    filter: str = "."
    info: str = "."
    allele: int = 1
    where: str = "variant"

    @property
    def pos(self) -> int:
        """Place of the first base of `ref`, from 1."""
        return self.start + 1

    @property
    def end(self) -> int:
        """Behind the last base of `ref`, from 0."""
        return self.start + len(self.ref)

    @property
    def is_snv(self) -> bool:
        """Whether one base stands for one other."""
        return len(self.ref) == len(self.alt) == 1

    def __str__(self) -> str:
        return f"{self.name}:{self.pos}:{_shown(self.ref)}>{_shown(self.alt)}"


def check_reference(variant: Variant, genome: Genome) -> None:
    """Raise RecordError unless the genome has `variant.ref` at its place.

    Raises:
        RecordError: a place past the chromosome's end, or other letters there.
    """
    length = genome.lengths[genome.resolve(variant.name)]
    if variant.end > length:
        reason = f"position {variant.end:,} is past the end of {variant.name}, which has {length:,} bases"
        raise RecordError(
            "positions past the end", variant.where, f"{reason} in {genome.path}; is it the right genome?"
        )
    there = genome.fetch(variant.name, variant.start, variant.end).decode("latin-1").upper()
    ref = variant.ref.upper()
    if there != ref and not all(map(_agree, there, ref)):
        remedy = "; is it the right genome, and are positions counted from 1?"
        reason = f"REF is {_shown(ref)}, {genome.path} has {_shown(there)} at {variant.name}:{variant.pos:,}{remedy}"
        raise RecordError("REF mismatches", variant.where, reason)


def normalise(variant: Variant, genome: Genome) -> Variant:
    """Return the normal form of a variant, alleles in upper case.

    Raises:
        RecordError: what `check_reference` raises; alleles that are equal, or that delete the whole chromosome.
    """
    check_reference(variant, genome)
    ref, alt, start = variant.ref.upper(), variant.alt.upper(), variant.start
    if ref == alt:
        raise RecordError("bad records", variant.where, f"ALT {_shown(alt)} is REF: no variant")
    tail = _common(ref[::-1], alt[::-1])
    ref, alt = ref[: len(ref) - tail], alt[: len(alt) - tail]
    head = min(_common(ref, alt), max(min(len(ref), len(alt)) - 1, 0))
    ref, alt, start = ref[head:], alt[head:], start + head
    if not ref or not alt:  # an indel alone: it slides, and needs a base to hold it
        start, moved = _slide(ref or alt, start, variant.name, genome)
        ref, alt = (moved, "") if ref else ("", moved)
        if start > 0:
            start -= 1
            anchor = genome.fetch(variant.name, start, start + 1).decode("latin-1").upper()
            ref, alt = anchor + ref, anchor + alt
        else:
            anchor = genome[variant.name][len(ref) : len(ref) + 1].decode("latin-1").upper()
            if not anchor:
                raise RecordError("bad records", variant.where, f"it deletes all of {variant.name}")
            ref, alt = ref + anchor, alt + anchor
    return replace(variant, start=start, ref=ref, alt=alt)


def _slide(letters: str, start: int, name: str, genome: Genome) -> tuple[int, str]:
    """Move inserted or deleted letters to the left as far as they say the same; return their start and the letters.

    One step left is possible if the base before equals the last letter, which then becomes the first. So the base at a
    distance d before `start` decides on step d against the letter that lies one period, len(letters), to its right.
    """
    period, steps, size = len(letters), 0, CONTEXT
    line = letters  # the genome before `start`, as far as it is fetched, and the letters
    while steps < start:
        known = len(line) - period
        if steps == known:
            first = max(start - known - size, 0)
            line = genome.fetch(name, first, start - known).decode("latin-1").upper() + line
            known, size = start - first, 2 * size
        at = known - steps - 1
        if line[at] != line[at + period]:
            break
        steps += 1
    known = len(line) - period
    return start - steps, line[known - steps : known - steps + period]


def _common(a: str, b: str) -> int:
    """Return how many letters both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _agree(there: str, ref: str) -> bool:
    bases = IUPAC.get(there, there)
    return there == ref or ref in bases or (ref == "N" and len(bases) > 1)


def _shown(letters: str) -> str:
    return letters if len(letters) <= SHOWN else f"{letters[:SHOWN]}... ({len(letters):,} bases)"
