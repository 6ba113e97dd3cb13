"""How `ssd` cuts sequences into chunks: what the operator, its fakes and its backends agree on; imports torch only.

A sequence of L positions becomes K = ceil(L / chunk_size) chunks of ceil(L / K) positions (the last may be shorter), in
the order of the recurrence: with `reverse` the first chunk holds the last positions. On a GPU chunks are as long as the
kernels take them, from a sequence's first position on, whatever chunk_size is.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.launch import power_of_2

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_COLUMNS = 16 if _INTERPRETED else 64
# Positions between the states that Triton's backward needs, one for each of its chunks. Forward keeps them all, but of
# a long sequence, where they would be most of the memory, every TRITON_FAR-th position's: backward works those between
# out again, for a piece of the length at a time.
TRITON_KEEP = 16 if _INTERPRETED else 64
TRITON_FAR, TRITON_LONG = (32, 70) if _INTERPRETED else (2048, 32768)
PAD = 16  # sides of the CPU's tiles and saved states are padded to a multiple of this: the widest SIMD register


def cpu_chunk_size(state_dim: int) -> int:
    """Return the chunk_size where the caller leaves it to us: N + 16, but at least 48 and at most 128.

    Longer chunks spend more on the products inside them, shorter ones on carrying states. Times of forward + backward
    in ms by chunk_size, one thread of an AVX-512 Xeon:

        B, L, H, P, N         48     64     80     96    128    192
        2, 1024, 8, 16, 16   3.8    4.0    4.2    4.5    4.7    5.6
        16, 197, 12, 64, 64   45     44     42     42     39     39
        1, 2048, 24, 64, 128  89     96     91     77     77     82
    """
    return min(max(state_dim + PAD, 48), 128)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up; also for symbolic sizes."""
    return (a + b - 1) // b


def state_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of every state: float32, or float64 if x is float64."""
    return torch.promote_types(x.dtype, torch.float32)


def boundary_states(
    x: Tensor, B: Tensor, cu_seqlens: Tensor | None, chunk_size: int, backend: str
) -> tuple[Any, int, int, int]:
    """Return the shape of the states at the boundaries between chunks, which `backend` keeps for backward.

    Args:
        x: (B, L, H, P).
        B: (B, L, G, N).
        cu_seqlens: (S+1,) or None.
        chunk_size: As given, or 0 for the rule.
        backend: One of `kernels.backend.BACKENDS`.

    Returns:
        (boundaries, H, N, P), or (boundaries, H, P, N) on Triton, the last two padded. With `cu_seqlens` the first is
        the most that any values need. The reference keeps none.
    """
    if backend == "reference" or x.dtype == torch.float64:
        return 0, 0, 0, 0
    batch, length, heads, head_dim = x.shape
    if _on_triton(x, backend):
        count = length // TRITON_KEEP if cu_seqlens is not None else batch * triton_boundaries(length)
        block_p, block_n = triton_tile(B.shape[3])
        return count, heads, ceil_div(head_dim, block_p) * block_p, block_n
    size = chunk_size or cpu_chunk_size(B.shape[3])
    count = length // size if cu_seqlens is not None else batch * (torch.sym_max(length - 1, 0) // size)
    return count, heads, ceil_div(B.shape[3], PAD) * PAD, ceil_div(head_dim, PAD) * PAD


def boundary_dtype(x: Tensor, backend: str) -> torch.dtype:
    """Return the dtype of what `boundary_states` describes: bfloat16 where Triton multiplies in it."""
    if _on_triton(x, backend) and x.dtype != torch.float64:
        return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    return state_dtype(x)


def triton_boundaries(length: Any) -> Any:
    """Return how many states Triton keeps of a sequence that is not packed: none at either end."""
    return torch.sym_max(length - 1, 0) // triton_keep(length)


def triton_keep(length: Any) -> int:
    """Return the positions from one state that Triton keeps of a sequence that is not packed to the next."""
    return TRITON_FAR if length >= TRITON_LONG else TRITON_KEEP


def triton_tile(state_dim: int) -> tuple[int, int]:
    """Return the tile of a state that a Triton program holds: 64 columns of x, and all of N.

    Backward's bfloat16 products of tiles with fewer columns came out wrong (Triton 3.6, sm_90).
    """
    return TRITON_COLUMNS, max(16, power_of_2(state_dim))


def _on_triton(x: Tensor, backend: str) -> bool:
    return backend == "triton" or (backend == "auto" and x.device.type == "cuda")
