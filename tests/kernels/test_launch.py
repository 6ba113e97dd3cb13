"""Promises of compiled_together: the kernels that a call lacks are compiled side by side, and launched in order.

They are compiled for a GPU that need not be there, and launches are written down.
"""

import os
import threading
from functools import partial
from typing import Any

import pytest
import torch

from mambaverse.kernels.backend import BackendError
from mambaverse.kernels.launch import Memo, compiled_together, launch

triton: Any = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

tl = triton.language


def jit(function):
    """Another JITFunction at each call, which has no kernels yet."""
    return triton.jit(function)


def add(x):
    i = tl.arange(0, 16)
    tl.store(x + i, tl.load(x + i) + 1)


def double(x):
    i = tl.arange(0, 16)
    tl.store(x + i, tl.load(x + i) * 2)


def wrong(x):
    tl.static_assert(False, "a kernel that does not compile")


class Device:
    """What Triton asks of a driver before a launch."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def log(monkeypatch, tmp_path):
    """("compile", thread) and ("launch", kernel), as they happen."""
    from triton.compiler import compiler
    from triton.runtime import driver

    events = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_ = compiler.compile

    def compile_and_tell(*arguments, **named):
        events.append(("compile", threading.current_thread().name.partition("_")[0]))
        return compile_(*arguments, **named)

    def run(kernel):
        return lambda *_: events.append(("launch", kernel.metadata.name))

    monkeypatch.setattr(triton.compiler, "compile", compile_and_tell)
    monkeypatch.setattr(compiler.CompiledKernel, "_init_handles", lambda kernel: setattr(kernel, "function", 0))
    monkeypatch.setattr(compiler.CompiledKernel, "run", property(run))
    monkeypatch.setattr(compiler.CompiledKernel, "launch_metadata", lambda *_: None)
    monkeypatch.setattr(driver, "_active", Device())
    return events


def call_of(memo, *kernels):
    """An operator's call that launches `kernels`."""
    x = torch.zeros(16)

    def run():
        for name, kernel in enumerate(kernels):
            launch(memo, name, kernel, (1,), (x,), lambda: {"num_warps": 1})
        return "outputs"

    return partial(compiled_together, run)


def test_kernels_of_a_call_are_compiled_by_threads_before_the_first_launch(log):
    call = call_of({}, jit(add), jit(double))
    assert call() == "outputs"
    assert log == [("compile", "mambaverse-compile")] * 2 + [("launch", "add"), ("launch", "double")]


def test_what_is_known_is_launched_at_once(log):
    memo: Memo = {}
    first, second = jit(add), jit(double)
    call_of(memo, first, second)()
    log.clear()
    call_of(memo, first, second)()
    call_of({}, first, second)()  # compiled, but with tensors of other shapes
    assert log == [("launch", "add"), ("launch", "double")] * 2


def test_one_missing_kernel_starts_the_call_anew(log):
    memo: Memo = {}
    first = jit(add)
    call_of(memo, first)()
    log.clear()
    call_of(memo, first, jit(double))()
    assert [event for event in log if event[0] == "launch"] == [("launch", n) for n in ("add", "add", "double")]


def test_outside_of_a_call_a_kernel_is_compiled_and_launched(log):
    launch({}, "add", jit(add), (1,), (torch.zeros(16),), lambda: {"num_warps": 1})
    assert log == [("compile", "MainThread"), ("launch", "add")]


def test_kernels_for_later_are_compiled_beside_those_that_are_missing_now(log):
    first: Memo = {}
    later: Memo = {}
    kernels = jit(add), jit(double)
    for _ in range(2):
        compiled_together(call_of(first, kernels[0]), ahead=lambda _: call_of(later, kernels[1])())
    assert log == [("compile", "mambaverse-compile")] * 2 + [("launch", "add")] * 2
    call_of(later, kernels[1])()
    assert log[4:] == [("launch", "double")]


def test_a_call_inside_a_call_is_part_of_it(log):
    first, second = call_of({}, jit(add)), call_of({}, jit(double))
    assert compiled_together(lambda: [first(), second()]) == ["outputs"] * 2
    assert [event[0] for event in log] == ["compile"] * 2 + ["launch"] * 2


def test_a_kernel_that_does_not_compile_says_so_every_time(log):
    call = call_of({}, jit(add), jit(wrong))
    for _ in range(2):
        with pytest.raises(triton.CompilationError, match="does not compile"):
            call()


def test_a_kernel_that_is_too_large_for_a_gpu_names_the_backend_that_can(log, monkeypatch):
    from triton.compiler import compiler
    from triton.runtime.errors import OutOfResources

    def refuse(kernel):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(compiler.CompiledKernel, "_init_handles", refuse)
    monkeypatch.setattr(compiler.CompiledKernel, "run", property(lambda kernel: kernel._init_handles()))
    call = call_of({}, jit(add))
    for _ in range(2):
        with pytest.raises(BackendError, match=r"kernel 'add'.* takes 300000 of shared memory.*232448.*reference"):
            call()
