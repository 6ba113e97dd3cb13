"""Selective scan in both directions of a sequence: y = merge(scan(u), reverse scan(u)).

As in the blocks of Vim (arXiv 2401.09417), Caduceus and AuM, but without flipped copies: the second direction walks the
same memory from its end.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from mambaverse.kernels.selective_scan.scan import selective_scan

MERGES = ("add", "mean")
_OP = "bidirectional_selective_scan"


@overload
def bidirectional_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    merge: str = "add",
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: Literal[False] = False,
) -> Tensor: ...
@overload
def bidirectional_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    merge: str = "add",
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def bidirectional_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    merge: str = "add",
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan forward and backward and merge the two outputs.

    Every tensor is that of `selective_scan`, shared by the directions, or has a leading axis of 2 (forward, backward);
    the number of its axes tells which. B and C alone need a rule, as both (2, B, L, N), one per direction, and
    (B, L, G, N), groups that the directions share, have four axes: the reading that fits the shape of u counts, and
    where both fit (B = L = 2) the call is refused. (2, B, L, G, N) is always clear, with G = 1 for no groups.

    Args:
        u: (B, L, D) or (2, B, L, D).
        delta: (B, L, D) or (2, B, L, D).
        A: (D, N) or (2, D, N).
        B: (B, L, N), (B, L, G, N), (2, B, L, N) or (2, B, L, G, N).
        C: As B, not necessarily of the same kind.
        D: (D,) or (2, D).
        merge: "add", or "mean", which is half of it.
        z: (B, L, D) or (2, B, L, D); it gates each direction before the merge.
        delta_bias: (D,) or (2, D).
        delta_softplus: As in `selective_scan`.
        initial_state: (S, D, N) or (2, S, D, N); the backward direction starts from it at the last position.
        cu_seqlens: (S+1,).
        return_final_state: Whether to return the states after the last step of each direction too.

    Returns:
        y (B, L, D) in u's dtype, or (y, final_state (2, S, D, N)).

    Raises:
        ValueError: An argument is wrong (the message names it), or B or C can be read in two ways.
    """
    if merge not in MERGES:
        raise ValueError(f"{_OP}: merge is {merge!r}; expected one of {', '.join(MERGES)}")
    u_pair = _split("u", u, 3)
    u_shape = tuple(u.shape[-3:])
    pairs = {
        "u": u_pair,
        "delta": _split("delta", delta, 3),
        "A": _split("A", A, 2),
        "B": _split("B", B, _ndim_of_one("B", B, u_shape)),
        "C": _split("C", C, _ndim_of_one("C", C, u_shape)),
        "D": _split("D", D, 1),
        "z": _split("z", z, 3),
        "delta_bias": _split("delta_bias", delta_bias, 1),
        "initial_state": _split("initial_state", initial_state, 3),
    }
    (y, state), (y_backward, state_backward) = (
        selective_scan(
            **{name: pair[direction] for name, pair in pairs.items()},
            delta_softplus=delta_softplus,
            cu_seqlens=cu_seqlens,
            reverse=direction == 1,
            return_final_state=True,
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


def _ndim_of_one(name: str, B: Tensor, u_shape: tuple[int, ...]) -> int:
    """Return how many axes the B of one direction has: 3, or 4 where it is grouped."""
    if B.ndim != 4:
        return 4 if B.ndim == 5 else 3
    batch, length, dim = u_shape
    per_direction = tuple(B.shape[:3]) == (2, batch, length)
    grouped = tuple(B.shape[:2]) == (batch, length) and B.shape[2] > 0 and dim % B.shape[2] == 0
    if per_direction and grouped:
        raise ValueError(
            f"{_OP}: {name} has shape {tuple(B.shape)}, that of both (2, B, L, N) and (B, L, G, N); expected the "
            "clear form (2, B, L, G, N)"
        )
    return 3 if per_direction else 4
