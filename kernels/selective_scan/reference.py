"""Selective scan in plain PyTorch: the specification, slow on purpose.

    Δ[t] = softplus(delta[t] + delta_bias)              softplus only where asked for
    h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] u[t]
    y[t] = (C[t]·h[t] + D u[t]) silu(z[t])              with a complex A: 2 Re(C[t]·h[t]), the sum over conjugate pairs

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023 (arXiv 2312.00752),
Algorithm 2, discretized as in the published code (Δ B rather than the exact integral).

`forward` is differentiable by autograd. `backward` is the same gradient written out, because autograd does not work
inside an op. Both take what the op takes, checked, and compute in float64 if u is float64, else in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from mambaverse.kernels.selective_scan.shapes import spans, state_dtype


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
    """Return y (B, L, D), the final state (S, D, N) and no chunk states (0, D, N): `backward` needs none."""
    dtype = state_dtype(u, A)
    x, A, B, C = u.to(dtype.to_real()), A.to(dtype), B.to(dtype), C.to(dtype)
    dt = _shift(delta.to(x), delta_bias)
    dt = softplus(dt) if delta_softplus else dt
    outputs, states = [x[:, :0]], [A.new_empty(0, *A.shape)]
    for rows, span in spans(u, cu_seqlens):
        start = _start(initial_state, rows, x, A)
        y, h = _scan(x[:, span], dt[:, span], A, B[:, span], C[:, span], start, reverse)
        outputs.append(y)
        states.append(h[-1])
    y = torch.cat(outputs, 1)
    if D is not None:
        y = y + D.to(x) * x
    if z is not None:
        y = y * silu(z.to(x))
    return y.to(u.dtype).contiguous(), torch.cat(states), A.new_empty(0, *A.shape)


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
    dtype = state_dtype(u, A)
    x, A, B, C = u.to(dtype.to_real()), A.to(dtype), B.to(dtype), C.to(dtype)
    shifted = _shift(delta.to(x), delta_bias)
    dt = softplus(shifted) if delta_softplus else shifted
    gate = None if z is None else z.to(x)
    gy = dy.to(x) if gate is None else dy.to(x) * silu(gate)
    empty = x[:, :0], x[:, :0], x[:, :0], B[:, :0], C[:, :0], torch.zeros_like(A), A.new_empty(0, *A.shape)
    parts = [[part] for part in empty]
    for rows, span in spans(u, cu_seqlens):
        gh = torch.zeros_like(A).expand(x.shape[0], -1, -1) if dfinal_state is None else dfinal_state[rows].to(dtype)
        h = _start(initial_state, rows, x, A)
        sequence = (x[:, span], dt[:, span], A, B[:, span], C[:, span])
        for part, gradient in zip(parts, _scan_backward(gy[:, span], gh, *sequence, h, reverse), strict=True):
            part.append(gradient)
    y, du, ddt, dB, dC = (torch.cat(part, 1) for part in parts[:5])
    dA, dinitial_state = torch.stack(parts[5]).sum(0), torch.cat(parts[6])
    dD = dz = None
    if D is not None:
        y, du, dD = y + D.to(x) * x, du + gy * D.to(x), (gy * x).sum((0, 1))
    if gate is not None:
        p = gate.sigmoid()
        dz = dy * y * p * (1 + gate * (1 - p))
    ddelta = ddt * shifted.sigmoid() if delta_softplus else ddt
    dbias = None if delta_bias is None else ddelta.sum((0, 1))
    return du, ddelta, dA, dB, dC, dD, dz, dbias, None if initial_state is None else dinitial_state


def _shift(delta: Tensor, delta_bias: Tensor | None) -> Tensor:
    return delta if delta_bias is None else delta + delta_bias.to(delta)


def _start(initial_state: Tensor | None, rows: slice, x: Tensor, A: Tensor) -> Tensor:
    """Return the state before the first step, (b, D, N)."""
    return torch.zeros_like(A).expand(x.shape[0], -1, -1) if initial_state is None else initial_state[rows].to(A.dtype)


def _per_channel(B: Tensor, dim: int) -> Tensor:
    """Give each channel the row of its group: (b, N) or (b, G, N) -> (b, D, N)."""
    B = B.unsqueeze(1) if B.ndim == 2 else B
    return B.repeat_interleave(dim // B.shape[1], 1)


def _per_group(gradient: Tensor, B: Tensor) -> Tensor:
    """Add up the gradient (b, D, N) over the channels that share a row of B (b, N) or (b, G, N)."""
    if B.ndim == 2:
        return gradient.sum(1)
    return gradient.unflatten(1, (B.shape[1], -1)).sum(2)


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, reverse: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return C·h (b, l, D) and the states before and after every step, in the order of the steps."""
    length, dim = x.shape[1:]
    y, states = [x[:, :0]] * length, [h]
    for t in range(length - 1, -1, -1) if reverse else range(length):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * x)[:, t, :, None] * _per_channel(B[:, t], dim)
        c_h = (_per_channel(C[:, t], dim) * h).sum(-1)
        y[t] = (2 * c_h.real if A.is_complex() else c_h).unsqueeze(1)
        states.append(h)
    return torch.cat(y, 1) if length else x, states


def _scan_backward(
    gy: Tensor, gh: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, reverse: bool
) -> tuple[Tensor, ...]:
    """Return C·h and the gradients of x, dt, B, C, A and the first state. `gh` is that of the last state."""
    length, dim = x.shape[1:]
    y, states = _scan(x, dt, A, B, C, h, reverse)
    du, ddt, dB, dC, dA = (torch.zeros_like(v) for v in (x, dt, B, C, A))
    order = range(length) if reverse else range(length - 1, -1, -1)
    gy = 2 * gy if A.is_complex() else gy
    for step, t in zip(range(length, 0, -1), order, strict=True):
        dt_t, x_t, gy_t = (v[:, t, :, None] for v in (dt, x, gy))
        B_t = _per_channel(B[:, t], dim)
        a = torch.exp(dt_t * A)
        gh = gh + gy_t * _per_channel(C[:, t], dim).conj()
        gx = (gh * B_t.conj()).real.sum(-1)
        gz = gh * (a * states[step - 1]).conj()  # gradient of Δ A
        du[:, t] = gx * dt[:, t]
        ddt[:, t] = gx * x[:, t] + (gz * A.conj()).real.sum(-1)
        dB[:, t] = _per_group(gh * dt_t * x_t, B[:, t])
        dC[:, t] = _per_group(gy_t * states[step].conj(), C[:, t])
        dA += (gz * dt_t).sum(0)
        gh = gh * a.conj()
    return y, du, ddt, dB, dC, dA, gh
