"""Cross-scan and cross-merge on the GPU with Triton, one pass each; in Triton's interpreter also on the CPU.

A program has a tile of tokens of one image, taken by rows, and channels: it writes each token to its four places, or
reads those and adds them in float32. Same signatures and results as reference.py. Its times are not measured.
"""

# What Triton compiles has its own types.
# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambaverse.kernels.cross_scan.reference import NUM_ORDERS
from mambaverse.kernels.launch import on_device

_TILE = 4096  # elements of a program: 32 a thread
_MAX_CHANNELS = 128


def scan(x: Tensor) -> Tensor:
    """Return the tokens of x (B, H, W, D) in four orders, (B, 4, H · W, D)."""
    batch, height, width, dim = x.shape
    y = torch.empty((batch, NUM_ORDERS, height * width, dim), dtype=x.dtype, device=x.device)
    _launch(_scan, x, y, x.stride(), batch, height, width, dim)
    return y


def merge(y: Tensor, height: int, width: int) -> Tensor:
    """Return the sum (B, H, W, D) of what the orders of y (B, 4, H · W, D) say of each token, in the dtype of y."""
    batch, dim = y.shape[0], y.shape[3]
    x = torch.empty((batch, height, width, dim), dtype=y.dtype, device=y.device)
    _launch(_merge, y, x, y.stride(), batch, height, width, dim)
    return x


def _launch(kernel, source, target, strides, batch, height, width, dim) -> None:
    if target.numel() == 0:
        return
    channels = min(_MAX_CHANNELS, triton.next_power_of_2(dim))
    tokens = _TILE // channels
    tiles, blocks = triton.cdiv(height * width, tokens), triton.cdiv(dim, channels)
    with on_device(source):
        kernel[(batch * tiles * blocks,)](
            source, target, height, width, dim, *strides, tiles, blocks, T=tokens, BD=channels, num_warps=4
        )


@triton.jit
def _tile(height, width, dim, tiles, blocks, T: tl.constexpr, BD: tl.constexpr):
    """Return this program's image, rows and columns of its tokens, their places in two orders, channels and mask."""
    pid = tl.program_id(0)
    d = pid % blocks * BD + tl.arange(0, BD)
    by_rows = pid // blocks % tiles * T + tl.arange(0, T)
    image = (pid // blocks // tiles).to(tl.int64)
    row, column = by_rows // width, by_rows % width
    ok = (by_rows < height * width)[:, None] & (d < dim)[None, :]
    return image, row.to(tl.int64), column.to(tl.int64), by_rows.to(tl.int64), d.to(tl.int64), ok


@triton.jit(do_not_specialize=["height", "width"])  # 1 would be no tensor
def _scan(x, y, height, width, dim, x_batch, x_row, x_column, x_channel, tiles, blocks, T: tl.constexpr,
          BD: tl.constexpr):  # fmt: skip
    """Write y (B, 4, L, D), contiguous."""
    image, row, column, by_rows, d, ok = _tile(height, width, dim, tiles, blocks, T, BD)
    place = image * x_batch + row * x_row + column * x_column
    value = tl.load(x + place[:, None] + (d * x_channel)[None, :], mask=ok)
    length = (height * width).to(tl.int64)
    by_columns = column * height + row
    out = image * 4 * length
    tl.store(y + ((out + by_rows) * dim)[:, None] + d[None, :], value, mask=ok)
    tl.store(y + ((out + length + by_columns) * dim)[:, None] + d[None, :], value, mask=ok)
    tl.store(y + ((out + 3 * length - 1 - by_rows) * dim)[:, None] + d[None, :], value, mask=ok)
    tl.store(y + ((out + 4 * length - 1 - by_columns) * dim)[:, None] + d[None, :], value, mask=ok)


@triton.jit(do_not_specialize=["height", "width"])  # 1 would be no tensor
def _merge(y, x, height, width, dim, y_batch, y_order, y_step, y_channel, tiles, blocks, T: tl.constexpr,
           BD: tl.constexpr):  # fmt: skip
    """Write x (B, H, W, D), contiguous."""
    image, row, column, by_rows, d, ok = _tile(height, width, dim, tiles, blocks, T, BD)
    last = (height * width - 1).to(tl.int64)
    by_columns = column * height + row
    first = image * y_batch
    channel = (d * y_channel)[None, :]
    rows = tl.load(y + (first + by_rows * y_step)[:, None] + channel, mask=ok).to(tl.float32)
    rows += tl.load(y + (first + 2 * y_order + (last - by_rows) * y_step)[:, None] + channel, mask=ok).to(tl.float32)
    place = first + y_order + by_columns * y_step
    columns = tl.load(y + place[:, None] + channel, mask=ok).to(tl.float32)
    place = first + 3 * y_order + (last - by_columns) * y_step
    columns += tl.load(y + place[:, None] + channel, mask=ok).to(tl.float32)
    out = ((image * (last + 1) + by_rows) * dim)[:, None] + d[None, :]
    tl.store(x + out, (rows + columns).to(x.dtype.element_ty), mask=ok)
