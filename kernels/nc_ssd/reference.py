"""Non-causal SSD in plain PyTorch, and its gradients written out.

    w = -A Δ;   S = Σ_t w[t] x[t] B[t]ᵀ;   y[t] = S C[t] + D x[t]

    dS = Σ_t dy[t] C[t]ᵀ;   dx[t] = w[t] dS B[t] + D dy[t];   dw[t] = x[t]·dS B[t];   dD = Σ_t dy[t]·x[t]
    dB[t] = w[t] dSᵀ x[t];   dC[t] = Sᵀ dy[t];   dA = -Σ_t Δ[t] dw[t];   dΔ = -A dw   (dB, dC: over a group's heads)

Source: Shi et al. 2024, "VSSD", arXiv 2407.18559, section 3.2. Shapes: see `nc_ssd`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def state_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which states are kept for backward: that of bfloat16 products, else float32 at least."""
    return x.dtype if x.dtype == torch.bfloat16 else torch.promote_types(x.dtype, torch.float32)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, H, P) and the states S (B, H, P, N); differentiable by autograd."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, groups = x.to(wide), B.shape[2]
    weight = -A.to(wide) * _steps(dt, dt_bias, dt_softplus)[1].to(wide)
    with _no_autocast(x):
        state = _outer(x_wide * weight[..., None], B.to(wide))
        y = _through(state, C.to(wide), groups)
    y = y if D is None else y + D.to(wide)[:, None] * x_wide
    return y.to(x.dtype), state.to(state_dtype(x))


def backward(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    state: Tensor, dt_softplus: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C, D and dt_bias; of what is None an empty tensor."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dy, x_wide, A_wide, B_wide, C_wide, S = (t.to(wide) for t in (dy, x, A, B, C, state))
    shifted, step = (t.to(wide) for t in _steps(dt, dt_bias, dt_softplus))
    weight, groups = (-A_wide * step)[..., None], B.shape[2]
    with _no_autocast(x):
        dstate = _outer(dy, C_wide)
        written = _through(dstate, B_wide, groups)
        dB, dC = _back(weight * x_wide, dstate, groups), _back(dy, S, groups)
    dx, dweight = weight * written, (x_wide * written).sum(-1)
    dx = dx if D is None else dx + D.to(wide)[:, None] * dy
    ddt = -A_wide * dweight * (torch.sigmoid(shifted) if dt_softplus else 1.0)
    return (
        dx.to(x.dtype),
        ddt.to(dt.dtype),
        -(step * dweight).sum((0, 1)).to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        x.new_empty(0) if D is None else (dy * x_wide).sum((0, 1, 3)).to(D.dtype),
        x.new_empty(0) if dt_bias is None else ddt.sum((0, 1)).to(dt_bias.dtype),
    )


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast from taking products of wide numbers to 16 bits."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _steps(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """Return dt + bias and Δ, in float32 at least."""
    shifted = dt.to(torch.promote_types(dt.dtype, torch.float32))
    shifted = shifted if dt_bias is None else shifted + dt_bias.to(shifted.dtype)
    return shifted, F.softplus(shifted) if dt_softplus else shifted


def _outer(v: Tensor, m: Tensor) -> Tensor:
    """Return Σ_t v[t] m[t]ᵀ (B, H, P, N) of v (B, L, H, P) and a group's m (B, L, G, N)."""
    v = v.unflatten(2, (m.shape[2], -1))
    return torch.einsum("blgrp,blgn->bgrpn", v, m).flatten(1, 2)


def _through(state: Tensor, m: Tensor, groups: int) -> Tensor:
    """Return S m[t] (B, L, H, P)."""
    return torch.einsum("bgrpn,blgn->blgrp", state.unflatten(1, (groups, -1)), m).flatten(2, 3)


def _back(v: Tensor, state: Tensor, groups: int) -> Tensor:
    """Return Sᵀ v[t], summed over the heads of a group, (B, L, G, N)."""
    return torch.einsum("blgrp,bgrpn->blgn", v.unflatten(2, (groups, -1)), state.unflatten(1, (groups, -1)))
