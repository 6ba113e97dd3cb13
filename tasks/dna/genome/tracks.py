"""Tracks of numbers along a genome as bedGraph, written while a scan goes on, and taken up again where it was cut off.

    chrom <tab> start <tab> end <tab> value     0-based, half-open, sorted by chromosome (bytes) and start, none overlap

Neighbours with equal values become one line; places without a value (NaN) have none. Beside x.bedgraph lies
x.chrom.sizes, so that `bedGraphToBigWig x.bedgraph x.chrom.sizes x.bw` takes it as it is.

While it is written the track is x.bedgraph.part, and x.bedgraph.checkpoint says which region is the last that is in it
for certain (see mambaverse/engine/resumable.py).

Source: the bedGraph format and bedGraphToBigWig of UCSC's genome browser.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambaverse.engine.resumable import ResumableFile
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.genome.regions import Region

DIGITS = 6  # significant, of a value


def scan_order(names: Sequence[str]) -> list[str]:
    """Return chromosomes in the order in which a track has them: by their bytes, as bedGraphToBigWig wants it."""
    return sorted(names, key=os.fsencode)


class BedGraphWriter(ResumableFile):
    """Writes one track, region by region.

        with BedGraphWriter(path, genome.lengths, resume=True) as track:
            for region in regions:                    # in `scan_order`, ascending
                if not track.has(region):             # it was scanned before the job was killed
                    track.write(region, values)

    Leaving the block finishes the file, unless by an error: then it stays as far as it went, to be taken up again.

    Args:
        path: The track.
        lengths: Bases of each chromosome.
        resume: Go on with what a scan that was cut off left at `path`, if there is such.
        overwrite: Replace a finished track.
        about: What the numbers are, such as the model's name and the window: a scan goes on only with the same.

    Attributes:
        done: The last region that is in the track; None at the start.

    Raises:
        UserError: a finished track is there, or a part of one with other numbers.
        SaveError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        lengths: Mapping[str, int],
        *,
        resume: bool = False,
        overwrite: bool = False,
        about: str = "",
    ) -> None:
        if path.exists() and not overwrite:
            raise UserError(f"{path}: is there already, finished; name another file with --out, or give --overwrite")
        super().__init__(path)
        self.lengths: dict[str, int] = dict(lengths)
        self.done: Region | None = None
        for beside, text in self._beside().items():
            if not overwrite and beside.exists() and beside.read_text(errors="replace") != text:
                told = f"{beside}: is there already, of other chromosomes"
                raise UserError(f"{told}; name another file with --out, or give --overwrite")
        self._settings = {"about": about, "digits": DIGITS, "lengths": self.lengths}
        self._pending: tuple[str, int, int, str] | None = None  # a line that may still grow
        state = self._read_state() if resume else None
        if state is not None:
            self.done = Region(*state["done"])
            self._pending = tuple(state["pending"]) if state["pending"] else None
        self._open(None if state is None else state["bytes"])

    def has(self, region: Region) -> bool:
        """Whether the track has this region, or one behind it, so that a scan in order is past it."""
        return self.done is not None and _key(region.name, region.end) <= _key(self.done.name, self.done.end)

    def write(self, region: Region, values: np.ndarray, step: int = 1) -> None:
        """Append the values of a region.

        Args:
            region: Where; behind what is written, in the order of `scan_order`. Its strand plays no part: values are
                given from its start on.
            values: One for each `step` bases, (ceil(bases / step),); NaN for none. The last may stand for fewer bases.
            step: Bases that share a value.

        Raises:
            UserError: a region out of order, overlapping the one before or past its chromosome's end; another number
                of values; an infinite one.
            SaveError: the file cannot be written.
        """
        self._check(region, values, step)
        with self._piece():
            values = np.asarray(values, np.float64)
            known = ~np.isnan(values)
            change = np.flatnonzero((values[1:] != values[:-1]) & (known[1:] | known[:-1])) + 1
            firsts = np.concatenate((np.zeros(min(len(values), 1), np.int64), change))
            starts = region.start + firsts * step
            ends = np.append(starts[1:], region.end)[: len(starts)]
            lines: list[str] = []
            for start, end, value in zip(starts.tolist(), ends.tolist(), values[firsts].tolist(), strict=True):
                if value == value:
                    self._add(lines, region.name, start, end, f"{value + 0.0:.{DIGITS}g}")
            self._append("".join(lines))
            self.done = region

    def _state(self) -> dict[str, Any] | None:
        if self.done is None:
            return None
        done = [self.done.name, self.done.start, self.done.end]
        return {**self._settings, "done": done, "pending": self._pending}

    def _rest(self) -> str:
        return "" if self._pending is None else _line(*self._pending)

    def _beside(self) -> dict[Path, str]:
        sizes = "".join(f"{name}\t{self.lengths[name]}\n" for name in scan_order(list(self.lengths)))
        return {self.path.with_suffix(".chrom.sizes"): sizes}

    def _add(self, lines: list[str], name: str, start: int, end: int, text: str) -> None:
        """Append a line, or let the one before grow."""
        if self._pending is not None:
            if self._pending[0] == name and self._pending[2] == start and self._pending[3] == text:
                self._pending = (name, self._pending[1], end, text)
                return
            lines.append(_line(*self._pending))
        self._pending = (name, start, end, text)

    def _check(self, region: Region, values: np.ndarray, step: int) -> None:
        if region.name not in self.lengths:
            raise UserError(f"{self.path}: no chromosome {region.name!r}{suggest(region.name, self.lengths)}")
        if region.end > self.lengths[region.name]:
            raise UserError(
                f"{self.path}: {region} is past the end of {region.name} ({self.lengths[region.name]:,} bases)"
            )
        if self.done is not None and _key(region.name, region.start) < _key(self.done.name, self.done.end):
            raise UserError(
                f"{self.path}: {region} behind {self.done}: not sorted, or overlapping; "
                "scan chromosomes in scan_order, and regions by their start"
            )
        if step < 1 or np.shape(values) != (-(-len(region) // step),):
            raise UserError(f"{self.path}: {region}: values {np.shape(values)}; expected one for each {step} bases")
        if np.isinf(values).any():
            raise UserError(f"{self.path}: {region}: an infinite value; expected numbers, or NaN for none")

    def _read_state(self) -> dict | None:
        """Return the checkpoint of a scan that was cut off, if there is one that can be used."""
        try:
            if (state := self._read_mark()) is None:
                return None
            same = all(state[key] == value for key, value in self._settings.items())
            usable = self._part.stat().st_size >= state["bytes"] and len(state["done"]) == 3
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self._mark}: damaged; delete it and {self._part}, and scan anew") from None
        if not same:
            raise UserError(
                f"{self._part}: a track of another genome or other numbers ({state['about']!r}); expected "
                f"{self._settings['about']!r}: go on with those settings, or delete it and {self._mark}"
            )
        if not usable:
            raise UserError(f"{self._part}: shorter than {self._mark} says; delete both, and scan anew")
        return state


def _key(name: str, place: int) -> tuple[bytes, int]:
    return os.fsencode(name), place


def _line(name: str, start: int, end: int, text: str) -> str:
    return f"{name}\t{start}\t{end}\t{text}\n"
