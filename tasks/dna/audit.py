"""Leakage between the sets of a DNA run: copies, overlaps and near neighbours of training sequences, on either strand.

- exact copies: the same letters, or those of the other strand
- copies of another label: such copies that training calls something else
- overlaps, and overlaps of half or more: places in a genome, strands ignored; of data sets that know places
- near neighbours: no copies, and at least `SIMILARITY` of the k-mers of one are in the other (see sketch.py)
- repeated sequences, contradictions: within the training set, copies of earlier rows, and rows that have a copy of
  another label

Whole sequences are compared, whatever windows of them a model sees. A base in 50 changed leaves 0.98^12 = 78 % of the
12-mers, one in 20 leaves 54 %; half of a sequence moved along a genome leaves a little less than half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from mambaverse.config import ConfigError
from mambaverse.engine.audit import Audit, Leak, Pair
from mambaverse.tasks.dna.places import overlaps
from mambaverse.tasks.dna.sequences import OTHER, Sequences
from mambaverse.tasks.dna.sketch import FEWEST, neighbours

SIMILARITY = 0.5  # containment from which on sequences are near neighbours


def audit_sets(
    train: Sequences, others: dict[str, Sequences], classes: Sequence[str], similarity: float | None = None
) -> Audit:
    """Compare each of `others` with the training sequences.

    Args:
        train: What is learnt from.
        others: The other sets by name, "eval" and "test".
        classes: Names of the labels.
        similarity: From which containment on sequences are near neighbours; None: `SIMILARITY`.

    Raises:
        ConfigError: a similarity that is not above 0 and at most 1.
    """
    least = SIMILARITY if similarity is None else similarity
    if not 0 < least <= 1:
        raise ConfigError(f"--similarity: expected a number above 0, at most 1, got {least:g}")
    audit, seen = Audit(), _digests(train)
    first: dict[bytes, int] = {}  # row of each kind of sequence
    labels: dict[bytes, set[int]] = {}
    for row, digest in enumerate(seen):
        first.setdefault(digest, row)
        labels.setdefault(digest, set()).add(int(train.labels[row]))
    _within(train, seen, first, classes, audit)
    for name, part in others.items():
        _between(name, train, part, first, labels, classes, least, audit)
    return audit


def _within(train: Sequences, seen: list[bytes], first: dict[bytes, int], classes: Sequence[str], audit: Audit) -> None:
    """Find copies inside of the training set."""
    labels = train.labels
    repeated = [row for row, digest in enumerate(seen) if first[digest] != row]
    mixed = {seen[row] for row in repeated if labels[row] != labels[first[seen[row]]]}
    torn = [row for row, digest in enumerate(seen) if digest in mixed]
    audit.leaks += [
        Leak("train", "repeated sequences", len(repeated), len(train)),
        Leak("train", "contradicting labels", len(torn), len(train)),
    ]
    for row in repeated:  # the first of each group is compared with all others
        if labels[row] != labels[other := first[seen[row]]]:
            audit.pairs.append(_pair("train", "contradicting labels", train, row, train, other, classes, 1.0))


def _between(
    name: str,
    train: Sequences,
    part: Sequences,
    first: dict[bytes, int],
    labels: dict[bytes, set[int]],
    classes: Sequence[str],
    least: float,
    audit: Audit,
) -> None:
    """Find what a set has in common with the training set."""
    digests = _digests(part)
    copied = np.array([digest in first for digest in digests], bool)
    other = np.array([first.get(digest, -1) for digest in digests], np.int64)
    torn = [row for row, digest in enumerate(digests) if labels.get(digest, set()) - {int(part.labels[row])}]
    found: dict[str, list[tuple[int, int, float]]] = {
        "exact copies": [(row, int(other[row]), 1.0) for row in np.flatnonzero(copied).tolist()],
    }
    counts = {"exact copies": int(copied.sum()), "copies of another label": len(torn)}
    if train.places is not None and part.places is not None:
        where = overlaps(train.places, part.places)
        rows = np.flatnonzero(where.rows >= 0).tolist()
        found["overlaps"] = [(row, int(where.rows[row]), float(where.shares[row])) for row in rows]
        counts["overlaps"], counts["overlaps of half or more"] = len(rows), int((where.shares >= 0.5).sum())
    near = neighbours(train, part, least)
    alike = np.flatnonzero((near.count > 0) & ~copied).tolist()
    kind = f"near neighbours ({least:.0%})"
    counts[kind] = len(alike)
    found[kind] = [
        (row, int(train_row), float(value))
        for row in alike
        for train_row, value in zip(near.rows[row], near.containment[row], strict=True)
        if train_row >= 0
    ]
    audit.leaks += [Leak(name, finding, count, len(part)) for finding, count in counts.items()]
    for finding, rows_found in found.items():
        audit.pairs += [_pair(name, finding, part, a, train, b, classes, value) for a, b, value in rows_found]
    if few := int((near.count < 0).sum()):
        audit.notes.append(f"{few:,} of {name} not searched for neighbours: fewer than {FEWEST} distinct k-mers")
    if cut := int(near.cut.sum()):
        audit.notes.append(f"{cut:,} of {name} searched in part: only by the seeds that few training sequences have")


def _digests(sequences: Sequences) -> list[bytes]:
    """Return a hash of each sequence that its other strand has too."""
    data, bounds = sequences.data.tobytes(), sequences.bounds
    found = []
    for start, end in pairwise(bounds):
        letters = data[start:end]
        strand = letters.translate(OTHER)[::-1]
        found.append(hashlib.blake2b(min(letters, strand), digest_size=16).digest())
    return found


def _pair(
    name: str,
    finding: str,
    part: Sequences,
    row: int,
    train: Sequences,
    other: int,
    classes: Sequence[str],
    value: float,
) -> Pair:
    label, other_label = classes[part.labels[row]], classes[train.labels[other]]
    return Pair(name, finding, part.names[row], label, train.names[other], other_label, value)
