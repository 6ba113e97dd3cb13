"""Argument checks that operators share; each raises one ValueError: which argument, what it got, what was expected."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_tensors(op: str, **given: Any) -> None:
    """Raise ValueError unless all that is `given`, by name, are tensors."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{op}: {name} is {reprlib.repr(value)}; expected a tensor")


def check_tensor(op: str, name: str, tensor: Tensor, shape: Sequence[int], letters: str, like: Tensor) -> None:
    """Raise ValueError unless `tensor` is one, floating or complex, has `shape` and lies on the device of `like`.

    Args:
        op: Name of the operator.
        name: Name of the argument.
        tensor: The argument.
        shape: What its shape must be.
        letters: The same in the signature's letters, e.g. "(B, L, D)".
        like: The operator's main input.
    """
    if not isinstance(tensor, Tensor):
        check_tensors(op, **{name: tensor})
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected {letters} = {tuple(shape)}")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; expected a floating dtype")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; expected {like.device}, where the main input is")


def check_real_tensor(op: str, name: str, tensor: Tensor, shape: Sequence[int], letters: str, like: Tensor) -> None:
    """Raise ValueError as `check_tensor` does, and for a complex tensor."""
    check_tensor(op, name, tensor, shape, letters, like)
    if tensor.is_complex():
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; expected a real floating dtype")


def check_dims(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """Raise ValueError unless `tensor` is one, floating, with as many axes as `letters`, e.g. "(B, L, D)", names."""
    if not isinstance(tensor, Tensor):
        check_tensors(op, **{name: tensor})
    if tensor.ndim != letters.count(",") + 1:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected {letters}")
    if not tensor.is_floating_point():
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; expected a real floating dtype")


def unshared(state: Tensor, *tensors: Any) -> tuple[Any, ...]:
    """Return the inputs of a step that changes `state` in place, each a tensor or None, none in the storage of `state`.

    One that is there is copied: it would change before the step has read it. Not under torch.compile, where such views
    are not looked for and the step reads what it has changed.
    """
    if not torch.compiler.is_compiling():
        unstubbed: Any = torch._C  # 0.2 µs a tensor
        is_alias = unstubbed._is_alias_of
        for tensor in tensors:
            if tensor is not None and is_alias(state, tensor):
                return tuple(t.clone() if t is not None and is_alias(state, t) else t for t in tensors)
    return tensors


def check_activation(op: str, activation: str | None) -> None:
    """Raise ValueError unless `activation` is None, or "silu" (alias "swish")."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'{op}: unknown activation {activation!r}; expected None, "silu" or "swish"')


def check_not_negative(op: str, **numbers: float) -> None:
    """Raise ValueError unless all are finite numbers of at least 0; a compiler's symbol has no value yet."""
    for name, value in numbers.items():
        symbol = isinstance(value, torch.SymFloat | torch.SymInt)
        if not symbol and not (isinstance(value, Real) and 0 <= value < math.inf):
            raise ValueError(f"{op}: {name} is {value!r}; expected a finite number of at least 0")


def num_sequences(op: str, cu_seqlens: Tensor | None, batch: int) -> int:
    """Return the number of rows that states have: `batch`, or with `cu_seqlens` (S+1,) the number of sequences S.

    Raises:
        ValueError: if `cu_seqlens` is not (S+1,) int32 or int64, or `batch` is not 1 beside it.
    """
    if cu_seqlens is None:
        return batch
    check_tensors(op, cu_seqlens=cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected (S + 1,)")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: cu_seqlens has dtype {cu_seqlens.dtype}; expected int32 or int64")
    if batch != 1:
        raise ValueError(
            f"{op}: the batch is {batch}; expected 1, with the sequences one after the other, beside cu_seqlens"
        )
    return cu_seqlens.shape[0] - 1


def wants_states(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether a call on `tensors` may be differentiated, so that states for backward are worth their memory.

    An exported program works them out again if it ever is: their number would pin its lengths.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def check_offsets(op: str, cu_seqlens: Tensor | None, name: str, x: Tensor) -> None:
    """Raise ValueError unless `cu_seqlens` is where x, the argument `name`, is."""
    if cu_seqlens is not None and cu_seqlens.device != x.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}; expected {x.device}, where {name} is")


def check_bounds(op: str, cu_seqlens: Tensor | None, length: int) -> None:
    """Raise ValueError for values of `cu_seqlens` that `sequence_bounds` refuses, where they may be read.

    Reading them on a GPU waits for it, and no graph can be captured: only with MAMBAVERSE_CHECK=1.
    """
    if cu_seqlens is not None and (not cu_seqlens.is_cuda or os.environ.get("MAMBAVERSE_CHECK") == "1"):
        sequence_bounds(op, cu_seqlens, length)


def sequence_bounds(op: str, cu_seqlens: Tensor, length: int) -> list[int]:
    """Return the values of `cu_seqlens` (on a GPU this waits for it), checked.

    Raises:
        ValueError: unless they start at 0, never decrease and end at `length`.
    """
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(
            f"{op}: cu_seqlens goes from {bounds[0]} to {bounds[-1]}; expected from 0 to the length {length}"
        )
    for i in range(len(bounds) - 1):
        if bounds[i] > bounds[i + 1]:
            raise ValueError(
                f"{op}: cu_seqlens falls from {bounds[i]} to {bounds[i + 1]} at index {i + 1}; it may not fall"
            )
    return bounds
