"""Shapes, dtypes and positions that the operator, its fakes and its backends agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 32  # steps between two states kept for backward: memory N / 32 of u; at 64 its rows no longer fit in L1

# On the GPU, the steps of backward's tile: nothing is computed again. See docs/gpu_selective_scan.md.
TRITON_CHUNK = 4 if os.environ.get("TRITON_INTERPRET") == "1" else 8
TRITON_KEPT = 16  # states a channel, beyond which the GPU's backward finds the states by a second forward pass


def state_dtype(u: Tensor, A: Tensor) -> torch.dtype:
    """Return the dtype of every state: float32, or float64 if u is float64, and complex of that precision if A is."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    return dtype.to_complex() if A.is_complex() else dtype


def on_gpu(u: Tensor, backend: str) -> bool:
    """Return whether a call with this backend runs on Triton's kernels."""
    return u.dtype != torch.float64 and (backend == "triton" or (backend == "auto" and u.device.type == "cuda"))


def chunk_state_dtype(u: Tensor, A: Tensor, backend: str) -> torch.dtype:
    """Return the dtype of the states kept for backward: on the GPU beside bfloat16 that, else `state_dtype`.

    They enter only gradients, which are rounded to bfloat16 themselves.
    """
    return torch.bfloat16 if on_gpu(u, backend) and u.dtype == torch.bfloat16 else state_dtype(u, A)


def keeps_states(u: Tensor, A: Tensor, backend: str, save: bool) -> bool:
    """Return whether forward keeps states for backward, which else runs it once more."""
    return save and not (on_gpu(u, backend) and A.shape[1] > TRITON_KEPT)


def num_chunk_states(u: Tensor, backend: str, save: bool) -> int:
    """Return how many states backward needs; what is in them is a matter of the backend. None unless `save`.

    The state that chunk c >= 1 of a sequence starts from is in row `b * (L // CHUNK) + start // CHUNK + c - 1`, where
    the sequence is batch element b from position `start`: a sequence of length n has (n - 1) // CHUNK of them, so rows
    of neighbours never meet.
    """
    if not save or backend == "reference" or u.dtype == torch.float64:
        return 0
    return u.shape[0] * (u.shape[1] // (TRITON_CHUNK if on_gpu(u, backend) else CHUNK))


def spans(u: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of the states and the positions of every run of the recurrence: one for a dense batch."""
    if cu_seqlens is None:
        yield slice(None), slice(0, u.shape[1])
        return
    offsets = cu_seqlens.tolist()
    for s, (start, end) in enumerate(pairwise(offsets)):
        yield slice(s, s + 1), slice(start, end)
