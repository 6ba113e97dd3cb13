"""Launching Triton kernels: together where they must be compiled, and again without asking what the arguments are.

Triton finds the compiled kernel of a call by the type, the alignment and some values of each argument: 30 to 50 us for
50 of them on the host, more than most of our kernels run. An operator that is called again with tensors of the same
`Spec`s and the same flags knows what Triton will find.

A kernel that is not compiled yet takes a second or more, and a call of an operator has up to seven. `compiled_together`
runs such a call twice: once to hand its kernels to threads, most of whose work is outside of Python, and then for good.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaverse.kernels.backend import BackendError

AHEAD_BYTES = 160 * 2**10  # of shared memory a program: where a GPU has less, kernels that could load ahead do not
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


@lru_cache
def capability(device: torch.device) -> int:
    """Return the major compute capability of a GPU: 8 of an A100, 9 of an H100."""
    return int(torch.cuda.get_device_properties(device).major)


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Return the most bytes of shared memory that a program may have on a GPU."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the attribute
    return int(properties.shared_memory_per_block_optin)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the GPU that holds `tensor` the current one, to which launches go; cheap where it is."""
    here = not tensor.is_cuda or tensor.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(tensor.device)


def power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least n, and 1; of a symbol that of its value: tiles are compiled in."""
    return 1 << max(0, int(n) - 1).bit_length()


class _Call:
    """A call of an operator, while it looks for its kernels."""

    def __init__(self) -> None:
        self.compiling: ExitStack | None = None  # leaving it waits for the threads
        self.unfinished = False  # a kernel was not there, so nothing is launched any more


_call: ContextVar[_Call | None] = ContextVar("mambaverse_call", default=None)


def compiled_together(run: Callable[..., Any], *arguments: Any, ahead: Callable[[Any], Any] | None = None) -> Any:
    """Return `run(*arguments)`, a call of an operator, with the kernels that it lacks compiled side by side.

    Args:
        run: May be called twice, and some of its launches are left out the first time. Must not write to its inputs.
        *arguments: Of `run`.
        ahead: Called with the outputs of such a first time, for kernels that will be needed later; launches nothing.
    """
    if _call.get() is not None:  # a part of another operator
        return run(*arguments)
    call = _Call()
    token = _call.set(call)
    try:
        outputs = run(*arguments)
        if call.unfinished and ahead is not None:
            ahead(outputs)
    finally:
        _call.reset(token)
        if call.compiling is not None:
            call.compiling.close()
    if call.unfinished:
        outputs = None  # or its memory would be needed twice
        outputs = run(*arguments)
    return outputs


def launch(
    memo: Memo,
    name: Hashable,
    function: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Callable[[], dict[str, Any]],
) -> None:
    """Launch `function[grid](*arguments, **constants())` on the current device; see `compiled_together`.

    Args:
        memo: What earlier launches found. Its owner makes sure that it is used with one device, one `Spec` an argument
            and one set of integers only; floats may differ, on which Triton does not specialize.
        name: Of this launch in `memo`.
        function: A `triton.jit` function whose constants follow all other parameters.
        grid: Three numbers, or fewer.
        arguments: Tensors and numbers, all parameters that are not constants.
        constants: Returns the constants by name, and options such as num_warps; called where `memo` has no `name`.

    Raises:
        BackendError: where the GPU has less shared memory, say, than a program takes.
    """
    call, found = _call.get(), memo.get(name)
    if found is None:
        values = constants()
        kernel = _compiled(call, function, grid, arguments, values)
        if kernel is None:
            return
        memo[name] = found = kernel, tuple(values[parameter] for parameter in function.arg_names[len(arguments) :])
    if call is None or not call.unfinished:
        kernel, tail = found
        try:
            kernel[(*grid, 1, 1)[:3]](*arguments, *tail)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":  # Triton's
                raise
            raise _too_large(function, error) from None


def _too_large(function: Any, error: Any) -> BackendError:
    """Return what to raise where a GPU has less of something than a kernel takes."""
    operator = function.__module__.removeprefix(__package__ + ".").split(".")[0]
    return BackendError(
        f"{operator}: at these sizes the kernel {function.__name__!r} of backend 'triton' takes {error.required} of "
        f'{error.name} a program, and this GPU has {error.limit}; use_backend("reference") runs anywhere'
    )


def _compiled(
    call: _Call | None, function: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], values: dict[str, Any]
) -> Any:
    """Return a compiled kernel; None if a thread of `call` compiles it now, or the interpreter has run `function`."""
    from triton import AsyncCompileMode, FutureKernel, JITFunction  # not where there is no GPU

    if not isinstance(function, JITFunction):
        return function[grid](*arguments, **values)
    if call is not None and call.compiling is None:
        call.compiling = ExitStack()
        pool = call.compiling.enter_context(ThreadPoolExecutor(thread_name_prefix="mambaverse-compile"))
        # What is raised in a thread is raised again by `result`. (Triton 3.6's mode stays on if it raises itself.)
        call.compiling.enter_context(AsyncCompileMode(pool, ignore_errors=True))
    kernel = function.warmup(*arguments, grid=grid, **values)
    if not isinstance(kernel, FutureKernel):
        return kernel
    if call is None:
        return kernel.result()
    call.unfinished = True
    return None
