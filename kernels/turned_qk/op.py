"""The torch.library registration of turned_qk: one forward op, one backward op, their fakes and the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.library import define_flops, define_gradient, define_op

_INPUTS = (
    "Tensor B, Tensor C, Tensor B_weight, Tensor C_weight, Tensor B_bias, Tensor C_bias, Tensor angles, "
    "bool interleaved, float eps, str backend"
)
_NUM_TENSORS = 7


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    *arguments, backend = inputs
    return backends.load("turned_qk", backend, inputs[0]).forward(*arguments)


def _forward_fake(B: Tensor, C: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    shape = *B.shape[:3], others[2].shape[0], B.shape[4]
    return B.new_empty(shape), C.new_empty(shape)


def _backward(dk: Tensor | None, dq: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    *arguments, backend = inputs
    gradients = backends.load("turned_qk", backend, inputs[0]).backward(dk, dq, *arguments)
    return tuple(gradient.contiguous() for gradient in gradients)


def _backward_fake(dk: Tensor | None, dq: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:_NUM_TENSORS])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS])
    ctx.flags = inputs[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dk: Tensor | None, dq: Tensor | None) -> tuple[Tensor | None, ...]:
    return *turned_qk_backward(dk, dq, *ctx.saved_tensors, *ctx.flags), None, None, None


def _flops(B: Tensor, C: Tensor, B_weight: Tensor, C_weight: Tensor, B_bias: Tensor, *others: Any) -> int:
    """A norm a group, then a bias and half a turn (six operations and two functions a pair) a head; keys, queries."""
    return 2 * (4 * B.numel() + 5 * B.numel() // B.shape[3] * B_bias.shape[0])


def _backward_flops(dk: Tensor | None, dq: Tensor | None, B: Tensor, C: Tensor, *others: Any) -> int:
    """The keys again; turning back (3 a channel), the angle (2), the sums over heads and tokens (2); the norm (8)."""
    return 2 * (8 * B.numel() + 12 * B.numel() // B.shape[3] * others[2].shape[0])


define_op("turned_qk", f"({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
define_op(
    "turned_qk_backward",
    f"(Tensor? dk, Tensor? dq, {_INPUTS}) -> ({', '.join(['Tensor'] * _NUM_TENSORS)})",
    _backward,
    _backward_fake,
)
define_gradient("turned_qk", _setup_context, _gradient)
define_flops("turned_qk", _flops)
define_flops("turned_qk_backward", _backward_flops)

turned_qk_forward = torch.ops.mambaverse.turned_qk.default
turned_qk_backward = torch.ops.mambaverse.turned_qk_backward.default
