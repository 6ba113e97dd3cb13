"""The argument checks of `ssd` and `ssd_update`, which differ in whether there is a length."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from mambaverse.kernels.checks import check_dims, check_real_tensor, check_tensors


def check_inputs(
    op: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_limit: tuple[float, float], axes: str,
) -> tuple[Tensor, Tensor, float, float]:  # fmt: skip
    """Raise ValueError unless all arguments fit x, which has the leading axes `axes`: "B, L" or "B".

    Returns:
        B and C with their axis of groups, the least and the greatest Δ.
    """
    check_dims(op, "x", x, f"({axes}, H, P)")
    check_tensors(op, dt=dt, A=A, B=B, C=C, **({} if D is None else {"D": D}))
    *lead, heads, head_dim = x.shape
    if B.ndim == x.ndim - 1 and C.ndim == B.ndim:  # one group
        B, C = B.unsqueeze(-2), C.unsqueeze(-2)
    if B.ndim != x.ndim or list(B.shape[:-2]) != lead or B.shape[-1] == 0:
        rule = (
            f"expected ({axes}, G, N), or ({axes}, N) for one group, with ({axes}) = {tuple(lead)} as of x and N >= 1"
        )
        raise ValueError(f"{op}: B has shape {tuple(B.shape)}; {rule}")
    groups, state_dim = B.shape[-2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"{op}: B has {groups} groups; expected a divisor of the {heads} heads of x")
    if D is not None and D.ndim not in (1, 2):
        raise ValueError(f"{op}: D has shape {tuple(D.shape)}; expected (H,) or (H, P)")
    shapes = {
        "dt": (dt, (*lead, heads), f"({axes}, H)"),
        "A": (A, (heads,), "(H,)"),
        "B": (B, (*lead, groups, state_dim), f"({axes}, G, N)"),
        "C": (C, (*lead, groups, state_dim), f"({axes}, G, N)"),
        "D": (D, (heads, head_dim)[: 2 if D is None else D.ndim], "(H,) or (H, P)"),
        "z": (z, (*lead, heads, head_dim), f"({axes}, H, P)"),
        "dt_bias": (dt_bias, (heads,), "(H,)"),
    }
    for name, (tensor, shape, letters) in shapes.items():
        if tensor is not None:
            check_real_tensor(op, name, tensor, shape, letters, x)
    try:
        low, high = (float(limit) for limit in dt_limit)
        fits = low <= high and not any(isinstance(limit, str) for limit in dt_limit)
    except (TypeError, ValueError):  # not two, or no numbers
        fits = False
    if not fits:
        raise ValueError(f"{op}: dt_limit is {dt_limit!r}; expected (least, greatest), two numbers")
    return B, C, low, high


def check_chunk_size(op: str, chunk_size: int | None) -> None:
    """Raise ValueError unless `chunk_size` is None, or a whole number of positions."""
    if chunk_size is not None and (not isinstance(chunk_size, Integral | torch.SymInt) or chunk_size < 1):
        raise ValueError(f"{op}: chunk_size is {chunk_size!r}; expected at least 1, a whole number, or None")


def check_weights(op: str, x: Tensor, weight: Tensor | None, own_weight: Tensor | None, letters: str) -> None:
    """Raise ValueError unless the weights that are given have the shape of x without its last axis."""
    for name, tensor in (("weight", weight), ("own_weight", own_weight)):
        if tensor is not None:
            check_real_tensor(op, name, tensor, x.shape[:-1], letters, x)
