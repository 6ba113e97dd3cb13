"""Sequences in memory, one byte a base, and the windows of them that a model sees.

A window of evaluation is drawn once: its place follows from `window_seed` and the letters of the sequence alone, so it
is the same in every split, order and run. While training another window is drawn every time.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mambaverse.engine.task import Sample
from mambaverse.tasks.dna.tokens import COMPLEMENT, PAD, A, N

Place = tuple[str, int, int]  # chromosome, start, end: 0-based, half-open
OTHER = COMPLEMENT.tobytes() + bytes(256 - len(COMPLEMENT))  # the complements as a table of bytes


class Sequences:
    """Sequences end to end in one array, with class numbers and names.

    Args:
        ids: Of each sequence, uint8 (L,).
        labels: Class numbers (S,).
        names: What each is called in its file.
        groups: What binds them, if the split went by it.
        places: Chromosome, start and end of each, 0-based and half-open, if that is known.
    """

    def __init__(
        self,
        ids: Sequence[np.ndarray],
        labels: np.ndarray,
        names: Sequence[str],
        groups: Sequence[str] | None = None,
        places: Sequence[Place] | None = None,
    ) -> None:
        self.data = np.concatenate(ids) if len(ids) else np.empty(0, np.uint8)
        self.bounds = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64).tolist()
        self.labels, self.names, self.groups = np.asarray(labels, np.int64), list(names), groups
        self.places = places

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.data[self.bounds[index] : self.bounds[index + 1]]

    def lengths(self) -> np.ndarray:
        """Return the number of bases of each, int64 (S,)."""
        return np.diff(self.bounds)


@dataclass(frozen=True)
class Background:
    """Where more sequences of one class can be cut out.

    Attributes:
        label: The class.
        data: Bases, uint8 (L,).
        starts: Places in `data` at which such sequences begin, int64 (K,).
        length: Of one in bases.
    """

    label: int
    data: np.ndarray
    starts: np.ndarray
    length: int

    def draw(self, generator: Generator) -> np.ndarray:
        """Return one of them, uint8 (length,)."""
        start = int(self.starts[int(torch.randint(len(self.starts), (), generator=generator))])
        return self.data[start : start + self.length]


@dataclass(frozen=True)
class Augment:
    """How a training sequence varies (see `DnaDataConfig`)."""

    reverse_complement: float = 0.0
    shift: int = 0
    mutate: float = 0.0
    mask: float = 0.0
    random_windows: bool = True

    def __call__(self, ids: np.ndarray, strand: float, place: float, generator: Generator) -> np.ndarray:
        """Return ids (L,), varied; `ids` is left as it is.

        Args:
            ids: A window of a sequence.
            strand: A draw from [0, 1) that decides on the strand,
            place: and one that decides on the shift.
            generator: Draws what is mutated and masked, base by base.
        """
        if strand < self.reverse_complement:
            ids = np.frombuffer(ids.tobytes().translate(OTHER)[::-1], np.uint8)  # three times as fast as indexing
        if self.shift:
            ids = moved(ids, int(place * (2 * self.shift + 1)) - self.shift)
        if self.mutate:
            draws = torch.rand(len(ids), generator=generator).numpy()
            ids = np.where(draws < self.mutate, (draws * (4 / self.mutate)).astype(np.uint8) % 4 + A, ids)
        if self.mask:
            ids = np.where(torch.rand(len(ids), generator=generator).numpy() < self.mask, np.uint8(N), ids)
        return ids


class DnaSamples:
    """Sequences with their labels as samples: uint8 "ids" (at most `window` of them) and "target".

    Args:
        sequences: What there is.
        window: Bases of a sequence that are shown at most.
        window_seed: Of the window that is shown in evaluation.
        augment: How a training sequence varies.
        background: In training, sequences of its class are drawn out of it,
        fresh: so large a share of them.
    """

    def __init__(
        self,
        sequences: Sequences,
        window: int | None = None,
        window_seed: int = 0,
        augment: Augment | None = None,
        background: Background | None = None,
        fresh: float = 0.0,
    ) -> None:
        self.sequences, self.window, self.augment = sequences, window, augment or Augment(random_windows=False)
        self._starts = [window_start(sequences[i], window, window_seed) if window else 0 for i in range(len(sequences))]
        self._bounds, self._data = sequences.bounds, sequences.data  # looked up for every sample
        self._targets = sequences.labels.tolist()
        self.background, self.fresh = background if fresh else None, fresh
        self._varies = self.augment != Augment(random_windows=self.augment.random_windows)

    def __len__(self) -> int:
        return len(self._targets)

    def sample(self, index: int, generator: Generator | None) -> Sample:
        """Return sequence `index`: with None the window of evaluation, with a generator another one, augmented."""
        start, stop = self._bounds[index], self._bounds[index + 1]
        window, place, strand, shift = self.window, 0.0, 1.0, 0.0
        if generator is not None:
            place, strand, shift = torch.rand(3, generator=generator).tolist()  # one call: it costs more than the rest
        if window is not None and stop - start > window:
            if generator is None or not self.augment.random_windows:
                start += self._starts[index]
            else:
                start += int(place * (stop - start - window + 1))
            stop = start + window
        ids = self._data[start:stop]
        if (
            generator is not None
            and self.background is not None
            and self._targets[index] == self.background.label
            and float(torch.rand((), generator=generator)) < self.fresh
        ):
            ids = self.background.draw(generator)
        if generator is not None and self._varies:
            ids = self.augment(ids, strand, shift, generator)
        return {"ids": ids, "target": self._targets[index]}

    def windows(self) -> list[np.ndarray]:
        """Return what `sample(i, None)` shows of each sequence."""
        return [self.sample(i, None)["ids"] for i in range(len(self))]


def window_start(ids: np.ndarray, window: int, seed: int) -> int:
    """Return where the one window of evaluation starts: by a hash of the letters and the seed."""
    spare = len(ids) - window
    return zlib.crc32(ids.tobytes(), seed) % (spare + 1) if spare > 0 else 0


def padded(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor | None]:
    """Return rows (L,) of one dtype as (B, longest), `fill` behind their ends, and lengths (B,), None if equal."""
    sizes = np.fromiter(map(len, rows), np.int64, len(rows))
    flat, longest = np.concatenate(rows), int(sizes.max())
    if sizes.min() == longest:
        return torch.from_numpy(flat.reshape(len(rows), longest)), None
    joined = np.full((len(rows), longest), fill, flat.dtype)
    joined[np.arange(longest) < sizes[:, None]] = flat
    return torch.from_numpy(joined), torch.from_numpy(sizes)


def tiles(ids: np.ndarray, window: int, most: int) -> list[np.ndarray]:
    """Return windows that cover a long sequence from end to end, evenly spread; `most` of them if it takes more."""
    spare = len(ids) - window
    if spare <= 0:
        return [ids]
    count = min(-(-len(ids) // window), most)
    return [ids[start : start + window] for start in np.linspace(0, spare, max(count, 1)).round().astype(int).tolist()]


def moved(ids: np.ndarray, places: int) -> np.ndarray:
    """Return ids (L,) moved to the right by `places` (to the left if negative), N where nothing moved in."""
    if not places:
        return ids
    out = np.full_like(ids, N)
    if places > 0:
        out[places:] = ids[:-places]
    else:
        out[:places] = ids[-places:]
    return out


def mix(
    ids: Tensor, targets: Tensor, num_classes: int, alpha: float, generator: Generator, smoothing: float = 0.0
) -> dict[str, Tensor]:
    """Mix each sequence with another of the batch: a base is its own with probability λ ~ Beta(α, α), one λ a batch.

    A base keeps its place, so this is for sequences of one length whose places mean something; behind the end of the
    shorter of a pair nothing is mixed.

    Args:
        ids: (B, L), padded.
        targets: Class numbers (B,).
        num_classes: Of the classes.
        alpha: α.
        generator: Makes all draws.
        smoothing: Share of the labels' weight that is spread over all classes.

    Returns:
        "ids" (B, L), and "target": the classes' shares of a sequence's bases, (B, classes) float32.
    """
    share = np.random.default_rng(int(torch.randint(2**62, (), generator=generator))).beta(alpha, alpha)
    order = torch.randperm(len(ids), generator=generator)
    other = ids[order]
    inside = (ids != PAD) & (other != PAD)
    swapped = (torch.rand(ids.shape, generator=generator) >= share) & inside
    weights = (swapped.sum(1) / (ids != PAD).sum(1).clamp(min=1))[:, None]
    one_hot = F.one_hot(targets, num_classes).float() * (1 - smoothing) + smoothing / num_classes
    return {"ids": torch.where(swapped, other, ids), "target": (1 - weights) * one_hot + weights * one_hot[order]}
