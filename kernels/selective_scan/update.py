"""One step of the selective scan, for decoding: plain PyTorch, and on a GPU one kernel.

h <- exp(Δ A) h + Δ B u,   y = (C·h + D u) silu(z),   Δ = softplus(delta + delta_bias)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from mambaverse.kernels.backend import current_backend, resolve
from mambaverse.kernels.checks import check_tensor, unshared
from mambaverse.kernels.library import define_op
from mambaverse.kernels.selective_scan.checks import check_inputs
from mambaverse.kernels.selective_scan.shapes import state_dtype


@torch.no_grad()
def selective_scan_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Advance `state` by one step, in place, and return that step's output. No gradients.

    Args:
        state: (B, D, N), the dtype of the states of `selective_scan`: float32; complex64 if A is complex. Changed
            in place, after the other inputs, which may be views of it (not under torch.compile), are read.
        u: (B, D) input.
        delta: (B, D) step size, before bias and softplus.
        A: (D, N).
        B: (B, N), or (B, G, N) with D divisible by G.
        C: As B.
        D: (D,) skip connection.
        z: (B, D) gate.
        delta_bias: (D,) added to delta.
        delta_softplus: Whether Δ is softplus(delta + delta_bias).

    Returns:
        y (B, D) in u's dtype.

    Raises:
        ValueError: A shape or the state's dtype is wrong; the message names the argument.
    """
    check_inputs("selective_scan_update", u, delta, A, B, C, D, z, delta_bias, "B")
    check_tensor("selective_scan_update", "state", state, (u.shape[0], *A.shape), "(B, D, N)", u)
    dtype = state_dtype(u, A)
    if state.dtype != dtype:
        raise ValueError(f"selective_scan_update: state has dtype {state.dtype}; expected {dtype}")
    u, delta, A, B, C, D, z, delta_bias = unshared(state, u, delta, A, B, C, D, z, delta_bias)
    backend = current_backend()
    if u.is_cuda or backend == "triton":
        return selective_scan_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend)
    return _step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _step(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool,
) -> Tensor:  # fmt: skip
    """Return y and advance `state`: one step in plain PyTorch, on any device."""
    dtype, dim = state.dtype, u.shape[1]
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32  # to_real() does not compile
    x, dt = u.to(real), delta.to(real)
    dt = dt if delta_bias is None else dt + delta_bias
    dt = softplus(dt) if delta_softplus else dt
    state.mul_(torch.exp(dt.unsqueeze(-1) * A)).add_((dt * x).unsqueeze(-1) * _per_channel(B, dim))
    y = (state * _per_channel(C, dim)).sum(-1)
    y = 2 * y.real if A.is_complex() else y
    y = y if D is None else y + D * x
    y = y if z is None else y * silu(z.to(x))
    return y.to(u.dtype)


def _update(state: Tensor, u: Tensor, *others: Any) -> Tensor:
    *arguments, backend = others
    if state.is_complex() or resolve("selective_scan", backend, u, "_update") == "reference":
        return _step(state, u, *arguments)  # a complex state has no kernel of its own
    from mambaverse.kernels.selective_scan.triton_update import update

    return update(state, u, *arguments)


def _per_channel(B: Tensor, dim: int) -> Tensor:
    """(B, N) -> (B, 1, N), (B, G, N) -> (B, D, N)."""
    return B.unsqueeze(1) if B.ndim == 2 else B.repeat_interleave(dim // B.shape[1], 1)


define_op(
    "selective_scan_update",
    "(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus, str backend) -> Tensor",
    _update,
    lambda state, u, *others: u.new_empty(u.shape),
)
selective_scan_step = torch.ops.mambaverse.selective_scan_update.default
