"""Windows of variants: the same number of bases for both alleles, whatever the indel and wherever it is."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.genome.skipped import RecordError
from mambaverse.tasks.dna.genome.variants import Variant
from mambaverse.tasks.dna.tokens import decode
from mambaverse.tasks.dna.variants.windows import GRID, place

SIZE = 64


def variant(letters: str, start: int, ref: int, alt: str, name: str = "chr1") -> Variant:
    return Variant(name, start, letters[start : start + ref], alt)


@pytest.mark.parametrize("seed", range(40))
def test_both_windows_are_the_haplotypes_in_as_many_bases(genome: Genome, letters: str, seed: int) -> None:
    draw = random.Random(seed)
    size = draw.choice([SIZE, 61, 5000])  # a grid of 8, an odd one, longer than the chromosome
    start = draw.choice([0, 1, 5, 698, 699, draw.randrange(690)])
    ref = min(draw.randint(1, 9), 700 - start)
    pair = place(variant(letters, start, ref, "".join(draw.choices("ACGT", k=draw.randint(1, 9)))), genome, size)
    haplotype = letters[:start] + pair.variant.alt + letters[start + ref :]
    assert len(pair.ref.ids) == len(pair.alt.ids) <= size
    first = pair.window[1]
    assert decode(pair.ref.ids) == letters[first : first + len(pair.ref.ids)]
    assert decode(pair.ref.ids[pair.ref.start : pair.ref.end]) == pair.variant.ref
    assert decode(pair.alt.ids[pair.alt.start : pair.alt.end]) == pair.variant.alt
    at = start - pair.alt.start
    assert decode(pair.alt.ids) == haplotype[at : at + len(pair.alt.ids)]
    behind = slice(pair.alt.end, None)  # the numbers of the bases are those of the chromosome
    assert decode(pair.alt.ids[behind]) == "".join(letters[p] for p in pair.alt.places[behind])


@pytest.mark.parametrize("size", [1024, 400, 399, 100])  # longer than the chromosome, as long, shorter
def test_indels_anywhere_on_a_short_chromosome_have_windows(tmp_path: Path, letters: str, size: int) -> None:
    short = letters[:400]
    (tmp_path / "short.fa").write_text(f">chr3\n{short}\n")
    with Genome(tmp_path / "short.fa") as genome:
        for start, added, ref in product(range(395), (1, 3, 5, 20), (1, 5)):
            pair = place(variant(short, start, ref, short[start] + "G" * added, "chr3"), genome, size)
            count, alt, ends = pair.window[2], pair.variant.alt, start + ref
            haplotype = short[:start] + alt + short[ends:]
            if pair.window[1] + count == 400:  # the last bases, but those of the left alone make room
                first = min(len(haplotype) - count, start)
            else:
                first = min(pair.window[1], len(haplotype) - count)
            assert count == min(size, 400, len(haplotype))
            assert decode(pair.alt.ids) == haplotype[first : first + count]
            assert (pair.alt.start, pair.alt.end) == (start - first, start - first + len(alt))
            assert decode(pair.alt.ids[pair.alt.start : pair.alt.end]) == alt


@pytest.mark.parametrize("size", [1024, 100_000])  # chromosomes shorter than a step of the grid
def test_deletions_at_the_end_of_a_very_short_chromosome_lie_in_its_window(
    tmp_path: Path, letters: str, size: int
) -> None:
    short = letters[:100]
    (tmp_path / "short.fa").write_text(f">chr3\n{short}\n")
    with Genome(tmp_path / "short.fa") as genome:
        for start, ref in product(range(90), (2, 5, 10)):
            pair = place(variant(short, start, ref, short[start], "chr3"), genome, size)
            assert decode(pair.ref.ids[pair.ref.start : pair.ref.end]) == pair.variant.ref
            assert decode(pair.alt.ids) == short[: start + 1] + short[start + ref :]


def test_windows_away_from_the_ends_begin_together_and_hold_the_variant_in_the_middle(
    genome: Genome, letters: str
) -> None:
    for start in range(100, 600, 7):
        pair = place(variant(letters, start, 1, letters[start] + "GG"), genome, SIZE)
        assert pair.flags == () and start - pair.alt.start == pair.window[1]
        assert abs(pair.ref.start - SIZE // 2) <= SIZE // GRID // 2


def test_neighbours_share_their_window(genome: Genome, letters: str) -> None:
    windows = {place(variant(letters, start, 1, "A"), genome, SIZE).window for start in range(300, 316)}
    assert len(windows) == 2  # a grid of eight bases


def test_flags_say_what_the_window_is(genome: Genome, letters: str) -> None:
    assert place(variant(letters, 3, 1, "A"), genome, SIZE).flags == ("edge",)
    assert place(variant(letters, 697, 2, "A"), genome, SIZE).flags == ("edge",)
    assert "short" in place(Variant("tiny", 4, "A", "C"), genome, SIZE).flags


def test_soft_masked_letters_are_read_as_others_and_n_is_flagged(tmp_path: Path) -> None:
    (tmp_path / "n.fa").write_text(">c\n" + "acgtN" * 40 + "\n")
    with Genome(tmp_path / "n.fa") as genome:
        pair = place(Variant("c", 100, "A", "g"), genome, SIZE)
    assert pair.flags == ("n_rich",) and pair.n_share == pytest.approx(0.2, abs=0.02)
    assert np.flatnonzero(pair.ref.ids != pair.alt.ids).tolist() == [pair.ref.start]


@pytest.mark.parametrize("letter", "Nr")
def test_a_letter_that_only_the_genome_lacks_is_no_allele(tmp_path: Path, letter: str) -> None:
    (tmp_path / "n.fa").write_text(f">c\n{'ACGT' * 20}AC{letter}T{'ACGT' * 20}\n")
    with Genome(tmp_path / "n.fa") as genome:
        for start, ref, alt in ((82, "A", "C"), (81, "CGT", "C")):
            with pytest.raises(RecordError, match=f"the genome has '{letter}' there; no probability") as caught:
                place(Variant("c", start, ref, alt), genome, SIZE)
            assert caught.value.kind == "alleles with N"
        assert place(Variant("c", 81, "C", "G"), genome, SIZE).flags == ("n_rich",)  # beside it


def test_what_cannot_be_placed_says_why(genome: Genome, letters: str) -> None:
    with pytest.raises(RecordError, match="an allele of 17 bases, in a window of 64; expected at most a quarter"):
        place(variant(letters, 300, 17, "A"), genome, SIZE)
    with pytest.raises(RecordError, match="no probability without a letter"):
        place(variant(letters, 300, 1, "N"), genome, SIZE)
