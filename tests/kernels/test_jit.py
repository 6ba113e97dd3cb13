"""Promises of cached_kernel: code is kept under a name that changes with what is compiled into it, or not at all."""

import os
import subprocess
import sys
import types

import numba
import numpy as np
import pytest

from mambaverse.kernels import jit


@pytest.fixture
def sources(monkeypatch):
    """Module objects whose source is what the test says it is."""
    texts: dict[str, str] = {}
    monkeypatch.setattr(jit.inspect, "getsource", lambda module: texts[module.__name__])
    return texts


def kept_name(*modules):
    def kernel(start, stop, x):
        for i in range(start, stop):
            x[i] += np.float32(1)

    return jit.cached_kernel(*modules)(kernel).py_func.__qualname__


def test_name_follows_the_source_of_what_is_called(sources):
    callee = types.ModuleType("callee")
    sources["callee"] = "def f(): return 1"
    before = kept_name(callee)
    assert kept_name(callee) == before
    sources["callee"] = "def f(): return 2"
    assert kept_name(callee) != before


def test_kernel_runs():
    @jit.cached_kernel(fastmath={"contract"})
    def double(start, stop, x):
        for i in range(start, stop):
            x[i] *= np.float32(2)

    x = np.ones(3, np.float32)
    double(1, 3, x)
    assert x.tolist() == [1, 2, 2]


NOWHERE = "IPythonCacheLocator"  # numba then finds no folder for a file's functions, as where none can be written to


@pytest.fixture
def nowhere(monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", NOWHERE)
    jit._warn_that_nothing_is_kept.cache_clear()
    yield
    jit._warn_that_nothing_is_kept.cache_clear()


@pytest.mark.parametrize("given", ["", "/given"])
def test_a_kernel_that_cannot_be_kept_runs_and_the_warning_names_the_variable(nowhere, monkeypatch, given):
    monkeypatch.setenv("NUMBA_CACHE_DIR", given)
    with pytest.warns(UserWarning, match=f"NUMBA_CACHE_DIR={given!r}" if given else "NUMBA_CACHE_DIR to") as warned:

        @jit.cached_kernel()
        def first(start, stop, x):
            x[start:stop] += 1

        @jit.cached_kernel()
        def second(start, stop, x):
            x[start:stop] *= 3

    assert len(warned) == 1
    x = np.ones(3, np.float32)
    first(1, 3, x)
    second(0, 2, x)
    assert x.tolist() == [3, 6, 2]


def test_what_is_not_for_want_of_a_folder_is_raised(monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "NoSuchLocator")
    with pytest.raises(RuntimeError, match="NoSuchLocator"):
        jit.cached_kernel()(lambda start, stop: None)


def test_every_operator_loads_without_a_folder_for_code_and_one_warning_is_shown():
    program = (
        "import importlib, torch\n"
        "for op in 'causal_conv1d cross_scan lti_conv norm selective_scan ssd'.split():\n"
        "    importlib.import_module(f'mambaverse.kernels.{op}.cpu')\n"
        "from mambaverse.kernels.rows import sum_rows\n"
        "assert sum_rows(torch.ones(3, 2)).tolist() == [3, 3]\n"
    )
    environment = os.environ | {"NUMBA_CACHE_LOCATOR_CLASSES": NOWHERE, "PYTHONWARNINGS": "always"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("NUMBA_CACHE_DIR") == 1, done.stderr
