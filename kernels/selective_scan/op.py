"""The torch.library registration of selective_scan: one forward op, one backward op, their fakes and the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.checks import check_bounds, num_sequences
from mambaverse.kernels.library import define_flops, define_gradient, define_op
from mambaverse.kernels.selective_scan.shapes import (
    chunk_state_dtype,
    keeps_states,
    num_chunk_states,
    state_dtype,
)

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? cu_seqlens"
)
_NUM_GRADIENTS = 9  # u, delta, A, B, C, D, z, delta_bias, initial_state


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, delta_softplus, reverse, backend, save = inputs
    u, A, cu_seqlens = tensors[0], tensors[2], tensors[9]
    check_bounds("selective_scan", cu_seqlens, u.shape[1])
    save = keeps_states(u, A, backend, save)
    return backends.load("selective_scan", backend, u).forward(*tensors, delta_softplus, reverse, save)


def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, _, A, *_, cu_seqlens, _, _, backend, save = inputs
    dim, state_dim = A.shape
    dtype = state_dtype(u, A)
    y = u.new_empty(u.shape)
    final_state = u.new_empty(num_sequences("selective_scan", cu_seqlens, u.shape[0]), dim, state_dim, dtype=dtype)
    kept = num_chunk_states(u, backend, keeps_states(u, A, backend, save))
    return y, final_state, u.new_empty(kept, dim, state_dim, dtype=chunk_state_dtype(u, A, backend))


def _backward(dy: Tensor | None, dfinal_state: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    *tensors, chunk_states, delta_softplus, reverse, backend = inputs
    u = tensors[0]
    module = backends.load("selective_scan", backend, u)
    if chunk_states.shape[0] < num_chunk_states(u, backend, True):  # forward kept none
        chunk_states = module.forward(*tensors, delta_softplus, reverse, True)[2]
    dy = u.new_zeros(u.shape) if dy is None else dy
    gradients = module.backward(dy, dfinal_state, *tensors, chunk_states, delta_softplus, reverse)
    return tuple(like_tensor(g, t, u) for g, t in zip(gradients, tensors[:_NUM_GRADIENTS], strict=True))


def like_tensor(gradient: Tensor | None, tensor: Tensor | None, u: Tensor) -> Tensor:
    """Return the gradient contiguous in its tensor's dtype, an empty tensor where the tensor is None."""
    if gradient is None or tensor is None:
        return u.new_empty(0)
    gradient = gradient.real if gradient.is_complex() and not tensor.is_complex() else gradient
    return gradient.to(tensor.dtype).contiguous()


def _backward_fake(dy: Tensor | None, dfinal_state: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    u = inputs[0]
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:_NUM_GRADIENTS])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, delta_softplus, reverse, backend, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.flags = delta_softplus, reverse, backend
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    gradients = selective_scan_backward(dy, dfinal_state, *saved, *ctx.flags)
    used = tuple(None if t is None else g for g, t in zip(gradients, saved[:_NUM_GRADIENTS], strict=True))
    return *used, None, None, None, None, None  # cu_seqlens, delta_softplus, reverse, backend, save


def forward_flops(u: Tensor, delta: Tensor, A: Tensor, *others: Any) -> int:
    """Of a state: Δ A, its exponential, Δu B, a h + x, y + C h; of a channel: softplus, Δ u, D u and the gate."""
    return u.numel() * (A.shape[1] * (22 if A.is_complex() else 7) + 10)


def backward_flops(dy: Tensor | None, dfinal_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, *_: Any) -> int:
    """Of a state: a and h again (5), then g = a g + C dy (3) and dC, dB, d(Δu), d(ΔA) (2 each), dΔ, dA (2 each)."""
    return u.numel() * (A.shape[1] * (64 if A.is_complex() else 20) + 30)


define_op(
    "selective_scan",
    f"({_INPUTS}, bool delta_softplus, bool reverse, str backend, bool save) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define_op(
    "selective_scan_backward",
    f"(Tensor? dy, Tensor? dfinal_state, {_INPUTS}, Tensor chunk_states, bool delta_softplus, bool reverse, "
    f"str backend) -> ({', '.join(['Tensor'] * _NUM_GRADIENTS)})",
    _backward,
    _backward_fake,
)
define_gradient("selective_scan", _setup_context, _gradient, compile_ahead=True)
define_flops("selective_scan", forward_flops)
define_flops("selective_scan_backward", backward_flops)

selective_scan_forward = torch.ops.mambaverse.selective_scan.default
selective_scan_backward = torch.ops.mambaverse.selective_scan_backward.default
