"""Batches whose content depends on (seed, epoch, position) alone: not on workers, nor on a run's interruptions.

    order of an epoch      randperm, seeded with H(seed, ORDER, epoch)
    a sample's choices     one generator, seeded with H(seed, SAMPLE, epoch, index)
    a batch's choices      one generator, seeded with H(seed, MIX, epoch, first index)

What an `EpochSet` changes from epoch to epoch follows from the epoch's number alone. A `BatchSet` makes its batches on
the device; its samples' choices follow from a key, H(seed, SAMPLE, epoch).

H is BLAKE2b. Step b of an epoch learns from the entries [b·G, (b+1)·G) of the order, G = batch_size · processes, of
which process r takes the r-th batch_size: several processes see what one sees with a batch as large as theirs together.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mambaverse.engine.task import Batch, BatchSet, EpochSet, Sample, SampleSet
from mambaverse.errors import UserError

ORDER, SAMPLE, MIX, MODEL, PROCESS = range(5)  # what a derived seed is for
Collate = Callable[[Sequence[Sample], torch.Generator | None], Batch]


def derive_seed(seed: int, *path: int) -> int:
    """Return a 63-bit seed for `path` (a purpose, then numbers), unrelated to that of any other path."""
    packed = struct.pack(f"<{1 + len(path)}q", seed, *path)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Job:
    """One batch to be made: the samples in it, and the epoch whose random choices they get (None: none)."""

    indices: list[int]
    epoch: int | None = None


def make_batch(samples: SampleSet, collate: Collate, seed: int, job: Job) -> Batch:
    """Load the samples of `job` and join them."""
    if job.epoch is None:
        return collate([samples.sample(index, None) for index in job.indices], None)
    if hasattr(samples, "of_epoch"):  # isinstance of a protocol costs a tenth of a batch of DNA
        samples = cast(EpochSet, samples).of_epoch(job.epoch)
    draw = torch.Generator()
    rows = []
    for index in job.indices:
        draw.manual_seed(derive_seed(seed, SAMPLE, job.epoch, index))
        rows.append(samples.sample(index, draw))
    return collate(rows, draw.manual_seed(derive_seed(seed, MIX, job.epoch, job.indices[0])))


@dataclass(frozen=True)
class Shard:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1


class TrainPlan:
    """Which samples this process sees in each batch of each epoch.

    Samples that fill no batch are left out, others in each epoch; a set smaller than one batch is one batch.

    Raises:
        UserError: fewer samples than processes.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, shard: Shard = Shard()) -> None:
        self.num_samples, self.seed, self.shard = num_samples, seed, shard
        self.batch_size = min(batch_size, num_samples // shard.count)  # of this process
        if not self.batch_size:
            raise UserError(f"training set: {num_samples} samples are too few for {shard.count} processes")
        self.num_batches = num_samples // (self.batch_size * shard.count)

    def jobs(self, epoch: int, start: int = 0) -> Iterator[Job]:
        """Yield the batches of `epoch` from the one numbered `start` on, at no cost for those before it."""
        draw = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch))
        order = torch.randperm(self.num_samples, generator=draw)
        for batch in range(start, self.num_batches):
            first = (batch * self.shard.count + self.shard.rank) * self.batch_size
            yield Job(order[first : first + self.batch_size].tolist(), epoch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return `batch` with its tensors on `device`; a GPU copies them from pinned memory, without waiting."""
    pin = device.type == "cuda"
    return {
        key: (value.pin_memory() if pin else value).to(device, non_blocking=pin) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def eval_jobs(num_samples: int, batch_size: int, shard: Shard = Shard()) -> Iterator[Job]:
    """Yield the batches of this process; all processes together see every sample once."""
    for first in range(shard.rank * batch_size, num_samples, batch_size * shard.count):
        yield Job(list(range(first, min(first + batch_size, num_samples))))


class Loader:
    """Makes batches here or in worker processes, and puts them on the device.

    Args:
        samples: What to load from.
        collate: `Task.collate`.
        seed: `trainer.seed`.
        device: Where the batches are wanted; for a GPU they are copied from pinned memory, without waiting.
        num_workers: Processes; 0 makes the batches in this one, as a `BatchSet` always does. Workers live until the
            loader is closed.
    """

    def __init__(
        self, samples: SampleSet, collate: Collate, seed: int, device: torch.device, num_workers: int = 0
    ) -> None:
        self._batches = _Batches(samples, collate, seed)
        self.samples, self._device = samples, device
        self._queue = _Queue()
        self._workers: DataLoader[Any] | None = None
        if num_workers and not isinstance(samples, BatchSet):
            self._workers = DataLoader(
                self._batches,
                sampler=self._queue,
                batch_size=None,
                collate_fn=_same,
                num_workers=num_workers,
                pin_memory=device.type == "cuda",
                persistent_workers=True,
                worker_init_fn=_leave_group,
                generator=torch.Generator(),  # else the global generator is drawn from, at a different place if resumed
            )

    def run(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Batch]]:
        """Yield (job, its batch on the device), in order.

        Raises:
            UserError: what a sample set says of a bad sample, also from a worker.
        """
        if isinstance(self.samples, BatchSet):
            for job in jobs:
                yield job, self._on_device(self.samples, job)
            return
        if self._workers is None:
            for job in jobs:
                yield self._deliver(self._batches[job])
            return
        self._queue.jobs = jobs
        for made in self._workers:
            yield self._deliver(made)

    def close(self) -> None:
        """End the worker processes."""
        if self._workers is not None:
            self._workers._iterator = None
            self._workers = None

    def _on_device(self, samples: BatchSet, job: Job) -> Batch:
        if job.epoch is None:
            return samples.batch(job.indices, None, None, self._device)
        seed = self._batches.seed
        draw = torch.Generator().manual_seed(derive_seed(seed, MIX, job.epoch, job.indices[0]))
        return samples.batch(job.indices, derive_seed(seed, SAMPLE, job.epoch), draw, self._device)

    def _deliver(self, made: tuple[Job, Batch] | UserError) -> tuple[Job, Batch]:
        if isinstance(made, UserError):
            raise made
        job, batch = made
        return job, batch if self._device.type == "cpu" else to_device(batch, self._device)


class _Batches(Dataset[Any]):
    """Batches by job, for a DataLoader; a UserError is handed over as it is, without a worker's traceback."""

    def __init__(self, samples: SampleSet, collate: Collate, seed: int) -> None:
        self.samples, self.collate, self.seed = samples, collate, seed

    def __getitem__(self, job: Job) -> tuple[Job, Batch] | UserError:
        try:
            return job, make_batch(self.samples, self.collate, self.seed, job)
        except UserError as error:
            return error


class _Queue(Sampler[Job]):
    """The jobs of the pass that is about to start."""

    jobs: Iterator[Job] = iter(())

    def __iter__(self) -> Iterator[Job]:
        return self.jobs


def _same(made: Any) -> Any:
    return made


def _leave_group(worker: int) -> None:
    """Keep Ctrl-C, and signals to the process group, from a worker: the process that trains saves first."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
