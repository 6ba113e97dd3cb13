"""The step sizes of Mamba-3 in plain PyTorch, and their gradients written out.

    Δ = softplus(δ + b);   rate = Δ max(f(a), floor);   γ = σ(μ) Δ;   β = σ(-μ) Δ;   weight[t] = γ[t] + β[t+1]

f is 1 + a for a >= 0 and 1 / (1 - a) below ("heavy tail"), or softplus(a); β[t+1] is 0 after a sequence's last token.

    dβ[t] = dweight[t-1];   dγ[t] = dweight[t] + down[t];   dμ = σ(μ) σ(-μ) Δ (dγ - dβ)
    dδ = σ(δ + b) (dΔ + drate max(f, floor) + σ(μ) dγ + σ(-μ) dβ);   da = drate Δ f'(a) where f(a) >= floor

Source: Lahoti et al. 2026, "Mamba-3", arXiv 2603.15569, section 3. Shapes: see `trapezoid_weights`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    dt: Tensor,
    a: Tensor,
    trap: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor | None,
    A_floor: float,
    heavy_tail: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Δ, rate, weight and γ (B, L, H); differentiable by autograd."""
    trap, step = _wide(trap), F.softplus(_wide(dt) + _wide(dt_bias))
    rate = step * _decay(_wide(a), heavy_tail).clamp(min=A_floor)
    own, beta = torch.sigmoid(trap) * step, torch.sigmoid(-trap) * step
    if cu_seqlens is not None:
        beta = beta.masked_fill(_starts(cu_seqlens, beta.shape[1]), 0.0)
    return step, rate, own + F.pad(beta, [0, 0, 0, 1])[:, 1:], own


def backward(
    dstep: Tensor | None,
    drate: Tensor | None,
    dweight: Tensor | None,
    down: Tensor | None,
    dt: Tensor,
    a: Tensor,
    trap: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor | None,
    A_floor: float,
    heavy_tail: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of δ, a, μ and the bias."""
    shifted, wide_a, wide_trap = _wide(dt) + _wide(dt_bias), _wide(a), _wide(trap)
    step, decay = F.softplus(shifted), _decay(wide_a, heavy_tail)
    late, early = torch.sigmoid(wide_trap), torch.sigmoid(-wide_trap)
    zero = torch.zeros_like(step)
    dgamma = (zero if dweight is None else dweight) + (zero if down is None else down)
    dbeta = zero if dweight is None else F.pad(dweight, [0, 0, 1, 0])[:, :-1]
    if cu_seqlens is not None:
        dbeta = dbeta.masked_fill(_starts(cu_seqlens, dbeta.shape[1]), 0.0)
    dtrap = late * early * step * (dgamma - dbeta)
    ddt = late * dgamma + early * dbeta + (zero if dstep is None else dstep)
    da = zero
    if drate is not None:
        ddt = ddt + drate * decay.clamp(min=A_floor)
        slope = torch.where(wide_a >= 0, 1.0, decay.square()) if heavy_tail else torch.sigmoid(wide_a)
        da = torch.where(decay >= A_floor, drate * step * slope, zero)
    ddt = torch.sigmoid(shifted) * ddt
    return ddt.to(dt.dtype), da.to(a.dtype), dtrap.to(trap.dtype), ddt.sum((0, 1)).to(dt_bias.dtype)


def _decay(a: Tensor, heavy_tail: bool) -> Tensor:
    return torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0))) if heavy_tail else F.softplus(a)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return which of `length` tokens are the first of a sequence: (1, L, 1)."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    return torch.isin(tokens, cu_seqlens)[None, :, None]
