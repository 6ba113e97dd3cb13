"""VMamba's four orders of a grid of tokens in plain PyTorch: the spec that every backend is held against.

    step l of order   0: row l div W, column l mod W     (rows, from the top left)
                      1: row l mod H, column l div H     (columns, from the top left)
                      2: order 0 backwards               3: order 1 backwards
    scan:  y[k, l] = x[order_k(l)]            merge:  x[t] = Σ_k y[k, l] with order_k(l) = t

Each is the transpose of the other, hence its gradient. Source: Liu et al., "VMamba: Visual State Space Model" (2024),
section 4.2 (cross-scan and cross-merge).
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_ORDERS = 4


def orders(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return (4, H · W) int64: the place, counted along rows, of the token that each order reads at each step."""
    step = torch.arange(height * width, device=device)
    by_rows = step
    by_columns = (step % max(height, 1)) * width + step // max(height, 1)
    return torch.stack([by_rows, by_columns, by_rows.flip(0), by_columns.flip(0)])


def scan(x: Tensor) -> Tensor:
    """Return the tokens of x (B, H, W, D) in four orders, (B, 4, H · W, D)."""
    return x.flatten(1, 2)[:, orders(x.shape[1], x.shape[2], x.device)].contiguous()


def merge(y: Tensor, height: int, width: int) -> Tensor:
    """Return the sum (B, H, W, D) of what the orders of y (B, 4, H · W, D) say of each token, in the dtype of y."""
    wide = torch.promote_types(y.dtype, torch.float32)
    total = torch.zeros(y.shape[0], height * width, y.shape[3], dtype=wide, device=y.device)
    for k, order in enumerate(orders(height, width, y.device)):
        total.index_add_(1, order, y[:, k].to(wide))
    return total.to(y.dtype).unflatten(1, (height, width))
