"""Rotary positions: pairs of a head's channels are turned by angles that are the same in every head.

    (a, b) = channels (i, i + P/2) of x[t];   y[t] = (a cos θ[t,i] - b sin θ[t,i], a sin θ[t,i] + b cos θ[t,i])

Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864), section
3.2.2, equation 15, in the pairing of halves.
"""

from __future__ import annotations

from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.checks import check_dims, check_real_tensor
from mambaverse.kernels.rotary.op import rotary_forward


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of channels (i, i + P/2) of every head.

    All tensors may have any strides, and any of the dtypes float32, bfloat16, float16, float64, mixed; everything
    inside is float32 at least. The gradient is the turn back.

    Args:
        x: (B, L, H, P), P even.
        cos: (B, L, P/2), or (1, L, P/2) for all rows of the batch; it may be scaled, and x is then, too.
        sin: As `cos`.

    Returns:
        y (B, L, H, P) in the dtype of x.

    Raises:
        ValueError: for a wrong shape, dtype or device, or if `cos` or `sin` wants a gradient, which it cannot have.
        BackendError: where no backend runs on the device of x.
    """
    op = "rotary"
    check_dims(op, "x", x, "(B, L, H, P)")
    batch, length, _, size = x.shape
    if size % 2:
        raise ValueError(f"{op}: x has {size} channels a head; expected an even number, for pairs")
    for name, table in (("cos", cos), ("sin", sin)):
        check_dims(op, name, table, "(B, L, P/2)")
        rows = 1 if table.shape[0] == 1 else batch
        check_real_tensor(op, name, table, (rows, length, size // 2), "(B or 1, L, P/2)", x)
        if table.requires_grad:
            raise ValueError(f"{op}: {name} has no gradient here, and requires one; give {name}.detach()")
    return rotary_forward(x, cos, sin, False, current_backend())
