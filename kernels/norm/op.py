"""The torch.library registration of norm and gated_rms_norm, their backward ops, fakes and gradients.

`norm` is RMS norm or, with `center`, layer norm. Backward computes the statistics of a row again rather than keep them:
the row is in cache anyway. So these ops have nothing to `save`; what backward needs is new_residual, or x without one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.library import define_flops, define_gradient, define_op


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, center: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return backends.load("norm", backend, x).forward(x, weight, bias, residual, eps, center)


def _forward_fake(x: Tensor, weight: Tensor, bias: Any, residual: Tensor | None, *flags: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if residual is None else residual.new_empty(residual.shape)


def _backward(
    dy: Tensor,
    dt: Tensor | None,
    t: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    x_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of t, of x where its dtype is another (else empty), of weight and of bias."""
    module = backends.load("norm", backend, t)
    if x_dtype != t.dtype and hasattr(module, "backward_in_two_dtypes"):
        both: tuple[Tensor, Tensor, Tensor, Tensor]
        both = module.backward_in_two_dtypes(dy, dt, t, weight, bias, eps, center, x_dtype)
        return both
    grad, dweight, dbias = module.backward(dy, dt, t, weight, bias, eps, center)
    return grad, t.new_empty(0, dtype=x_dtype) if x_dtype == t.dtype else grad.to(x_dtype), dweight, dbias


def _backward_fake(
    dy: Tensor,
    dt: Tensor | None,
    t: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    x_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = t.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dx = t.new_empty(0 if x_dtype == t.dtype else t.shape, dtype=x_dtype)
    return t.new_empty(t.shape), dx, weight.new_empty(weight.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, residual, *flags = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight, bias)
    ctx.flags = flags
    ctx.x_dtype, ctx.has_residual = x.dtype, residual is not None
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None, dnew_residual: Tensor | None) -> tuple[Tensor | None, ...]:
    t, weight, bias = ctx.saved_tensors
    dt, dx, dweight, dbias = dnew_residual if ctx.has_residual else None, None, None, None
    if dy is not None:
        dt, dx, dweight, dbias = norm_backward(dy, dt, t, weight, bias, *ctx.flags[:2], ctx.x_dtype, *ctx.flags[2:])
        dx = dt if ctx.x_dtype == t.dtype else dx
    elif dt is not None:
        dx = dt.to(ctx.x_dtype)
    return dx, dweight, None if bias is None else dbias, dt if ctx.has_residual else None, None, None, None


def _flops(x: Tensor, *others: Any) -> int:
    """The residual, the sum of squares, the scale, weight and bias."""
    return 6 * x.numel()


def _backward_flops(dy: Tensor, *others: Any) -> int:
    """The normalised values again, two sums over a row, dx, dweight and dbias."""
    return 14 * dy.numel()


define_op(
    "norm",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, bool center, str backend) -> "
    "(Tensor y, Tensor new_residual)",
    _forward,
    _forward_fake,
)
define_op(
    "norm_backward",
    "(Tensor dy, Tensor? dt, Tensor t, Tensor weight, Tensor? bias, float eps, bool center, ScalarType x_dtype, "
    "str backend) -> (Tensor grad_t, Tensor dx, Tensor dweight, Tensor dbias)",
    _backward,
    _backward_fake,
)
define_gradient("norm", _setup_context, _gradient)
define_flops("norm", _flops)
define_flops("norm_backward", _backward_flops)


def _gated_forward(x: Tensor, *others: Any) -> Tensor:
    *arguments, backend = others
    return backends.load("norm", backend, x).gated_forward(x, *arguments)


def _gated_forward_fake(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


def _gated_backward(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, backend = others
    return backends.load("norm", backend, x).gated_backward(dy, x, *arguments)


def _gated_backward_fake(dy: Tensor, x: Tensor, weight: Tensor, z: Tensor, *flags: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), z.new_empty(z.shape)


def _gated_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.flags = inputs[3:]


def _gated_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_rms_norm_backward(dy, *ctx.saved_tensors, *ctx.flags), None, None, None, None


_GATED = "Tensor x, Tensor weight, Tensor z, int group_size, bool norm_before_gate, float eps, str backend"
define_op("gated_rms_norm", f"({_GATED}) -> Tensor", _gated_forward, _gated_forward_fake)
define_op(
    "gated_rms_norm_backward",
    f"(Tensor dy, {_GATED}) -> (Tensor dx, Tensor dweight, Tensor dz)",
    _gated_backward,
    _gated_backward_fake,
)
define_gradient("gated_rms_norm", _gated_setup_context, _gated_gradient)
define_flops("gated_rms_norm", lambda x, *others: 9 * x.numel())  # the gate, four, instead of residual and bias
define_flops("gated_rms_norm_backward", lambda dy, *others: 22 * dy.numel())

norm_forward = torch.ops.mambaverse.norm.default
norm_backward = torch.ops.mambaverse.norm_backward.default
gated_rms_norm_forward = torch.ops.mambaverse.gated_rms_norm.default
gated_rms_norm_backward = torch.ops.mambaverse.gated_rms_norm_backward.default
