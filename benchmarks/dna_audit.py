"""How long the leakage audit takes, what memory it needs, and what it finds of copies that were planted.

python benchmarks/dna_audit.py [--sequences 200000] [--length 300] [--threads 2]

Four in five sequences are for training. A tenth of all hold 200 bases of a repeat with 15 % of its bases changed, as a
genome would. 1,000 queries of each kind are changed copies of training sequences, a half of them from the other strand.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch

from mambaverse.tasks.dna.audit import SIMILARITY, audit_sets
from mambaverse.tasks.dna.sequences import Sequences
from mambaverse.tasks.dna.tokens import A, reverse_complement_ids

PLANTED = 1_000  # queries of each kind
KINDS = ("exact", "2 % changed", "5 % changed", "10 % changed", "moved by a third", "moved by two thirds")


def mutated(ids: np.ndarray, share: float, draw: np.random.Generator) -> np.ndarray:
    """Return ids with a share of the bases replaced by another one."""
    other = (ids - A + draw.integers(1, 4, len(ids), dtype=np.uint8)) % 4 + A
    return np.where(draw.random(len(ids)) < share, other, ids).astype(np.uint8)


def copy(kind: int, ids: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Return a copy of one of `KINDS`."""
    if kind < 4:
        return mutated(ids, (0.0, 0.02, 0.05, 0.1)[kind], draw)
    gone = len(ids) * (kind - 3) // 3
    return np.concatenate([ids[gone:], draw.integers(A, A + 4, gone, dtype=np.uint8)])


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=200_000)
    parser.add_argument("--length", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count, length, draw = arguments.sequences, arguments.length, np.random.default_rng(0)
    rows = draw.integers(A, A + 4, (count, length), dtype=np.uint8)
    repeat = draw.integers(A, A + 4, 200, dtype=np.uint8)
    for row in np.flatnonzero(draw.random(count) < 0.1) if length >= 200 else ():
        at = draw.integers(length - 199)
        rows[row, at : at + 200] = mutated(repeat, 0.15, draw)
    num_train = count * 4 // 5
    train, queries = list(rows[:num_train]), list(rows[num_train:])
    for i in range(PLANTED * len(KINDS)):
        ids = copy(i // PLANTED, train[i], draw)
        queries[i] = reverse_complement_ids(ids) if i % 2 else ids
    sets = [Sequences(part, np.zeros(len(part), int), [str(i) for i in range(len(part))]) for part in (train, queries)]
    for run in ("first", "second"):
        start = time.perf_counter()
        audit = audit_sets(sets[0], {"test": sets[1]}, ["any"])
        print(f"{run} call: {time.perf_counter() - start:.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{count:,} sequences of {length} bases, {arguments.threads} threads, peak {peak:.2f} GiB; {audit.line()}")
    found = {(int(pair.name), int(pair.other)) for pair in audit.pairs}
    for kind, name in enumerate(KINDS):
        planted = range(kind * PLANTED, (kind + 1) * PLANTED)
        print(f"{name:20s} found {sum((i, i) in found for i in planted) / PLANTED:.1%}")
    others = {query for query, _ in found if query >= PLANTED * len(KINDS)}
    print(f"queries without a copy that were reported at {SIMILARITY:.0%}: {len(others):,}")


if __name__ == "__main__":
    main()
