"""The torch.library registration of nc_ssd: a forward and a backward op, their fakes and the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.library import define_flops, define_gradient, define_op
from mambaverse.kernels.nc_ssd.reference import state_dtype

_TENSORS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias"
_FLAGS = "bool dt_softplus, str backend"
_NUM_TENSORS = 7


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    *arguments, backend = inputs
    y, state = backends.load("nc_ssd", backend, inputs[0]).forward(*arguments)
    return y.contiguous(), state.contiguous()


def _forward_fake(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], *x.shape[2:], B.shape[3])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=state_dtype(x))


def _backward(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *arguments, backend = inputs
    gradients = backends.load("nc_ssd", backend, inputs[0]).backward(dy, *arguments)
    return tuple(gradient.contiguous() for gradient in gradients)


def _backward_fake(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    x = inputs[0]
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:_NUM_TENSORS])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], output[1])
    ctx.flags = inputs[_NUM_TENSORS:]
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = nc_ssd_backward(dy, *tensors, *ctx.flags)
    return *(None if t is None else g for g, t in zip(gradients, tensors[:-1], strict=True)), None, None


def _flops(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Any) -> int:
    """Of a state of a channel: w x B added, and S C added."""
    return x.numel() * (4 * B.shape[3] + 3)


def _backward_flops(dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Any) -> int:
    """Of a state of a channel: dS, dS B, dB and dC (2 each)."""
    return x.numel() * (8 * B.shape[3] + 8)


define_op("nc_ssd", f"({_TENSORS}, {_FLAGS}) -> (Tensor, Tensor)", _forward, _forward_fake)
define_op(
    "nc_ssd_backward",
    f"(Tensor dy, {_TENSORS}, Tensor state, {_FLAGS}) -> ({', '.join(['Tensor'] * _NUM_TENSORS)})",
    _backward,
    _backward_fake,
)
define_gradient("nc_ssd", _setup_context, _gradient)
define_flops("nc_ssd", _flops)
define_flops("nc_ssd_backward", _backward_flops)

nc_ssd_forward = torch.ops.mambaverse.nc_ssd.default
nc_ssd_backward = torch.ops.mambaverse.nc_ssd_backward.default
