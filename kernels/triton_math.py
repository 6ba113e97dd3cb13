"""Functions that Triton kernels of several operators call."""

# What Triton compiles has its own types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)); a series in e / (2 + e) where the sum would round e = exp(x) away."""
    e = tl.exp(tl.minimum(x, 20.0))
    s = e / (2.0 + e)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9)))))
    return tl.where(x <= 20.0, tl.where(e < 0.5, series, tl.log(1.0 + e)), x)  # a NaN stays one


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), without an exponential that overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)
