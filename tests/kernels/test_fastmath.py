"""Promises of the fast elementwise functions: accurate over all of float32, safe for NaN and infinities, vectorised."""

import re
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from mambaverse.kernels import fastmath

# every magnitude from subnormal to overflow, and densely the range where the functions bend
MAGNITUDES = np.geomspace(1e-42, 3e38, 20001)
X = np.concatenate([MAGNITUDES, -MAGNITUDES, np.linspace(-130, 130, 200001), [0.0]]).astype(np.float32)
SMALLEST = 2.0**-125

LIMITS = {  # at -inf, inf
    "exp2f": (0.0, np.inf),
    "expf": (0.0, np.inf),
    "sigmoid": (0.0, 1.0),
    "silu": (np.nan, np.inf),  # as x sigmoid(x) in torch: -inf times 0
    "softplus": (0.0, np.inf),
}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp2f": np.exp2,
    "expf": np.exp,
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "softplus": lambda x: np.logaddexp(0, x),
}


def compiled(name: str) -> Any:
    function = getattr(fastmath, name)

    @numba.njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
    def loop(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    return loop


def apply(name: str, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    compiled(name)(x, y)
    return y


@pytest.mark.parametrize("name", EXACT)
def test_relative_error_is_a_few_roundings(name):
    actual = apply(name, X).astype(np.float64)
    with np.errstate(over="ignore"):
        expected = EXACT[name](X.astype(np.float64))
    top = expected > np.finfo(np.float32).max
    assert np.all(actual[top] >= np.finfo(np.float32).max * (1 - 1e-6))
    normal = ~top & (np.abs(expected) >= 90 * SMALLEST)  # silu is 0 where e^-x overflows, below -88.7
    assert np.max(np.abs(actual[normal] / expected[normal] - 1)) < 3e-7
    tiny = ~top & ~normal
    assert np.max(np.abs(actual[tiny] - expected[tiny])) < 90 * SMALLEST


def test_silu_gradient_is_accurate():
    x = X.astype(np.float64)
    with np.errstate(over="ignore"):
        s = sigmoid(x)
    error = apply("silu_gradient", X) - s * (1 + x * (1 - s))
    assert np.max(np.abs(error)) < 3e-7  # the function is of order 1 and crosses 0


@pytest.mark.parametrize("name", LIMITS)
def test_nan_gives_nan_and_infinities_give_the_limits(name):
    payloads = np.array([0x7FC00000, 0x7F800001, 0xFFC12345], dtype=np.uint32).view(np.float32)
    assert np.isnan(apply(name, payloads)).all()
    np.testing.assert_array_equal(
        apply(name, np.array([-np.inf, np.inf], np.float32)), np.array(LIMITS[name], np.float32)
    )


def test_exp_of_zero_is_one():
    zeros = np.array([0.0, -0.0], np.float32)
    assert apply("exp2f", zeros).tolist() == apply("expf", zeros).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", [*EXACT, "silu_gradient"])
def test_a_loop_over_it_is_vectorised(name):
    loop = compiled(name)
    loop(X, np.empty_like(X))
    (code,) = loop.inspect_llvm().values()
    assert re.search(r"fmul [a-z ]*<\d+ x float>", code)
    assert "@llvm.exp" not in code
    assert "@exp" not in code
