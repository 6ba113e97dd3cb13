"""Which implementation of an operator runs: "auto", "triton", "cpu" or "reference".

The public function of an operator asks `current_backend()` and passes the name into the torch op as a string, so that
backward runs what forward ran, whatever context it is called in. Inside the op, `load()` turns the name into a module:

- "auto": the device decides. A CPU tensor goes to `cpu.py`, a GPU tensor to `triton.py`.
- float64 and complex128 always run the reference: it is the only one in that precision.
- What cannot run raises `BackendError` with the reason and the backend that can. Nothing falls back in silence.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BACKENDS = ("auto", "triton", "cpu", "reference")
ENVIRONMENT = "MAMBAVERSE_BACKEND"
_chosen: ContextVar[str | None] = ContextVar("mambaverse_backend", default=None)


class BackendError(RuntimeError):
    """A backend that was asked for cannot run here; the message says why and what can."""


_default = os.environ.get(ENVIRONMENT, "auto")  # a wrong name is an error of the first operator that runs


def current_backend() -> str:
    """Return the backend in force: that of `use_backend`, else `MAMBAVERSE_BACKEND`, else "auto"."""
    return _chosen.get() or _default


# torch 2.11's compiler cannot trace a context variable. This is what torch.compiler.assume_constant_result does, but
# does not load the compiler, which takes seconds.
current_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators called inside the `with` block (in this thread) on the backend `name`.

    Raises:
        ValueError: if `name` is not one of `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def recomputed(function: Callable[..., Any], *arguments: Any, preserve_rng_state: bool = True) -> Any:
    """Return `function(*arguments)`, of which backward keeps the arguments alone and works out the rest again.

    It does so on the backend of now. `torch.utils.checkpoint` alone would ask for that of backward, which may run after
    a `with use_backend(...)`, and for tensors on a GPU runs in a thread of its own.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    if torch.compiler.is_compiling():  # the compiler records the operators, and their backend with them
        return checkpoint(function, *arguments, **options)
    backend = current_backend()

    def on_that_backend(*arguments: Any) -> Any:
        with use_backend(backend):
            return function(*arguments)

    return checkpoint(on_that_backend, *arguments, **options)


def resolve(op: str, backend: str, tensor: Tensor, suffix: str = "") -> str:
    """Return the backend, never "auto", that runs operator `op` on `tensor`, or raise `BackendError`.

    Args:
        op: Name of the operator's folder.
        backend: One of `BACKENDS`.
        tensor: The operator's main input; its device and dtype decide.
        suffix: Of the module's name: "_update" for `triton_update.py`.
    """
    if backend not in BACKENDS:
        expected = f"expected one of {', '.join(BACKENDS)}"
        raise BackendError(f"environment variable {ENVIRONMENT}: unknown backend {backend!r}; {expected}")
    if tensor.dtype in (torch.float64, torch.complex128):
        return "reference"
    device = tensor.device.type
    if backend == "auto":
        backend = {"cpu": "cpu", "cuda": "triton"}.get(device, "")
        if not backend:
            raise BackendError(f'{op}: no fast kernel for device {device!r}; use_backend("reference") runs anywhere')
    if reason := why_not(op, backend, device, suffix):
        raise BackendError(f"{op}: backend {backend!r} cannot run on device {device!r}: {reason}")
    return backend


def why_not(op: str, backend: str, device: str, suffix: str = "") -> str | None:
    """Return why `backend` cannot run `op` on `device` ("cpu", "cuda", ...), or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu" and device != "cpu":
        return "it takes CPU tensors only"
    if importlib.util.find_spec(f"mambaverse.kernels.{op}.{backend}{suffix}") is None:
        return f'{op} has no {backend}{suffix}.py; use_backend("reference") runs anywhere'
    if backend == "cpu":
        if importlib.util.find_spec("numba") is None:
            return 'numba is not installed: `pip install numba`, or use_backend("reference")'
        return None
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed (it exists for Linux only); use_backend("cpu") on CPU tensors'
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "CPU tensors run in Triton's interpreter only: set TRITON_INTERPRET=1 before the first import"
    return None


def load(op: str, backend: str, tensor: Tensor) -> ModuleType:
    """Return the module, e.g. `mambaverse.kernels.ssd.cpu`, that runs `op` on `tensor` (see `resolve`)."""
    return importlib.import_module(f"mambaverse.kernels.{op}.{resolve(op, backend, tensor)}")
