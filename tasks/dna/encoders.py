"""Sequences as fixed vectors, for what is no network: counts of k-mers, and one column a base and place.

The number of a k-mer reads its letters as digits of base 4 (A 0, C 1, G 2, T 3), the first the most significant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

from mambaverse.errors import UserError
from mambaverse.tasks.dna.tokens import A, N, T

MAX_K = 12  # 4^12 columns still fit into a sparse matrix with small indices


def kmer_numbers(ids: np.ndarray, k: int) -> np.ndarray:
    """Return the number of each k-mer of ids (L,), int64 (L - k + 1,) less those that touch an N.

    Raises:
        UserError: k below 1 or above 12.
    """
    if not 1 <= k <= MAX_K:
        raise UserError(f"k-mers: expected k from 1 to {MAX_K}, got {k}")
    if len(ids) < k:
        return np.empty(0, np.int64)
    digits = ids.astype(np.int64) - A  # 0 to 3
    known = (ids >= A) & (ids <= T)
    count = len(ids) - k + 1
    numbers, whole = np.zeros(count, np.int64), np.ones(count, bool)
    for i in range(k):
        numbers = 4 * numbers + digits[i : i + count]
        whole &= known[i : i + count]
    return numbers[whole]


def kmers(sequences: Sequence[np.ndarray], sizes: Sequence[int], *, binary: bool = False) -> csr_matrix:
    """Return the counts of all k-mers of the given sizes, float32 (sequences, Σ 4^k), sizes side by side.

    Args:
        sequences: Ids (L,) each.
        sizes: The values of k.
        binary: 1 for a k-mer that occurs, whatever its count.
    """
    offsets = np.concatenate([[0], np.cumsum([4**k for k in sizes])])
    columns, values, bounds = [], [], [0]
    for ids in sequences:
        numbers = np.concatenate([kmer_numbers(ids, k) + start for k, start in zip(sizes, offsets[:-1], strict=True)])
        kinds, counts = np.unique(numbers, return_counts=True)
        columns.append(kinds)
        values.append(np.ones(len(kinds)) if binary else counts)
        bounds.append(bounds[-1] + len(kinds))
    shape = (len(bounds) - 1, int(offsets[-1]))
    if not columns:
        return csr_matrix(shape, dtype=np.float32)
    return csr_matrix((np.concatenate(values).astype(np.float32), np.concatenate(columns), bounds), shape=shape)


def one_hot(ids: np.ndarray) -> np.ndarray:
    """Return float32 (..., L, 4) in the order A, C, G, T for ids (..., L); N and all that is no base are zeros."""
    return np.eye(N + 1, dtype=np.float32)[np.minimum(ids, N)][..., A : T + 1]
