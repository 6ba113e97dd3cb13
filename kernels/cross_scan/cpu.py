"""Cross-scan and cross-merge on the CPU: one gather of rows of channels, and one pass of a numba kernel that adds four.

Same signatures and results as reference.py. A gather copies, so it takes every dtype; sums are taken in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambaverse.kernels.cross_scan.reference import NUM_ORDERS, orders
from mambaverse.kernels.jit import cached_kernel
from mambaverse.kernels.rows import WORTH_A_CALL, as_array, flat_rows
from mambaverse.kernels.threads import parallel_for


def scan(x: Tensor) -> Tensor:
    """Return the tokens of x (B, H, W, D) in four orders, (B, 4, H · W, D)."""
    order = orders(x.shape[1], x.shape[2]).flatten()
    return x.flatten(1, 2).index_select(1, order).unflatten(1, (NUM_ORDERS, x.shape[1] * x.shape[2]))


def merge(y: Tensor, height: int, width: int) -> Tensor:
    """Return the sum (B, H, W, D) of what the orders of y (B, 4, H · W, D) say of each token, in the dtype of y."""
    batch, dim = y.shape[0], y.shape[3]
    x = torch.empty(batch, height, width, dim)
    parallel_for(
        _merge, batch * height, *flat_rows(y), height, width, dim, as_array(x.view(-1)),
        grain=1 + WORTH_A_CALL // max(1, width * dim),
    )  # fmt: skip
    return x.to(y.dtype)


@cached_kernel()
def _merge(start, stop, y, y_batch, y_order, y_step, height, width, dim, x):
    last = height * width - 1
    for item in range(start, stop):  # a row of the grid of one image
        image, row = item // height, item % height
        for column in range(width):
            by_rows, by_columns = row * width + column, column * height + row
            place = image * y_batch + by_rows * y_step
            first = y[place : place + dim]
            place = image * y_batch + y_order + by_columns * y_step
            second = y[place : place + dim]
            place = image * y_batch + 2 * y_order + (last - by_rows) * y_step
            third = y[place : place + dim]
            place = image * y_batch + 3 * y_order + (last - by_columns) * y_step
            fourth = y[place : place + dim]
            place = (item * width + column) * dim
            out = x[place : place + dim]
            for j in range(dim):
                out[j] = (first[j] + third[j]) + (second[j] + fourth[j])
