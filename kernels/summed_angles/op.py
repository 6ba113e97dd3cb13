"""The torch.library registration of summed_angles: one forward op, one backward op, their fakes and the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.checks import check_bounds
from mambaverse.kernels.library import define_flops, define_gradient, define_op

_INPUTS = "Tensor dt, Tensor rate, Tensor? initial, Tensor? cu_seqlens, str backend"


def _forward(dt: Tensor, rate: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    check_bounds("summed_angles", cu_seqlens, dt.shape[1])
    angles: Tensor = backends.load("summed_angles", backend, dt).forward(dt, rate, initial, cu_seqlens)
    return angles


def _forward_fake(dt: Tensor, rate: Tensor, *others: Any) -> Tensor:
    return dt.new_empty((*dt.shape, rate.shape[2]), dtype=torch.promote_types(dt.dtype, torch.float32))


def _backward(
    dangles: Tensor, dt: Tensor, rate: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    module = backends.load("summed_angles", backend, dt)
    ddt, drate, dinitial = module.backward(dangles, dt, rate, initial, cu_seqlens)
    return ddt.contiguous(), drate.contiguous(), dinitial.contiguous()


def _backward_fake(dangles: Tensor, dt: Tensor, rate: Tensor, initial: Tensor | None, *others: Any) -> Any:
    dinitial = dt.new_empty(0) if initial is None else initial.new_empty(initial.shape)
    return dt.new_empty(dt.shape), rate.new_empty(rate.shape), dinitial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.backend = inputs[4]


def _gradient(ctx: Any, dangles: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: checkpoints recompute it, and give it away
    ddt, drate, dinitial = summed_angles_backward(dangles, *saved, ctx.backend)
    return ddt, drate, None if saved[2] is None else dinitial, None, None


def _flops(dt: Tensor, rate: Tensor, *others: Any) -> int:
    """Of an angle: the product, the sum, and two to bring it into one turn."""
    return 4 * dt.numel() * rate.shape[2]


def _backward_flops(dangles: Tensor, *others: Any) -> int:
    """Of an angle: the sum from the end, and a product and a sum for each of dt and rate."""
    return 5 * dangles.numel()


define_op("summed_angles", f"({_INPUTS}) -> Tensor", _forward, _forward_fake)
define_op(
    "summed_angles_backward", f"(Tensor dangles, {_INPUTS}) -> (Tensor, Tensor, Tensor)", _backward, _backward_fake
)
define_gradient("summed_angles", _setup_context, _gradient)
define_flops("summed_angles", _flops)
define_flops("summed_angles_backward", _backward_flops)

summed_angles_forward = torch.ops.mambaverse.summed_angles.default
summed_angles_backward = torch.ops.mambaverse.summed_angles_backward.default
