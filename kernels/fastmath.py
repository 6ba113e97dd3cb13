"""exp, sigmoid, SiLU and softplus in float32 for numba kernels: a few multiply-adds each, no libm, so LLVM vectorises.

    2^x = 2^k 2^f,  k = round(x),  f = x - k in [-1/2, 1/2],  2^f a polynomial with p(0) = 1
    softplus(x) = max(x, 0) + log1p(exp(-|x|)),  log1p(e) / e a polynomial on [0, 1]

Arguments must be `np.float32` and stay so: beside a Python float literal numba would compute in float64. NaN gives NaN,
infinities give the limits. The relative error is about 1.5e-7, two float32 roundings, wherever the result is a normal
number; results below 2^-125.5 are 0.

The coefficients are minimax fits of the relative error by Lawson's iteration (weighted least squares), rounded to
float32. Kernels that call these functions are compiled by `jit.cached_kernel`, which notices edits here.
"""

import numba
import numpy as np

f32 = np.float32
_ROUND = f32(1.5 * 2**23 + 126)  # adding it rounds to an integer k and leaves k + 126 in the low bits of the result
_SHIFT = np.int32(23)  # the exponent's place in a float32
_LOG2E, _LN2_HIGH, _LN2_LOW = f32(1.44269504), f32(0.693145752), f32(1.42860677e-6)

# No "reassoc": it would cancel the addition of _ROUND. Inlined, the functions keep these flags whatever the caller's.
_inlined = numba.njit(fastmath={"contract", "nsz"}, error_model="numpy", forceinline=True)


@_inlined
def exp2f(x):
    """Return 2^x."""
    x = f32(-126) if x < f32(-126) else x
    x = f32(128) if x > f32(128) else x
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)
    p = f32(0.00265294546) * f + f32(0.019343026)
    p = p * f + f32(0.111014672)
    p = p * f + f32(0.480444849)
    p = p * f + f32(1.38629401)
    p = p * f + f32(2)
    # p is 2 · 2^f and the scale 2^(k - 1), so that both ends of the range, k = -126 (scale 0) and 128, are exact.
    return p * np.int32(f32(shifted).view(np.int32) << _SHIFT).view(np.float32)


@_inlined
def expf(x):
    """Return e^x."""
    x = f32(-87.33654) if x < f32(-87.33654) else x
    x = f32(88.72284) if x > f32(88.72284) else x
    shifted = x * _LOG2E + _ROUND
    k = shifted - _ROUND
    f = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = f32(0.01658063) * f + f32(0.0837958604)
    p = p * f + f32(0.333352715)
    p = p * f + f32(0.999983013)
    p = p * f + f32(1.9999994)
    p = p * f + f32(2)
    return p * np.int32(f32(shifted).view(np.int32) << _SHIFT).view(np.float32)


@_inlined
def sigmoid(x):
    """Return 1 / (1 + e^-x)."""
    return f32(1) / (f32(1) + expf(-x))


@_inlined
def silu(x):
    """Return x sigmoid(x)."""
    return x / (f32(1) + expf(-x))


@_inlined
def silu_gradient(x):
    """Return d silu / dx = s + x s (1 - s) with s = sigmoid(x), from e = exp(-|x|) so that 1 - s keeps its digits."""
    e = expf(-abs(x))
    d = f32(1) / (f32(1) + e)
    return d * ((e if x < f32(0) else f32(1)) + x * e * d)


@_inlined
def softplus(x):
    """Return log(1 + e^x); its derivative is `sigmoid`."""
    e = expf(-abs(x))
    p = f32(0.00536482455) * e + f32(-0.0300657917)
    p = p * e + f32(0.079204537)
    p = p * e + f32(-0.137538031)
    p = p * e + f32(0.191536546)
    p = p * e + f32(-0.248571634)
    p = p * e + f32(0.33321324)
    p = p * e + f32(-0.499996483)
    p = p * e + f32(1)
    return (x if x > f32(0) else f32(0)) + e * p
