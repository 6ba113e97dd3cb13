"""The recurrence over one chunk of steps and one block of channels, for a real and for a complex A (numba).

    h[t] = a[t] h[t-1] + x[t] B[t],  a = 2^(Δ rate),  rate = A / ln 2,  x = Δ u;   out += C·h, complex: 2 Re(C·h)

and its gradient, for which the states are followed forward once more from those that the chunk starts from. One state n
after the other runs through the steps q of the chunk, for a real A with two registers of channels at a time.

Forward works on rows of W = WIDTH channels, backward on W = STRIP. Arrays of states (rate, h, ...) are (1, N, W) for a
real A; for a complex A (2, N, W), real and imaginary parts. Arrays of steps are (steps, W). B and C are flat; step q of
the chunk is in B[b_first + q b_step + n], or for a complex A in the pair that starts at B[b_first + q b_step + 2 n].

`forward_real_bounded` asks for |Δ rate| <= BOUND and then returns the same bits as `forward_real`. Backward has no such
form: it waits for memory rather than for arithmetic.
"""

from typing import Any

import numpy as np
from numba import njit

from mambaverse.kernels import simd
from mambaverse.kernels.fastmath import exp2f
from mambaverse.kernels.selective_scan.cpu_layout import STRIP, WIDTH
from mambaverse.kernels.selective_scan.shapes import CHUNK
from mambaverse.kernels.simd import LANES, add, fma, load, mul, splat, splat_at, store, total

f32 = np.float32
_ROUND = f32(1.5 * 2**23)  # adding it rounds to an integer, which is then in the low bits
_HALF_TURNS = f32(np.log(2) / np.pi)

# "reassoc" would cancel what rounds to an integer in exp2, here as in simd
_exact = njit(fastmath={"contract", "nsz"}, error_model="numpy", boundscheck=False)
_relaxed = njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy", boundscheck=False)


def _forward_real(exp2_pair: Any) -> Any:
    @_exact
    def forward_real(num, rate, h, dt, x, B, b_first, b_step, C, c_first, c_step, out):
        """Take `num` steps: h is updated, out added to."""
        for v in range(0, WIDTH, 2 * LANES):
            for n in range(rate.shape[1]):
                i = n * WIDTH + v
                rate_0, rate_1 = load(rate, i), load(rate, i + LANES)
                h_0, h_1 = load(h, i), load(h, i + LANES)
                for q in range(num):
                    b, c = splat_at(B, b_first + q * b_step + n), splat_at(C, c_first + q * c_step + n)
                    o = q * WIDTH + v
                    r = o + LANES
                    a_0, a_1 = exp2_pair(mul(load(dt, o), rate_0), mul(load(dt, r), rate_1))
                    h_0 = fma(a_0, h_0, mul(load(x, o), b))
                    h_1 = fma(a_1, h_1, mul(load(x, r), b))
                    store(out, o, fma(c, h_0, load(out, o)))
                    store(out, r, fma(c, h_1, load(out, r)))
                store(h, i, h_0)
                store(h, i + LANES, h_1)

    return forward_real


forward_real = _forward_real(simd.exp2_pair)
forward_real_bounded = _forward_real(simd.exp2_pair_bounded)


