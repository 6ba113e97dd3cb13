"""The recurrence of Mamba-3: inputs enter by the trapezoidal rule, keys and queries turn by angles that add up.

    h[t] = α[t] h[t-1] + α[t] β[t] Σ_r v[t-1,r] k[t-1,r]ᵀ + γ[t] Σ_r v[t,r] k[t,r]ᵀ;   y[t,r] = h[t] q[t,r]
    α = exp(-rate);   β = (1 - λ) Δ;   γ = λ Δ

One input a token (R = 1) is one call of SSD. Of token s, h[t] holds what it entered with, γ[s], and what it enters with
again one token later, β[s+1]; both decay alike from s + 1 on. So the state that has both from s on,

    F[t] = α[t] F[t-1] + (γ[t] + β[t+1]) v[t] k[t]ᵀ,   F[0] = h[0] + β[1] v[0] k[0]ᵀ,   β = 0 after the last token,

gives y[t] = (α[t] F[t-1] + γ[t] v[t] k[t]ᵀ) q[t], SSD with a weight of its own for a token's own output, and ends as h.
Nothing is shifted but β, (B, L, H), inside of `trapezoid_weights`, and nothing of v and k is subtracted, which would
cost the accuracy of 16-bit inputs.

Several inputs a token run over R L places, of which each first one decays. A token's own inputs all enter all of its
outputs, so a state may hold none of them: with G[t] = α[t] (h[t-1] + β[t] Σ v[t-1] k[t-1]ᵀ), before token t enters,

    G[t] = α[t] G[t-1] + α[t] (γ[t-1] + β[t]) Σ_r v[t-1,r] k[t-1,r]ᵀ
    h[t] = G[t] + γ[t] Σ_r v[t,r] k[t,r]ᵀ

SSD runs on the inputs of the token before; what a token adds to its own outputs, and the inputs that come later among
the R of the token before, which an output of SSD misses, are added.

Source: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles" (arXiv 2603.15569),
section 3. Shapes: q, k (B, L, R, H, N); v (B, L, R, H, P); rate, β and γ (B, L, H); h (S, H, P, N), S sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.mixers import _portable
from mambaverse.mixers._common import at_least_fp32
from mambaverse.mixers._ops import gated_recurrence


def trapezoid_weights(
    dt: Tensor, a: Tensor, trap: Tensor, dt_bias: Tensor, A_form: str, A_floor: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Δ, the rate, γ[t] + β[t+1] and γ[t] (B, L, H) of δ, a and μ (B, L, H)."""
    if torch.jit.is_scripting():
        heavy_tail = A_form == "heavy_tail"
        return torch.ops.mambaverse.trapezoid_weights(dt, a, trap, dt_bias, cu_seqlens, A_floor, heavy_tail, "auto")
    else:
        return _portable.trapezoid_weights(dt, a, trap, dt_bias, A_form=A_form, A_floor=A_floor, cu_seqlens=cu_seqlens)


def trapezoid_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    rate: Tensor,
    weight: Tensor,
    gamma: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    h: Tensor | None,
    k_before: Tensor | None,
    v_before: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, R, H, P), with D v (D (H,)) added, and h after the last token of each sequence (S, H, P, N).

    Δ, the rate and the weights (B, L, H) are those of `trapezoid_weights`. `k_before` (S, R, H, N) and `v_before`
    (S, R, H, P) are those of the token before each sequence, none without. With one input y is gated by silu(z), z
    (B, L, H, P), and has the dtype of v; with several, in fp32 at least, z is None.
    """
    if q.shape[2] > 1:
        assert z is None
        y, h = _scan_of_several(q, k, v, rate, dt - gamma, gamma, h, k_before, v_before, cu_seqlens, chunk_size)
        return y if D is None else y + at_least_fp32(D)[:, None] * v, h
    if k_before is not None and v_before is not None and h is not None:
        h = h + _entering(_first(dt - gamma, cu_seqlens), v_before, k_before, h)
    q, k, v = q.squeeze(2), k.squeeze(2), v.squeeze(2)
    y, h = gated_recurrence(v, rate, weight, k, q, h, cu_seqlens, chunk_size, gamma, D, z)
    return y.unsqueeze(2), h


def _scan_of_several(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    beta: Tensor,
    gamma: Tensor,
    h: Tensor | None,
    k_before: Tensor | None,
    v_before: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Return y, in fp32 at least, and h after the last tokens."""
    rank = q.shape[2]
    last_k, last_v = last(k, k_before, cu_seqlens), last(v, v_before, cu_seqlens)
    k_before, v_before = shifted(k, k_before, cu_seqlens), shifted(v, v_before, cu_seqlens)
    weight = torch.exp(-rate) * (shifted(gamma, None, cu_seqlens) + beta)  # (B, L, H)
    rates = torch.cat([rate[:, :, None], torch.zeros_like(rate)[:, :, None].expand(-1, -1, rank - 1, -1)], dim=2)
    rates, weights = rates.flatten(1, 2), weight[:, :, None].expand(-1, -1, rank, -1).flatten(1, 2)
    bounds = None if cu_seqlens is None else cu_seqlens * rank
    y, G = gated_recurrence(
        v_before.flatten(1, 2), rates, weights, k_before.flatten(1, 2), q.flatten(1, 2), h, bounds, chunk_size
    )
    y = y.unflatten(1, (-1, rank))
    h = G + _entering(last(gamma, None, cu_seqlens), last_v, last_k, G)  # of an empty sequence nothing
    q, k, v, k_before = at_least_fp32(q), at_least_fp32(k), at_least_fp32(v), at_least_fp32(k_before)
    later = torch.ones(rank, rank, device=q.device, dtype=q.dtype).triu(1)  # [r, s]: input s > r, which r did not see
    own = gamma[..., None, None] * torch.einsum("blrhn,blshn->blhrs", q, k)
    missed = weight[..., None, None] * torch.einsum("blrhn,blshn->blhrs", q, k_before) * later
    inputs = torch.cat([v, at_least_fp32(v_before)], dim=2)
    return y + torch.einsum("blhrs,blshp->blrhp", torch.cat([own, missed], dim=-1), inputs), h


