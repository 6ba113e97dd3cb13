"""Near neighbours among sequences, of either strand: seeds find candidates, whole sets of k-mers decide (numba).

A k-mer counts as the smaller of its number and that of its reverse complement; k-mers that touch an N do not count. Of
every `window` k-mers in a row the one with the smallest hash is a seed (a minimizer), so that two sequences with
window + k - 1 bases in common share one. An index lists the training sequences of each seed. Of those that share most
seeds with a query the sets of k-mers A, B are compared:

    containment = |A ∩ B| / min(|A|, |B|),    Jaccard = |A ∩ B| / |A ∪ B|

Seeds that many sequences have, those of repeats, are looked up last, until `BUDGET` list entries are read.

Source: Roberts et al. 2004, "Reducing storage requirements for biological sequence comparison" (minimizers); Broder
1997, "On the resemblance and containment of documents".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mambaverse.kernels.jit import cached_kernel
from mambaverse.kernels.threads import parallel_for
from mambaverse.tasks.dna.sequences import Sequences

WINDOW = 6  # k-mers in a row that give one seed: 17 bases in common are enough
SHORT_K, LONG_K, LONG = 12, 16, 2**18  # k; a sequence of LONG bases holds too many of all 12-mers by chance alone
FEWEST = 20  # distinct k-mers that a sequence needs: fewer say nothing
BUDGET = 100_000  # list entries that are read for one query
CHECKED = 32  # candidates whose k-mers are compared
KEPT = 5  # neighbours that are reported of one query, at most
GRAIN = 128  # queries a thread takes at a time
EMPTY = np.uint64(2**64 - 1)
_FIRST_BASE, _LAST_BASE = 7, 10  # ids of A and T: constants that numba compiles in

_compiled = cached_kernel()


@dataclass(frozen=True)
class Neighbours:
    """What was found for Q queries.

    Attributes:
        count: Neighbours of each among the candidates that were compared, int64 (Q,); -1: too few k-mers to compare.
        rows: The nearest of them, int64 (Q, KEPT), the nearest first; -1 where there are fewer.
        containment: Theirs, float64 (Q, KEPT).
        cut: Whether the search ended at `BUDGET`, bool (Q,).
    """

    count: np.ndarray
    rows: np.ndarray
    containment: np.ndarray
    cut: np.ndarray


def neighbours(known: Sequences, queries: Sequences, least: float) -> Neighbours:
    """Return the sequences of `known` whose containment with a query is `least` or more.

    Memory: the bases, 12 bytes a seed (two for every seven bases) while they are sorted, and little else.
    """
    longest = max((int(s.lengths().max()) for s in (known, queries) if len(s)), default=0)
    k = SHORT_K if longest <= LONG else LONG_K
    index = _Index(known, k)
    bounds, entries = index.look_up(queries)
    count = np.zeros(len(queries), np.int64)
    rows = np.full((len(queries), KEPT), -1, np.int64)
    containment = np.zeros((len(queries), KEPT))
    cut = np.zeros(len(queries), bool)
    found = (count, rows, containment, cut)
    data = (queries.data, _bounds(queries), known.data, _bounds(known), index.distinct)
    parallel_for(
        _search, len(queries), k, least, *data, bounds, entries, index.starts, index.sequences, *found, grain=GRAIN
    )
    return Neighbours(*found)


class _Index:
    """Seeds (sorted), where the list of each begins, and the lists: numbers of sequences, end to end."""

    def __init__(self, known: Sequences, k: int) -> None:
        self.k = k
        self.distinct = np.zeros(len(known), np.int64)
        parallel_for(_count_distinct, len(known), k, known.data, _bounds(known), self.distinct, grain=GRAIN)
        owners, seeds = _seeds_of(known, k)
        packed = _sorted_unique(seeds.astype(np.uint64) << np.uint64(32) | owners.astype(np.uint64))
        self.sequences = (packed & np.uint64(0xFFFFFFFF)).astype(np.int32)
        packed >>= np.uint64(32)
        first = np.flatnonzero(np.diff(packed, prepend=EMPTY))
        self.seeds = packed[first].astype(np.uint32)
        self.starts = np.append(first, len(packed)).astype(np.int64)

    def look_up(self, queries: Sequences) -> tuple[np.ndarray, np.ndarray]:
        """Return where each query's seeds begin, (Q + 1,), and the numbers of those in the index, the rarest first."""
        owners, seeds = _seeds_of(queries, self.k)
        packed = _sorted_unique(owners.astype(np.uint64) << np.uint64(32) | seeds.astype(np.uint64))
        owners, seeds = (packed >> np.uint64(32)).astype(np.int64), packed.astype(np.uint32)
        places = np.searchsorted(self.seeds, seeds)
        there = places < len(self.seeds)
        there[there] = self.seeds[places[there]] == seeds[there]
        owners, places = owners[there], places[there]
        bounds = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(queries)))])
        rarest = np.lexsort((self.starts[places + 1] - self.starts[places], owners))
        return bounds.astype(np.int64), places[rarest].astype(np.int64)


