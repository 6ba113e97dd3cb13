from __future__ import annotations

from typing import Any

import pytest
import torch

from mambaverse.engine.data import SAMPLE, Job, Loader, Shard, TrainPlan, derive_seed, eval_jobs, make_batch
from mambaverse.errors import UserError
from tests.engine.toy import Sectors, Toy, toy_config


def _toy(tmp_path: Any, *overrides: str) -> Toy:
    task = Toy(toy_config(tmp_path, *overrides))
    task.setup()
    return task


def _loader(task: Toy, num_workers: int = 0) -> Loader:
    return Loader(task.train_set, task.collate, 7, torch.device("cpu"), num_workers)


def test_seeds_of_different_paths_differ() -> None:
    seeds = {derive_seed(s, SAMPLE, e, i) for s in range(3) for e in range(10) for i in range(100)}
    assert len(seeds) == 3000
    assert derive_seed(0, 1, 2) == derive_seed(0, 1, 2) != derive_seed(0, 2, 1)


def test_an_epoch_sees_each_sample_at_most_once_and_another_order_each_time() -> None:
    plan = TrainPlan(100, 16, seed=0)
    first, second = ([i for job in plan.jobs(epoch) for i in job.indices] for epoch in (0, 1))
    assert len(first) == len(set(first)) == plan.num_batches * 16 == 96
    assert first != second


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "processes"),
    [(64, 8, 1), (64, 4, 2), (67, 4, 2), (67, 3, 4), (5, 16, 2)],  # whole, shared, ragged, odd, smaller than a batch
)
def test_processes_together_see_what_one_sees_with_their_batches_joined(
    num_samples: int, batch_size: int, processes: int
) -> None:
    plans = [TrainPlan(num_samples, batch_size, 3, Shard(rank, processes)) for rank in range(processes)]
    joined = TrainPlan(num_samples, batch_size * processes, 3)
    expected = [job.indices for job in joined.jobs(2)][: plans[0].num_batches]
    shared = [[i for job in jobs for i in job.indices] for jobs in zip(*(p.jobs(2) for p in plans), strict=True)]
    if num_samples >= batch_size * processes:
        assert shared == expected
    else:  # one batch of equal shares
        assert shared == [expected[0][: num_samples // processes * processes]]


def test_more_processes_than_samples_are_refused() -> None:
    with pytest.raises(UserError, match="1 samples are too few for 2 processes"):
        TrainPlan(1, 4, 0, Shard(0, 2))


def test_an_epoch_entered_in_the_middle_goes_on_as_if_from_its_start(tmp_path: Any) -> None:
    task = _toy(tmp_path)
    plan = TrainPlan(100, 16, seed=7)
    whole = list(_loader(task).run(plan.jobs(1)))
    part = list(_loader(task).run(plan.jobs(1, start=4)))
    assert [job for job, _ in part] == [job for job, _ in whole[4:]]
    for (_, left), (_, right) in zip(whole[4:], part, strict=True):
        assert torch.equal(left["point"], right["point"])


def test_entering_an_epoch_late_reads_no_sample_before(tmp_path: Any) -> None:
    task = _toy(tmp_path)
    read: list[int] = []

    class Counting(Sectors):
        def sample(self, index: int, generator: torch.Generator | None) -> Any:
            read.append(index)
            return super().sample(index, generator)

    loader = Loader(Counting(100, 1), task.collate, 7, torch.device("cpu"))
    list(loader.run(TrainPlan(100, 16, seed=7).jobs(0, start=5)))
    assert len(read) == 16


def test_batches_do_not_depend_on_workers_and_leave_the_global_generator_alone(tmp_path: Any) -> None:
    task = _toy(tmp_path)
    plan = TrainPlan(100, 16, seed=7)
    before = torch.get_rng_state()
    workers = _loader(task, num_workers=2)
    try:
        for epoch in (0, 1):  # the second pass goes through the same worker processes
            here = list(_loader(task).run(plan.jobs(epoch)))
            there = list(workers.run(plan.jobs(epoch)))
            assert [job for job, _ in here] == [job for job, _ in there]
            for (_, left), (_, right) in zip(here, there, strict=True):
                assert torch.equal(left["point"], right["point"])
    finally:
        workers.close()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_sample_is_one_line_from_a_worker_too(tmp_path: Any, num_workers: int) -> None:
    loader = _loader(_toy(tmp_path, "data.bad=3"), num_workers)
    with pytest.raises(UserError) as error:
        list(loader.run(iter([Job([1, 2, 3], epoch=0)])))
    loader.close()
    assert str(error.value) == "sample 3 is truncated"


def test_samples_are_not_augmented_in_evaluation(tmp_path: Any) -> None:
    task = _toy(tmp_path)
    batch = make_batch(task.train_set, task.collate, 7, Job([0, 1, 2]))
    assert torch.equal(batch["point"], task.train_set.points[:3])


@pytest.mark.parametrize(("num_samples", "processes"), [(50, 1), (50, 2), (33, 2), (1, 2)])  # ragged, and none for one
def test_evaluation_counts_every_sample_once(num_samples: int, processes: int) -> None:
    jobs = [job for rank in range(processes) for job in eval_jobs(num_samples, 8, Shard(rank, processes))]
    assert sorted(i for job in jobs for i in job.indices) == list(range(num_samples))
    assert all(0 < len(job.indices) <= 8 for job in jobs)


class Growing:
    """As many numbers in a sample as epochs have passed."""

    def __init__(self, size: int = 0) -> None:
        self.size = size

    def __len__(self) -> int:
        return 8

    def of_epoch(self, epoch: int) -> Growing:
        return Growing(epoch)

    def sample(self, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        return {
            "x": torch.full((self.size,), index) if generator is None else torch.rand(self.size, generator=generator)
        }


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_set_that_changes_from_epoch_to_epoch_follows_the_epoch_of_the_job(num_workers: int) -> None:
    def shape(indices: list[int], epoch: int | None) -> tuple[int, ...]:
        loader = Loader(Growing(), _joined, 0, torch.device("cpu"), num_workers)
        found = [tuple(batch["x"].shape) for _, batch in loader.run(iter([Job(indices, epoch)]))]
        loader.close()
        return found[0]

    assert [shape([1, 2], epoch) for epoch in (3, 5, 3, None)] == [(2, 3), (2, 5), (2, 3), (2, 0)]


def _joined(samples: Any, generator: torch.Generator | None) -> dict[str, Any]:
    return {"x": torch.stack([sample["x"] for sample in samples])}
