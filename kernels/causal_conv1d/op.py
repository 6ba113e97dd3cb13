"""The torch.library registration of causal_conv1d: one forward op, one backward op, their fakes and the gradient.

Backward recomputes the sums before SiLU from the inputs, so that forward has nothing to save beside them: unlike the
scans, this op has no `chunk_states` and no `save`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.checks import num_sequences
from mambaverse.kernels.library import define_gradient, define_op

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu, bool reverse, "
    "str backend"
)


def _forward(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *arguments, backend = others
    return backends.load("causal_conv1d", backend, x).forward(x, *arguments)


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Any, state: Any, cu_seqlens: Any, *flags: Any
) -> tuple[Tensor, Tensor]:
    num_states = num_sequences("causal_conv1d", cu_seqlens, x.shape[0])
    return x.new_empty(x.shape), x.new_empty((num_states, weight.shape[1] - 1, x.shape[2]))


def _backward(dy: Tensor | None, dfinal_state: Tensor | None, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *arguments, backend = others
    return backends.load("causal_conv1d", backend, x).backward(dy, dfinal_state, x, *arguments)


def _backward_fake(dy: Tensor | None, dfinal_state: Tensor | None, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, *others[:3]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.flags = inputs[5:]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    gradients = causal_conv1d_backward(dy, dfinal_state, *inputs, *ctx.flags)
    used = (None if tensor is None else g for g, tensor in zip(gradients, inputs[:4], strict=True))
    return *used, None, None, None, None  # cu_seqlens, silu, reverse, backend


define_op("causal_conv1d", f"({_ARGUMENTS}) -> (Tensor y, Tensor final_state)", _forward, _forward_fake)
define_op(
    "causal_conv1d_backward",
    f"(Tensor? dy, Tensor? dfinal_state, {_ARGUMENTS}) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",
    _backward,
    _backward_fake,
)
define_gradient("causal_conv1d", _setup_context, _gradient)

causal_conv1d_forward = torch.ops.mambaverse.causal_conv1d.default
causal_conv1d_backward = torch.ops.mambaverse.causal_conv1d_backward.default
