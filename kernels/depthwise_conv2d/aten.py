"""The depthwise convolution of a grid by torch's own operators, in float32: on the CPU, and of large filters.

Same signatures and results as reference.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels.depthwise_conv2d import reference


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Return y (B, H, W, D) in the dtype of x, as `reference.forward`."""
    if not x.numel():  # which conv2d refuses
        return reference.forward(x, weight, bias, silu)
    p = _sums(x, weight, bias)
    return (F.silu(p) if silu else p).permute(0, 2, 3, 1).to(x.dtype).contiguous()


def backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias, as `reference.backward`."""
    if not x.numel():
        return reference.backward(dy, x, weight, bias, silu)
    g = dy.float().permute(0, 3, 1, 2)
    if silu:
        g = torch.ops.aten.silu_backward(g, _sums(x, weight, bias))
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        g, x.float().permute(0, 3, 1, 2), weight.float().unsqueeze(1), [x.shape[3]], [1, 1], _padding(weight), [1, 1],
        False, [0, 0], x.shape[3], [True, True, bias is not None],
    )  # fmt: skip
    dx = dx.permute(0, 2, 3, 1).to(x.dtype).contiguous()
    dweight = dweight.squeeze(1).to(weight.dtype).contiguous()
    return dx, dweight, x.new_empty(0) if bias is None else dbias.to(bias.dtype)


def _sums(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sums before SiLU (B, D, H, W), channels last in memory."""
    grid, bias = x.float().permute(0, 3, 1, 2), None if bias is None else bias.float()
    with torch.autocast(x.device.type, enabled=False):  # which would take them to 16 bits
        return F.conv2d(grid, weight.float().unsqueeze(1), bias, padding=_padding(weight), groups=x.shape[3])


def _padding(weight: Tensor) -> list[int]:
    return [weight.shape[1] // 2, weight.shape[2] // 2]