def trapezoid_step(
    h: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_before: Tensor,
    v_before: Tensor,
    dt: Tensor,
    rate: Tensor,
    gamma: Tensor,
) -> Tensor:
    """Take one step, h (B, H, P, N) in place; return y (B, R, H, P). The other shapes are those above without L."""
    alpha, beta = torch.exp(-rate), dt - gamma
    wide = h.dtype
    v = torch.cat([(alpha * beta)[:, None, :, None] * v_before.to(wide), gamma[:, None, :, None] * v.to(wide)], dim=1)
    k = torch.cat([k_before.to(wide), k.to(wide)], dim=1)
    h.mul_(alpha[..., None, None]).add_(torch.einsum("bshp,bshn->bhpn", v, k))
    return torch.einsum("bhpn,brhn->brhp", h, q.to(wide))


def shifted(x: Tensor, first: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return x[t-1] of x (B, L, ...), and where a sequence starts its row of `first` (S, ...); None: zeros."""
    start = torch.zeros_like(x[:, :1])
    if first is not None and cu_seqlens is None:
        start = first[:, None].to(x.dtype)
    before = torch.cat([start, x], dim=1)[:, : x.shape[1]]
    if cu_seqlens is None:
        return before
    start = torch.zeros_like(x[:1, :1])
    if first is not None:
        start = first[sequence_of_tokens(cu_seqlens, x.shape[1])][None].to(x)
    return torch.where(_starts(x, cu_seqlens), start, before)


def last(x: Tensor, first: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return x (B, L, ...) at each sequence's last token: (S, ...); of an empty sequence its row of `first`."""
    if cu_seqlens is None:
        if x.shape[1] > 0:
            return x[:, -1].clone()  # a view would keep all of x as long as a state lives
        return x.sum(1) if first is None else first.to(x.dtype)  # a sum of nothing: zeros
    if x.shape[1] == 0:
        x = torch.zeros_like(x.sum(1, keepdim=True))
    ends = x[0, (cu_seqlens[1:] - 1).clamp(0, x.shape[1] - 1)]  # of an empty sequence any row
    empty = (cu_seqlens[1:] == cu_seqlens[:-1]).view([-1] + [1] * (x.ndim - 2))
    return torch.where(empty, torch.zeros_like(ends) if first is None else first.to(ends), ends)


def _entering(weight: Tensor, v: Tensor, k: Tensor, like: Tensor) -> Tensor:
    """Return weight Σ_r v[r] k[r]ᵀ (S, H, P, N) in the dtype of `like`, of weight (S, H), v and k (S, R, H, ...).

    Not a matrix product, which autocast would take in 16 bits.
    """
    v, k = weight[:, None, :, None].to(like.dtype) * v.to(like.dtype), k.to(like.dtype)
    total = v[:, 0, :, :, None] * k[:, 0, :, None, :]
    for r in range(1, v.shape[1]):
        total = total + v[:, r, :, :, None] * k[:, r, :, None, :]
    return total


def _starts(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return which tokens of x (1, L, ...) are the first of a sequence, (1, L, 1, ...)."""
    sequence = sequence_of_tokens(cu_seqlens, x.shape[1])
    starts = torch.arange(x.shape[1], device=x.device) == cu_seqlens[sequence]
    return starts.view([1, -1] + [1] * (x.ndim - 2))


def _first(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return x (B, L, H) at each sequence's first token: (S, H); zeros of an empty sequence."""
    if cu_seqlens is None:
        return x[:, :1].sum(1)
    x = F.pad(x, [0, 0, 0, 1])[0, cu_seqlens[:-1].clamp(0, x.shape[1])]  # of an empty sequence any row
    return torch.where((cu_seqlens[1:] == cu_seqlens[:-1])[:, None], torch.zeros_like(x), x)


def sequence_of_tokens(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return the number (L,) of each packed token's sequence."""
    at = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, at, right=True) - 1
    return sequence.clamp(0, max(cu_seqlens.shape[0] - 2, 0))  # wrong bounds are the operator's to refuse


def summed_angles(dt: Tensor, rate: Tensor, before: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return the angles (B, L, H, S), radians in [0, 2π], that `before` (S, H, S) and Δ π rate add up to.

    Δ is (B, L, H), the rate tanh φ (B, L, S).
    """
    if torch.jit.is_scripting():
        return torch.ops.mambaverse.summed_angles(dt, rate, before, cu_seqlens, "auto")
    else:
        return _portable.summed_angles(dt, rate, before, cu_seqlens)


def keys_and_queries(
    B: Tensor,
    C: Tensor,
    B_weight: Tensor,
    C_weight: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    angles: Tensor,
    pairing: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return k and q (B, L, R, H, N): B and C (B, L, R, G, N) normalised, with biases (H, R, N), and turned."""
    if torch.jit.is_scripting():
        interleaved = pairing == "interleaved"
        return torch.ops.mambaverse.turned_qk(
            B, C, B_weight, C_weight, B_bias, C_bias, angles, interleaved, eps, "auto"
        )
    else:
        return _portable.turned_qk(B, C, B_weight, C_weight, B_bias, C_bias, angles, pairing=pairing, eps=eps)
