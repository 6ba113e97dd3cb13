"""Sequences in other forms than one id a base: counts of k-mers, tokens of k-mers, one column a base and place.

The number of a k-mer reads its letters as digits of base 4 (A 0, C 1, G 2, T 3), the first the most significant. Its
token is 16 more: ids below are those of tokens.py, so specials and single bases are the same in all vocabularies.

    kmer_tokens          GATTACAGATNT -> GATTAC A G A T N T     one after the other; single bases at N and at the end
    overlapping_tokens   GATTACAG     -> GATTAC ATTACA TTACAG   one at each base; [UNK] where one would touch N

Source: Dalla-Torre et al. 2024, "Nucleotide Transformer" (the first, k = 6); Ji et al. 2021, "DNABERT" (the second,
k = 3 to 6). Which number a k-mer has is ours: the vocabulary files of theirs order letters and specials otherwise, so
their weights need a map by name, `decode_kmers`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

from mambaverse.errors import UserError
from mambaverse.tasks.dna.tokens import UNK, VOCAB_SIZE, A, N, T, decode, is_base

MAX_K = 12  # 4^12 columns still fit into a sparse matrix with small indices


def kmer_numbers(ids: np.ndarray, k: int) -> np.ndarray:
    """Return the number of each k-mer of ids (L,), int64 (L - k + 1,) less those that touch an N.

    Raises:
        UserError: k below 1 or above 12.
    """
    numbers = _all_numbers(ids, _checked(k))
    return numbers[numbers >= 0]


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


def kmer_vocab_size(k: int) -> int:
    """Return the number of ids: 16 of single bases and specials, and 4^k."""
    return VOCAB_SIZE + 4 ** _checked(k)


def kmer_tokens(ids: np.ndarray, k: int = 6) -> np.ndarray:
    """Return tokens, int64 (M,), of ids (L,): k bases each, from the left; single ones at N and where fewer are left.

    M is L / k for a sequence without N whose length is a multiple of k; one base more moves all k-mers behind it.

    Raises:
        UserError: k below 1 or above 12.
    """
    numbers = _all_numbers(ids, _checked(k))
    known = np.concatenate([[False], is_base(ids), [False]])
    edges = np.flatnonzero(known[1:] != known[:-1])  # where stretches of bases begin and end, in turn
    tokens = ids.astype(np.int64)
    kept = np.ones(len(ids), bool)
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        whole = end - (end - start) % k
        tokens[start:whole:k] = VOCAB_SIZE + numbers[start:whole:k]
        kept[start:whole] = np.arange(whole - start) % k == 0
    return tokens[kept]


def overlapping_tokens(ids: np.ndarray, k: int = 6) -> np.ndarray:
    """Return tokens, int64 (L - k + 1,), of ids (L,): the k bases from each place on; [UNK] if one of them is no base.

    Raises:
        UserError: k below 1 or above 12.
    """
    numbers = _all_numbers(ids, _checked(k))
    return np.where(numbers < 0, UNK, VOCAB_SIZE + numbers)


def decode_kmers(tokens: np.ndarray, k: int) -> list[str]:
    """Return the letters of each token (M,), the names of specials."""
    names = []
    for token in np.asarray(tokens).tolist():
        number = token - VOCAB_SIZE
        digits = [number >> 2 * (k - 1 - i) & 3 for i in range(k)] if number >= 0 else []
        names.append(decode(np.array(digits) + A) if digits else decode(np.array([token])))
    return names


def one_hot(ids: np.ndarray, *, channels_first: bool = False, unknown: float = 0.0) -> np.ndarray:
    """Return one column a base, in the order A, C, G, T.

    Args:
        ids: (..., L).
        channels_first: (..., 4, L), as convolutions want it, rather than (..., L, 4).
        unknown: What all four columns of an N are: 0, or 0.25 for "any of them". Padding and specials are 0 always.

    Returns:
        float32 (..., L, 4) or (..., 4, L), contiguous.
    """
    table = np.eye(VOCAB_SIZE, dtype=np.float32)[:, A : T + 1].copy()
    table[N] = unknown
    columns = table[ids]
    return np.ascontiguousarray(np.swapaxes(columns, -1, -2)) if channels_first else columns


def _checked(k: int) -> int:
    if not 1 <= k <= MAX_K:
        raise UserError(f"k-mers: expected k from 1 to {MAX_K}, got {k}")
    return k


def _all_numbers(ids: np.ndarray, k: int) -> np.ndarray:
    """Return the number of the k-mer at each place, int64 (L - k + 1,); -1 where it touches what is no base."""
    if len(ids) < k:
        return np.empty(0, np.int64)
    digits, known = ids.astype(np.int64) - A, is_base(ids)  # digits 0 to 3
    count = len(ids) - k + 1
    numbers, whole = np.zeros(count, np.int64), np.ones(count, bool)
    for i in range(k):
        numbers = 4 * numbers + digits[i : i + count]
        whole &= known[i : i + count]
    return np.where(whole, numbers, -1)
