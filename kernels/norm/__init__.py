"""RMS norm and layer norm with the residual's addition fused in, and Mamba-2's RMS norm with a gate.

    t = x + residual,   rms: y = t / sqrt(mean(t²) + eps) · weight + bias,   layer: the same for t - mean(t)
    gated: y = rms(x silu(z)) · weight, or rms(x) · weight · silu(z)

Sources: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); Ba et al., "Layer Normalization" (2016);
Dao and Gu, "Transformers are SSMs" (2024), section 7.2.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.checks import check_not_negative, check_real_tensor, check_tensors
from mambaverse.kernels.norm.op import gated_rms_norm_forward, norm_forward


def rms_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add the residual and divide by the root of the mean square over the channels.

    Args:
        x: (..., D), any strides. float32, bfloat16, float16 or float64.
        weight: (D,), any floating dtype, as all that follow.
        bias: (D,).
        residual: (..., D), the shape of x. Keep it in float32 and the sum over the layers is one in float32; backward
            reads the sum in the dtype of the residual, and gradients are as exact as that.
        eps: Added to the mean square.

    Returns:
        y (..., D) in the dtype of x, and new_residual = x + residual in the dtype of the residual: a new tensor, but
        without a residual x itself.

    Raises:
        ValueError: for a wrong shape, dtype, device or eps.
    """
    return _norm("rms_norm", x, weight, bias, residual, eps, False)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add the residual, subtract the mean over the channels and divide by the standard deviation.

    Args:
        x: (..., D), any strides. float32, bfloat16, float16 or float64.
        weight: (D,), any floating dtype, as all that follow.
        bias: (D,).
        residual: (..., D), the shape of x. Keep it in float32 and the sum over the layers is one in float32; backward
            reads the sum in the dtype of the residual, and gradients are as exact as that.
        eps: Added to the variance.

    Returns:
        y (..., D) in the dtype of x, and new_residual = x + residual in the dtype of the residual: a new tensor, but
        without a residual x itself.

    Raises:
        ValueError: for a wrong shape, dtype, device or eps.
    """
    return _norm("layer_norm", x, weight, bias, residual, eps, True)


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """Gate by silu(z) and divide by the root of the mean square over each group of channels.

    Args:
        x: (..., D), any strides. float32, bfloat16, float16 or float64.
        weight: (D,), any floating dtype, as z.
        z: (..., D), the shape of x.
        group_size: Channels in a group, a divisor of D; None: all D.
        norm_before_gate: Normalise x and then gate, instead of gating x and then normalising.
        eps: Added to the mean square.

    Returns:
        y (..., D) in the dtype of x.

    Raises:
        ValueError: for a wrong shape, dtype, device, group size or eps.
    """
    op = "gated_rms_norm"
    _check(op, x, weight, eps, {"z": z})
    group_size = x.shape[-1] if group_size is None else group_size
    if not isinstance(group_size, Integral | torch.SymInt) or group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(f"{op}: group_size is {group_size!r}; expected a divisor of D = {x.shape[-1]}")
    return gated_rms_norm_forward(x, weight, z, group_size, norm_before_gate, eps, current_backend())


def _norm(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    _check(op, x, weight, eps, {} if residual is None else {"residual": residual})
    if bias is not None:
        check_real_tensor(op, "bias", bias, (x.shape[-1],), "(D,)", x)
    y, new_residual = norm_forward(x, weight, bias, residual, eps, center, current_backend())
    return y, x if residual is None else new_residual


def _check(op: str, x: Tensor, weight: Tensor, eps: float, others: dict[str, Tensor]) -> None:
    check_tensors(op, x=x)
    if x.ndim < 1 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(f"{op}: x is {x.dtype} of shape {tuple(x.shape)}; expected a floating dtype, (..., D)")
    check_not_negative(op, eps=eps)
    check_real_tensor(op, "weight", weight, (x.shape[-1],), "(D,)", x)
    for name, tensor in others.items():
        check_real_tensor(op, name, tensor, x.shape, "(..., D)", x)
