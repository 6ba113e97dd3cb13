"""Times what feeds a DNA model: batches of 250-base windows by the engine's own path, and the reverse complement.

python benchmarks/dna_loader.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from mambaverse.config import compose
from mambaverse.engine.data import SAMPLE, TrainPlan, derive_seed, eval_jobs, make_batch
from mambaverse.engine.task import TASKS
from mambaverse.tasks.dna.tokens import encode, reverse_complement

REPEAT = 5


def best(run: Callable[[], object]) -> float:
    """Return the shortest of some runs, in seconds."""
    times = []
    for _ in range(REPEAT):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    for title, overrides in {
        "windows": (),
        "windows, other strand": ("data.reverse_complement=0.5",),
        "windows, other strand, mutated": ("data.reverse_complement=0.5", "data.mutate=0.05"),
    }.items():
        config = compose("dna/rrna16s", ["data.batch_size=64", *overrides])
        task = TASKS.get("dna")(config)
        task.setup()
        plan = TrainPlan(len(task.train_set), 64, 0)

        def epoch(task=task, plan=plan) -> None:
            for job in plan.jobs(0):
                make_batch(task.train_set, task.collate, 0, job)

        count = plan.num_batches * 64
        print(f"training, {title}: {count / best(epoch):,.0f} sequences/s")

    def evaluation() -> None:
        for job in eval_jobs(len(task.train_set), 64):
            make_batch(task.train_set, task.collate, 0, job)

    print(f"evaluation: {len(task.train_set) / best(evaluation):,.0f} sequences/s")
    draw = torch.Generator()
    seeds = best(lambda: [draw.manual_seed(derive_seed(0, SAMPLE, 0, i)) for i in range(4000)]) / 4000
    print(f"of that, seeding one generator a sample: {1e6 * seeds:.1f} us, so at most {1 / seeds:,.0f} sequences/s")
    letters = np.random.default_rng(0).choice(np.frombuffer(b"ACGTN", np.uint8), 1_000_000).tobytes()
    print(f"reverse complement of 1 Mb: {1e3 * best(lambda: reverse_complement(letters)):.2f} ms")
    print(f"ids of 1 Mb: {1e3 * best(lambda: encode(letters)):.2f} ms")


if __name__ == "__main__":
    main()
