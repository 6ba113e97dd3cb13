"""Promises of cached_kernel: code is kept under a name that changes with the sources that are compiled into it."""

import types

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
