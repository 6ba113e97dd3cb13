"""The torch.library registration of ssd: one forward op, one backward op, their fakes and the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.checks import check_bounds, num_sequences
from mambaverse.kernels.library import define_flops, define_gradient, define_op
from mambaverse.kernels.ssd.layout import boundary_dtype, boundary_states, state_dtype

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? cu_seqlens"
)
_FLAGS = "bool dt_softplus, float dt_min, float dt_max, bool reverse, int chunk_size, str backend"
# They came after programs were saved that call the operator without them, so they stand last and have defaults, which
# torch leaves out of the call.
_WEIGHTS = "Tensor? weight=None, Tensor? own_weight=None"
_NUM_INPUTS = 17  # tensors, flags and save, without the weights
_NUM_GRADIENTS = 11  # x, dt, A, B, C, D, z, dt_bias, initial_state, weight, own_weight


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, backend, save = inputs[:_NUM_INPUTS]
    x, cu_seqlens = arguments[0], arguments[9]
    check_bounds("ssd", cu_seqlens, x.shape[1])
    return backends.load("ssd", backend, x).forward(*arguments, save, *inputs[_NUM_INPUTS:])


def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, _, _, B, *_, cu_seqlens, _, _, _, _, chunk_size, backend, save = inputs[:_NUM_INPUTS]
    rows, *shape = boundary_states(x, B, cu_seqlens, chunk_size, backend)
    sequences = num_sequences("ssd", cu_seqlens, x.shape[0])
    final_state = x.new_empty((sequences, *x.shape[2:], B.shape[3]), dtype=state_dtype(x))
    states = x.new_empty((rows if save else 0, *shape), dtype=boundary_dtype(x, backend))
    return x.new_empty(x.shape), final_state, states


def _backward(dy: Tensor | None, dfinal_state: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    *tensors, weight, own_weight, chunk_states, dt_softplus, dt_min, dt_max, reverse, chunk_size, backend = inputs
    x, B, cu_seqlens = tensors[0], tensors[3], tensors[9]
    flags = dt_softplus, dt_min, dt_max, reverse, chunk_size
    module = backends.load("ssd", backend, x)
    if chunk_states.shape[0] < boundary_states(x, B, cu_seqlens, chunk_size, backend)[0]:  # forward had save=False
        chunk_states = module.forward(*tensors, *flags, True, weight, own_weight)[2]
    gradients = module.backward(dy, dfinal_state, *tensors, chunk_states, *flags, weight, own_weight)
    return tuple(gradient.contiguous() for gradient in gradients)


def _backward_fake(dy: Tensor | None, dfinal_state: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    x = inputs[0]
    like = *inputs[:9], *inputs[10:12]  # but cu_seqlens
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in like)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weights = inputs[_NUM_INPUTS:]
    ctx.save_for_backward(*inputs[:10], *weights, *[None] * (2 - len(weights)), output[2])
    ctx.flags, ctx.num_weights = inputs[10:16], len(weights)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    gradients = ssd_backward(dy, dfinal_state, *saved, *ctx.flags)
    inputs = *saved[:9], *saved[10:12]
    used = [None if t is None else g for g, t in zip(gradients, inputs, strict=True)]
    return *used[:9], *[None] * 8, *used[9 : 9 + ctx.num_weights]  # cu_seqlens, the six flags, save


def _flops(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Any) -> int:
    """Of a state of a channel: a h + x B and y + C h."""
    return x.numel() * (5 * B.shape[3] + 10)


def _backward_flops(
    dy: Tensor | None, dfinal_state: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *_: Any
) -> int:
    """Of a state of a channel: h again (3), then g = a g + C dy (3) and dC, dB, dx, da (2 each)."""
    return x.numel() * (14 * B.shape[3] + 30)


define_op("ssd", f"({_INPUTS}, {_FLAGS}, bool save, {_WEIGHTS}) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake)
define_op(
    "ssd_backward",
    f"(Tensor? dy, Tensor? dfinal_state, {_INPUTS}, Tensor? weight, Tensor? own_weight, Tensor chunk_states, {_FLAGS})"
    " -> "
    f"({', '.join(['Tensor'] * _NUM_GRADIENTS)})",
    _backward,
    _backward_fake,
)
define_gradient("ssd", _setup_context, _gradient, compile_ahead=True)
define_flops("ssd", _flops)
define_flops("ssd_backward", _backward_flops)

ssd_forward = torch.ops.mambaverse.ssd.default
ssd_backward = torch.ops.mambaverse.ssd_backward.default
