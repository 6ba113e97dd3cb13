"""The depthwise convolution of a grid in plain PyTorch: the spec that every backend is held against.

    p[i, j] = bias + Σ_rs weight[:, r, s] x[i + r - K // 2, j + s - K' // 2];   y = p, or silu(p) = p σ(p)

    g = dy silu'(p);   dx[i, j] = Σ_rs weight[:, r, s] g[i - r + K // 2, j - s + K' // 2]
    dweight[:, r, s] = Σ_ij g[i, j] x[i + r - K // 2, j + s - K' // 2];   dbias = Σ_ij g[i, j]

Sums over taps and images are in float32 at least. Source: Liu et al., "VMamba: Visual State Space Model" (2024),
section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Return y (B, H, W, D) in the dtype of x; differentiable.

    Args:
        x: (B, H, W, D).
        weight: (D, K, K'), both odd.
        bias: (D,) or None.
        silu: Whether SiLU follows.
    """
    p = _sums(_padded(x, weight), weight, bias)
    return (p * torch.sigmoid(p) if silu else p).to(x.dtype)


def backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias, each in its input's dtype; one for an absent input is empty."""
    inputs = _padded(x, weight)
    wide = inputs.dtype
    g = dy.to(wide)
    if silu:
        p = _sums(inputs, weight, bias)
        gate = torch.sigmoid(p)
        g = g * gate * (1 + p * (1 - gate))
    dweight = torch.zeros(weight.shape, dtype=wide, device=x.device)
    dinputs = torch.zeros_like(inputs)
    for (r, s), window in _windows(inputs, weight):
        dweight[:, r, s] = (g * window).sum((0, 1, 2))
    for (r, s), window in _windows(dinputs, weight):
        window += g * weight[:, r, s].to(wide)
    top, left = weight.shape[1] // 2, weight.shape[2] // 2
    dx = dinputs[:, top : top + x.shape[1], left : left + x.shape[2]]
    dbias = x.new_empty(0) if bias is None else g.sum((0, 1, 2)).to(bias.dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias


def _sums(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return p (B, H, W, D) in the dtype of `padded`, x with the zeros beside the grid."""
    taps = [weight[:, r, s].to(padded.dtype) * window for (r, s), window in _windows(padded, weight)]
    p = sum(taps[1:], taps[0])
    return p if bias is None else p + bias.to(padded.dtype)


def _padded(x: Tensor, weight: Tensor) -> Tensor:
    """Return x in float32 at least, with the zeros beside the grid."""
    top, left = weight.shape[1] // 2, weight.shape[2] // 2
    return F.pad(x.to(torch.promote_types(x.dtype, torch.float32)), [0, 0, left, left, top, top])


def _windows(padded: Tensor, weight: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yield for each tap (r, s) what it meets at every token (B, H, W, D), a view of `padded`."""
    _, rows, columns = weight.shape
    height, width = padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
    for r in range(rows):
        for s in range(columns):
            yield (r, s), padded[:, r : r + height, s : s + width]
