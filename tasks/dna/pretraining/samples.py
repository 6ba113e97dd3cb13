"""Windows of a genome as samples: read when they are asked for, by any process, in memory that does not grow with it.

Sample i of an epoch is window i, or with `epoch_windows` n of N windows floor((i + v) N / n), v ~ U[0, 1): n of them,
evenly spread, other ones in each epoch. While windows are shorter (`pieces` r), sample i is r of them, numbers i,
n + i, 2 n + i, ... of the n r pieces of all windows: each is there once an epoch, and those of a batch lie far apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Generator

from mambaverse.engine.data import derive_seed
from mambaverse.engine.task import Sample
from mambaverse.errors import UserError
from mambaverse.tasks.dna.genome import Genome, Region
from mambaverse.tasks.dna.pretraining.config import DnaLmDataConfig, DnaLmTaskConfig
from mambaverse.tasks.dna.pretraining.masking import mask_bases
from mambaverse.tasks.dna.pretraining.windows import Windows
from mambaverse.tasks.dna.tokens import PAD, N, encode, is_base

EVALUATION = 0x6D61736B  # the seed of the masks of evaluation: those of sample i are the same in every run


@dataclass
class GenomeSamples:
    """The windows of one set, read from a genome.

    A sample is {"ids": [...]}, uint8 (L,) each, one or, while windows are shorter, several; with mlm "target" likewise
    (see masking.py); with soft-masked bases that count less or nothing "weight", float32.

    Attributes:
        genome: Where they are read.
        windows: Which there are.
        kept: The numbers of those that are used.
        data: How they are read,
        task: and what is asked of them.
        size: Samples of an epoch.
        other_strand: The probability, in training, that a window is read from its other strand.
        pieces: Windows that stand in for one, each a part as long.
    """

    genome: Genome
    windows: Windows
    kept: np.ndarray
    data: DnaLmDataConfig
    task: DnaLmTaskConfig
    size: int
    other_strand: float = 0.0
    pieces: int = 1

    def __len__(self) -> int:
        return self.size

    def of_epoch(self, epoch: int) -> GenomeSamples:
        """Return the samples of an epoch: in the first ones shorter windows, if `length_warmup` says so."""
        pieces = self.data.pieces(epoch)
        return self if pieces == self.pieces else replace(self, pieces=pieces)

    def sample(self, index: int, generator: Generator | None) -> Sample:
        """Return window `index`: with a generator where and as its draws say, with None on its tile."""
        if generator is None:
            own = torch.Generator().manual_seed(derive_seed(EVALUATION, index))
            return _joined([self._asked(*self._read(self.windows.tile(int(self.kept[index]))), own)])
        parts = []
        for j in range(self.pieces):
            v, u, strand = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
            at, piece = divmod(j * self.size + index, self.pieces)
            if self.size != len(self.kept):
                at = min(int((at + v) * len(self.kept) / self.size), len(self.kept) - 1)
            ids, weight = self._drawn(int(self.kept[at]), u, piece, "-" if strand < self.other_strand else "+")
            parts.append(self._asked(ids, weight, generator))
        return _joined(parts)

    @cached_property
    def asks(self) -> bool:
        """Whether an evaluation scores any base; as a rule the first window says so, and no other is read."""
        return any(_scored(part, self.data.strands) for i in range(len(self)) for part in _parts(self.sample(i, None)))

    def _drawn(self, number: int, u: float, piece: int, strand: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a window of training, on its tile if where it was drawn there are too many N."""
        if self.data.random_windows:
            ids, weight = self._read(self.windows.drawn(number, u, piece, self.pieces), strand)
            if self.data.max_unknown == 1 or (ids == N).mean() <= self.data.max_unknown:
                return ids, weight
        return self._read(self.windows.part(number, piece, self.pieces), strand)

    def _read(self, region: Region, strand: str = "+") -> tuple[np.ndarray, np.ndarray | None]:
        """Return the ids of a region, and what each base counts, if not all count the same."""
        letters = self.genome.fetch(region.name, region.start, region.end, strand)
        try:
            ids = encode(letters, strict=self.data.strict, rna=self.data.rna)
        except UserError as error:
            raise UserError(f"{self.genome.path}, {region}: {str(error).removeprefix('sequence: ')}") from None
        if self.task.soft_mask_weight == 1:
            return ids, None
        soft = np.frombuffer(letters, np.uint8) >= ord("a")
        return ids, np.where(soft, np.float32(self.task.soft_mask_weight), np.float32(1))

    def _asked(self, ids: np.ndarray, weight: np.ndarray | None, generator: Generator) -> dict[str, np.ndarray]:
        part = {"ids": ids} if weight is None else {"ids": ids, "weight": weight}
        if self.task.objective == "mlm":
            how = (self.task.mask_rate, generator)
            part["ids"], part["target"] = mask_bases(ids, *how, compat=self.task.caduceus_compat)
        return part


def _parts(sample: Sample) -> list[dict[str, np.ndarray]]:
    """Return the windows of a sample, each by itself."""
    return [dict(zip(sample, arrays, strict=True)) for arrays in zip(*sample.values(), strict=True)]


def _scored(part: dict[str, np.ndarray], strands: str) -> bool:
    """Whether a base of a window is scored: with mlm a masked one; else one that follows another, on a strand read."""
    targets = part.get("target")
    counted = is_base(part["ids"]) if targets is None else targets != PAD
    if "weight" in part:
        counted = counted & (part["weight"] > 0)
    both = strands == "both" and counted[:-1].any()
    return bool(counted.any() if targets is not None else counted[1:].any() or both)


def _joined(parts: list[dict[str, np.ndarray]]) -> Sample:
    return {key: [part[key] for part in parts] for key in parts[0]}
