"""Selective scan in both directions of a sequence: y = merge(scan(u), reverse scan(u)).

As in the blocks of Vim (arXiv 2401.09417), Caduceus and AuM, but without flipped copies: the second direction walks the
same memory from its end.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.checks import check_offsets, check_tensor, num_sequences, wants_states
from mambaverse.kernels.directions import Directions, check_merge, ndim_of_one, one_of, split_directions
from mambaverse.kernels.selective_scan.checks import check_inputs, check_real
from mambaverse.kernels.selective_scan.op_both import both_forward

_OP = "bidirectional_selective_scan"


@overload
def bidirectional_selective_scan(
    u: Directions,
    delta: Directions,
    A: Directions,
    B: Directions,
    C: Directions,
    D: Directions | None = None,
    *,
    merge: str = "add",
    z: Directions | None = None,
    delta_bias: Directions | None = None,
    delta_softplus: bool = False,
    initial_state: Directions | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: Literal[False] = False,
) -> Tensor: ...
@overload
def bidirectional_selective_scan(
    u: Directions,
    delta: Directions,
    A: Directions,
    B: Directions,
    C: Directions,
    D: Directions | None = None,
    *,
    merge: str = "add",
    z: Directions | None = None,
    delta_bias: Directions | None = None,
    delta_softplus: bool = False,
    initial_state: Directions | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def bidirectional_selective_scan(
    u: Directions,
    delta: Directions,
    A: Directions,
    B: Directions,
    C: Directions,
    D: Directions | None = None,
    *,
    merge: str = "add",
    z: Directions | None = None,
    delta_bias: Directions | None = None,
    delta_softplus: bool = False,
    initial_state: Directions | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan forward and backward and merge the two outputs.

    Every argument is that of `selective_scan`, shared by the directions, or a pair of such (forward, backward), or has
    a leading axis of 2; the number of its axes tells which. B and C alone need a rule, as both (2, B, L, N), one per
    direction, and (B, L, G, N), groups that the directions share, have four axes: the reading that fits the shape of u
    counts, and where both fit (B = L = 2) the call is refused. A pair, or (2, B, L, G, N) with G = 1 for no groups, is
    always clear. On a GPU both directions run in one launch, and what they have in pairs should have the same strides:
    it is copied where it has not.

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
        BackendError: The backend in force cannot run here.
    """
    check_merge(_OP, merge)
    one_u = one_of(_OP, "u", u)
    if one_u.ndim < 3:
        raise ValueError(f"{_OP}: u has shape {tuple(one_u.shape)}; expected (B, L, D)")
    given = {
        "u": (u, 3), "delta": (delta, 3), "A": (A, 2), "B": (B, ndim_of_one(_OP, "B", B, *one_u.shape[-3:])),
        "C": (C, ndim_of_one(_OP, "C", C, *one_u.shape[-3:])), "D": (D, 1), "z": (z, 3), "delta_bias": (delta_bias, 1),
        "initial_state": (initial_state, 3),
    }  # fmt: skip
    pairs = [split_directions(_OP, name, tensor, ndim) for name, (tensor, ndim) in given.items()]
    first, second = ([pair[direction] for pair in pairs] for direction in range(2))
    _check(cu_seqlens, *first)
    _check(cu_seqlens, *(a if b is None else b for a, b in zip(first, second, strict=True)))
    save = wants_states((*first, *second))
    y, final_state, _, _ = both_forward(
        *first, *second, cu_seqlens, delta_softplus, merge == "mean", current_backend(), save
    )
    return (y, final_state) if return_final_state else y


def _check(
    cu_seqlens: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError unless these are what `selective_scan` takes."""
    check_inputs(_OP, u, delta, A, B, C, D, z, delta_bias, "B, L")
    sequences = num_sequences(_OP, cu_seqlens, u.shape[0])
    check_offsets(_OP, cu_seqlens, "u", u)
    if initial_state is not None:
        check_tensor(_OP, "initial_state", initial_state, (sequences, *A.shape), "(S, D, N)", u)
        check_real(_OP, "initial_state", initial_state, A)
