"""Shapes, dtypes and positions that the operator, its fakes and its backends agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 32  # steps between two states kept for backward: memory N / 32 of u; at 64 its rows no longer fit in L1

TRITON_CHUNK = 8 if os.environ.get("TRITON_INTERPRET") == "1" else 32  # on the GPU, see docs/gpu_selective_scan.md


def state_dtype(u: Tensor, A: Tensor) -> torch.dtype:
    """Return the dtype of every state: float32, or float64 if u is float64, and complex of that precision if A is."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    return dtype.to_complex() if A.is_complex() else dtype


def num_chunk_states(u: Tensor, backend: str, save: bool) -> int:
    """Return how many states forward keeps for backward; what is in them is a matter of the backend.

    The state that chunk c >= 1 of a sequence starts from is in row `b * (L // CHUNK) + start // CHUNK + c - 1`, where
    the sequence is batch element b from position `start`: a sequence of length n has (n - 1) // CHUNK of them, so rows
    of neighbours never meet.
    """
    if not save or backend == "reference" or u.dtype == torch.float64:
        return 0
    on_gpu = backend == "triton" or (backend == "auto" and u.device.type == "cuda")
    return u.shape[0] * (u.shape[1] // (TRITON_CHUNK if on_gpu else CHUNK))


def spans(u: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of the states and the positions of every run of the recurrence: one for a dense batch."""
    if cu_seqlens is None:
        yield slice(None), slice(0, u.shape[1])
        return
    offsets = cu_seqlens.tolist()
    for s, (start, end) in enumerate(pairwise(offsets)):
        yield slice(s, s + 1), slice(start, end)
