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
from mambaverse.kernels.library import define_flops, define_gradient, define_op

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


def _flops(x: Tensor, weight: Tensor, *others: Any) -> int:
    """A multiply-add a tap, the bias, SiLU."""
    return x.numel() * (2 * weight.shape[1] + 5)


def _backward_flops(dy: Tensor | None, dfinal_state: Tensor | None, x: Tensor, weight: Tensor, *others: Any) -> int:
    """The output before SiLU again, then dx and dweight: a multiply-add a tap each."""
    return x.numel() * (6 * weight.shape[1] + 10)


define_op("causal_conv1d", f"({_ARGUMENTS}) -> (Tensor y, Tensor final_state)", _forward, _forward_fake)
define_op(
    "causal_conv1d_backward",
    f"(Tensor? dy, Tensor? dfinal_state, {_ARGUMENTS}) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",
    _backward,
    _backward_fake,
)
define_gradient("causal_conv1d", _setup_context, _gradient)
define_flops("causal_conv1d", _flops)
define_flops("causal_conv1d_backward", _backward_flops)


def step(x_t: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Return y_t and shift `conv_state`: one step in plain PyTorch, on any device."""
    wide = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    inputs = torch.cat((conv_state.to(wide), x_t.to(wide).unsqueeze(1)), 1)  # (B, W, D)
    y_t = (inputs * weight.to(wide).t()).sum(1)
    y_t = y_t if bias is None else y_t + bias.to(wide)
    conv_state.copy_(inputs[:, 1:])
    return (torch.nn.functional.silu(y_t) if silu else y_t).to(x_t.dtype)


def _update(x_t: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, backend: str) -> Tensor:
    if backends.resolve("causal_conv1d", backend, x_t, "_update") == "reference":
        return step(x_t, conv_state, weight, bias, silu)
    from mambaverse.kernels.causal_conv1d.triton_update import update

    return update(x_t, conv_state, weight, bias, silu)


define_op(
    "causal_conv1d_update",
    "(Tensor x_t, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, str backend) -> Tensor",
    _update,
    lambda x_t, *others: x_t.new_empty(x_t.shape),
)

causal_conv1d_forward = torch.ops.mambaverse.causal_conv1d.default
causal_conv1d_backward = torch.ops.mambaverse.causal_conv1d_backward.default
causal_conv1d_step = torch.ops.mambaverse.causal_conv1d_update.default
