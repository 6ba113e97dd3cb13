"""Heads of more columns than a kernel takes: some of them after the other.

Columns of x do not meet in a state, so that each part is a call of its own; what they share, such as B, gets the sum of
their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Results = TypeVar("Results", bound=tuple[Tensor, ...])
# Where the columns are, by the name of an argument; all others are the same for each part.
AXES = {"dy": 3, "dfinal": 2, "x": 3, "D": 1, "z": 3, "initial_state": 2, "chunk_states": 2, "state": 2}


def forward(function: Callable[..., Results], width: int, **arguments: Any) -> Results:
    """Return what `function` does, y (B, L, H, P) and states (.., H, P, N), from calls with up to `width` columns."""
    y, *states = zip(*(function(**part) for part in _parts(width, arguments)), strict=True)
    return cast(Results, (torch.cat(y, 3), *(torch.cat(state, 2) for state in states)))


def backward(
    function: Callable[..., tuple[Tensor, ...]], width: int, names: tuple[str, ...], **arguments: Any
) -> tuple[Tensor, ...]:
    """Return what `function` does, the gradients of the arguments `names`, likewise."""
    gradients = zip(*(function(**part) for part in _parts(width, arguments)), strict=True)
    return tuple(_joined(name, arguments[name], parts) for name, parts in zip(names, gradients, strict=True))


def _parts(width: int, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for first in range(0, arguments["x"].shape[3], width):
        yield {name: _columns(name, value, first, width) for name, value in arguments.items()}


def _columns(name: str, value: Any, first: int, width: int) -> Any:
    if value is None or not _has_columns(name, value):
        return value
    return value.narrow(AXES[name], first, min(width, value.shape[AXES[name]] - first))


def _has_columns(name: str, value: Any) -> bool:
    return name in AXES and value.ndim > AXES[name]  # D may be a number a head


def _joined(name: str, value: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
    if value is None:
        return parts[0]
    if _has_columns(name, value):
        return torch.cat(parts, AXES[name])
    return torch.stack(parts).sum(0, dtype=torch.float32).to(value.dtype)
