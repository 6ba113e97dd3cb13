"""Selective scan on the CPU: hands tensors of any strides and dtypes to the numba kernels of `cpu_kernels`.

Same equations, arguments and results as `reference`. 16-bit inputs are widened to float32 first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.checks import num_sequences
from mambaverse.kernels.rows import sum_rows
from mambaverse.kernels.selective_scan.cpu_kernels import scan_backward, scan_forward
from mambaverse.kernels.selective_scan.cpu_layout import (
    flat,
    forward_parts,
    grain,
    grouped_rows,
    num_groups,
    offsets,
    partition,
    rows,
)
from mambaverse.kernels.selective_scan.shapes import num_chunk_states, state_dtype
from mambaverse.kernels.threads import parallel_for


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype, the final state (S, D, N) and chunk states (K, D, N) in float32 or complex64."""
    batch, length, dim = u.shape
    sequences, groups, state_dim = num_sequences("selective_scan", cu_seqlens, batch), num_groups(B), A.shape[1]
    dtype = state_dtype(u, A)
    y = torch.empty(u.shape)
    final_state = torch.empty(sequences, dim, state_dim, dtype=dtype)
    chunk_states = torch.empty(num_chunk_states(u, "cpu", save), dim, state_dim, dtype=dtype)
    arrays, strides = _inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    num_parts = forward_parts(sequences, dim, groups)
    parallel_for(
        scan_forward,
        sequences * groups * num_parts,
        *arrays,
        *(strides, length, dim, groups, state_dim, 2 if A.is_complex() else 1, delta_softplus, reverse, num_parts),
        A.is_complex() or None,
        *(flat(y), flat(final_state), flat(chunk_states)),
        grain=grain(batch * length * dim * state_dim // max(sequences * groups * num_parts, 1)),
    )
    return y.to(u.dtype), final_state, chunk_states


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, None for what is None."""
    batch, length, dim = u.shape
    sequences, groups, state_dim = num_sequences("selective_scan", cu_seqlens, batch), num_groups(B), A.shape[1]
    parts, dtype = 2 if A.is_complex() else 1, state_dtype(u, A)
    seq_parts, num_parts = partition(sequences, dim, groups, state_dim)
    du, ddelta = torch.empty(u.shape), torch.empty(u.shape)
    dz = None if z is None else torch.empty(u.shape)
    dA = torch.empty(seq_parts, dim, state_dim, parts)
    dD, dbias = torch.empty(seq_parts, dim), torch.empty(seq_parts, dim)
    dB, dC = (torch.zeros(num_parts, batch, length, groups, state_dim, parts) for _ in range(2))
    dinitial_state = None if initial_state is None else torch.empty(sequences, dim, state_dim, dtype=dtype)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    (dy_, dy_strides), (arrays, strides) = rows(dy), _inputs(*inputs)
    parallel_for(
        scan_backward,
        seq_parts * groups * num_parts,
        *(dy_, flat(dfinal_state, dtype), *arrays, flat(chunk_states)),
        *((dy_strides, *strides), length, dim, groups, state_dim, parts, delta_softplus, reverse),
        *(sequences, batch, num_parts, seq_parts, A.is_complex() or None),
        *(flat(gradient) for gradient in (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial_state)),
    )
    dA, dB, dC = (_joined(sum_rows(parts)).view(t.shape) for parts, t in ((dA, A), (dB, B), (dC, C)))
    return (
        *(du, ddelta, dA, dB, dC, None if D is None else sum_rows(dD), dz),
        *(None if delta_bias is None else sum_rows(dbias), dinitial_state),
    )


def _inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[tuple[Any, ...], tuple[tuple[int, ...], ...]]:
    """Return the arrays that every kernel starts with, and the strides of u, delta, z, B and C."""
    dtype = state_dtype(u, A)
    (u_, u_strides), (delta_, delta_strides), (z_, z_strides) = rows(u), rows(delta), rows(z)
    (B_, B_strides), (C_, C_strides) = grouped_rows(B, dtype), grouped_rows(C, dtype)
    others = flat(D), z_, flat(delta_bias), flat(initial_state, dtype), offsets(cu_seqlens)
    return (u_, delta_, flat(A, dtype), B_, C_, *others), (u_strides, delta_strides, z_strides, B_strides, C_strides)


def _joined(pairs: Tensor) -> Tensor:
    """Return (..., 2) as complex numbers, (..., 1) as real ones."""
    return torch.view_as_complex(pairs) if pairs.shape[-1] == 2 else pairs.squeeze(-1)