@_exact
def backward_real(
    num, rate, h_first, dt, x, B, b_first, b_step, C, c_first, c_step, g_out, a, h,
    out, g_x, g_dt, g_b, g_c, g_h, g_rate,
):  # fmt: skip
    """Differentiate `num` steps of STRIP channels; a (1, CHUNK, STRIP) and h (a row more) are scratch.

    g_h comes in as the gradient of the last states and leaves as that of `h_first`; out, g_x (of x), g_dt (through
    a, over ln 2), g_rate (of A) and, lane by lane, g_b and g_c (N, CHUNK, LANES) are added to.
    """
    for n in range(rate.shape[1]):
        i = n * STRIP
        rate_0, rate_1 = load(rate, i), load(rate, i + LANES)
        h_0, h_1 = load(h_first, i), load(h_first, i + LANES)
        store(h, 0, h_0)
        store(h, LANES, h_1)
        for q in range(num):
            b, c = splat_at(B, b_first + q * b_step + n), splat_at(C, c_first + q * c_step + n)
            o = q * STRIP
            r = o + LANES
            a_0, a_1 = simd.exp2_pair(mul(load(dt, o), rate_0), mul(load(dt, r), rate_1))
            h_0 = fma(a_0, h_0, mul(load(x, o), b))
            h_1 = fma(a_1, h_1, mul(load(x, r), b))
            store(a, o, a_0)
            store(a, r, a_1)
            store(h, o + STRIP, h_0)
            store(h, r + STRIP, h_1)
            store(out, o, fma(c, h_0, load(out, o)))
            store(out, r, fma(c, h_1, load(out, r)))
        g_h0, g_h1 = load(g_h, i), load(g_h, i + LANES)
        g_rate0 = g_rate1 = splat(f32(0))  # over one chunk: a long float32 sum keeps its digits in two levels only
        for q in range(num - 1, -1, -1):
            b, c = splat_at(B, b_first + q * b_step + n), splat_at(C, c_first + q * c_step + n)
            o = q * STRIP
            r, s = o + LANES, (n * CHUNK + q) * LANES
            g_0, g_1 = load(g_out, o), load(g_out, r)
            store(g_c, s, fma(g_0, h_0, fma(g_1, h_1, load(g_c, s))))
            g_0, g_1 = fma(g_0, c, g_h0), fma(g_1, c, g_h1)  # gradients of the states after step q
            store(g_b, s, fma(g_0, load(x, o), fma(g_1, load(x, r), load(g_b, s))))
            store(g_x, o, fma(g_0, b, load(g_x, o)))
            store(g_x, r, fma(g_1, b, load(g_x, r)))
            g_h0, g_h1 = mul(g_0, load(a, o)), mul(g_1, load(a, r))
            h_0, h_1 = load(h, o), load(h, r)
            g_0, g_1 = mul(g_h0, h_0), mul(g_h1, h_1)  # gradients of Δ A
            store(g_dt, o, fma(g_0, rate_0, load(g_dt, o)))
            store(g_dt, r, fma(g_1, rate_1, load(g_dt, r)))
            g_rate0, g_rate1 = fma(g_0, load(dt, o), g_rate0), fma(g_1, load(dt, r), g_rate1)
        store(g_h, i, g_h0)
        store(g_h, i + LANES, g_h1)
        store(g_rate, i, add(load(g_rate, i), g_rate0))
        store(g_rate, i + LANES, add(load(g_rate, i + LANES), g_rate1))


@_exact
def sum_lanes(g_b, g_c, num, g_B, g_C):
    """Write the sums of the lanes of g_b and g_c (N, CHUNK, LANES) to g_B and g_C (1, N, CHUNK)."""
    for n in range(g_B.shape[1]):
        for q in range(num):
            g_B[0, n, q] = total(load(g_b, (n * CHUNK + q) * LANES))
            g_C[0, n, q] = total(load(g_c, (n * CHUNK + q) * LANES))


@_exact
def _complex_exp2(z, w):
    """Return the parts of 2^(z + i w) = 2^z (cos(w ln 2) + i sin(w ln 2)), with w ln 2 = pi (k + f), |f| <= 1/2."""
    t = w * _HALF_TURNS
    k = t + _ROUND
    f = t - (k - _ROUND)
    f2 = f * f
    c = f32(0.22008066) * f2 + f32(-1.3320938)
    c = c * f2 + f32(4.058451)
    c = c * f2 + f32(-4.9347954)
    c = c * f2 + f32(1)
    s = f32(0.077560484) * f2 + f32(-0.59824216)
    s = s * f2 + f32(2.5500698)
    s = s * f2 + f32(-5.16771)
    s = s * f2 + f32(3.1415927)
    size = exp2f(z) * (f32(1) - f32(2) * f32(np.int32(f32(k).view(np.int32) & np.int32(1))))
    return size * c, size * s * f


