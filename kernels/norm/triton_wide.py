"""The Triton kernels of the norms for rows too wide for registers: a program has one row and reads it several times.

What they compute is said in triton_kernels.py. Backward leaves the mean and the factor of each row in `stats`
(2, rows · groups), from which `weights` takes the partial sums over rows, a program for a stretch of rows and a block
of channels.
"""

# What Triton compiles has its own types.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from mambaverse.kernels.norm.triton_kernels import _sigmoid, _vector


@triton.jit
def _inputs(x, other, at, ok, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """Return what is normalised and silu(z), or 1 without a gate."""
    v, gate = tl.load(x + at[0], mask=ok, other=0.0).to(tl.float32), 1.0
    if HAS_RESIDUAL:
        v += tl.load(other + at[1], mask=ok, other=0.0).to(tl.float32)
    if GATE != 0:
        gate = tl.load(other + at[1], mask=ok, other=0.0).to(tl.float32)
        gate = gate * _sigmoid(gate)
    if GATE == 1:
        v *= gate
    return v, gate


@triton.jit
def _statistics(x, other, base, size, eps, CENTER: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
                V: tl.constexpr):  # fmt: skip
    """Return the mean (0 unless CENTER) and the factor of a row that begins at `base` in x and in `other`."""
    mean = 0.0
    if CENTER:
        sums = tl.zeros((V,), tl.float32)
        for i in range(0, size, V):
            column = i + tl.arange(0, V)
            sums += _inputs(x, other, (base[0] + column, base[1] + column), column < size, GATE, HAS_RESIDUAL)[0]
        mean = tl.sum(sums, 0) / size
    squares = tl.zeros((V,), tl.float32)
    for i in range(0, size, V):
        column = i + tl.arange(0, V)
        v = _inputs(x, other, (base[0] + column, base[1] + column), column < size, GATE, HAS_RESIDUAL)[0]
        v = tl.where(column < size, v - mean, 0.0)
        squares += v * v
    return mean, tl.rsqrt(tl.sum(squares, 0) / size + eps)


@triton.jit(do_not_specialize=["eps"])
def forward(
    x, weight, bias, other, y, t, size, groups, x_row, other_row, w_step, b_step, eps,
    CENTER: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Write y and t as `triton_kernels.forward`."""
    row, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    base = (row * x_row + group * size, row * other_row + group * size)
    mean, scale = _statistics(x, other, base, size, eps, CENTER, GATE, HAS_RESIDUAL, V)
    for i in range(0, size, V):
        column = i + tl.arange(0, V)
        ok, place = column < size, (row * groups + group) * size + column
        v, gate = _inputs(x, other, (base[0] + column, base[1] + column), ok, GATE, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(t + place, v.to(t.dtype.element_ty), mask=ok)
        v = (v - mean) * scale * _vector(weight, group * size + column, w_step, ok)
        if HAS_BIAS:
            v += _vector(bias, group * size + column, b_step, ok)
        if GATE == 2:
            v *= gate
        tl.store(y + place, v.to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["eps"])
def backward(
    dy, dt, t, z, weight, grad, narrow, dz, stats, size, groups, dy_row, dt_row, t_row, z_row, w_step, eps,
    CENTER: tl.constexpr, GATE: tl.constexpr, HAS_DT: tl.constexpr, NARROW: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Write grad, narrow and dz as `triton_kernels.backward`, and stats."""
    pid = tl.program_id(0)
    row, group = (pid // groups).to(tl.int64), pid % groups
    base = (row * t_row + group * size, row * z_row + group * size)
    mean, scale = _statistics(t, z, base, size, eps, CENTER, GATE, False, V)
    tl.store(stats + pid, mean)
    tl.store(stats + tl.num_programs(0).to(tl.int64) + pid, scale)
    along, level = tl.zeros((V,), tl.float32), tl.zeros((V,), tl.float32)
    for i in range(0, size, V):
        column = i + tl.arange(0, V)
        ok = column < size
        v, gate = _inputs(t, z, (base[0] + column, base[1] + column), ok, GATE, False)
        g = tl.load(dy + row * dy_row + group * size + column, mask=ok, other=0.0).to(tl.float32)
        g *= _vector(weight, group * size + column, w_step, ok)
        if GATE == 2:
            g *= gate
        along += g * (v - mean) * scale
        level += g
    mean_along, mean_level = tl.sum(along, 0) / size, 0.0
    if CENTER:
        mean_level = tl.sum(level, 0) / size
    for i in range(0, size, V):
        column = i + tl.arange(0, V)
        ok, place = column < size, (row * groups + group) * size + column
        v, gate = _inputs(t, z, (base[0] + column, base[1] + column), ok, GATE, False)
        g = tl.load(dy + row * dy_row + group * size + column, mask=ok, other=0.0).to(tl.float32)
        g *= _vector(weight, group * size + column, w_step, ok)
        n = (v - mean) * scale
        if GATE == 2:
            du = g * n
            g *= gate
        out = scale * (g - n * mean_along - mean_level)
        if GATE == 1:
            du = out * tl.load(t + base[0] + column, mask=ok, other=0.0).to(tl.float32)
            out *= gate
        if HAS_DT:
            out += tl.load(dt + row * dt_row + group * size + column, mask=ok, other=0.0).to(tl.float32)
        tl.store(grad + place, out.to(grad.dtype.element_ty), mask=ok)
        if NARROW:
            tl.store(narrow + place, out.to(narrow.dtype.element_ty), mask=ok)
        if GATE != 0:
            u = tl.load(z + base[1] + column, mask=ok, other=0.0).to(tl.float32)
            s = _sigmoid(u)
            tl.store(dz + place, (du * s * (1.0 + u * (1.0 - s))).to(dz.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_rows", "span"])
def weights(
    dy, t, z, stats, partial, num_rows, size, groups, span, dy_row, t_row, z_row,
    GATE: tl.constexpr, HAS_BIAS: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Write a block of channels of a row of partial (P, 1 or 2, D)."""
    width = groups * size
    blocks = tl.cdiv(width, V)
    column = tl.program_id(0) % blocks * V + tl.arange(0, V)
    ok = column < width
    first = tl.program_id(0) // blocks * span
    dweight, dbias = tl.zeros((V,), tl.float32), tl.zeros((V,), tl.float32)
    for i in range(first, tl.minimum(first + span, num_rows)):
        row = tl.zeros((1,), tl.int64) + i
        v, gate = _inputs(t, z, (row * t_row + column, row * z_row + column), ok, GATE, False)
        d = tl.load(dy + row * dy_row + column, mask=ok, other=0.0).to(tl.float32)
        if GATE == 2:
            d *= gate
        place = row * groups + column // size
        mean = tl.load(stats + place, mask=ok, other=0.0)
        scale = tl.load(stats + num_rows.to(tl.int64) * groups + place, mask=ok, other=0.0)
        dweight += d * (v - mean) * scale
        dbias += d
    place = (tl.program_id(0) // blocks).to(tl.int64) * width * (2 if HAS_BIAS else 1) + column
    tl.store(partial + place, dweight, mask=ok)
    if HAS_BIAS:
        tl.store(partial + place + width, dbias, mask=ok)
