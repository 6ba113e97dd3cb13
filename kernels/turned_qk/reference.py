"""Keys and queries of Mamba-3 in plain PyTorch, and their gradients written out.

    n = B / sqrt(mean(B²) + eps) · w,   (a, b) = pairs of n + bias,   k = (a cos θ - b sin θ, a sin θ + b cos θ)

    da = dk_a cos θ + dk_b sin θ,   db = dk_b cos θ - dk_a sin θ,   dθ = Σ_r dk_b k_a - dk_a k_b
    dbias = Σ_tokens (da, db),   dn = Σ_(heads of a group) (da, db)
    dw = Σ dn B s,   dB = s (w dn - B s² mean(w dn B))

with s = 1 / sqrt(mean(B²) + eps). Source: Lahoti et al. 2026, "Mamba-3", arXiv 2603.15569, section 3. Shapes: see
`turned_qk`. Everything runs in float64 if B is float64, else in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    B: Tensor, C: Tensor, B_weight: Tensor, C_weight: Tensor, B_bias: Tensor, C_bias: Tensor, angles: Tensor,
    interleaved: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return k and q; differentiable by autograd."""
    wide = torch.promote_types(B.dtype, torch.float32)
    cos, sin = _turn_of(angles, wide)
    k = _turn(_of_heads(_normalised(B, eps, wide)[0] * B_weight.to(wide), B_bias), cos, sin, interleaved)
    q = _turn(_of_heads(_normalised(C, eps, wide)[0] * C_weight.to(wide), C_bias), cos, sin, interleaved)
    return k.to(B.dtype), q.to(C.dtype)


def backward(
    dk: Tensor | None, dq: Tensor | None, B: Tensor, C: Tensor, B_weight: Tensor, C_weight: Tensor, B_bias: Tensor,
    C_bias: Tensor, angles: Tensor, interleaved: bool, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of B, C, both weights, both biases and the angles."""
    wide = torch.promote_types(B.dtype, torch.float32)
    cos, sin = _turn_of(angles, wide)
    of_B = _gradients(dk, B, B_weight, B_bias, cos, sin, interleaved, eps)
    of_C = _gradients(dq, C, C_weight, C_bias, cos, sin, interleaved, eps)
    dB, dC, dB_weight, dC_weight, dB_bias, dC_bias = (g for pair in zip(of_B[:3], of_C[:3], strict=True) for g in pair)
    return dB, dC, dB_weight, dC_weight, dB_bias, dC_bias, (of_B[3] + of_C[3]).to(angles.dtype)


def _gradients(
    dk: Tensor | None, B: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of B, its weight, its bias, and of the angles by its keys."""
    wide, groups = cos.dtype, B.shape[3]
    n, scale = _normalised(B, eps, wide)
    k = _turn(_of_heads(n * weight.to(wide), bias), cos, sin, interleaved)
    dk = torch.zeros_like(k) if dk is None else dk.to(wide)
    count = cos.shape[-1]
    (k_a, k_b), (dk_a, dk_b) = _pairs(k, count, interleaved), _pairs(dk, count, interleaved)
    dangles = (dk_b * k_a - dk_a * k_b).sum(2)
    d = _turn(dk, cos, -sin, interleaved)
    dn = d.unflatten(3, (groups, -1)).sum(4)
    dnormal = dn * weight.to(wide)
    dB = scale * (dnormal - n * (dnormal * n).mean(-1, keepdim=True))
    dweight = (dn * n).sum((0, 1, 2, 3))
    return dB.to(B.dtype), dweight.to(weight.dtype), d.sum((0, 1)).transpose(0, 1).to(bias.dtype), dangles


def _normalised(B: Tensor, eps: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return B / sqrt(mean(B²) + eps), and the factor."""
    B = B.to(wide)
    scale = (B.square().mean(-1, keepdim=True) + eps).rsqrt()
    return B * scale, scale


def _of_heads(n: Tensor, bias: Tensor) -> Tensor:
    """Return n (B, L, R, G, N) of each head, with its bias: (B, L, R, H, N)."""
    return n.repeat_interleave(bias.shape[0] // n.shape[3], dim=3) + bias.to(n.dtype).transpose(0, 1)


def _turn_of(angles: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of the angles, (B, L, 1, H, S)."""
    angles = angles.to(wide).unsqueeze(2)
    return angles.cos(), angles.sin()


def _pairs(x: Tensor, count: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return the first and the second channels of the first `count` pairs of x (..., N)."""
    if interleaved:
        return x[..., 0 : 2 * count : 2], x[..., 1 : 2 * count : 2]
    half = x.shape[-1] // 2
    return x[..., :count], x[..., half : half + count]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the first pairs of x (..., H, N)."""
    count = cos.shape[-1]
    a, b = _pairs(x, count, interleaved)
    a, b = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        return torch.cat([torch.stack([a, b], dim=-1).flatten(-2), x[..., 2 * count :]], dim=-1)
    half = x.shape[-1] // 2
    return torch.cat([a, x[..., count:half], b, x[..., half + count :]], dim=-1)
