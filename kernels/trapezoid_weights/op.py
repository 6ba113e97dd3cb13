"""The torch.library registration of trapezoid_weights: a forward and a backward op, their fakes and the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.checks import check_bounds
from mambaverse.kernels.library import define_flops, define_gradient, define_op

_INPUTS = (
    "Tensor dt, Tensor a, Tensor trap, Tensor dt_bias, Tensor? cu_seqlens, float A_floor, bool heavy_tail, str backend"
)
_NUM_TENSORS = 4  # that have gradients
_GRADIENTS = "Tensor? dstep, Tensor? drate, Tensor? dweight, Tensor? down"


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    *arguments, backend = inputs
    dt, cu_seqlens = inputs[0], inputs[_NUM_TENSORS]
    check_bounds("trapezoid_weights", cu_seqlens, dt.shape[1])
    outputs: tuple[Tensor, ...] = backends.load("trapezoid_weights", backend, dt).forward(*arguments)
    return outputs


def _forward_fake(dt: Tensor, *others: Any) -> tuple[Tensor, ...]:
    wide = torch.promote_types(dt.dtype, torch.float32)
    return tuple(dt.new_empty(dt.shape, dtype=wide) for _ in range(4))


def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    *arguments, backend = inputs
    gradients = backends.load("trapezoid_weights", backend, inputs[_NUM_TENSORS]).backward(*arguments)
    return tuple(gradient.contiguous() for gradient in gradients)


def _backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[_NUM_TENSORS : 2 * _NUM_TENSORS])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: _NUM_TENSORS + 1])
    ctx.flags = inputs[_NUM_TENSORS + 1 :]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    return *trapezoid_weights_backward(*gradients, *ctx.saved_tensors, *ctx.flags), None, None, None, None


def _flops(dt: Tensor, *others: Any) -> int:
    """A token and head: softplus 4, the rate 4, two sigmoids 3 each, their products and the sum 3."""
    return 17 * dt.numel()


def _backward_flops(*inputs: Any) -> int:
    """The same again, and 14 operations of the gradients."""
    return 31 * int(inputs[_NUM_TENSORS].numel())


define_op("trapezoid_weights", f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", _forward, _forward_fake)
define_op(
    "trapezoid_weights_backward",
    f"({_GRADIENTS}, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
define_gradient("trapezoid_weights", _setup_context, _gradient)
define_flops("trapezoid_weights", _flops)
define_flops("trapezoid_weights_backward", _backward_flops)

trapezoid_weights_forward = torch.ops.mambaverse.trapezoid_weights.default
trapezoid_weights_backward = torch.ops.mambaverse.trapezoid_weights_backward.default
