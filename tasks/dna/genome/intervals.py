"""Arithmetic of intervals by binary search: merge, count and join overlaps, tile with windows, hold out chromosomes.

    a and b overlap    <=>    same chromosome, a.start < b.end and b.start < a.end
    overlaps of a      =      #{starts < a.end} - #{ends <= a.start}        two binary searches

All are 0-based and half-open; an empty interval overlaps nothing. Strands play no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.genome.regions import Region

TAILS = ("drop", "short", "shift")


@dataclass(frozen=True)
class Intervals:
    """Many intervals as arrays.

    Attributes:
        names: Chromosomes.
        chrom: Each interval's chromosome, as its place in `names`, int64 (N,).
        start: First base, int64 (N,).
        end: Behind the last base, int64 (N,).
    """

    names: tuple[str, ...]
    chrom: np.ndarray
    start: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, regions: Iterable[Region]) -> Intervals:
        """Return regions as arrays; chromosomes are numbered as they first come."""
        numbers: dict[str, int] = {}
        rows = [(numbers.setdefault(r.name, len(numbers)), r.start, r.end) for r in regions]
        table = np.array(rows, np.int64).reshape(-1, 3)
        return cls(tuple(numbers), table[:, 0], table[:, 1], table[:, 2])

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, number: int) -> Region:
        return Region(self.names[self.chrom[number]], int(self.start[number]), int(self.end[number]))

    def __iter__(self) -> Iterator[Region]:
        return (self[number] for number in range(len(self)))

    def take(self, places: np.ndarray) -> Intervals:
        """Return those at `places` (numbers, or a mask)."""
        return Intervals(self.names, self.chrom[places], self.start[places], self.end[places])

    def order(self) -> np.ndarray:
        """Return the places (N,) that sort by chromosome (as in `names`), start and end; equal ones keep theirs."""
        return np.lexsort((self.end, self.start, self.chrom))

    def sort(self) -> Intervals:
        """Return them sorted as `order` does."""
        return self.take(self.order())

    def merge(self, gap: int = 0) -> Intervals:
        """Return the stretches that they cover, sorted; those at most `gap` bases apart (0: that touch) become one."""
        ordered = self.sort()
        if not len(ordered):
            return ordered
        start, end = _on_one_line(ordered, gap)
        reach = np.maximum.accumulate(end)  # chromosomes lie more than `gap` apart on the line
        first = np.concatenate(([True], start[1:] > reach[:-1] + gap))
        last = np.concatenate((first[1:], [True]))
        offset = start - ordered.start
        return Intervals(ordered.names, ordered.chrom[first], ordered.start[first], (reach - offset)[last])

    def count_overlaps(self, other: Intervals) -> np.ndarray:
        """Return how many intervals of `other` each overlaps, int64 (N,)."""
        (start, end), (other_start, other_end) = _on_one_line(self, 0, other)
        full = other_end > other_start
        began = np.searchsorted(np.sort(other_start[full]), end, side="left")
        ended = np.searchsorted(np.sort(other_end[full]), start, side="right")
        return np.where(end > start, began - ended, 0)

    def join(self, other: Intervals) -> np.ndarray:
        """Return all overlapping pairs, (place in self, place in other), int64 (P, 2), by the first, then by start."""
        (start, end), (other_start, other_end) = _on_one_line(self, 0, other)
        order = np.argsort(other_start, kind="stable")
        order = order[other_end[order] > other_start[order]]
        reach = np.maximum.accumulate(other_end[order]) if len(order) else other_end[order]
        low = np.searchsorted(reach, start, side="right")  # nothing before ends behind the start
        high = np.searchsorted(other_start[order], end, side="left")
        counts = np.where(end > start, np.maximum(high - low, 0), 0)
        left = np.repeat(np.arange(len(self)), counts)
        right = order[np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - low, counts)]
        hit = other_end[right] > start[left]
        return np.stack((left[hit], right[hit]), axis=1)


def _on_one_line(self: Intervals, gap: int, other: Intervals | None = None) -> tuple:
    """Return starts and ends with the chromosomes laid out one behind the other, further apart than `gap`."""
    both = (self,) if other is None else (self, other)
    numbers: dict[str, int] = {}
    for name in (name for one in both for name in one.names):
        numbers.setdefault(name, len(numbers))
    span = max((int(one.end.max()) for one in both if len(one)), default=0) + gap + 1
    lines = []
    for one in both:
        shift = np.array([numbers[name] for name in one.names], np.int64)[one.chrom] * span if len(one) else one.start
        lines.append((one.start + shift, one.end + shift))
    return lines[0] if other is None else tuple(lines)


def windows(region: Region, window: int, stride: int | None = None, tail: str = "shift") -> np.ndarray:
    """Return windows that tile a region, int64 (W, 2): start and end of each on the chromosome.

    Args:
        region: What is tiled.
        window: Bases of a window.
        stride: Bases from one window to the next; default: `window`.
        tail: What becomes of the bases behind the last whole window: "drop" leaves them out; "short" gives them a
            shorter window; "shift" moves a whole window back so that it ends with the region, as Caduceus does at the
            ends of chromosomes. A region shorter than `window` has no window by "drop", and a short one otherwise.

    Raises:
        UserError: a window or stride below 1, a stride beyond the window (bases between would be lost), another tail.
    """
    stride = window if stride is None else stride
    if window < 1 or not 1 <= stride <= window:
        raise UserError(f"window {window:,}, stride {stride:,}: expected 1 <= stride <= window")
    if tail not in TAILS:
        raise UserError(f"tail {tail!r}: expected {', '.join(TAILS)}{suggest(tail, TAILS)}")
    size = len(region)
    starts = np.arange(0, max(size - window + 1, 0), stride, dtype=np.int64)
    covered = int(starts[-1]) + window if len(starts) else 0
    if covered < size and tail != "drop":
        last = int(starts[-1]) + stride if len(starts) else 0
        starts = np.append(starts, last if tail == "short" else max(size - window, 0))
    return np.stack((starts, np.minimum(starts + window, size)), axis=1) + region.start


def split_by_chromosome(regions: Sequence[Region], held_out: Mapping[str, Iterable[str]]) -> dict[str, list[int]]:
    """Return the places of the regions in each set: {"train": [...], "valid": [...]}; train has what is not held out.

    Args:
        regions: What is split.
        held_out: Chromosomes of the other sets, {"valid": ["chr8"], "test": ["chr9", "chr10"]}.

    Raises:
        UserError: a chromosome of no region, or of two sets.
    """
    known = {region.name for region in regions}
    sets: dict[str, str] = {}
    for name, chromosomes in held_out.items():
        for chromosome in chromosomes:
            if chromosome not in known:
                raise UserError(f"{name}: no region on chromosome {chromosome!r}{suggest(chromosome, known)}")
            if chromosome in sets:
                raise UserError(
                    f"chromosome {chromosome!r} is in {sets[chromosome]} and in {name}; expected one of them"
                )
            sets[chromosome] = name
    places: dict[str, list[int]] = {"train": [], **{name: [] for name in held_out}}
    for place, region in enumerate(regions):
        places[sets.get(region.name, "train")].append(place)
    return places
