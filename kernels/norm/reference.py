"""The normalisations in plain PyTorch: the spec that every backend is held against.

    t = x + residual
    RMS norm     y = t / sqrt(mean(t²) + eps) · weight + bias
    layer norm   y = (t - mean(t)) / sqrt(var(t) + eps) · weight + bias
    gated RMS    y = rms(x silu(z)) · weight,   or with the norm before the gate   y = rms(x) · weight · silu(z)

Means are over the channels, in the gated norm over each group of them. Sources: Zhang and Sennrich, "Root Mean Square
Layer Normalization" (2019); Ba et al., "Layer Normalization" (2016); Dao and Gu, "Transformers are SSMs" (2024), 7.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """Return y and t = x + residual, the latter an empty (0,) tensor without a residual; differentiable.

    Args:
        x: (..., D); y has its dtype.
        weight: (D,).
        bias: (D,) or None.
        residual: (..., D) or None; t has its dtype.
        eps: Added to the mean square.
        center: Whether the mean is subtracted: layer norm.
    """
    wide = _wide(x)
    t = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    y = _normalised(t, eps, center)[0] * weight.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return _fresh(y, x.dtype), x.new_empty(0) if residual is None else _fresh(t, residual.dtype)


def backward(
    dy: Tensor, dt: Tensor | None, t: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of t, weight and bias (empty without one), each in its input's dtype.

    Args:
        dy: (..., D).
        dt: (..., D), what flows into t beside the norm, or None.
        t: (..., D): x + residual, or x.
        weight: (D,).
        bias: (D,) or None.
        eps: As in `forward`.
        center: As in `forward`.
    """
    wide = _wide(t)
    dy = dy.to(wide)
    normalised, scale = _normalised(t.to(wide), eps, center)
    grad = _through_norm(dy * weight.to(wide), normalised, scale, center)
    grad = grad if dt is None else grad + dt.to(wide)
    dweight = (dy * normalised).reshape(-1, t.shape[-1]).sum(0).to(weight.dtype)
    dbias = t.new_empty(0) if bias is None else dy.reshape(-1, t.shape[-1]).sum(0).to(bias.dtype)
    return _fresh(grad, t.dtype), dweight, dbias


def gated_forward(x: Tensor, weight: Tensor, z: Tensor, group_size: int, norm_before_gate: bool, eps: float) -> Tensor:
    """Return y in the dtype of x; differentiable.

    Args:
        x: (..., D).
        weight: (D,).
        z: (..., D).
        group_size: Channels that share a mean square; divides D.
        norm_before_gate: Whether the gate is applied to the normalised x.
        eps: Added to the mean square.
    """
    wide = _wide(x)
    gate = z.to(wide) * torch.sigmoid(z.to(wide))
    v = x.to(wide) if norm_before_gate else x.to(wide) * gate
    y = _normalised(_grouped(v, group_size), eps)[0].reshape(x.shape) * weight.to(wide)
    return _fresh(y * gate if norm_before_gate else y, x.dtype)


def gated_backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor, group_size: int, norm_before_gate: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and z for `dy` (..., D); the other arguments are those of `gated_forward`."""
    wide = _wide(x)
    dy, xw, zw, w = dy.to(wide), x.to(wide), z.to(wide), weight.to(wide)
    s = torch.sigmoid(zw)
    gate, dgate_dz = zw * s, s * (1 + zw * (1 - s))
    groups, scale = _normalised(_grouped(xw if norm_before_gate else xw * gate, group_size), eps)
    normalised = groups.reshape(x.shape)
    dv = _through_norm(_grouped(dy * w * gate if norm_before_gate else dy * w, group_size), groups, scale, False)
    dv = dv.reshape(x.shape)
    dgate = dy * w * normalised if norm_before_gate else dv * xw
    dweight = (dy * normalised * gate if norm_before_gate else dy * normalised).reshape(-1, x.shape[-1]).sum(0)
    dx = dv if norm_before_gate else dv * gate
    return _fresh(dx, x.dtype), dweight.to(weight.dtype), _fresh(dgate * dgate_dz, z.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fresh(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).contiguous()


def _grouped(x: Tensor, group_size: int) -> Tensor:
    return x.unflatten(-1, (-1, group_size))


def _normalised(t: Tensor, eps: float, center: bool = False) -> tuple[Tensor, Tensor]:
    """Return the normalised t and the factor that did it."""
    t = t - t.mean(-1, keepdim=True) if center else t
    scale = torch.rsqrt(t.square().mean(-1, keepdim=True) + eps)
    return t * scale, scale


def _through_norm(grad: Tensor, normalised: Tensor, scale: Tensor, center: bool) -> Tensor:
    """Return the gradient of t from that of the normalised t."""
    inner = grad - normalised * (grad * normalised).mean(-1, keepdim=True)
    return scale * (inner - grad.mean(-1, keepdim=True) if center else inner)
