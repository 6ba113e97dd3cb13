"""SSD in both directions of a sequence: y = merge(ssd(x), reverse ssd(x)).

As in the blocks of Vim (arXiv 2401.09417), with the recurrence of Mamba-2 and without flipped copies: the second
direction walks the same memory from its end.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from mambaverse.kernels.ssd import ssd

MERGES = ("add", "mean")
_OP = "bidirectional_ssd"


@overload
def bidirectional_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., *, merge: str = ...,
    z: Tensor | None = ..., dt_bias: Tensor | None = ..., dt_softplus: bool = ..., dt_limit: tuple[float, float] = ...,
    initial_state: Tensor | None = ..., cu_seqlens: Tensor | None = ..., return_final_state: Literal[False] = ...,
    chunk_size: int | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def bidirectional_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., *, merge: str = ...,
    z: Tensor | None = ..., dt_bias: Tensor | None = ..., dt_softplus: bool = ..., dt_limit: tuple[float, float] = ...,
    initial_state: Tensor | None = ..., cu_seqlens: Tensor | None = ..., return_final_state: Literal[True],
    chunk_size: int | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def bidirectional_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    merge: str = "add",
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run `ssd` forward and backward and merge the two outputs.

    Every tensor is that of `ssd`, shared by the directions, or has a leading axis of 2 (forward, backward); the number
    of its axes tells which. Three need a rule. B and C with four axes are (2, B, L, N), one for each direction, or
    (B, L, G, N), groups that the directions share; D with two is (2, H) or (H, P). The reading that fits the shape of x
    counts, and where both fit the call is refused. (2, B, L, G, N) and (2, H, P) are always clear.

    Args:
        x: (B, L, H, P) or (2, B, L, H, P).
        dt: (B, L, H) or (2, B, L, H).
        A: (H,) or (2, H).
        B: (B, L, N), (B, L, G, N), (2, B, L, N) or (2, B, L, G, N).
        C: As B, not necessarily of the same kind.
        D: (H,), (H, P), (2, H) or (2, H, P).
        merge: "add", or "mean", which is half of it.
        z: (B, L, H, P) or (2, B, L, H, P); it gates each direction before the merge.
        dt_bias: (H,) or (2, H).
        dt_softplus: As in `ssd`.
        dt_limit: As in `ssd`.
        initial_state: (S, H, P, N) or (2, S, H, P, N); the backward direction starts from it at the last position.
        cu_seqlens: (S+1,).
        return_final_state: Whether to return the states after the last step of each direction too.
        chunk_size: As in `ssd`.

    Returns:
        y (B, L, H, P) in x's dtype, or (y, final_state (2, S, H, P, N)).

    Raises:
        ValueError: An argument is wrong (the message names it), or B, C or D can be read in two ways.
        BackendError: where no backend runs on the device of x.
    """
    if merge not in MERGES:
        raise ValueError(f"{_OP}: merge is {merge!r}; expected one of {', '.join(MERGES)}")
    if x.ndim not in (4, 5):
        raise ValueError(f"{_OP}: x has shape {tuple(x.shape)}; expected (B, L, H, P) or (2, B, L, H, P)")
    B_ndim, C_ndim = (_ndim_of_one(name, t, x.shape[-4:]) for name, t in (("B", B), ("C", C)))
    if B_ndim != C_ndim:  # `ssd` takes both with or both without groups
        B, C = (t.unsqueeze(-2) if n == 3 else t for t, n in ((B, B_ndim), (C, C_ndim)))
        B_ndim = C_ndim = 4
    pairs = {
        "x": _split("x", x, 4),
        "dt": _split("dt", dt, 3),
        "A": _split("A", A, 1),
        "B": _split("B", B, B_ndim),
        "C": _split("C", C, C_ndim),
        "D": _split("D", D, _ndim_of_D(D, x.shape[-2:])),
        "z": _split("z", z, 4),
        "dt_bias": _split("dt_bias", dt_bias, 1),
        "initial_state": _split("initial_state", initial_state, 4),
    }
    (y, state), (y_backward, state_backward) = (
        ssd(
            **{name: pair[direction] for name, pair in pairs.items()},
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            cu_seqlens=cu_seqlens,
            reverse=direction == 1,
            return_final_state=True,
            chunk_size=chunk_size,
        )
        for direction in range(2)
    )
    y = y + y_backward if merge == "add" else (y + y_backward) / 2
    return (y, torch.stack((state, state_backward))) if return_final_state else y


def _split(name: str, tensor: Tensor | None, ndim: int) -> tuple[Any, Any]:
    """Return the tensor of each direction; one that has `ndim` axes is shared."""
    if tensor is None or tensor.ndim == ndim:
        return tensor, tensor
    if tensor.ndim != ndim + 1 or tensor.shape[0] != 2:
        raise ValueError(
            f"{_OP}: {name} has shape {tuple(tensor.shape)}; expected {ndim} axes, or {ndim + 1} of which the first is "
            "the 2 directions"
        )
    return tensor[0], tensor[1]


def _ndim_of_one(name: str, B: Tensor, x_shape: tuple[int, ...]) -> int:
    """Return how many axes the B of one direction has: 3, or 4 where it is grouped."""
    if B.ndim != 4:
        return 4 if B.ndim == 5 else 3
    batch, length, heads, _ = x_shape
    per_direction = tuple(B.shape[:3]) == (2, batch, length)
    grouped = tuple(B.shape[:2]) == (batch, length) and B.shape[2] > 0 and heads % B.shape[2] == 0
    if per_direction and grouped:
        raise ValueError(
            f"{_OP}: {name} has shape {tuple(B.shape)}, that of both (2, B, L, N) and (B, L, G, N); expected the "
            "clear form (2, B, L, G, N)"
        )
    return 3 if per_direction else 4


def _ndim_of_D(D: Tensor | None, x_shape: tuple[int, ...]) -> int:  # noqa: N802
    """Return how many axes the D of one direction has: 1, or 2 where it is one for each channel."""
    if D is None or D.ndim != 2:
        return 2 if D is not None and D.ndim == 3 else 1
    heads, head_dim = x_shape
    per_direction, per_channel = tuple(D.shape) == (2, heads), tuple(D.shape) == (heads, head_dim)
    if per_direction and per_channel:
        raise ValueError(
            f"{_OP}: D has shape {tuple(D.shape)}, that of both (2, H) and (H, P); expected the clear form (2, H, P)"
        )
    return 1 if per_direction else 2
