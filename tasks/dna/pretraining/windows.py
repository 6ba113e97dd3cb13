"""Windows of one length that tile many intervals of a genome, by number: three numbers an interval, whatever its size.

    interval [a, b) of S bases    W = ceil(S / L) windows; tile w is [a + w L, a + (w + 1) L), moved to end at b
    in training                   cut in r pieces of l = L / r bases each: piece q of W r starts at
                                  a + floor((q + u) (S - l + 1) / (W r)),  u ~ U[0, 1)

So a window lies inside its interval, is never padded, every start is as likely as any other, and the windows of an
epoch are spread evenly. A whole chromosome that is shorter than L is one window, shorter than the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from mambaverse.tasks.dna.genome import Genome, Region
from mambaverse.tasks.dna.genome.intervals import Intervals

KNOWN = b"ACGTacgt"
READ = 1 << 22  # bases that are looked through at a time
_UNKNOWN = np.ones(256, bool)
_UNKNOWN[list(KNOWN)] = False


class Windows:
    """Numbered windows.

    Args:
        regions: Intervals, none empty; their strand is not looked at.
        length: Bases L of a window.
    """

    def __init__(self, regions: Iterable[Region], length: int) -> None:
        self.length = length
        self.regions = Intervals.of(regions)
        sizes = self.regions.end - self.regions.start
        self.bounds = np.concatenate(([0], np.cumsum(-(-sizes // length))))

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def tile(self, number: int) -> Region:
        """Return window `number` where evaluation reads it."""
        region, at, _ = self._place(number)
        start = max(min(region.start + at * self.length, region.end - self.length), region.start)
        return Region(region.name, start, min(start + self.length, region.end))

    def drawn(self, number: int, u: float, piece: int = 0, pieces: int = 1) -> Region:
        """Return window `number` where training reads it.

        Args:
            number: Of the window.
            u: A draw from [0, 1).
            piece: Which of
            pieces: that it is cut in, r.
        """
        region, at, count = self._place(number)
        length = self.length // pieces
        spare = max(len(region) - length, 0)
        start = region.start + min(int((at * pieces + piece + u) * (spare + 1) / (count * pieces)), spare)
        return Region(region.name, start, min(start + length, region.end))

    def part(self, number: int, piece: int, pieces: int) -> Region:
        """Return piece number `piece` of the tile `number`."""
        tile, length = self.tile(number), self.length // pieces
        start = max(min(tile.start + piece * length, tile.end - length), tile.start)
        return Region(tile.name, start, min(start + length, tile.end))

    def _place(self, number: int) -> tuple[Region, int, int]:
        """Return the interval of a window, its place in it, and how many there are in it."""
        at = int(np.searchsorted(self.bounds, number, side="right")) - 1
        return self.regions[at], number - int(self.bounds[at]), int(self.bounds[at + 1] - self.bounds[at])


def known_windows(genome: Genome, windows: Windows, max_unknown: float) -> np.ndarray:
    """Return the numbers of the windows whose tiles have at most a share of `max_unknown` of N or ambiguous letters.

    Reads all of them once, some millions of bases at a time.
    """
    kept = [_known(genome, windows, int(first), region, max_unknown) for first, region in _spans(windows)]
    return np.concatenate(kept) if kept else np.zeros(0, np.int64)


def _spans(windows: Windows) -> Iterator[tuple[int, Region]]:
    """Yield stretches of whole windows, at most `READ` bases or one window, each with its first window's number."""
    step = max(READ // windows.length, 1)
    for at, region in enumerate(windows.regions):
        first, last = windows.bounds[at : at + 2].tolist()
        for number in range(first, last, step):
            start = windows.tile(number).start
            yield number, Region(region.name, start, windows.tile(min(number + step, last) - 1).end)


def _known(genome: Genome, windows: Windows, first: int, span: Region, max_unknown: float) -> np.ndarray:
    fetched = genome.fetch(span)
    length = min(windows.length, len(fetched))
    count = -(-len(fetched) // length)
    if not fetched.translate(None, KNOWN):  # the most of a genome; five times as fast as counting
        return first + np.arange(count)
    letters = np.frombuffer(fetched, np.uint8)
    starts = np.minimum(np.arange(count) * length, len(letters) - length)
    before = np.concatenate(([0], np.cumsum(_UNKNOWN[letters], dtype=np.int64)))
    shares = (before[starts + length] - before[starts]) / length
    return first + np.flatnonzero(shares <= max_unknown)
