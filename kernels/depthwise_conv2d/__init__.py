"""Depthwise convolution of a grid of tokens, as VMamba and VSSD put before their scans.

    y[i, j] = act(bias + Σ_rs weight[:, r, s] x[i + r - K // 2, j + s - K' // 2]),   zeros beside the grid

Source: Liu et al., "VMamba: Visual State Space Model" (2024), the VSS block: DWConv, then SiLU.
"""

from __future__ import annotations

from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.checks import check_activation, check_dims, check_real_tensor, check_tensors
from mambaverse.kernels.depthwise_conv2d.op import depthwise_conv2d_forward

__all__ = ["depthwise_conv2d"]


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """Convolve every channel of a grid with its own filter around each token, in a grid of the same size.

    As `silu(conv2d(x))` of `torch.nn.functional`, channels last, in one pass: sums and SiLU in float32, rounded once.

    Args:
        x: (B, H, W, D), any strides. float32, bfloat16, float16 or float64.
        weight: (D, K, K'), both odd, so that a filter has a middle; any real floating dtype, as the bias.
        bias: (D,).
        activation: None, or "silu" (alias "swish").

    Returns:
        y (B, H, W, D) in the dtype of x, contiguous. Differentiable.

    Raises:
        ValueError: for a wrong shape, dtype, device or activation.
        BackendError: The backend in force cannot run here.
    """
    check_dims("depthwise_conv2d", "x", x, "(B, H, W, D)")
    check_tensors("depthwise_conv2d", weight=weight)
    dim = x.shape[3]
    if weight.ndim != 3 or weight.shape[1] % 2 == 0 or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"depthwise_conv2d: weight has shape {tuple(weight.shape)}; expected (D, K, K'), D = {dim}, K and K' odd"
        )
    check_real_tensor("depthwise_conv2d", "weight", weight, (dim, *weight.shape[1:]), "(D, K, K')", x)
    if bias is not None:
        check_real_tensor("depthwise_conv2d", "bias", bias, (dim,), "(D,)", x)
    check_activation("depthwise_conv2d", activation)
    return depthwise_conv2d_forward(x, weight, bias, activation is not None, current_backend())
