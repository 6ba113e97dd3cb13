"""Triton kernels of the depthwise convolution of a grid.

A program has a block of columns and channels of one image, and walks down a band of its rows: a row is loaded once for
each tap beside it, from the L1 cache but the first time, and added to the rows of sums that it is a part of, which are
in registers. The next row is on its way meanwhile.
"""

# What Triton compiles has its own types, and it knows no unpacking into a tuple.
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from mambaverse.kernels.triton_math import sigmoid


@triton.jit
def _place(height, width, dim, ROWS: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr):
    """Return this program's image, first row, the row after its last, its columns and channels.

    Grid: (images, times bands of rows, times blocks of columns; blocks of channels).
    """
    bands, blocks = tl.cdiv(height, ROWS), tl.cdiv(width, BW)
    pid = tl.program_id(0)
    first = pid // blocks % bands * ROWS
    column = pid % blocks * BW + tl.arange(0, BW)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    return (pid // blocks // bands).to(tl.int64), first, tl.minimum(first + ROWS, height), column, channel


@triton.jit
def _load_row(p, row, column, there, width, row_step, column_step, ok_d, K: tl.constexpr):
    """Load K tiles (columns, channels) of a row: moved by -(K // 2) to K // 2 columns; zeros beside the grid."""
    tiles = ()
    for s in tl.static_range(K):
        at = column + (s - K // 2)
        ok = (there & (at >= 0) & (at < width))[:, None] & ok_d[None, :]
        offset = row.to(tl.int64) * row_step + at.to(tl.int64) * column_step
        tiles = tiles + (tl.load(p + offset[:, None], mask=ok, other=0.0),)
    return tiles


@triton.jit
def _load_taps(p, ok_d, row_step, column_step, K_ROWS: tl.constexpr, K_COLUMNS: tl.constexpr):
    """Load the filters (1, channels), tap by tap in the order of rows, in float32."""
    taps = ()
    for r in tl.static_range(K_ROWS):
        for s in tl.static_range(K_COLUMNS):
            taps = taps + (tl.load(p + r * row_step + s * column_step, mask=ok_d, other=0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit(do_not_specialize=["height", "width"])
def convolve(
    x, weight, bias, dy, y, height, width, dim,
    x_b, x_r, x_c, x_d, w_d, w_r, w_c, bias_d, dy_b, dy_r, dy_c, dy_d,
    K_ROWS: tl.constexpr, K_COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    GRADIENT: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write y (B, H, W, D); with GRADIENT not y, but the gradient of the sums before SiLU."""
    TOP: tl.constexpr = K_ROWS // 2
    image, first, stop, column, channel = _place(height, width, dim, ROWS, BW, BD)
    ok_d, d = channel < dim, channel.to(tl.int64)
    p_x = x + image * x_b + (d * x_d)[None, :]
    p_dy = dy + image * dy_b + (column.to(tl.int64) * dy_c)[:, None] + (d * dy_d)[None, :]
    p_y = y + (image * height * width + column)[:, None] * dim + d[None, :]
    ok_y = (column < width)[:, None] & ok_d[None, :]
    taps = _load_taps(weight + d * w_d, ok_d, w_r, w_c, K_ROWS, K_COLUMNS)
    zeros = tl.zeros([BW, BD], tl.float32)
    start = zeros
    if HAS_BIAS:
        start += tl.load(bias + d * bias_d, mask=ok_d, other=0.0).to(tl.float32)[None, :]
    sums = ()  # of rows q - TOP to q + TOP
    for _ in tl.static_range(K_ROWS):
        sums = sums + (start,)
    ahead = _load_row(p_x, first - TOP, column, first >= TOP, width, x_r, x_c, ok_d, K_COLUMNS)
    for t in range(stop - first + 2 * TOP):
        q = first - TOP + t
        tiles = ahead
        there = (q + 1 >= 0) & (q + 1 < height)
        ahead = _load_row(p_x, q + 1, column, there, width, x_r, x_c, ok_d, K_COLUMNS)
        after = ()
        for m in tl.static_range(K_ROWS):
            total = sums[m]
            for s in tl.static_range(K_COLUMNS):
                total += taps[(K_ROWS - 1 - m) * K_COLUMNS + s] * tiles[s].to(tl.float32)
            after = after + (total,)
        i = q - TOP
        if i >= first:
            out = after[0]
            if GRADIENT:
                g = tl.load(p_dy + i.to(tl.int64) * dy_r, mask=ok_y, other=0.0).to(tl.float32)
                if SILU:
                    gate = sigmoid(out)
                    g *= gate * (1.0 + out * (1.0 - gate))
                out = g
            elif SILU:
                out *= sigmoid(out)
            tl.store(p_y + i.to(tl.int64) * width * dim, out.to(y.dtype.element_ty), mask=ok_y)
        sums = ()
        for m in tl.static_range(1, K_ROWS):
            sums = sums + (after[m],)
        sums = sums + (start,)


@triton.jit(do_not_specialize=["height", "width"])
def gradient(
    g, x, weight, dx, parts, height, width, dim, g_b, g_r, g_c, g_d, x_b, x_r, x_c, x_d, w_d, w_r, w_c,
    K_ROWS: tl.constexpr, K_COLUMNS: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write dx (B, H, W, D), and to `parts` (programs, K K' + 1, D) what they add to dweight and dbias.

    A row q of g is a part of the rows q - K // 2 to q + K // 2 of dx, and meets those of x.
    """
    TOP: tl.constexpr = K_ROWS // 2
    TAPS: tl.constexpr = K_ROWS * K_COLUMNS
    image, first, stop, column, channel = _place(height, width, dim, ROWS, BW, BD)
    ok_d, d = channel < dim, channel.to(tl.int64)
    p_g = g + image * g_b + (d * g_d)[None, :]
    p_x = x + image * x_b + (d * x_d)[None, :]
    p_dx = dx + (image * height * width + column)[:, None] * dim + d[None, :]
    ok_dx = (column < width)[:, None] & ok_d[None, :]
    taps = _load_taps(weight + d * w_d, ok_d, w_r, w_c, K_ROWS, K_COLUMNS)
    zeros = tl.zeros([BW, BD], tl.float32)
    sums, xs, dtaps = (), (), ()
    for _ in tl.static_range(K_ROWS):
        sums = sums + (zeros,)
    for _ in tl.static_range(K_ROWS - 1):  # rows before the band, which other programs have
        xs = xs + (zeros.to(x.dtype.element_ty),)
    for _ in tl.static_range(TAPS):
        dtaps = dtaps + (zeros,)
    dbias = zeros
    ahead = _load_row(p_g, first - TOP, column, first >= TOP, width, g_r, g_c, ok_d, K_COLUMNS)
    x_ahead = _load_row(p_x, first, column, first < stop, width, x_r, x_c, ok_d, 1)
    for t in range(stop - first + 2 * TOP):
        q = first - TOP + t
        tiles = ahead
        xs = xs + x_ahead
        there = (q + 1 >= 0) & (q + 1 < height)
        ahead = _load_row(p_g, q + 1, column, there, width, g_r, g_c, ok_d, K_COLUMNS)
        x_ahead = _load_row(p_x, q + 1 + TOP, column, q + 1 + TOP < stop, width, x_r, x_c, ok_d, 1)
        if (q >= first) & (q < stop):
            dbias += tiles[K_COLUMNS // 2].to(tl.float32)
        after, dafter = (), ()
        for m in tl.static_range(K_ROWS):
            total, x_m = sums[m], xs[m].to(tl.float32)
            for s in tl.static_range(K_COLUMNS):
                g_s = tiles[K_COLUMNS - 1 - s].to(tl.float32)
                total += taps[m * K_COLUMNS + s] * g_s
                dafter = dafter + (dtaps[m * K_COLUMNS + s] + x_m * g_s,)
            after = after + (total,)
        dtaps = dafter
        i = q - TOP
        if i >= first:
            tl.store(p_dx + i.to(tl.int64) * width * dim, after[0].to(dx.dtype.element_ty), mask=ok_dx)
        sums, rest = (), ()
        for m in tl.static_range(1, K_ROWS):
            sums, rest = sums + (after[m],), rest + (xs[m],)
        sums, xs = sums + (zeros,), rest
    p_part = parts + tl.program_id(0).to(tl.int64) * (TAPS + 1) * dim + d
    for k in tl.static_range(TAPS):
        tl.store(p_part + k * dim, tl.sum(dtaps[k], 0), mask=ok_d)
    tl.store(p_part + TAPS * dim, tl.sum(dbias, 0), mask=ok_d)
