"""What numba kernels over rows of channels share: tensors as flat arrays without a copy, and sums in a fixed order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambaverse.kernels.jit import cached_kernel
from mambaverse.kernels.threads import parallel_for

WORTH_A_CALL = 2**16  # elements of a row kernel that take about 50 µs, where handing them to a thread takes 10 µs
_COLUMNS = 256  # columns of partial sums that a work item adds: 1 kB of each row
_CODES = {
    torch.float32: np.dtype(np.float32).str,
    torch.float64: np.dtype(np.float64).str,
    torch.int64: np.dtype(np.int64).str,
}


class _Memory:
    """What numpy asks for the memory of a contiguous tensor, which lives as long as the array."""

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        data = (tensor.data_ptr(), False)
        self.__array_interface__ = {"version": 3, "data": data, "shape": tensor.shape, "typestr": _CODES[tensor.dtype]}


def as_array(x: Tensor) -> Any:
    """Return contiguous `x` on a CPU, float32, float64 or int64, as an array of its own memory.

    `x.numpy()` takes half a µs less, but the storage of `x` can then never be resized, which FSDP2 does to parameters.
    """
    assert x.is_cpu and x.is_contiguous() and not x.is_neg(), "an array has the memory of a tensor, in its order"
    return np.asarray(_Memory(x)) if x.numel() else np.empty(x.shape, _CODES[x.dtype])


def flat_rows(x: Tensor) -> tuple[Any, ...]:
    """Return x (..., D) as a flat float32 array and the strides of all axes but the last, whose own stride is 1.

    The array is x's memory (slices of a wider tensor and expanded axes cost nothing), or that of a copy where x is not
    float32 or the channels do not lie side by side. To numba it has one type, whatever the strides.
    """
    x = x.detach().float().resolve_neg()
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return as_array(x.as_strided((span,), (1,))), *x.stride()[:-1]


def dense(x: Tensor) -> Any:
    """Return x as a contiguous float32 array; its own memory where it is one."""
    return as_array(x.detach().float().resolve_neg().contiguous())


def sum_rows(partial: Tensor) -> Tensor:
    """Return the sum of contiguous `partial` (P, ...), float32 or float64, over its first axis.

    Each column is added from first to last by one thread, so unlike with `torch.sum` the result does not depend on the
    number of threads.
    """
    total = torch.empty(partial.shape[1:], dtype=partial.dtype)
    rows, columns = partial.shape[0], total.numel()
    grain = 1 + WORTH_A_CALL // (_COLUMNS * max(1, rows))
    parallel_for(
        _sum_rows, -(-columns // _COLUMNS), as_array(partial.view(rows, columns)), as_array(total.view(-1)), grain=grain
    )
    return total


@cached_kernel()
def _sum_rows(start, stop, partial, total):
    for item in range(start, stop):
        out = total[item * _COLUMNS : (item + 1) * _COLUMNS]
        out[:] = 0
        for i in range(partial.shape[0]):
            row = partial[i, item * _COLUMNS : (item + 1) * _COLUMNS]
            for j in range(out.size):
                out[j] += row[j]
