"""Compilation of numba kernels whose machine code is kept on disk, and not used when it is stale.

numba looks only at the source file of a function itself when it decides whether kept code is stale, while the code of
the functions that it calls is compiled into it. So what a kernel calls in other files is hashed into its name.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numba


def cached_kernel(*modules: ModuleType, fastmath: bool | set[str] = False) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator that compiles a kernel for `threads.parallel_for` at its first call.

    Args:
        modules: Every module, beside its own, with a compiled function or a constant that ends up in the kernel.
        fastmath: LLVM's flags for the kernel itself; what it calls keeps its own.
    """
    digest = hashlib.sha256("".join(map(inspect.getsource, modules)).encode()).hexdigest()[:12]

    def compiled(function: Callable[..., Any]) -> Any:
        function.__qualname__ += f"_{digest}"
        return numba.njit(nogil=True, fastmath=fastmath, error_model="numpy", boundscheck=False, cache=True)(function)

    return compiled
