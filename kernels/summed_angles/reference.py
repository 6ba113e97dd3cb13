"""The angles of Mamba-3 in plain PyTorch, sequence by sequence, and their gradients written out.

    turns[t] = θ[0] / 2π + Σ_(s<=t) Δ[s] rate[s] / 2,   θ[t] = 2π (turns[t] - ⌊turns[t]⌋)
    R[t] = Σ_(s>=t) dθ[s],   dΔ[t] = π Σ_pairs rate[t] R[t],   drate[t] = π Σ_heads Δ[t] R[t],   dθ[0] = R[first]

Source: Lahoti et al. 2026, "Mamba-3", arXiv 2603.15569, section 3. Shapes: see `summed_angles`. Sums are float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward(dt: Tensor, rate: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return the angles (B, L, H, S); differentiable by autograd."""
    parts = []
    for rows, tokens in _pieces(dt, cu_seqlens):
        turns = dt[:, tokens, :, None].double() * (rate[:, tokens, None].double() / 2)
        turns = turns.cumsum(1)
        if initial is not None:
            turns = turns + initial[rows, None].double() / (2 * math.pi)
        parts.append(2 * math.pi * (turns - turns.detach().floor()))
    shape = *dt.shape, rate.shape[2]
    angles = torch.cat(parts, 1) if parts else dt.new_zeros(shape)
    return angles.to(torch.promote_types(dt.dtype, torch.float32))


def backward(
    dangles: Tensor, dt: Tensor, rate: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of dt, rate and initial; an empty tensor for an absent one."""
    ddt, drate = torch.zeros_like(dt), torch.zeros_like(rate)
    dinitial = dt.new_empty(0) if initial is None else torch.zeros_like(initial)
    for rows, tokens in _pieces(dt, cu_seqlens):
        later = dangles[:, tokens].double().flip(1).cumsum(1).flip(1)
        ddt[:, tokens] = (math.pi * (later * rate[:, tokens, None].double()).sum(3)).to(dt.dtype)
        drate[:, tokens] = (math.pi * (later * dt[:, tokens, :, None].double()).sum(2)).to(rate.dtype)
        if initial is not None:
            dinitial[rows] = later[:, :1].sum(1).to(initial.dtype)
    return ddt, drate, dinitial


def _pieces(dt: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, slice]]:
    """Return the rows of `initial` and the tokens of each sequence, or of the whole batch at once."""
    if cu_seqlens is None:
        return [(slice(None), slice(None))]
    bounds = cu_seqlens.tolist()
    return [(slice(s, s + 1), slice(bounds[s], bounds[s + 1])) for s in range(len(bounds) - 1)]
