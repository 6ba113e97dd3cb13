"""Intervals against the same arithmetic on sets of bases."""

import random
from itertools import pairwise

import numpy as np
import pytest

from mambaverse.tasks.dna.genome.intervals import Intervals, split_by_chromosome, windows
from mambaverse.tasks.dna.genome.regions import Region
from tests.tasks.dna.conftest import fails


def some(draw: random.Random, names: str = "ab") -> list[Region]:
    regions = []
    for _ in range(draw.randint(0, 12)):
        start = draw.randint(0, 40)
        regions.append(Region(draw.choice(names), start, start + draw.choice([0, 1, 3, 8])))
    return regions


def bases(region: Region) -> set[tuple[str, int]]:
    return {(region.name, place) for place in range(region.start, region.end)}


@pytest.mark.parametrize("seed", range(40))
def test_overlaps_are_those_of_sets_of_bases(seed: int) -> None:
    draw = random.Random(seed)
    a, b = some(draw), some(draw, "bca")
    pairs = [(i, j) for i, x in enumerate(a) for j, y in enumerate(b) if bases(x) & bases(y)]
    one, two = Intervals.of(a), Intervals.of(b)
    assert sorted(map(tuple, one.join(two).tolist())) == pairs
    assert one.count_overlaps(two).tolist() == [sum(i == k for k, _ in pairs) for i in range(len(a))]
    assert list(one) == a


@pytest.mark.parametrize("seed", range(40))
def test_merged_intervals_cover_the_same_bases_and_lie_apart(seed: int) -> None:
    draw = random.Random(seed)
    regions = [region for region in some(draw) if len(region)]
    for gap in (0, 2):
        merged = list(Intervals.of(regions).merge(gap))
        assert set().union(*map(bases, regions), set()) <= set().union(*map(bases, merged), set())
        if gap == 0:
            assert sum(map(len, merged)) == len(set().union(*map(bases, regions), set()))
        for x, y in pairwise(merged):
            assert x.name != y.name or y.start > x.end + gap


def test_sorting_is_by_chromosome_start_and_end() -> None:
    regions = [Region("b", 5, 9), Region("a", 7, 8), Region("b", 5, 6), Region("b", 1, 2)]
    assert list(Intervals.of(regions).sort()) == [regions[3], regions[2], regions[0], regions[1]]


def test_a_million_intervals_are_joined_in_a_moment() -> None:
    draw = np.random.default_rng(0)
    start = draw.integers(0, 10**8, 10**6)
    many = Intervals(("chr1",), np.zeros(10**6, np.int64), start, start + 100)
    few = many.take(np.arange(1000))
    assert (few.join(many)[:, 0] == np.repeat(np.arange(1000), few.count_overlaps(many))).all()


@pytest.mark.parametrize(
    ("size", "window", "stride", "tail", "expected"),
    [
        (10, 4, None, "drop", [(0, 4), (4, 8)]),
        (10, 4, None, "short", [(0, 4), (4, 8), (8, 10)]),
        (10, 4, None, "shift", [(0, 4), (4, 8), (6, 10)]),
        (8, 4, None, "shift", [(0, 4), (4, 8)]),
        (8, 4, 2, "short", [(0, 4), (2, 6), (4, 8)]),
        (9, 4, 2, "short", [(0, 4), (2, 6), (4, 8), (6, 9)]),
        (3, 4, None, "drop", []),
        (3, 4, None, "shift", [(0, 3)]),
        (0, 4, None, "short", []),
    ],
)
def test_windows_tile_a_region(size: int, window: int, stride: int | None, tail: str, expected: list) -> None:
    found = windows(Region("a", 100, 100 + size), window, stride, tail)
    assert (found - 100).tolist() == [list(pair) for pair in expected] and found.dtype == np.int64
    if tail != "drop":
        assert set().union(*(range(a, b) for a, b in found.tolist()), set()) == set(range(100, 100 + size))


def test_windows_that_would_lose_bases_are_refused() -> None:
    region = Region("a", 0, 9)
    assert "window 4, stride 5: expected 1 <= stride <= window" in fails(lambda: windows(region, 4, 5))
    assert "window 0" in fails(lambda: windows(region, 0))
    assert "tail 'shfit': expected drop, short, shift, did you mean 'shift'?" in fails(
        lambda: windows(region, 4, tail="shfit")
    )


def test_whole_chromosomes_are_held_out() -> None:
    regions = [Region(name, 0, 5) for name in ("chr1", "chr8", "chr9", "chr1")]
    assert split_by_chromosome(regions, {"valid": ["chr8"], "test": ["chr9"]}) == {
        "train": [0, 3],
        "valid": [1],
        "test": [2],
    }
    assert "test: no region on chromosome 'chr10'" in fails(lambda: split_by_chromosome(regions, {"test": ["chr10"]}))
    assert "'chr8' is in valid and in test" in fails(
        lambda: split_by_chromosome(regions, {"valid": ["chr8"], "test": ["chr8"]})
    )
