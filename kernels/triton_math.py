"""Functions that Triton kernels of several operators call."""

# What Triton compiles has its own types.
# mypy: ignore-errors

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)): max(x, 0) and, of e = exp(-|x|), log(1 + e) by a polynomial of relative error 2e-7.

    Step sizes may be 1e-4, and their relative error counts: a logarithm of what 1 + e rounds to would be off. A NaN
    stays one.
    """
    e = tl.exp2(tl.abs(x) * -LOG2E)
    p = 0.0440896476 - e * 0.00853921193
    p = 0.17745244 + e * (e * p - 0.107681741)
    p = 0.3327548 + e * (e * p - 0.24495464)
    p = 0.999999806 + e * (e * p - 0.499974054)
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), without an exponential that overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)
