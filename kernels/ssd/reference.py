"""State space duality (SSD, Mamba-2) as the paper defines it: one step after the other, in plain PyTorch.

    Δ[t] = clamp(softplus(dt[t] + dt_bias), dt_limit)
    h[t] = exp(Δ[t] A) h[t-1] + w[t] x[t] B[t]ᵀ          h (P, N), one per head; w is Δ unless given
    y[t] = (h[t] C[t] + D x[t]) · silu(z[t])

With `own_weight` o, a token enters its own output with that: exp(Δ[t] A) h[t-1] + o[t] x[t] B[t]ᵀ in h's place in y[t].

Source: Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060, section 2 and listing 1; discretised as there (Euler
for B). Head h uses row h // (H // G) of B and C. Everything runs in float64 if x is float64, else in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels.ssd.layout import state_dtype

Pieces = list[tuple[slice, slice, range]]  # rows of the batch, rows of the states, positions in order


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float,
    reverse: bool, chunk_size: int = 0, save: bool = False, weight: Tensor | None = None,
    own_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, the final state and no chunk states; differentiable by autograd. Shapes: see `ssd`."""
    x_, A_, B_, C_, D_, z_ = _widen(x, A, B, C, D, z)
    Δ = step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max, x_.dtype)
    w, own = _weights(Δ, weight, own_weight)
    h0 = _initial(x_, B_, initial_state, cu_seqlens)
    y, _, final = _scan(x_, Δ, w, own, A_, B_, C_, h0, _pieces(x, cu_seqlens, reverse))
    if D_ is not None:
        y = y + D_ * x_
    if z_ is not None:
        y = y * F.silu(z_)
    return y.to(x.dtype), final, final.new_empty(0, 0, 0, 0)


