"""SSD in both directions of a sequence: y = merge(ssd(x), reverse ssd(x)).

As in the blocks of Vim (arXiv 2401.09417), with the recurrence of Mamba-2 and without flipped copies: the second
direction walks the same memory from its end.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mambaverse.kernels.directions import Directions, check_merge, ndim_of_one, one_of, split_directions
from mambaverse.kernels.ssd import ssd

_OP = "bidirectional_ssd"


@overload
def bidirectional_ssd(
    x: Directions, dt: Directions, A: Directions, B: Directions, C: Directions, D: Directions | None = ..., *,
    merge: str = ..., z: Directions | None = ..., dt_bias: Directions | None = ..., dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ..., initial_state: Directions | None = ..., cu_seqlens: Tensor | None = ...,
    return_final_state: Literal[False] = ..., chunk_size: int | None = ..., weight: Directions | None = ...,
    own_weight: Directions | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def bidirectional_ssd(
    x: Directions, dt: Directions, A: Directions, B: Directions, C: Directions, D: Directions | None = ..., *,
    merge: str = ..., z: Directions | None = ..., dt_bias: Directions | None = ..., dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ..., initial_state: Directions | None = ..., cu_seqlens: Tensor | None = ...,
    return_final_state: Literal[True], chunk_size: int | None = ..., weight: Directions | None = ...,
    own_weight: Directions | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def bidirectional_ssd(
    x: Directions,
    dt: Directions,
    A: Directions,
    B: Directions,
    C: Directions,
    D: Directions | None = None,
    *,
    merge: str = "add",
    z: Directions | None = None,
    dt_bias: Directions | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Directions | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    weight: Directions | None = None,
    own_weight: Directions | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run `ssd` forward and backward and merge the two outputs.

    Every tensor is that of `ssd`, shared by the directions, or a pair of such (forward, backward), or has a leading
    axis of 2; the number of its axes tells which. Three need a rule. B and C with four axes are (2, B, L, N), one for
    each direction, or (B, L, G, N), groups that the directions share; D with two is (2, H) or (H, P). The reading that
    fits the shape of x counts, and where both fit the call is refused. A pair, (2, B, L, G, N) and (2, H, P) are always
    clear.

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
        weight: (B, L, H) or (2, B, L, H).
        own_weight: (B, L, H) or (2, B, L, H). y then has the own terms of both directions.

    Returns:
        y (B, L, H, P) in x's dtype, or (y, final_state (2, S, H, P, N)).

    Raises:
        ValueError: An argument is wrong (the message names it), or B, C or D can be read in two ways.
        BackendError: where no backend runs on the device of x.
    """
    check_merge(_OP, merge)
    one_x, allowed = one_of(_OP, "x", x), (4, 5) if isinstance(x, Tensor) else (4,)
    if one_x.ndim not in allowed:
        raise ValueError(f"{_OP}: x has shape {tuple(one_x.shape)}; expected (B, L, H, P) or (2, B, L, H, P)")
    batch, length, heads, head_dim = one_x.shape[-4:]
    of_B, of_C = (ndim_of_one(_OP, name, t, batch, length, heads) for name, t in (("B", B), ("C", C)))
    given = {
        "x": (x, 4), "dt": (dt, 3), "A": (A, 1), "B": (B, of_B), "C": (C, of_C),
        "D": (D, _ndim_of_D(D, heads, head_dim)), "z": (z, 4), "dt_bias": (dt_bias, 1),
        "initial_state": (initial_state, 4), "weight": (weight, 3), "own_weight": (own_weight, 3),
    }  # fmt: skip
    pairs = {name: split_directions(_OP, name, tensor, ndim) for name, (tensor, ndim) in given.items()}
    if of_B != of_C:  # `ssd` takes both with or both without groups
        name = "B" if of_B == 3 else "C"
        first, second = pairs[name]
        pairs[name] = first.unsqueeze(-2), None if second is None else second.unsqueeze(-2)
    (y, state), (y_backward, state_backward) = (
        ssd(
            **{name: one if direction == 0 or two is None else two for name, (one, two) in pairs.items()},
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


def _ndim_of_D(D: Directions | None, heads: int, head_dim: int) -> int:  # noqa: N802
    """Return how many axes the D of one direction has: 1, or 2 where it is one for each channel."""
    if D is None:
        return 1
    if not isinstance(D, Tensor):
        return one_of(_OP, "D", D).ndim
    if D.ndim != 2:
        return 2 if D.ndim == 3 else 1
    per_direction, per_channel = tuple(D.shape) == (2, heads), tuple(D.shape) == (heads, head_dim)
    if per_direction and per_channel:
        raise ValueError(
            f"{_OP}: D has shape {tuple(D.shape)}, that of both (2, H) and (H, P); expected the clear form (2, H, P)"
        )
    return 1 if per_direction else 2
