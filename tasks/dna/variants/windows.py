"""The windows of a variant: the reference around it, and the same number of bases with the other allele put in.

    reference      [start, start + W),   W bases; start on a grid of W / 8, so that neighbours share their window
    alternative    the bases before the variant, ALT, and the bases behind it, up to W bases

An indel brings in other bases at the right end, or loses some there, so both windows have W bases, and what is summed
over them has the same number of terms. At a chromosome's ends windows are moved inwards, never padded; windows that
reach its right end both end there, and it is the left that gains or loses bases; the right loses those that the left
does not have. A chromosome of fewer than W bases is read from end to end, as far as both alleles have bases.

Each base keeps the number of its place on the chromosome (`places`), inserted ones continue from the left: which bases
are masked together (see scores.py) is then the same in both windows, but for the allele.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.genome.skipped import RecordError
from mambaverse.tasks.dna.genome.variants import Variant
from mambaverse.tasks.dna.tokens import N, encode, is_base

GRID = 8  # windows start at multiples of W / GRID; a variant is at most W / 16 off the middle
N_RICH = 0.005  # share of N from which on a window is flagged, that of Caduceus' benchmark of variants
Window = tuple[str, int, int]  # chromosome, start, bases


@dataclass(frozen=True)
class Allele:
    """One allele in its window.

    Attributes:
        ids: Of the window, uint8 (W,).
        places: Of its bases on the chromosome, int64 (W,).
        start: First base of the allele in the window.
        end: Behind it.
    """

    ids: np.ndarray
    places: np.ndarray
    start: int
    end: int


@dataclass(frozen=True)
class Pair:
    """Both alleles of a variant, in windows of one size.

    Attributes:
        variant: The variant.
        window: Where the reference's window is.
        ref: The reference.
        alt: The alternative.
        n_share: Of N in the reference's window.
        flags: What to know of the windows: "n_rich", "edge" (moved inwards), "short" (fewer bases than asked for).
    """

    variant: Variant
    window: Window
    ref: Allele
    alt: Allele
    n_share: float
    flags: tuple[str, ...]

    @property
    def is_substitution(self) -> bool:
        """Whether as many bases stand for as many others."""
        return len(self.variant.ref) == len(self.variant.alt)


def place(variant: Variant, genome: Genome, size: int) -> Pair:
    """Return the windows of a variant whose REF was checked.

    Args:
        variant: The variant.
        genome: Its genome.
        size: W, bases of a window.

    Raises:
        RecordError: an allele with a letter other than A, C, G, T, also where the genome alone has it, or one that is
            longer than a quarter of the window.
    """
    letters = variant.ref + variant.alt
    if not set(letters.upper()) <= set("ACGT"):
        raise RecordError("alleles with N", variant.where, f"{variant}: no probability without a letter")
    length, growth = genome.lengths[variant.name], len(variant.alt) - len(variant.ref)
    count = min(size, length, length + growth)
    if (longest := max(len(variant.ref), len(variant.alt))) > count // 4:
        reason = f"{variant}: an allele of {longest:,} bases, in a window of {count:,}; expected at most a quarter"
        raise RecordError("alleles too long", variant.where, reason)
    grid = max(size // GRID, 1)
    wanted = (variant.start + len(variant.ref) // 2 - count // 2 + grid // 2) // grid * grid
    start = min(max(wanted, 0), length - count)
    if variant.end > start + count:  # a deletion at the end of a chromosome that is much shorter than the grid's steps
        start = length - count
    ref_ids = genome.ids(variant.name, start, start + count)
    offset = variant.start - start
    if not is_base(ref_ids[offset : offset + len(variant.ref)]).all():
        letters = genome.fetch(variant.name, variant.start, variant.end).decode("latin-1")
        found = next(letter for letter in letters if letter not in "ACGTacgt")
        reason = f"{variant}: the genome has {found!r} there; no probability without a letter"
        raise RecordError("alleles with N", variant.where, reason)
    ref = Allele(ref_ids, np.arange(start, start + count), offset, offset + len(variant.ref))
    share = float((ref_ids == N).mean())
    flagged = {"n_rich": share > N_RICH, "edge": start != wanted, "short": count < size}
    flags = tuple(name for name, holds in flagged.items() if holds)
    alt = _alternative(variant, genome, ref, start + count == length)
    return Pair(variant, (variant.name, start, count), ref, alt, share, flags)


def _alternative(variant: Variant, genome: Genome, ref: Allele, at_end: bool) -> Allele:
    """Return the other allele in as many bases as `ref` has, which may be the chromosome's last ones, `at_end`."""
    count, alt = len(ref.ids), encode(variant.alt, where=variant.where)
    if len(variant.alt) == len(variant.ref):
        ids = np.concatenate([ref.ids[: ref.start], alt, ref.ids[ref.end :]])
        return Allele(ids, ref.places, ref.start, ref.end)
    available = genome.lengths[variant.name] - variant.end
    before = 0 if at_end else ref.start  # bases of the left that are kept; at the end those that there is room for
    behind = min(count - before - len(alt), available)
    first = variant.start + len(alt) + behind - count
    left = genome.ids(variant.name, first, variant.start)
    right = genome.ids(variant.name, variant.end, variant.end + behind)
    places = [np.arange(first, variant.start + len(alt)), np.arange(variant.end, variant.end + behind)]
    begin = len(left)
    return Allele(np.concatenate([left, alt, right]), np.concatenate(places), begin, begin + len(alt))
