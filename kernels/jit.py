"""Compilation of numba kernels whose machine code is kept on disk, and not used when it is stale.

numba looks only at the source file of a function itself when it decides whether kept code is stale, while the code of
the functions that it calls is compiled into it. So what a kernel calls in other files is hashed into its name.
Where no folder can be written to, nothing is kept, and a warning says so once.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import warnings
from collections.abc import Callable
from functools import cache
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
        flags: dict[str, Any] = {"fastmath": fastmath, "error_model": "numpy", "boundscheck": False}
        try:
            return numba.njit(nogil=True, cache=True, **flags)(function)
        except RuntimeError as error:  # numba has no class of its own for it
            if "no locator available" not in str(error):
                raise
            _warn_that_nothing_is_kept()
            return numba.njit(nogil=True, **flags)(function)

    return compiled


@cache  # once a process, whatever the filters of warnings are
def _warn_that_nothing_is_kept() -> None:
    given = os.environ.get("NUMBA_CACHE_DIR")
    remedy = f", nor into NUMBA_CACHE_DIR={given!r}; set it" if given else "; set the variable NUMBA_CACHE_DIR"
    warnings.warn(
        "kernels are compiled anew in every process, which takes seconds to minutes: numba can write their machine "
        f"code neither beside the package nor into the user's cache folder{remedy} to a folder that can be written to",
        stacklevel=3,
    )
