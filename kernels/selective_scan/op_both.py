"""The torch.library registration of bidirectional_selective_scan: one forward op, one backward op, and the gradient.

Of the second direction, which is the reverse one, the ops take what it does not share with the first: None is shared.
A backend that can runs both directions in one launch (`forward_both`, `backward_both`); another runs one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.checks import check_bounds, num_sequences
from mambaverse.kernels.library import define_flops, define_gradient, define_op
from mambaverse.kernels.selective_scan.op import backward_flops, forward_flops, like_tensor
from mambaverse.kernels.selective_scan.shapes import (
    chunk_state_dtype,
    keeps_states,
    num_chunk_states,
    on_gpu,
    state_dtype,
)

_OF_ONE = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"]
_INPUTS = ", ".join(
    [f"Tensor{'?' if i >= 5 else ''} {name}" for i, name in enumerate(_OF_ONE)]
    + [f"Tensor? {name}_2" for name in _OF_ONE]
    + ["Tensor? cu_seqlens"]
)
_NUM = len(_OF_ONE)
_NUM_GRADIENTS = 2 * _NUM
_Z = _OF_ONE.index("z")


def _directions(tensors: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what each direction takes."""
    first, own = tensors[:_NUM], tensors[_NUM:_NUM_GRADIENTS]
    return tuple(first), tuple(a if b is None else b for a, b in zip(first, own, strict=True))


def _outer_gate(tensors: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], Tensor | None]:
    """Return what each direction takes, and z apart where they share it: it may gate their sum instead."""
    z = tensors[_Z] if tensors[_NUM + _Z] is None else None
    ungated = tensors if z is None else [*tensors[:_Z], None, *tensors[_Z + 1 :]]
    return *_directions(ungated), z


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, cu_seqlens, delta_softplus, mean, backend, save = inputs
    u = tensors[0]
    check_bounds("bidirectional_selective_scan", cu_seqlens, u.shape[1])
    save = keeps_states(u, tensors[2], backend, save)
    module = backends.load("selective_scan", backend, u)
    if hasattr(module, "forward_both"):
        first, second, z = _outer_gate(tensors)
        scale = 0.5 if mean else 1.0
        return module.forward_both(first, second, z, scale, cu_seqlens, delta_softplus, save)
    runs = [
        module.forward(*used, cu_seqlens, delta_softplus, reverse, save)
        for used, reverse in zip(_directions(tensors), (False, True), strict=True)
    ]
    ys, final_states, kept = zip(*runs, strict=True)
    y, final_state, chunk_states = torch.add(*ys), torch.stack(final_states), torch.cat(kept)
    return (y / 2 if mean else y), final_state, chunk_states, u.new_empty(0)


def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u, _, A, *_, cu_seqlens, _, _, backend, save = inputs
    save = keeps_states(u, A, backend, save)
    gated = save and on_gpu(u, backend) and inputs[_Z] is not None and inputs[_NUM + _Z] is None
    dim, state_dim = A.shape
    sequences = num_sequences("bidirectional_selective_scan", cu_seqlens, u.shape[0])
    kept = 2 * num_chunk_states(u, backend, save)
    return (
        u.new_empty(u.shape),
        u.new_empty(2, sequences, dim, state_dim, dtype=state_dtype(u, A)),
        u.new_empty(kept, dim, state_dim, dtype=chunk_state_dtype(u, A, backend)),
        u.new_empty(u.shape if gated else (0,)),
    )


def _backward(dy: Tensor | None, dfinal_state: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    *tensors, cu_seqlens, chunk_states, total, delta_softplus, mean, backend = inputs
    u = tensors[0]
    module = backends.load("selective_scan", backend, u)
    of_each: list[list[Any]] = []
    dz = None
    dy, scale = u.new_zeros(u.shape) if dy is None else dy, 0.5 if mean else 1.0
    rows = num_chunk_states(u, backend, True)
    if hasattr(module, "backward_both"):
        one, two, z = _outer_gate(tensors)
        kept = chunk_states, total
        if chunk_states.shape[0] < 2 * rows or (z is not None and total.shape != z.shape):  # forward kept none
            kept = module.forward_both(one, two, z, scale, cu_seqlens, delta_softplus, True)[2:]
        gradients, dz = module.backward_both(dy, dfinal_state, one, two, z, scale, cu_seqlens, *kept, delta_softplus)
        of_each = [[None if g is None else g[direction] for g in gradients] for direction in range(2)]
    else:
        for direction, used in enumerate(_directions(tensors)):
            states = chunk_states[direction * rows : (direction + 1) * rows]
            if states.shape[0] < rows:
                states = module.forward(*used, cu_seqlens, delta_softplus, direction == 1, True)[2]
            dfinal = None if dfinal_state is None else dfinal_state[direction]
            arguments = *used, cu_seqlens, states, delta_softplus, direction == 1
            of_each.append(list(module.backward(dy * scale, dfinal, *arguments)))
    firsts, seconds = of_each
    if dz is not None:
        firsts[_Z], seconds[_Z] = dz, None
    for i, own in enumerate(tensors[_NUM:]):
        if own is None and firsts[i] is not None and seconds[i] is not None:  # shared
            firsts[i], seconds[i] = firsts[i] + seconds[i], None
    return tuple(like_tensor(g, t, u) for g, t in zip((*firsts, *seconds), tensors, strict=True))


def _backward_fake(dy: Tensor | None, dfinal_state: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    u = inputs[0]
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:_NUM_GRADIENTS])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, delta_softplus, mean, backend, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.flags = delta_softplus, mean, backend
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    gradients = both_backward(dy, dfinal_state, *saved, *ctx.flags)
    used = tuple(None if t is None else g for g, t in zip(gradients, saved[:_NUM_GRADIENTS], strict=True))
    return *used, None, None, None, None, None  # cu_seqlens, delta_softplus, mean, backend, save


def _flops(u: Tensor, delta: Tensor, A: Tensor, *others: Any) -> int:
    """Two scans, and the merge."""
    return 2 * forward_flops(u, delta, A) + u.numel()


def _backward_flops(
    dy: Tensor | None, dfinal_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, *_: Any
) -> int:
    return 2 * backward_flops(dy, dfinal_state, u, delta, A)


define_op(
    "bidirectional_selective_scan",
    f"({_INPUTS}, bool delta_softplus, bool mean, str backend, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define_op(
    "bidirectional_selective_scan_backward",
    f"(Tensor? dy, Tensor? dfinal_state, {_INPUTS}, Tensor chunk_states, Tensor total, bool delta_softplus, "
    f"bool mean, str backend) -> ({', '.join(['Tensor'] * _NUM_GRADIENTS)})",
    _backward,
    _backward_fake,
)
define_gradient("bidirectional_selective_scan", _setup_context, _gradient, compile_ahead=True)
define_flops("bidirectional_selective_scan", _flops)
define_flops("bidirectional_selective_scan_backward", _backward_flops)

both_forward = torch.ops.mambaverse.bidirectional_selective_scan.default
both_backward = torch.ops.mambaverse.bidirectional_selective_scan_backward.default
