"""What happens to rows of channels before and after the recurrence, in SIMD registers (numba).

    Δ = softplus(delta + delta_bias),  x = Δ u,  out = D u;    y = out silu(z)

Sources and targets are flat arrays, `first` and `stride` the position of their first row and the distance of the next;
buffers are (STEPS, WIDTH), those of backward (CHUNK, STRIP). All of them have whole rows to read and to write.
"""

import numpy as np
from numba import njit

from mambaverse.kernels.selective_scan.cpu_layout import STEPS, STRIP, WIDTH
from mambaverse.kernels.selective_scan.shapes import CHUNK
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
    where_negative,
)

f32 = np.float32
_LN_2 = f32(0.69314718)
_INFINITY = f32(np.inf)
LINE = 16  # elements of a cache line

# "reassoc" would cancel what rounds to an integer in exp
exact = njit(fastmath={"contract", "nsz"}, error_model="numpy", boundscheck=False)


@exact
def exp_of_minus_size(x):
    """Return e^-|x|."""
    return exp(sub(splat(f32(0)), absolute(x)))


@exact
def softplus(x, e):
    """Return log(1 + e^x) = max(x, 0) + log1p(e), e = e^-|x|, by the polynomial of fastmath for log1p(e) / e."""
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
                step = softplus(step, exp_of_minus_size(step))
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


@exact
def sigmoid(x, e):
    """Return 1 / (1 + e^-x) from e = e^-|x|, to full relative precision."""
    return div(where_negative(x, e, splat(f32(1))), add(splat(f32(1)), e))


@exact
def prepare_backward(
    num, u, u_first, u_stride, delta, d_first, d_stride, dy, dy_first, dy_stride, bias, skip, with_softplus,
    du, ddelta, dz, to_first, to_stride, dt, slope, x, out, g_out, g_x, g_dt,
):  # fmt: skip
    """Fill the buffers (CHUNK, STRIP) of backward: slope is dΔ / ddelta, g_out is dy, g_x and g_dt are zeros."""
    for q in range(num):
        for j in range(0, STRIP, LANES):
            i = q * STRIP + j
            if j % LINE == 0:  # of the chunk before, which comes next
                prefetch(u, u_first + (q - CHUNK) * u_stride + j)
                prefetch(delta, d_first + (q - CHUNK) * d_stride + j)
                prefetch(dy, dy_first + (q - CHUNK) * dy_stride + j)
                prefetch(du, to_first + q * to_stride + j)
                prefetch(ddelta, to_first + q * to_stride + j)
                prefetch(dz, to_first + q * to_stride + j)
            row, step = load(u, u_first + q * u_stride + j), load(delta, d_first + q * d_stride + j)
            step = add(step, load(bias, j))
            if with_softplus:
                e = exp_of_minus_size(step)
                store(slope, i, sigmoid(step, e))
                step = softplus(step, e)
            else:
                store(slope, i, splat(f32(1)))
            store(dt, i, step)
            store(x, i, mul(row, step))
            store(out, i, mul(row, load(skip, j)))
            store(g_out, i, load(dy, dy_first + q * dy_stride + j))
            store(g_x, i, splat(f32(0)))
            store(g_dt, i, splat(f32(0)))


@exact
def ungated(num, z, z_first, z_stride, g_out, gate):
    """Turn g_out from dy into the gradient of the ungated output; gate becomes dz over that output."""
    for q in range(num):
        for j in range(0, STRIP, LANES):
            i = q * STRIP + j
            if j % LINE == 0:
                prefetch(z, z_first + (q - CHUNK) * z_stride + j)
            row = load(z, z_first + q * z_stride + j)
            p = sigmoid(row, exp_of_minus_size(row))
            w = mul(row, p)
            g = load(g_out, i)
            store(gate, i, mul(g, fma(w, sub(splat(f32(1)), p), p)))
            store(g_out, i, mul(g, w))


@exact
def finish_backward(
    num, u, u_first, u_stride, skip, dt, slope, g_out, g_x, g_dt, g_skip, g_bias,
    du, ddelta, to_first, to_stride,
):  # fmt: skip
    """Write du and ddelta, add to g_skip and g_bias."""
    for j in range(0, STRIP, LANES):
        sum_skip = sum_bias = splat(f32(0))  # over one chunk: a long float32 sum keeps its digits in two levels only
        for q in range(num):
            i = q * STRIP + j
            row, g, g_row = load(u, u_first + q * u_stride + j), load(g_out, i), load(g_x, i)
            sum_skip = fma(g, row, sum_skip)
            g_step = mul(fma(load(g_dt, i), splat(_LN_2), mul(g_row, row)), load(slope, i))
            sum_bias = add(sum_bias, g_step)
            store(ddelta, to_first + q * to_stride + j, g_step)
            store(du, to_first + q * to_stride + j, fma(g_row, load(dt, i), mul(g, load(skip, j))))
        store(g_skip, j, add(load(g_skip, j), sum_skip))
        store(g_bias, j, add(load(g_bias, j), sum_bias))


@exact
def product(num, gate, out, dz, dz_first, dz_stride):
    """Write dz = gate out."""
    for q in range(num):
        for j in range(0, STRIP, LANES):
            store(dz, dz_first + q * dz_stride + j, mul(load(gate, q * STRIP + j), load(out, q * STRIP + j)))
