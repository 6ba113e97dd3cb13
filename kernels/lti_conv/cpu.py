"""lti_conv on the CPU with numba: the recurrence itself, 16 channels in SIMD, in float64.

Forward holds h of 16 channels in cache and takes four steps for each time that a state and its system are loaded.
Backward does two such runs. One forwards, where q = ∂h/∂A_bar follows h:

    q[t] = A_bar q[t-1] + h[t-1],   dA_bar = conj(C Σ_t dy[t] q[t]) + dfinal conj(q[L-1]),   dC = conj(Σ_t dy[t] h[t])

and one backwards, with m the gradient that reaches h[t] from later steps:

    g = m + conj(C) dy[t],   du[t] = Re(Σ_n conj(B_bar) g),   dB_bar = Σ_t u[t] g,   m = conj(A_bar) g

float64, because a rounding of A_bar acts at every step: in float32 a memory of 1000 steps costs 3e-5 of relative error.
Same signatures and results as reference.py.

MEASURED
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from mambaverse.kernels.lti_conv.reference import state_dtype
from mambaverse.kernels.rows import flat_rows, sum_rows
from mambaverse.kernels.threads import parallel_for

_LANES = 16  # channels of a work item; 32 states of them and their system fill 32 kB
_STEPS = 4
_ITEMS = 32  # work items of backward at least, where the batch gives them: each holds its own sums over t
_flags: dict[str, Any] = {"fastmath": {"contract", "nsz"}, "error_model": "numpy", "boundscheck": False}
_compiled = numba.njit(nogil=True, cache=True, **_flags)
_inlined = numba.njit(forceinline=True, **_flags)


def forward(
    u: Tensor,
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and the final state, as `reference.forward`."""
    y = torch.empty(u.shape)
    system, skip = _blocks(A_bar, B_bar, C), _skip(D, u)
    states = _state_blocks(initial_state, u, A_bar)
    arguments = u.shape[1], u.shape[2], -1 if reverse else 1, *flat_rows(u), system.numpy(), skip.numpy()
    parallel_for(_forward, states.shape[0] * states.shape[1], *arguments, states.numpy(), y.view(-1).numpy())
    return y.to(u.dtype), _unblocked(states, u.shape[2]).to(state_dtype(u))


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    u: Tensor,
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, A_bar, B_bar, C, D and initial_state, as `reference.backward`."""
    batch, length, dim = u.shape
    du = torch.empty(u.shape)
    system, skip = _blocks(A_bar, B_bar, C), _skip(D, u)
    states, grads = _state_blocks(initial_state, u, A_bar), _state_blocks(dfinal_state, u, A_bar)
    num_blocks, num_states = system.shape[:2]
    groups = min(batch, -(-_ITEMS // num_blocks))
    sums = torch.empty((groups, num_blocks, num_states, 8 * _LANES), dtype=torch.float64)
    skip_sums = torch.empty((groups, num_blocks, _LANES), dtype=torch.float64)
    dy = torch.zeros(u.shape) if dy is None else dy
    arguments = length, dim, -1 if reverse else 1, *flat_rows(u), system.numpy(), skip.numpy()
    outputs = states.numpy(), grads.numpy(), du.view(-1).numpy(), sums.numpy(), skip_sums.numpy()
    parallel_for(_backward, groups * num_blocks, *arguments, *flat_rows(dy), *outputs)
    dC, dA, dB, dA_final = _unblocked(sum_rows(sums).unsqueeze(0), dim).squeeze(0).unbind(-1)
    dD = u.new_empty(0) if D is None else sum_rows(skip_sums).view(-1)[:dim].to(D.dtype, copy=True)
    dstate = u.new_empty(0) if initial_state is None else _unblocked(grads, dim).to(initial_state.dtype)
    return du.to(u.dtype), (C * dA).conj_physical() + dA_final, dB, dC.conj_physical(), dD, dstate