def backward(
    grad_y: Tensor | None, grad_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    chunk_states: Tensor, dt_softplus: bool, dt_min: float, dt_max: float, reverse: bool, chunk_size: int = 0,
    weight: Tensor | None = None, own_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C, D, z, dt_bias, initial_state, weight and own_weight.

    An absent one's is an empty tensor.
    """
    x_, A_, B_, C_, D_, z_ = _widen(x, A, B, C, D, z)
    Δ = step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max, x_.dtype)
    w, own = _weights(Δ, weight, own_weight)
    h0, pieces = _initial(x_, B_, initial_state, cu_seqlens), _pieces(x, cu_seqlens, reverse)
    dy = torch.zeros_like(x_) if grad_y is None else grad_y.to(x_.dtype)
    absent = x_.new_empty(0)

    y, states, _ = _scan(x_, Δ, w, own, A_, B_, C_, h0, pieces)
    dz = dD = absent
    if z_ is not None:
        gate = torch.sigmoid(z_)
        dz = dy * (y if D_ is None else y + D_ * x_) * gate * (1 + z_ * (1 - gate))
        dy = dy * z_ * gate

    groups, repeats = B_.shape[2], x_.shape[2] // B_.shape[2]
    dx, dB, dC = torch.zeros_like(x_), torch.zeros_like(B_), torch.zeros_like(C_)
    dΔ, dA, dw, down = torch.zeros_like(Δ), torch.zeros_like(A_), torch.zeros_like(Δ), torch.zeros_like(Δ)
    dinitial = torch.zeros_like(h0) if grad_final is None else grad_final.to(h0.dtype).clone()
    for rows, state_rows, positions in pieces:
        dh = dinitial[state_rows]
        for t in reversed(positions):
            previous = t - positions.step
            before = states[previous][0] if previous in positions else h0[state_rows]
            b, c = (m[rows, t].repeat_interleave(repeats, dim=1) for m in (B_, C_))  # (B, H, N)
            v, dout, step, decay = x_[rows, t], dy[rows, t], Δ[rows, t], (Δ[rows, t] * A_).exp()  # (B, H, P) or (B, H)
            later = dh  # the gradient of h[t] by what follows t
            dh = dh + dout[..., None] * c[:, :, None]
            entered = dh if own is None else later  # of w[t] x[t] B[t]ᵀ
            along = (dh * before).sum((-1, -2)) * decay
            into = (entered * b[:, :, None]).sum(-1)  # (B, H, P)
            dx[rows, t] = w[rows, t, :, None] * into
            dw[rows, t] = (into * v).sum(-1)
            dΔ[rows, t] = along * A_
            dA += (along * step).sum(0)
            dc = (dout[..., None] * (states[t][0] if own is None else decay[..., None, None] * before)).sum(-2)
            db = w[rows, t, :, None] * (entered * v[..., None]).sum(-2)
            if own is not None:
                o, score, both = own[rows, t], (b * c).sum(-1), (dout * v).sum(-1)  # (B, H)
                dx[rows, t] += (o * score)[..., None] * dout
                down[rows, t] = score * both
                dc += (o * both)[..., None] * b
                db += (o * both)[..., None] * c
            dC[rows, t] = dc.unflatten(1, (groups, repeats)).sum(2)
            dB[rows, t] = db.unflatten(1, (groups, repeats)).sum(2)
            dh = decay[..., None, None] * dh
        dinitial[state_rows] = dh
    if D is not None and D_ is not None:
        dx += D_ * dy
        dD = (dy * x_).sum((0, 1) if D.ndim == 2 else (0, 1, 3)).to(D.dtype)

    if weight is None:
        dΔ += dw
    raw = dt.to(x_.dtype) if dt_bias is None else dt.to(x_.dtype) + dt_bias.to(x_.dtype)
    free = F.softplus(raw) if dt_softplus else raw
    ddt = dΔ * ((free >= dt_min) & (free <= dt_max))
    if dt_softplus:
        ddt = ddt * torch.sigmoid(raw)
    return (
        dx.to(x.dtype), ddt.to(dt.dtype), dA.to(A.dtype), dB.to(B.dtype), dC.to(C.dtype), dD,
        dz if z is None else dz.to(z.dtype), absent if dt_bias is None else ddt.sum((0, 1)).to(dt_bias.dtype),
        absent if initial_state is None else dinitial.to(initial_state.dtype),
        absent if weight is None else dw.to(weight.dtype),
        absent if own_weight is None else down.to(own_weight.dtype),
    )  # fmt: skip


def _scan(
    x: Tensor, Δ: Tensor, w: Tensor, own: Tensor | None, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, pieces: Pieces
) -> tuple[Tensor, dict[int, list[Tensor]], Tensor]:
    """Return y without D and z, the state after each position, and the final states."""
    repeats = x.shape[2] // B.shape[2]
    y: list[list[Tensor]] = [[] for _ in range(x.shape[1])]
    states: dict[int, list[Tensor]] = {t: [] for t in range(x.shape[1])}
    final = []
    for rows, state_rows, positions in pieces:
        h = h0[state_rows]  # (B, H, P, N)
        for t in positions:
            b, c = (m[rows, t].repeat_interleave(repeats, dim=1) for m in (B, C))  # (B, H, N)
            carried = (Δ[rows, t, :, None, None] * A[:, None, None]).exp() * h
            entering = x[rows, t, :, :, None] * b[:, :, None]
            h = carried + w[rows, t, :, None, None] * entering
            seen = h if own is None else carried + own[rows, t, :, None, None] * entering
            y[t].append((seen * c[:, :, None]).sum(-1))
            states[t].append(h)
        final.append(h)
    stacked = torch.stack([piece[0] for piece in y], dim=1) if y else torch.zeros_like(x)
    return stacked, states, torch.cat(final).clone()


def _weights(Δ: Tensor, weight: Tensor | None, own_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return what tokens enter the state with, and their own outputs, where that is another."""
    return Δ if weight is None else weight.to(Δ.dtype), None if own_weight is None else own_weight.to(Δ.dtype)


def _pieces(x: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Pieces:
    """Return what the recurrence runs over: the whole batch at once, or one packed sequence after the other."""

    def ordered(start: int, stop: int) -> range:
        return range(stop - 1, start - 1, -1) if reverse else range(start, stop)

    if cu_seqlens is None:
        return [(slice(None), slice(None), ordered(0, x.shape[1]))]
    bounds = cu_seqlens.tolist()
    return [(slice(None), slice(s, s + 1), ordered(bounds[s], bounds[s + 1])) for s in range(len(bounds) - 1)]


def _widen(
    x: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    dtype = state_dtype(x)
    column = None if D is None else D.to(dtype) if D.ndim == 2 else D.to(dtype)[:, None]
    return x.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype), column, None if z is None else z.to(dtype)


def _initial(x: Tensor, B: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(x.dtype)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    return x.new_zeros(rows, x.shape[2], x.shape[3], B.shape[3])


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, dtype: torch.dtype
) -> Tensor:
    """Return Δ in `dtype`, of the shape of dt."""
    Δ = dt.to(dtype)
    if dt_bias is not None:
        Δ = Δ + dt_bias.to(dtype)
    if dt_softplus:
        Δ = F.softplus(Δ)
    return Δ.clamp(dt_min, dt_max)
