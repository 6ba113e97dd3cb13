"""Tests in Triton's interpreter: a pytest process for each file of them, beside the tests of this one.

Triton reads TRITON_INTERPRET when it is imported. A file of such tests has one that asks for the fixture
`passes_in_the_interpreter`; it runs last, and its process is started, one after the other, when the tests have been
collected: the interpreter keeps one core busy for minutes. Several workers (`-n auto`) keep all cores busy anyway:
there it runs first, for one of them takes minutes, and starts its process itself.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

FIXTURE = "passes_in_the_interpreter"
MINUTES = 15
_runs: dict[str, Future[subprocess.CompletedProcess[str]]] = {}
_processes: list[subprocess.Popen[str]] = []
_pool = ThreadPoolExecutor(1)


def _patch_the_language_once_a_launch() -> None:
    """Let the interpreter put its functions into `triton.language` at a launch, not at each call of a jitted function.

    Triton 3.6 looks through the modules, some 700 names, whenever a kernel calls a function, and changes nothing the
    second time: a third of these tests' time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang"):  # another version
        return
    patch = interpreter._patch_lang
    patched: set[frozenset[str]] = set()  # which of the modules a function sees, of those since the launch

    def patch_once(function: Any) -> Any:
        seen = frozenset(m.__name__ for m in function.__globals__.values() if m is tl or m is tl.core)
        if seen in patched:
            return None  # a call inside a kernel, which drops it; a launch would use it
        scope, is_launch = patch(function), not patched
        patched.add(seen)
        if is_launch:
            end = scope.restore

            def restore() -> None:
                patched.clear()
                end()

            scope.restore = restore
        return scope

    interpreter._patch_lang = patch_once


def _leave_out_what_is_thrown_away() -> None:
    """Let the interpreter not work out what it drops: overflow of integers, and tables of dtypes.

    Triton 3.6 asserts the first with the option `debug` alone, which its interpreter does not set, but computes it
    first. The second it builds, of 18 dtypes, to look one of them up.
    """
    from triton.runtime import interpreter

    if not (hasattr(interpreter, "interpreter_builder") and hasattr(interpreter, "_get_np_dtype")):  # another version
        return
    builder = interpreter.interpreter_builder
    if not getattr(builder.options, "debug", True) and hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    look_up = interpreter._get_np_dtype
    known: dict[str, Any] = {}  # a block's is that of its elements

    def look_up_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = look_up_once


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_the_language_once_a_launch()
    _leave_out_what_is_thrown_away()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that wait for a process behind all others or, in a worker, before; give them the time for it."""
    waiting = [item for item in items if FIXTURE in getattr(item, "fixturenames", ())]
    others = [item for item in items if item not in waiting]
    items[:] = waiting + others if "PYTEST_XDIST_WORKER" in os.environ else others + waiting
    for item in waiting:
        item.add_marker(pytest.mark.timeout(60 * MINUTES))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the processes of those that were not deselected."""
    shared = {"TRITON_INTERPRET", "PYTEST_XDIST_WORKER"} & {*os.environ}  # workers collect what others run
    if shared or session.config.option.collectonly:
        return
    for item in session.items:
        if FIXTURE in getattr(item, "fixturenames", ()):
            _runs[str(item.path)] = _pool.submit(_run, str(item.path))


def pytest_sessionfinish() -> None:
    """Leave no process behind."""
    _pool.shutdown(wait=False, cancel_futures=True)
    for process in _processes:
        process.kill()


@pytest.fixture
def passes_in_the_interpreter(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Return a function that waits for this file's process, and raises AssertionError unless its tests passed."""

    def check() -> None:
        path = str(request.path)
        done = (_runs.get(path) or _pool.submit(_run, path)).result()
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert " passed" in done.stdout

    return check


def _run(path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]
        _processes.append(process)
        out, error = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, error)
