"""Launching a Triton kernel again without asking every argument what it is.

Triton finds the compiled kernel of a call by the type, the alignment and some values of each argument: 30 to 50 us for
50 of them on the host, more than most of our kernels run. An operator that is called again with tensors of the same
`Spec`s and the same flags knows what Triton will find.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

Memo = dict[Hashable, tuple[Any, tuple[Any, ...]]]  # by name: a compiled kernel, and the values of its constants


class Spec(NamedTuple):
    """What a compiled kernel may depend on of a tensor; hashable."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    alignment: int  # of its address, mod 16

    @staticmethod
    def of(tensor: Tensor | None) -> Spec | None:
        """Return that of a tensor, None for None."""
        if tensor is None:
            return None
        return Spec(tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16)


@lru_cache(maxsize=4096)
def memo_of(*key: Hashable) -> Memo:
    """Return the memo of all launches with this key: device, `Spec`s, flags and integers of an operator's call."""
    return {}


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the GPU that holds `tensor` the current one, to which launches go; cheap where it is."""
    here = not tensor.is_cuda or tensor.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(tensor.device)


def launch(
    memo: Memo,
    name: Hashable,
    function: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Callable[[], dict[str, Any]],
) -> None:
    """Launch `function[grid](*arguments, **constants())` on the current device.

    Args:
        memo: What earlier launches found. Its owner makes sure that it is used with one device, one `Spec` an argument
            and one set of integers only; floats may differ, on which Triton does not specialize.
        name: Of this launch in `memo`.
        function: A `triton.jit` function whose constants follow all other parameters.
        grid: Three numbers, or fewer.
        arguments: Tensors and numbers, all parameters that are not constants.
        constants: Returns the constants by name, and options such as num_warps; called where `memo` has no `name`.
    """
    found = memo.get(name)
    if found is None:
        values = constants()
        kernel = function[grid](*arguments, **values)
        if kernel is not None:  # the interpreter compiles none
            memo[name] = kernel, tuple(values[parameter] for parameter in function.arg_names[len(arguments) :])
        return
    kernel, tail = found
    kernel[(*grid, 1, 1)[:3]](*arguments, *tail)