def _bounds(sequences: Sequences) -> np.ndarray:
    return np.asarray(sequences.bounds, np.int64)


def _seeds_of(sequences: Sequences, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (owners int32, seeds uint32) of all seeds."""
    counts = np.zeros(len(sequences), np.int64)
    nothing, none = np.empty(0, np.uint32), np.zeros(len(sequences), np.int64)
    how = (k, WINDOW, sequences.data, _bounds(sequences))
    parallel_for(_find_seeds, len(sequences), *how, False, counts, none, nothing, grain=GRAIN)
    ends = np.cumsum(counts)
    seeds = np.empty(int(ends[-1]) if len(ends) else 0, np.uint32)
    parallel_for(_find_seeds, len(sequences), *how, True, counts, ends - counts, seeds, grain=GRAIN)
    return np.repeat(np.arange(len(sequences), dtype=np.int32), counts), seeds


def _sorted_unique(values: np.ndarray) -> np.ndarray:
    values.sort()
    fresh = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=fresh[1:])
    return values[fresh]


@_compiled
def _mixed(value: Any) -> Any:
    """Return a hash of an uint64 (the finalizer of splitmix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@_compiled
def _next_kmer(base: Any, k: int, forward: Any, backward: Any, known: int) -> Any:
    """Return both strands' numbers and how many known bases they span, once `base` is taken in."""
    if base < _FIRST_BASE or base > _LAST_BASE:
        return np.uint64(0), np.uint64(0), 0
    digit = np.uint64(base - _FIRST_BASE)
    mask = (np.uint64(1) << np.uint64(2 * k)) - np.uint64(1)
    forward = ((forward << np.uint64(2)) | digit) & mask
    backward = (backward >> np.uint64(2)) | ((np.uint64(3) - digit) << np.uint64(2 * (k - 1)))
    return forward, backward, known + 1


@_compiled
def _find_seeds(
    start: int, stop: int, k: int, window: int, data: Any, bounds: Any, fill: bool, counts: Any, at: Any, seeds: Any
) -> None:
    """Count the seeds of sequences start to stop - 1, or with `fill` write them."""
    ring, hashes = np.empty(window, np.uint64), np.empty(window, np.uint64)
    for i in range(start, stop):
        forward, backward, known = np.uint64(0), np.uint64(0), 0
        found, last, seen = 0, -1, 0
        for place in range(bounds[i], bounds[i + 1]):
            forward, backward, known = _next_kmer(data[place], k, forward, backward, known)
            if known < k:
                if known == 0:
                    seen, last = 0, -1  # an N begins a new stretch
                continue
            slot = seen % window
            ring[slot] = min(forward, backward)
            hashes[slot] = _mixed(ring[slot])
            seen += 1
            ends = place + 1 == bounds[i + 1] or data[place + 1] < _FIRST_BASE or data[place + 1] > _LAST_BASE
            if seen < window and not ends:
                continue
            best = 0
            for j in range(1, min(seen, window)):
                if hashes[j] < hashes[best]:
                    best = j
            number = seen - 1 - (slot - best) % window  # of the k-mer in its stretch
            if number != last:
                if fill:
                    seeds[at[i] + found] = np.uint32(ring[best])
                found += 1
                last = number
        counts[i] = found


@_compiled
def _table_size(bases: int) -> int:
    size = 16
    while size < 2 * bases:
        size *= 2
    return size


@_compiled
def _slot_of(table: Any, value: Any) -> int:
    """Return the slot that holds `value`, or the empty one where it belongs."""
    mask = np.uint64(len(table) - 1)
    slot = _mixed(value) & mask
    while table[slot] != EMPTY and table[slot] != value:
        slot = (slot + np.uint64(1)) & mask
    return slot


@_compiled
def _fill_table(table: Any, k: int, data: Any, first: int, end: int) -> int:
    """Put the k-mers of data[first:end] into an empty table; returns how many distinct ones there are."""
    forward, backward, known, distinct = np.uint64(0), np.uint64(0), 0, 0
    for place in range(first, end):
        forward, backward, known = _next_kmer(data[place], k, forward, backward, known)
        if known >= k:
            value = min(forward, backward)
            slot = _slot_of(table, value)
            if table[slot] == EMPTY:
                table[slot] = value
                distinct += 1
    return distinct


@_compiled
def _count_distinct(start: int, stop: int, k: int, data: Any, bounds: Any, distinct: Any) -> None:
    for i in range(start, stop):
        table = np.full(_table_size(bounds[i + 1] - bounds[i]), EMPTY, np.uint64)
        distinct[i] = _fill_table(table, k, data, bounds[i], bounds[i + 1])


@_compiled
def _shared(table: Any, stamps: Any, stamp: int, k: int, data: Any, first: int, end: int) -> int:
    """Return how many distinct k-mers of the table are in data[first:end]."""
    forward, backward, known, shared = np.uint64(0), np.uint64(0), 0, 0
    for place in range(first, end):
        forward, backward, known = _next_kmer(data[place], k, forward, backward, known)
        if known >= k:
            value = min(forward, backward)
            slot = _slot_of(table, value)
            if table[slot] == value and stamps[slot] != stamp:
                stamps[slot] = stamp
                shared += 1
    return shared


@_compiled
def _search(
    start: int, stop: int, k: int, least: float, data: Any, bounds: Any, known: Any, known_bounds: Any, distinct: Any,
    first: Any, entries: Any, starts: Any, sequences: Any, count: Any, rows: Any, containment: Any, cut: Any,
) -> None:  # fmt: skip
    """Find the neighbours of queries start to stop - 1 (see `Neighbours`)."""
    hits = np.zeros(len(distinct), np.int32)
    touched = np.empty(len(distinct), np.int32)
    chosen = np.empty(CHECKED, np.int32)
    for i in range(start, stop):
        size = _table_size(bounds[i + 1] - bounds[i])
        table, stamps = np.full(size, EMPTY, np.uint64), np.full(size, -1, np.int32)
        own = _fill_table(table, k, data, bounds[i], bounds[i + 1])
        if own < FEWEST:
            count[i] = -1
            continue
        read, num_touched = 0, 0
        for seed in entries[first[i] : first[i + 1]]:
            read += starts[seed + 1] - starts[seed]
            if read > BUDGET:
                cut[i] = True
                break
            for sequence in sequences[starts[seed] : starts[seed + 1]]:
                if hits[sequence] == 0:
                    touched[num_touched] = sequence
                    num_touched += 1
                hits[sequence] += 1
        num_chosen = 0  # the candidates with most hits, the most first
        for t in range(num_touched):
            sequence = touched[t]
            if distinct[sequence] >= FEWEST and (num_chosen < CHECKED or hits[sequence] > hits[chosen[num_chosen - 1]]):
                place = min(num_chosen, CHECKED - 1)
                while place > 0 and hits[chosen[place - 1]] < hits[sequence]:
                    chosen[place] = chosen[place - 1]
                    place -= 1
                chosen[place] = sequence
                num_chosen = min(num_chosen + 1, CHECKED)
        for c in range(num_chosen):
            other = chosen[c]
            shared = _shared(table, stamps, c, k, known, known_bounds[other], known_bounds[other + 1])
            value = shared / min(own, distinct[other])
            if value >= least:
                count[i] += 1
                place = KEPT
                while place > 0 and (rows[i, place - 1] < 0 or containment[i, place - 1] < value):
                    if place < KEPT:
                        rows[i, place], containment[i, place] = rows[i, place - 1], containment[i, place - 1]
                    place -= 1
                if place < KEPT:
                    rows[i, place], containment[i, place] = other, value
        for t in range(num_touched):
            hits[touched[t]] = 0
