"""How the bidirectional operators read an argument: shared by the directions, a pair, or with a leading axis of 2."""

from __future__ import annotations

import reprlib
from typing import Any

from torch import Tensor

MERGES = ("add", "mean")
Directions = Tensor | tuple[Tensor, Tensor]  # one that both share, or that of each


def check_merge(op: str, merge: str) -> None:
    """Raise ValueError unless `merge` is one of `MERGES`."""
    if merge not in MERGES:
        raise ValueError(f"{op}: merge is {merge!r}; expected one of {', '.join(MERGES)}")


def one_of(op: str, name: str, given: Any) -> Tensor:
    """Return `given`, or the first of a pair; ValueError for what is no tensor, nor a pair of them."""
    if isinstance(given, Tensor):
        return given
    if not (isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(t, Tensor) for t in given)):
        raise ValueError(f"{op}: {name} is {reprlib.repr(given)}; expected a tensor, or a pair (forward, backward)")
    first: Tensor = given[0]
    return first


def split_directions(op: str, name: str, given: Directions | None, ndim: int) -> tuple[Any, Any]:
    """Return the tensor of the first direction and that of the second, None where they share one of `ndim` axes.

    Raises:
        ValueError: for another number of axes, or a pair of two shapes or dtypes.
    """
    if given is None or (isinstance(given, Tensor) and given.ndim == ndim):
        return given, None
    if isinstance(given, Tensor):
        if given.ndim != ndim + 1 or given.shape[0] != 2:
            raise ValueError(
                f"{op}: {name} has shape {tuple(given.shape)}; expected {ndim} axes, or {ndim + 1} of which the first "
                "is the 2 directions"
            )
        first, second = given.unbind(0)
        return first, second
    one_of(op, name, given)
    if given[0].shape != given[1].shape or given[0].dtype != given[1].dtype:
        got = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in given)
        raise ValueError(f"{op}: {name} is ({got}); expected a pair (forward, backward) of one shape and dtype")
    return given[0], given[1]


def ndim_of_one(op: str, name: str, B: Directions, batch: int, length: int, divided: int) -> int:
    """Return how many axes the B (or C) of one direction has: 3, or 4 where it is grouped; G divides `divided`.

    Raises:
        ValueError: for a shape that is both (2, B, L, N) and (B, L, G, N).
    """
    if not isinstance(B, Tensor):
        return one_of(op, name, B).ndim
    if B.ndim != 4:
        return 4 if B.ndim == 5 else 3
    per_direction = tuple(B.shape[:3]) == (2, batch, length)
    grouped = tuple(B.shape[:2]) == (batch, length) and B.shape[2] > 0 and divided % B.shape[2] == 0
    if per_direction and grouped:
        raise ValueError(
            f"{op}: {name} has shape {tuple(B.shape)}, that of both (2, B, L, N) and (B, L, G, N); expected the "
            "clear form (2, B, L, G, N)"
        )
    return 3 if per_direction else 4
