"""Triton kernels around those that walk the length.

Operands are packed before them, segments joined between them, and where both directions share a gate, it comes after
them, once: their sum is gated, so that neither reads z or works out what it does to a step.
"""

# What Triton compiles has its own types, and it knows no unpacking into a tuple.
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from mambaverse.kernels.selective_scan.triton_common import sigmoid
from mambaverse.kernels.triton_math import LOG2E


@triton.jit
def pack(
    A, B, C, A_2, B_2, C_2, A2, BC, num_rows, L, dim, N, G,
    sA_d, sA_n, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n,
    num_A: tl.constexpr, PAIR: tl.constexpr, ROWS: tl.constexpr, GN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write A log2(e) as (N, D), and B and C side by side, (B, L, G, N): see `unpack`.

    Grid: (blocks of A, then of rows of B and C; directions). The second direction has `A_2`, `B_2` and `C_2`.
    """
    i_p, i_2 = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if i_2 == 1:
        A, B, C = A_2, B_2, C_2
    A2 += i_2 * N * dim
    BC += i_2 * num_rows * G * N
    if i_p < num_A:
        o = i_p * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(A + (o % dim) * sA_d + (o // dim) * sA_n, mask=o < N * dim).to(tl.float32)
        tl.store(A2 + o, value * LOG2E, mask=o < N * dim)
    else:
        row = (i_p - num_A) * ROWS + tl.arange(0, ROWS)[:, None]
        o_b, o_l = row // L, row % L
        for first in range(0, G * N, GN):
            column = first + tl.arange(0, GN)[None, :]
            o_g, o_n = (column // N).to(tl.int64), (column % N).to(tl.int64)
            mask = (row < num_rows) & (column < G * N)
            b = tl.load(B + o_b * sB_b + o_l * sB_l + o_g * sB_g + o_n * sB_n, mask=mask)
            c = tl.load(C + o_b * sC_b + o_l * sC_l + o_g * sC_g + o_n * sC_n, mask=mask)
            if PAIR == 32:
                low = b.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
                word = low | (c.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) << 32)
            else:
                low = b.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
                word = low | (c.to(tl.int16, bitcast=True).to(tl.int32) << 16)
            tl.store(BC + row * G * N + column, word, mask=mask)


@triton.jit
def combine(
    A2, ends, sums, h0, h0_2, starts, dim, N, num_sequences, num_segments, sh_s, sh_d, sh_n,
    HAS_H0: tl.constexpr, BACKWARD: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Find the state that each segment starts from (or the gradient that enters its end, if BACKWARD).

    `ends` (sequences, segments, N, D) holds each segment's own contribution, `starts` (same shape) the results. Grid:
    (blocks of D, N, sequences of all directions); `num_sequences` are of one, and `h0_2` is of the second.
    """
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    n, i_q = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_2, i_s = i_q // num_sequences, i_q % num_sequences
    if i_2 == 1:
        h0 = h0_2
    m_d = o_d < dim
    a = tl.load(A2 + (i_2 * N + n) * dim + o_d, mask=m_d, other=0.0)
    h = tl.zeros([BD], tl.float32)
    if HAS_H0:
        h = tl.load(h0 + i_s * sh_s + o_d * sh_d + n * sh_n, mask=m_d, other=0.0).to(tl.float32)
    for first in range(0, num_segments, UNROLL):
        decay, end = (), ()
        for k in tl.static_range(UNROLL):
            c = i_q * num_segments + (num_segments - 1 - first - k if BACKWARD else first + k)
            mask = m_d & (first + k < num_segments)
            decay = decay + (tl.exp2(a * tl.load(sums + c * dim + o_d, mask=mask, other=0.0)),)
            end = end + (tl.load(ends + (c * N + n) * dim + o_d, mask=mask, other=0.0),)
        for k in tl.static_range(UNROLL):
            c = i_q * num_segments + (num_segments - 1 - first - k if BACKWARD else first + k)
            tl.store(starts + (c * N + n) * dim + o_d, h, mask=m_d & (first + k < num_segments))
            h = decay[k] * h + end[k]


@triton.jit(do_not_specialize=["num_rows"])  # a 1 would be a constant, which has no type
def gate(
    ys, z, y, total, num_rows, L, dim, sz_b, sz_l, sz_d,
    SCALE: tl.constexpr, SAVE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write y = total silu(z), where total is SCALE times the sum of ys (2, B, L, D), and if SAVE total too.

    Grid: (blocks of rows, blocks of D).
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    mask = (row < num_rows) & (o_d < dim)
    o = row * dim + o_d
    first = tl.load(ys + o, mask=mask, other=0.0).to(tl.float32)
    value = (first + tl.load(ys + num_rows.to(tl.int64) * dim + o, mask=mask, other=0.0).to(tl.float32)) * SCALE
    g = tl.load(z + row // L * sz_b + row % L * sz_l + o_d * sz_d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + o, (value * g * sigmoid(g, FAST)).to(y.dtype.element_ty), mask=mask)
    if SAVE:
        tl.store(total + o, value.to(total.dtype.element_ty), mask=mask)


@triton.jit
def gate_gradient(
    dy, z, total, dtotal, dz, num_rows, L, dim, sy_b, sy_l, sy_d, sz_b, sz_l, sz_d,
    SCALE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write SCALE dy silu(z) to dtotal and dy total silu'(z) to dz. Grid: as `gate`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    mask = (row < num_rows) & (o_d < dim)
    o, i_b, i_l = row * dim + o_d, row // L, row % L
    d = tl.load(dy + i_b * sy_b + i_l * sy_l + o_d * sy_d, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(z + i_b * sz_b + i_l * sz_l + o_d * sz_d, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(total + o, mask=mask, other=0.0).to(tl.float32)
    s = sigmoid(g, FAST)
    tl.store(dtotal + o, (d * g * s * SCALE).to(dtotal.dtype.element_ty), mask=mask)
    tl.store(dz + o, (d * value * s * (1.0 + g * (1.0 - s))).to(dz.dtype.element_ty), mask=mask)
