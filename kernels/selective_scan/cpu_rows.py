"""What happens to rows of channels before and after the recurrence, in SIMD registers (numba).

    Δ = softplus(delta + delta_bias),  x = Δ u,  out = D u;    y = out silu(z)

Sources and targets are flat arrays, `first` and `stride` the position of their first row and the distance of the next;
buffers are (STEPS, WIDTH). All of them have whole rows of WIDTH elements to read and to write.
"""

import numpy as np
from numba import njit

from mambaverse.kernels.selective_scan.cpu_layout import STEPS, WIDTH
from mambaverse.kernels.simd import (
    LANES,
    absolute,
    add,
    clamp,
    div,
    exp,
    fma,
    larger,
    load,
    mul,
    prefetch,
    splat,
    store,
    sub,
)

f32 = np.float32
_INFINITY = f32(np.inf)
LINE = 16  # elements of a cache line

# "reassoc" would cancel what rounds to an integer in exp
exact = njit(fastmath={"contract", "nsz"}, error_model="numpy", boundscheck=False)


@exact
def softplus(x):
    """Return log(1 + e^x) = max(x, 0) + log1p(e), e = e^-|x|, by the polynomial of fastmath for log1p(e) / e."""
    e = exp(sub(splat(f32(0)), absolute(x)))
    p = fma(splat(f32(0.00536482455)), e, splat(f32(-0.0300657917)))
    p = fma(p, e, splat(f32(0.079204537)))
    p = fma(p, e, splat(f32(-0.137538031)))
    p = fma(p, e, splat(f32(0.191536546)))
    p = fma(p, e, splat(f32(-0.248571634)))
    p = fma(p, e, splat(f32(0.33321324)))
    p = fma(p, e, splat(f32(-0.499996483)))
    p = fma(p, e, splat(f32(1)))
    return fma(e, p, clamp(x, splat(f32(0)), splat(_INFINITY)))


@exact
def sigmoid(x):
    """Return 1 / (1 + e^-x)."""
    return div(splat(f32(1)), add(splat(f32(1)), exp(sub(splat(f32(0)), x))))


@exact
def prepare(num, u, u_first, u_stride, delta, d_first, d_stride, bias, skip, with_softplus, dt, x, out, peak):
    """Fill dt (Δ), x and out; peak (LANES,) becomes the largest |Δ| of every lane, NaN if one is."""
    most = splat(f32(0))
    for q in range(num):
        for j in range(0, WIDTH, LANES):
            i = q * WIDTH + j
            if j % LINE == 0:
                prefetch(u, u_first + (q + STEPS) * u_stride + j)
                prefetch(delta, d_first + (q + STEPS) * d_stride + j)
            row, step = load(u, u_first + q * u_stride + j), load(delta, d_first + q * d_stride + j)
            step = add(step, load(bias, j))
            if with_softplus:
                step = softplus(step)
            most = larger(most, absolute(step))
            store(dt, i, step)
            store(x, i, mul(row, step))
            store(out, i, mul(row, load(skip, j)))
    store(peak, 0, most)


@exact
def gated(num, out, z, z_first, z_stride, y, y_first, y_stride):
    """Write out silu(z) to y."""
    for q in range(num):
        for j in range(0, WIDTH, LANES):
            if j % LINE == 0:
                prefetch(z, z_first + (q + STEPS) * z_stride + j)
            gate = load(z, z_first + q * z_stride + j)
            denominator = add(splat(f32(1)), exp(sub(splat(f32(0)), gate)))
            row = div(mul(load(out, q * WIDTH + j), gate), denominator)
            store(y, y_first + q * y_stride + j, row)
