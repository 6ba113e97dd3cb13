"""Where sequences lie in a genome, and which of them overlap; 0-based, half-open, strands ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mambaverse.kernels.jit import cached_kernel
from mambaverse.tasks.dna.sequences import Place

SPAN = 2**40  # of one chromosome on the line on which all are laid end to end

_compiled = cached_kernel()


@dataclass(frozen=True)
class Overlaps:
    """For each of Q places the known place that covers most of it.

    Attributes:
        rows: Its row, int64 (Q,); -1: none overlaps.
        shares: Of the query's own bases, float64 (Q,).
    """

    rows: np.ndarray
    shares: np.ndarray


def overlaps(known: Sequence[Place], queries: Sequence[Place]) -> Overlaps:
    """Return for each query the known place with the largest overlap."""
    numbers = {name: i for i, name in enumerate(sorted({place[0] for place in (*known, *queries)}))}
    begin, end = _line(known, numbers)
    query_begin, query_end = _line(queries, numbers)
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], end[order]
    reach = np.maximum.accumulate(end) if len(end) else end  # how far to the right the places up to here go
    before = np.searchsorted(begin, query_end)  # those that begin before the query ends
    rows, bases = np.full(len(queries), -1, np.int64), np.zeros(len(queries), np.int64)
    _largest(begin, end, reach, before.astype(np.int64), query_begin, query_end, rows, bases)
    found = rows >= 0
    rows[found] = order[rows[found]]
    return Overlaps(rows, bases / np.maximum(query_end - query_begin, 1))


def _line(places: Sequence[Place], numbers: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    offset = np.array([numbers[name] for name, _, _ in places], np.int64) * SPAN
    start = np.array([start for _, start, _ in places], np.int64)
    return offset + start, offset + np.array([end for _, _, end in places], np.int64)


@_compiled
def _largest(
    begin: Any, end: Any, reach: Any, before: Any, query_begin: Any, query_end: Any, rows: Any, bases: Any
) -> None:
    for i in range(len(query_begin)):
        j = before[i] - 1
        while j >= 0 and reach[j] > query_begin[i]:
            shared = min(end[j], query_end[i]) - max(begin[j], query_begin[i])
            if shared > bases[i]:
                bases[i], rows[i] = shared, j
            j -= 1
