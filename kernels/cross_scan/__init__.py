"""VMamba's cross-scan, a grid of tokens as four sequences, and cross-merge, its transpose; both by indexing.

    y[k] = the tokens by rows (k = 0), by columns (1), by rows backwards (2), by columns backwards (3)

This is the general form, for scans that know one direction only: it writes four copies. `selective_scan` runs backwards
where it is told to (`reverse`), and takes both directions at once (`bidirectional_selective_scan`), so that the mixer
`ss2d` needs one copy, by columns, and none of these operators.

Source: Liu et al., "VMamba: Visual State Space Model" (2024), section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.checks import check_dims
from mambaverse.kernels.cross_scan.op import cross_merge_forward, cross_scan_forward

__all__ = ["cross_merge", "cross_scan"]


def cross_scan(x: Tensor) -> Tensor:
    """Return the tokens of a grid in four orders.

    Args:
        x: (B, H, W, D), any strides. float32, bfloat16, float16 or float64.

    Returns:
        y (B, 4, H · W, D) in the dtype of x, contiguous: by rows, by columns, and both of them backwards.
        Differentiable; the gradient is `cross_merge`.

    Raises:
        ValueError: for another number of axes, or a dtype that is not floating.
        BackendError: The backend in force cannot run here.
    """
    check_dims("cross_scan", "x", x, "(B, H, W, D)")
    return cross_scan_forward(x, current_backend())


def cross_merge(y: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    """Add up what four sequences in the orders of `cross_scan` say of each token of a grid.

    Args:
        y: (B, 4, L, D), any strides. float32, bfloat16, float16 or float64; 16-bit values are summed in float32.
        spatial_shape: (H, W), the height and width of the grid, H · W = L.

    Returns:
        x (B, H, W, D) in the dtype of y, contiguous. Differentiable; the gradient is `cross_scan`.

    Raises:
        ValueError: for a wrong shape or dtype, or a grid of another number of tokens.
        BackendError: The backend in force cannot run here.
    """
    check_dims("cross_merge", "y", y, "(B, 4, L, D)")
    if y.shape[1] != 4:
        raise ValueError(f"cross_merge: y has shape {tuple(y.shape)}; expected (B, 4, L, D), one sequence an order")
    two = isinstance(spatial_shape, Sequence) and len(spatial_shape) == 2
    whole = two and all(isinstance(n, int | torch.SymInt) and n >= 0 for n in spatial_shape)
    if not whole or spatial_shape[0] * spatial_shape[1] != y.shape[2]:
        raise ValueError(
            f"cross_merge: spatial_shape is {spatial_shape!r}; expected (H, W) with H · W = L = {y.shape[2]}"
        )
    return cross_merge_forward(y, spatial_shape[0], spatial_shape[1], current_backend())
