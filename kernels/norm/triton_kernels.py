"""The Triton kernels of the norms for rows that fit into registers: one set for RMS norm, layer norm and the gated one.

A row here is one group of channels. A tile is [K, BR, V]: V·K channels of BR rows, in this order so that Triton gives a
warp, or a few, to a row and no more: sums over channels then need shuffles, not shared memory. Backward walks
`span` rows a program and loads the next BR before it works on the present ones. With n the normalised row:

    g = d · weight,   dt = scale (g - n mean(g n) [- mean(g)]) + other,   dweight = Σ d n,   dbias = Σ d

with d = dy, or dy silu(z) for a gate behind the norm (GATE 2); for one before it (GATE 1) t = x silu(z). Sums over rows
are partial, a row for each program, and `reduce` adds them in a fixed order.
"""

# What Triton compiles has its own types.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

NO_GATE, GATE_FIRST, NORM_FIRST = 0, 1, 2


@triton.jit
def _load(tensor, row, step, column, ok):
    """Return [K, BR, V] of `tensor`, zeros where not `ok`."""
    return tl.load(tensor + (row.to(tl.int64) * step)[None, :, None] + column, mask=ok, other=0.0)


@triton.jit
def _vector(tensor, column, step, ok):
    return tl.load(tensor + column.to(tl.int64) * step, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _sum(values):
    """Return the sums of the rows of values [K, BR, V] as [1, BR, 1]."""
    return tl.sum(tl.sum(values, 2), 0)[None, :, None]


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _normalised(v, ok, size, eps, CENTER: tl.constexpr):
    """Return the normalised rows and the factor that did it."""
    if CENTER:
        v = tl.where(ok, v - _sum(v) / size, 0.0)
    scale = tl.rsqrt(_sum(v * v) / size + eps)
    return v * scale, scale


@triton.jit(do_not_specialize=["num_rows", "eps"])
def forward(
    x, weight, bias, other, y, t, num_rows, size, groups, x_row, other_row, w_step, b_step, eps,
    CENTER: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    K: tl.constexpr, BR: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Write y (rows, groups · size) and, with a residual, t; `other` is the residual or z."""
    pid = tl.program_id(0)
    inner = (tl.arange(0, K) * V)[:, None, None] + tl.arange(0, V)[None, None, :]
    column = pid % groups * size + inner
    row = pid // groups * BR + tl.arange(0, BR)
    ok = (row < num_rows)[None, :, None] & (inner < size)
    out = (row.to(tl.int64) * groups * size)[None, :, None] + column
    v = _load(x, row, x_row, column, ok).to(tl.float32)
    if HAS_RESIDUAL or GATE != 0:
        addend = _load(other, row, other_row, column, ok).to(tl.float32)
    if HAS_RESIDUAL:
        v += addend
        tl.store(t + out, v.to(t.dtype.element_ty), mask=ok)
    if GATE == 1:
        v *= addend * _sigmoid(addend)
    v, _scale = _normalised(v, ok, size, eps, CENTER)
    v *= _vector(weight, column, w_step, inner < size)
    if HAS_BIAS:
        v += _vector(bias, column, b_step, inner < size)
    if GATE == 2:
        v *= addend * _sigmoid(addend)
    tl.store(y + out, v.to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_rows", "span", "eps"])
def backward(
    dy, dt, t, z, weight, grad, narrow, dz, partial,
    num_rows, size, groups, span, dy_row, dt_row, t_row, z_row, w_step, eps,
    CENTER: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DT: tl.constexpr, NARROW: tl.constexpr,
    K: tl.constexpr, BR: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Write grad (rows, groups · size), with NARROW also in another dtype, dz, and a row of partial (P, 1 or 2, D)."""
    pid = tl.program_id(0)
    inner = (tl.arange(0, K) * V)[:, None, None] + tl.arange(0, V)[None, None, :]
    column = pid % groups * size + inner
    first = pid // groups * span
    stop = tl.minimum(first + span, num_rows)
    width = groups * size
    w = _vector(weight, column, w_step, inner < size)
    dweight, dbias = tl.zeros((K, BR, V), tl.float32), tl.zeros((K, BR, V), tl.float32)
    row = first + tl.arange(0, BR)
    ok = (row < stop)[None, :, None] & (inner < size)
    dy_ahead, t_ahead = _load(dy, row, dy_row, column, ok), _load(t, row, t_row, column, ok)
    if HAS_DT:
        dt_ahead = _load(dt, row, dt_row, column, ok)
    for _ in range(first, stop, BR):
        d, v, ok_now, row_now = dy_ahead.to(tl.float32), t_ahead.to(tl.float32), ok, row
        row += BR
        ok = (row < stop)[None, :, None] & (inner < size)
        dy_ahead, t_ahead = _load(dy, row, dy_row, column, ok), _load(t, row, t_row, column, ok)
        if HAS_DT:
            beside = dt_ahead.to(tl.float32)
            dt_ahead = _load(dt, row, dt_row, column, ok)
        if GATE != 0:
            x, gate = v, _load(z, row_now, z_row, column, ok_now).to(tl.float32)
            s = _sigmoid(gate)
            slope = s * (1.0 + gate * (1.0 - s))
            gate *= s
        if GATE == 1:
            v *= gate
        n, scale = _normalised(v, ok_now, size, eps, CENTER)
        g = d * w
        if GATE == 2:
            du = g * n * slope
            d *= gate
            g *= gate
        dweight += d * n
        out = g - n * (_sum(g * n) / size)
        if CENTER:
            out -= _sum(g) / size
        if HAS_BIAS:
            dbias += d
        out *= scale
        if GATE == 1:
            du = out * x * slope
            out *= gate
        if HAS_DT:
            out += beside
        place = (row_now.to(tl.int64) * width)[None, :, None] + column
        tl.store(grad + place, out.to(grad.dtype.element_ty), mask=ok_now)
        if NARROW:
            tl.store(narrow + place, out.to(narrow.dtype.element_ty), mask=ok_now)
        if GATE != 0:
            tl.store(dz + place, du.to(dz.dtype.element_ty), mask=ok_now)

    place = (pid // groups).to(tl.int64) * width * (2 if HAS_BIAS else 1) + column
    tl.store(partial + place, tl.sum(dweight, 1)[:, None, :], mask=inner < size)
    if HAS_BIAS:
        tl.store(partial + place + width, tl.sum(dbias, 1)[:, None, :], mask=inner < size)


@triton.jit(do_not_specialize=["programs"])
def reduce(partial, dweight, dbias, programs, dim, HAS_BIAS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """Write dweight and dbias (D,), the sums over the rows of partial (P, 1 or 2, D), in their order."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    row = tl.arange(0, BP)
    width = dim * (2 if HAS_BIAS else 1)
    sums = tl.zeros((BP, BC), tl.float32)
    for i in range(0, programs, BP):
        mask = (i + row < programs)[:, None] & (column < width)[None, :]
        sums += tl.load(partial + ((i + row).to(tl.int64) * width)[:, None] + column[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    tl.store(dweight + column, total.to(dweight.dtype.element_ty), mask=column < dim)
    if HAS_BIAS:
        tl.store(dbias + column - dim, total.to(dbias.dtype.element_ty), mask=(column >= dim) & (column < width))
