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
    p = _sums(_channels_first(x), weight, bias)
    return (F.silu(p) if silu else p).permute(0, 2, 3, 1).to(x.dtype)


def backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias, as `reference.backward`."""
    if not x.numel():
        return reference.backward(dy, x, weight, bias, silu)
    grid, g = _channels_first(x), _channels_first(dy)
    if silu:
        g = torch.ops.aten.silu_backward(g, _sums(grid, weight, bias))
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        g, grid, weight.float().unsqueeze(1), [x.shape[3]], [1, 1], _padding(weight), [1, 1], False, [0, 0], x.shape[3],
        [True, True, bias is not None],
    )  # fmt: skip
    dbias = x.new_empty(0) if bias is None else dbias.to(bias.dtype)
    return dx.permute(0, 2, 3, 1).to(x.dtype), dweight.squeeze(1).to(weight.dtype), dbias


def _sums(grid: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sums before SiLU (B, D, H, W) of a float32 grid of that shape, channels last in memory."""
    bias = None if bias is None else bias.float()
    with torch.autocast(grid.device.type, enabled=False):  # which would take them to 16 bits
        return F.conv2d(grid, weight.float().unsqueeze(1), bias, padding=_padding(weight), groups=len(weight))


def _channels_first(x: Tensor) -> Tensor:
    return x.float().permute(0, 3, 1, 2)


def _padding(weight: Tensor) -> list[int]:
    return [weight.shape[1] // 2, weight.shape[2] // 2]
