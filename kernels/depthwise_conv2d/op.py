"""The torch.library registration of depthwise_conv2d: a forward and a backward op, their fakes and the gradient.

Backward works the sums before SiLU out again, so forward has nothing to save beside its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.library import define_flops, define_gradient, define_op

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, str backend"


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, backend: str) -> Tensor:
    return _in_order(backends.load("depthwise_conv2d", backend, x).forward(x, weight, bias, silu))


def _forward_fake(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, backend: str) -> Any:
    gradients = backends.load("depthwise_conv2d", backend, x).backward(dy, x, weight, bias, silu)
    return tuple(_in_order(gradient) for gradient in gradients)


def _backward_fake(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(inputs[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:3])


def _in_order(tensor: Tensor) -> Tensor:
    """Return a tensor with the strides that the fake has, on axes of one element too, which `contiguous` leaves."""
    return tensor.contiguous().view(-1).view(tensor.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.flags = inputs[3:]


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = depthwise_conv2d_backward(dy, *tensors, *ctx.flags)
    return *(None if t is None else g for g, t in zip(gradients, tensors, strict=True)), None, None


def _flops(x: Tensor, weight: Tensor, *others: Any) -> int:
    """A multiply-add a tap, the bias, SiLU."""
    return x.numel() * (2 * weight.shape[1] * weight.shape[2] + 5)


def _backward_flops(dy: Tensor, x: Tensor, weight: Tensor, *others: Any) -> int:
    """The output before SiLU again, then dx and dweight: a multiply-add a tap each."""
    return x.numel() * (6 * weight.shape[1] * weight.shape[2] + 10)


define_op("depthwise_conv2d", f"({_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
define_op(
    "depthwise_conv2d_backward",
    f"(Tensor dy, {_ARGUMENTS}) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward,
    _backward_fake,
)
define_gradient("depthwise_conv2d", _setup_context, _gradient)
define_flops("depthwise_conv2d", _flops)
define_flops("depthwise_conv2d_backward", _backward_flops)

depthwise_conv2d_forward = torch.ops.mambaverse.depthwise_conv2d.default
depthwise_conv2d_backward = torch.ops.mambaverse.depthwise_conv2d_backward.default