@_relaxed
def forward_complex(num, rate, h, dt, x, B, b_first, b_step, C, c_first, c_step, out):
    """Take `num` steps: h is updated, out added to."""
    for n in range(rate.shape[1]):
        for q in range(num):
            i_b, i_c = b_first + q * b_step + 2 * n, c_first + q * c_step + 2 * n
            b_re, b_im, c_re, c_im = B[i_b], B[i_b + 1], f32(2) * C[i_c], f32(2) * C[i_c + 1]
            for j in range(WIDTH):
                a_re, a_im = _complex_exp2(dt[q, j] * rate[0, n, j], dt[q, j] * rate[1, n, j])
                re = a_re * h[0, n, j] - a_im * h[1, n, j] + x[q, j] * b_re
                im = a_re * h[1, n, j] + a_im * h[0, n, j] + x[q, j] * b_im
                h[0, n, j] = re
                h[1, n, j] = im
                out[q, j] += c_re * re - c_im * im


@_relaxed
def backward_complex(
    num, rate, h_first, dt, x, B, b_first, b_step, C, c_first, c_step, g_out, a, h, g_rate_sum,
    out, g_x, g_dt, g_B, g_C, g_h, g_rate,
):  # fmt: skip
    """Differentiate `num` steps, as `backward_real` does; a, h and g_rate_sum (2, STRIP) are scratch.

    g_B and g_C (2, N, CHUNK) are added to.
    """
    for n in range(rate.shape[1]):
        for part in range(2):
            for j in range(STRIP):
                h[part, 0, j] = h_first[part, n, j]
                g_rate_sum[part, j] = f32(0)
        for q in range(num):
            i_b, i_c = b_first + q * b_step + 2 * n, c_first + q * c_step + 2 * n
            b_re, b_im, c_re, c_im = B[i_b], B[i_b + 1], f32(2) * C[i_c], f32(2) * C[i_c + 1]
            for j in range(STRIP):
                a_re, a_im = _complex_exp2(dt[q, j] * rate[0, n, j], dt[q, j] * rate[1, n, j])
                re = a_re * h[0, q, j] - a_im * h[1, q, j] + x[q, j] * b_re
                im = a_re * h[1, q, j] + a_im * h[0, q, j] + x[q, j] * b_im
                a[0, q, j] = a_re
                a[1, q, j] = a_im
                h[0, q + 1, j] = re
                h[1, q + 1, j] = im
                out[q, j] += c_re * re - c_im * im
        for q in range(num - 1, -1, -1):
            i_b, i_c = b_first + q * b_step + 2 * n, c_first + q * c_step + 2 * n
            b_re, b_im, c_re, c_im = B[i_b], B[i_b + 1], f32(2) * C[i_c], f32(2) * C[i_c + 1]
            g_b_re = g_b_im = g_c_re = g_c_im = f32(0)
            for j in range(STRIP):
                re = g_h[0, n, j] + g_out[q, j] * c_re
                im = g_h[1, n, j] - g_out[q, j] * c_im
                g_c_re += g_out[q, j] * h[0, q + 1, j]
                g_c_im -= g_out[q, j] * h[1, q + 1, j]
                g_b_re += re * x[q, j]
                g_b_im += im * x[q, j]
                g_x[q, j] += re * b_re + im * b_im
                g_re = re * a[0, q, j] + im * a[1, q, j]
                g_im = im * a[0, q, j] - re * a[1, q, j]
                g_h[0, n, j] = g_re
                g_h[1, n, j] = g_im
                re = g_re * h[0, q, j] + g_im * h[1, q, j]  # gradient of Δ A
                im = g_im * h[0, q, j] - g_re * h[1, q, j]
                g_dt[q, j] += re * rate[0, n, j] + im * rate[1, n, j]
                g_rate_sum[0, j] += re * dt[q, j]
                g_rate_sum[1, j] += im * dt[q, j]
            g_B[0, n, q] += g_b_re
            g_B[1, n, q] += g_b_im
            g_C[0, n, q] += f32(2) * g_c_re
            g_C[1, n, q] += f32(2) * g_c_im
        for part in range(2):
            for j in range(STRIP):
                g_rate[part, n, j] += g_rate_sum[part, j]
