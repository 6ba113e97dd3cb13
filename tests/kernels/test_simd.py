"""Promises of the vector functions: accurate over the whole range, safe for NaN and infinities, equal in both forms."""

import numba
import numpy as np
import pytest

from mambaverse.kernels import simd
from mambaverse.kernels.simd import LANES, load, store

LARGEST = np.finfo(np.float32).max


def apply(function, x):
    """The function of every element; x is filled up to whole vectors."""

    @numba.njit(fastmath={"contract", "nsz"}, error_model="numpy")
    def loop(x, y):
        for i in range(0, x.size, LANES):
            store(y, i, function(load(x, i)))

    padded = np.concatenate([x, np.zeros(-x.size % LANES)]).astype(np.float32)
    y = np.empty_like(padded)
    loop(padded, y)
    return y[: x.size]


@pytest.mark.parametrize("name, exact, low, high", [("exp2", np.exp2, -126, 127), ("exp", np.exp, -87, 88)])
def test_relative_error_is_a_few_roundings(name, exact, low, high):
    x = np.concatenate([np.linspace(low, high, 200001), np.geomspace(1e-9, 1, 1001), -np.geomspace(1e-9, 1, 1001)])
    x = x.astype(np.float32)
    assert np.max(np.abs(apply(getattr(simd, name), x) / exact(x.astype(np.float64)) - 1)) < 3e-7


def test_a_slow_decay_is_as_slow_as_it_should_be():
    """2^z near z = 0: the error must shrink with z, or a long memory would add it up."""
    z = -np.geomspace(2.0**-10, 2.0**-3, 4096).astype(np.float32)
    error = apply(simd.exp2, z).astype(np.float64) - np.exp2(z.astype(np.float64))
    assert np.all(np.abs(error) < 2.0**-24 + 1e-6 * np.abs(z))


@pytest.mark.parametrize("name", ["exp2", "exp"])
def test_nan_and_infinities_give_the_limits(name):
    x = np.array([np.nan, -np.inf, np.inf, 0], np.float32)
    np.testing.assert_array_equal(apply(getattr(simd, name), x), np.array([np.nan, 0, np.inf, 1], np.float32))


@pytest.mark.parametrize("bounded", [False, True])
def test_pairs_have_the_same_bits(bounded):
    pair = simd.exp2_pair_bounded if bounded else simd.exp2_pair
    size = 126 if bounded else 300
    z = np.random.default_rng(0).uniform(-size, size, 2**17).astype(np.float32)

    @numba.njit
    def loop(x, y):
        for i in range(0, x.size, 2 * LANES):
            first, second = pair(load(x, i), load(x, i + LANES))
            store(y, i, first)
            store(y, i + LANES, second)

    y = np.empty_like(z)
    loop(z, y)
    np.testing.assert_array_equal(y, apply(simd.exp2, z))


def test_larger_lets_nan_through():
    sizes = np.array([0, 1, LARGEST, np.inf, np.nan], np.float32)

    @numba.njit
    def largest(x, out):
        most = load(x, 0)
        for i in range(LANES, x.size, LANES):
            most = simd.larger(most, load(x, i))
        store(out, 0, most)

    out = np.empty(LANES, np.float32)
    for count in range(1, len(sizes) + 1):
        for order in (sizes[:count], sizes[:count][::-1]):
            largest(np.repeat(order, LANES).astype(np.float32), out)
            np.testing.assert_array_equal(out, np.full(LANES, sizes[count - 1]))
