"""How the CPU kernels of selective_scan see B, C and states, and how their work is split into items."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambaverse.kernels.rows import as_array, dense, flat_rows
from mambaverse.kernels.simd import LANES

WIDTH = 64  # channels that one work item walks through a sequence with
STRIP = 2 * LANES  # channels whose rows backward has in buffers at a time: CHUNK rows of all of them fit in L1
STEPS = 16  # steps whose rows lie in buffers at a time in forward; a divisor of shapes.CHUNK
BOUND = 125.9  # |Δ rate| up to which a = 2^(Δ rate) needs no clamp
ITEMS_PER_THREAD = 4  # what forward aims at: fewer read longer rows, more keep all threads busy to the end
UPDATES_PER_CALL = 1 << 18  # state updates that are worth a call from Python: about 0.1 ms
BACKWARD_ITEMS = 16  # what the partition of backward aims at: more are more parallel, fewer read longer rows

_NOTHING = np.empty(0, np.float32)
_NO_OFFSETS = np.empty(0, np.int64)


def num_groups(B: Tensor) -> int:
    """Return G of B (B, L, N) or (B, L, G, N)."""
    return B.shape[2] if B.ndim == 4 else 1


def num_blocks(dim: int, groups: int) -> int:
    """Return how many blocks of WIDTH channels a group has; a block never spans two groups."""
    return -(-(dim // groups) // WIDTH)


def partition(sequences: int, dim: int, groups: int, state_dim: int) -> tuple[int, int]:
    """Return into how many parts backward splits the sequences and the channels of a group.

    A function of the shape alone, so that sums do not depend on the number of threads. Each part of the channels has
    its own dB and dC; the bound keeps their memory below that of u.
    """
    seq_parts = max(1, min(sequences, BACKWARD_ITEMS))
    wanted = -(-BACKWARD_ITEMS // (seq_parts * groups))
    most, blocks = max(1, min(wanted, dim // (groups * state_dim))), num_blocks(dim, groups)
    return seq_parts, max(1, -(-blocks // -(-blocks // most)))


def forward_parts(sequences: int, dim: int, groups: int) -> int:
    """Return into how many parts forward splits the channels of a group; no result depends on it."""
    wanted = ITEMS_PER_THREAD * torch.get_num_threads()
    return max(1, min(num_blocks(dim, groups), -(-wanted // max(sequences * groups, 1))))


def grain(updates_per_item: int) -> int:
    """Return how many items of that many state updates one call of a kernel should at least work on."""
    return max(1, UPDATES_PER_CALL // max(updates_per_item, 1))


def rows(x: Tensor | None) -> tuple[Any, tuple[int, ...]]:
    """Return the memory of x (B, L, D) and its two outer strides; nothing for None."""
    if x is None:
        return _NOTHING, (0, 0)
    memory, *strides = flat_rows(x)
    return memory, tuple(strides)


def grouped_rows(B: Tensor, dtype: torch.dtype) -> tuple[Any, tuple[int, ...]]:
    """Return the memory of B (B, L, N) or (B, L, G, N) in `dtype` (complex: pairs) and its three outer strides."""
    B = B.unsqueeze(2) if B.ndim == 3 else B
    if dtype.is_complex:
        B = torch.view_as_real(B.to(dtype).resolve_conj().contiguous()).flatten(-2)
    memory, *strides = flat_rows(B)
    return memory, tuple(strides)


def flat(x: Tensor | None, dtype: torch.dtype = torch.float32) -> Any:
    """Return a small input in `dtype`, or the memory of an output, flat (complex: in pairs); nothing for None."""
    if x is None:
        return _NOTHING
    if x.is_complex() or dtype.is_complex:
        x = torch.view_as_real(x.to(torch.complex64).resolve_conj())
    return dense(x).reshape(-1)


def offsets(cu_seqlens: Tensor | None) -> Any:
    """Return cu_seqlens in int64; nothing for None."""
    return _NO_OFFSETS if cu_seqlens is None else as_array(cu_seqlens.to(torch.int64).contiguous())
