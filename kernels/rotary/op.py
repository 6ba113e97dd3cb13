"""The torch.library registration of rotary: one op, which is its own gradient with the turn the other way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.library import define_flops, define_gradient, define_op


def _forward(x: Tensor, cos: Tensor, sin: Tensor, back: bool, backend: str) -> Tensor:
    return backends.load("rotary", backend, x).forward(x, cos, sin, back)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, back: bool, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.back, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return rotary_forward(dy, *ctx.saved_tensors, not ctx.back, ctx.backend), None, None, None, None


define_op("rotary", "(Tensor x, Tensor cos, Tensor sin, bool back, str backend) -> Tensor", _forward, _fake)
define_gradient("rotary", _setup_context, _gradient)
define_flops("rotary", lambda x, *others: 3 * x.numel())

rotary_forward = torch.ops.mambaverse.rotary.default
