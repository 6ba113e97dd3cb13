"""The torch.library registration of cross_scan and cross_merge: linear ops, each of them the gradient of the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import backend as backends
from mambaverse.kernels.library import define_flops, define_gradient, define_op


def _scan(x: Tensor, backend: str) -> Tensor:
    return backends.load("cross_scan", backend, x).scan(x)


def _scan_fake(x: Tensor, backend: str) -> Tensor:
    batch, height, width, dim = x.shape
    return x.new_empty(batch, 4, height * width, dim)


def _merge(y: Tensor, height: int, width: int, backend: str) -> Tensor:
    return backends.load("cross_scan", backend, y).merge(y, height, width)


def _merge_fake(y: Tensor, height: int, width: int, backend: str) -> Tensor:
    return y.new_empty(y.shape[0], height, width, y.shape[3])


def _setup_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.grid = x.shape[1], x.shape[2]


def _setup_merge(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.backend = inputs[-1]


def _scan_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return cross_merge_forward(dy, *ctx.grid, ctx.backend), None


def _merge_gradient(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    return cross_scan_forward(dx, ctx.backend), None, None, None


define_op("cross_scan", "(Tensor x, str backend) -> Tensor", _scan, _scan_fake)
define_op("cross_merge", "(Tensor y, SymInt height, SymInt width, str backend) -> Tensor", _merge, _merge_fake)
define_gradient("cross_scan", _setup_scan, _scan_gradient)
define_gradient("cross_merge", _setup_merge, _merge_gradient)
define_flops("cross_scan", lambda x, *others: 0)
define_flops("cross_merge", lambda y, *others: 3 * y.numel() // 4)

cross_scan_forward = torch.ops.mambaverse.cross_scan.default
cross_merge_forward = torch.ops.mambaverse.cross_merge.default
