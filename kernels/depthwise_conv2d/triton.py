"""The depthwise convolution of a grid on the GPU with Triton; in Triton's interpreter also on the CPU.

Same signatures and results as reference.py, with sums in float32. One pass forward; backward two: the gradient of the
sums before SiLU, which is written in the dtype of x, and what follows from it. Deterministic, but for filters of more
than MAX_SIDE a side, which torch's operators take.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from mambaverse.kernels.depthwise_conv2d import aten
from mambaverse.kernels.depthwise_conv2d.triton_kernels import convolve, gradient
from mambaverse.kernels.launch import Memo, Spec, launch, memo_of, on_device, power_of_2

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_SIDE = 7  # of a filter, whose taps are in registers, and its loops unrolled; torch's operators take larger ones
ROWS = 8 if INTERPRETED else 32  # of a band
COLUMNS = 8 if INTERPRETED else 16
# Elements of a tile, of each of 128 threads as many as leave room for the taps of a filter of so many a side; backward
# has as many sums for them beside.
TILES = {1: 1024, 3: 1024, 5: 512, 7: 256}
OF_GRADIENT = 2


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Return y (B, H, W, D) in the dtype of x, as `reference.forward`."""
    if max(weight.shape[1:]) > MAX_SIDE:
        return aten.forward(x, weight, bias, silu)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        memo = memo_of("depthwise_conv2d", x.device, *map(Spec.of, (x, weight, bias)), silu)
        with on_device(x):
            _convolve(memo, x, weight, bias, None, y, silu)
    return y


def backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias, as `reference.backward`."""
    if max(weight.shape[1:]) > MAX_SIDE:
        return aten.backward(dy, x, weight, bias, silu)
    (batch, height, width, dim), (_, rows, columns) = x.shape, weight.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, channels = _tile(width, dim, rows, columns, OF_GRADIENT)
    programs = batch * -(-height // ROWS) * -(-width // block)
    parts = torch.empty((programs, rows * columns + 1, dim), dtype=torch.float32, device=x.device)
    if dx.numel():
        memo = memo_of("depthwise_conv2d", x.device, *map(Spec.of, (dy, x, weight, bias)), silu)
        with on_device(x):
            g = dy
            if silu:
                g = torch.empty(x.shape, dtype=x.dtype, device=x.device)
                _convolve(memo, x, weight, bias, dy, g, True)
            launch(
                memo, "gradient", gradient, (programs, -(-dim // channels)),
                (g, x, weight, dx, parts, height, width, dim, *g.stride(), *x.stride(), *weight.stride()),
                lambda: {
                    "K_ROWS": rows, "K_COLUMNS": columns, "ROWS": ROWS, "BW": block, "BD": channels, "num_warps": 4
                },
            )  # fmt: skip
    total = parts.sum(0)
    dweight = total[:-1].T.reshape(weight.shape).to(weight.dtype)
    dbias = x.new_empty(0) if bias is None else total[-1].to(bias.dtype)
    return dx, dweight, dbias


def _convolve(
    memo: Memo, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor | None, y: Tensor, silu: bool
) -> None:  # fmt: skip
    (batch, height, width, dim), (_, rows, columns) = x.shape, weight.shape
    block, channels = _tile(width, dim, rows, columns, 1)
    launch(
        memo, "convolve", convolve, (batch * -(-height // ROWS) * -(-width // block), -(-dim // channels)),
        (x, weight, weight if bias is None else bias, x if dy is None else dy, y, height, width, dim,
         *x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0), *(x if dy is None else dy).stride()),
        lambda: {
            "K_ROWS": rows, "K_COLUMNS": columns, "HAS_BIAS": bias is not None, "SILU": silu,
            "GRADIENT": dy is not None, "ROWS": ROWS, "BW": block, "BD": channels, "num_warps": 4,
        },
    )  # fmt: skip


def _tile(width: int, dim: int, rows: int, columns: int, share: int) -> tuple[int, int]:
    """Return the columns and channels of a program's tile, each a power of two."""
    elements = 256 if INTERPRETED else TILES[max(rows, columns)] // share
    block = min(COLUMNS, power_of_2(width))
    return block, min(max(1, elements // block), power_of_2(dim))
