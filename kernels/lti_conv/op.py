"""The torch.library registration of lti_conv: one forward op, one backward op, their fakes and the gradient.

The op takes the discretised system, (D, N) and hence cheap, that `discretize` makes of the parameters in plain PyTorch.
Backward runs the recurrence again, so there is nothing to `save` beside the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.library import define_flops, define_gradient, define_op
from mambaverse.kernels.lti_conv.reference import no_state, state_dtype

_ARGUMENTS = (
    "Tensor u, Tensor A_bar, Tensor B_bar, Tensor C, Tensor? D, Tensor? initial_state, bool reverse, bool wants_state, "
    "str backend"
)


def _forward(u: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *arguments, backend = others
    return backends.load("lti_conv", backend, u).forward(u, *arguments)


def _forward_fake(u: Tensor, A_bar: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    wants_state = others[-2]
    state = u.new_empty((u.shape[0], *A_bar.shape), dtype=state_dtype(u)) if wants_state else no_state(u)
    return u.new_empty(u.shape), state


def _backward(dy: Tensor | None, dfinal_state: Tensor | None, u: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *arguments, _, backend = others
    return backends.load("lti_conv", backend, u).backward(dy, dfinal_state, u, *arguments)


def _backward_fake(dy: Tensor | None, dfinal_state: Tensor | None, u: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in (u, *others[:5]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.flags = inputs[6:]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    gradients = lti_conv_backward(dy, dfinal_state, *inputs, *ctx.flags)
    used = (None if tensor is None else g for g, tensor in zip(gradients, inputs, strict=True))
    return *used, None, None, None  # reverse, wants_state, backend


def _flops(u: Tensor, A_bar: Tensor, *others: Any) -> int:
    """Of a complex state: A h (6), + B u (4), y + Re(C h) (4); and D u."""
    return u.numel() * (14 * A_bar.shape[1] + 2)


def _backward_flops(dy: Tensor | None, dfinal_state: Tensor | None, u: Tensor, A_bar: Tensor, *others: Any) -> int:
    """Of a complex state: h and dh/dA (18), dy h and dy dh/dA (8), the way back: g, dB, du and conj(A) g (18)."""
    return u.numel() * (44 * A_bar.shape[1] + 4)


define_op("lti_conv", f"({_ARGUMENTS}) -> (Tensor y, Tensor final_state)", _forward, _forward_fake)
define_op(
    "lti_conv_backward",
    f"(Tensor? dy, Tensor? dfinal_state, {_ARGUMENTS}) -> "
    "(Tensor du, Tensor dA_bar, Tensor dB_bar, Tensor dC, Tensor dD, Tensor dinitial_state)",
    _backward,
    _backward_fake,
)
define_gradient("lti_conv", _setup_context, _gradient)
define_flops("lti_conv", _flops)
define_flops("lti_conv_backward", _backward_flops)

lti_conv_forward = torch.ops.mambaverse.lti_conv.default
lti_conv_backward = torch.ops.mambaverse.lti_conv_backward.default
