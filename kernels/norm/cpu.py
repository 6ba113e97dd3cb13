"""The normalisations on the CPU with numba: a row stays in cache while its sums are taken and its results written.

Backward recomputes a row's statistics. With g = dy · weight and n the normalised row,

    dt = scale (g - n mean(g n) [- mean(g)]) + what flows into t beside the norm,   dweight = Σ dy n,   dbias = Σ dy

Sums over rows are partial per block of 64 rows and added in a fixed order. Same signatures and results as reference.py,
in float32. Loops write to one or two arrays each: LLVM gives up on more than eight pairs of arrays that may overlap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambaverse.kernels import fastmath
from mambaverse.kernels.fastmath import silu, silu_gradient
from mambaverse.kernels.jit import cached_kernel
from mambaverse.kernels.rows import WORTH_A_CALL, as_array, dense, flat_rows, sum_rows
from mambaverse.kernels.threads import parallel_for

_ROWS = 64  # rows whose weight gradients are added before they are written
# "reassoc" lets sums run in SIMD lanes; NaN and infinities keep their meaning.
_compiled = cached_kernel(fastmath, fastmath={"reassoc", "contract", "nsz"})


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """Return y and new_residual, as `reference.forward`."""
    y = torch.empty(x.shape)
    t = torch.empty(0 if residual is None else x.shape)
    addend = (dense(torch.empty(0)), 0) if residual is None else _rows(residual)
    shift = torch.zeros_like(weight) if bias is None else bias
    rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    parallel_for(
        _forward, rows, *_rows(x), *addend, dense(weight), dense(shift), np.float32(eps), center, residual is not None,
        as_array(y.view(-1)), as_array(t.view(-1)), grain=1 + WORTH_A_CALL // dim,
    )  # fmt: skip
    return y.to(x.dtype), t.to(x.dtype if residual is None else residual.dtype)


def backward(
    dy: Tensor, dt: Tensor | None, t: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of t, weight and bias, as `reference.backward`."""
    grad, dim = torch.empty(t.shape), t.shape[-1]
    rows = t.numel() // dim
    addend = (dense(torch.empty(0)), 0) if dt is None else _rows(dt)
    partial = torch.empty((-(-rows // _ROWS), 2, dim))
    parallel_for(
        _backward, partial.shape[0], rows, *_rows(dy), *addend, *_rows(t), dense(weight), np.float32(eps), center,
        dt is not None, as_array(grad.view(-1)), as_array(partial), grain=1 + WORTH_A_CALL // (_ROWS * dim),
    )  # fmt: skip
    sums = sum_rows(partial)
    dbias = t.new_empty(0) if bias is None else sums[1].to(bias.dtype, copy=True)
    return grad.to(t.dtype), sums[0].to(weight.dtype, copy=True), dbias


def gated_forward(x: Tensor, weight: Tensor, z: Tensor, group_size: int, norm_before_gate: bool, eps: float) -> Tensor:
    """Return y, as `reference.gated_forward`."""
    y, dim = torch.empty(x.shape), x.shape[-1]
    parallel_for(
        _gated_forward, x.numel() // dim, *_rows(x), *_rows(z), dense(weight), group_size, norm_before_gate,
        np.float32(eps), as_array(y.view(-1)), grain=1 + WORTH_A_CALL // dim,
    )  # fmt: skip
    return y.to(x.dtype)


def gated_backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor, group_size: int, norm_before_gate: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and z, as `reference.gated_backward`."""
    dx, dz, dim = torch.empty(x.shape), torch.empty(x.shape), x.shape[-1]
    rows = x.numel() // dim
    partial = torch.empty((-(-rows // _ROWS), dim))
    parallel_for(
        _gated_backward, partial.shape[0], rows, *_rows(dy), *_rows(x), *_rows(z), dense(weight), group_size,
        norm_before_gate, np.float32(eps), as_array(dx.view(-1)), as_array(dz.view(-1)), as_array(partial),
        grain=1 + WORTH_A_CALL // (_ROWS * dim),
    )  # fmt: skip
    return dx.to(x.dtype), sum_rows(partial).to(weight.dtype), dz.to(z.dtype)


def _rows(x: Tensor) -> tuple[Any, ...]:
    """Return x (..., D) as a flat array and the stride of its rows."""
    return flat_rows(x.reshape(-1, x.shape[-1]))


@_compiled
def _mean(v):
    total = np.float32(0)
    for j in range(v.size):
        total += v[j]
    return total / np.float32(v.size)


@_compiled
def _square(v, mean):
    """Return the sum of (v - mean)²."""
    total = np.float32(0)
    for j in range(v.size):
        total += (v[j] - mean) * (v[j] - mean)
    return total


@_compiled
def _scale(square, size, eps):
    """Return what normalises `size` numbers whose squares sum to `square`."""
    return np.float32(1) / np.sqrt(square / np.float32(size) + eps)


@_compiled
def _forward(start, stop, x, x_row, residual, residual_row, weight, bias, eps, center, has_residual, y, t):
    dim = weight.size
    for i in range(start, stop):
        v = x[i * x_row : i * x_row + dim]
        if has_residual:
            r = residual[i * residual_row : i * residual_row + dim]
            out = t[i * dim : i * dim + dim]
            for j in range(dim):
                out[j] = v[j] + r[j]
            v = out
        mean = _mean(v) if center else np.float32(0)
        scale = _scale(_square(v, mean), dim, eps)
        out = y[i * dim : i * dim + dim]
        for j in range(dim):
            out[j] = (v[j] - mean) * scale * weight[j] + bias[j]


@_compiled
def _backward(
    start, stop, num_rows, dy, dy_row, dt, dt_row, t, t_row, weight, eps, center, has_dt, grad, partial
):  # fmt: skip
    dim = weight.size
    for block in range(start, stop):
        dweight, dbias = partial[block, 0], partial[block, 1]
        dweight[:] = np.float32(0)
        dbias[:] = np.float32(0)
        for i in range(block * _ROWS, min(num_rows, (block + 1) * _ROWS)):
            v, d = t[i * t_row : i * t_row + dim], dy[i * dy_row : i * dy_row + dim]
            mean = _mean(v) if center else np.float32(0)
            square, along, level = np.float32(0), np.float32(0), np.float32(0)
            for j in range(dim):
                g, c = d[j] * weight[j], v[j] - mean
                square += c * c
                along += g * c
                level += g
            scale = _scale(square, dim, eps)
            along *= scale * scale / np.float32(dim)
            level = level / np.float32(dim) if center else np.float32(0)
            out = grad[i * dim : i * dim + dim]
            if has_dt:
                other = dt[i * dt_row : i * dt_row + dim]
                for j in range(dim):
                    out[j] = other[j] + scale * (d[j] * weight[j] - level - along * (v[j] - mean))
            else:
                for j in range(dim):
                    out[j] = scale * (d[j] * weight[j] - level - along * (v[j] - mean))
            for j in range(dim):
                dweight[j] += d[j] * (v[j] - mean) * scale
                dbias[j] += d[j]


@_compiled
def _gated_forward(start, stop, x, x_row, z, z_row, weight, group_size, norm_before_gate, eps, y):
    dim = weight.size
    for i in range(start, stop):
        v, gate = x[i * x_row : i * x_row + dim], z[i * z_row : i * z_row + dim]
        out = y[i * dim : i * dim + dim]
        if not norm_before_gate:
            for j in range(dim):
                out[j] = v[j] * silu(gate[j])
            v = out
        for c in range(0, dim, group_size):
            group, w, o = v[c : c + group_size], weight[c : c + group_size], out[c : c + group_size]
            scale = _scale(_square(group, np.float32(0)), group_size, eps)
            for j in range(group_size):
                o[j] = group[j] * scale * w[j]
        if norm_before_gate:
            for j in range(dim):
                out[j] *= silu(gate[j])


@_compiled
def _gated_backward(
    start, stop, num_rows, dy, dy_row, x, x_row, z, z_row, weight, group_size, norm_before_gate, eps, dx, dz, partial
):  # fmt: skip
    dim = weight.size
    gate, v, g = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
    one = np.float32(1)
    for block in range(start, stop):
        dweight = partial[block]
        dweight[:] = np.float32(0)
        for i in range(block * _ROWS, min(num_rows, (block + 1) * _ROWS)):
            d, z_i = dy[i * dy_row : i * dy_row + dim], z[i * z_row : i * z_row + dim]
            x_i = x[i * x_row : i * x_row + dim]
            out, out_z = dx[i * dim : i * dim + dim], dz[i * dim : i * dim + dim]
            for j in range(dim):
                gate[j] = silu(z_i[j])
            for j in range(dim):  # v is normalised, g is the gradient of weight · normalised v
                v[j] = x_i[j] * (one if norm_before_gate else gate[j])
                g[j] = d[j] * (gate[j] if norm_before_gate else one)
            for c in range(0, dim, group_size):
                v_c, g_c, w = v[c : c + group_size], g[c : c + group_size], weight[c : c + group_size]
                o, dw = out[c : c + group_size], dweight[c : c + group_size]
                square, along = np.float32(0), np.float32(0)
                for j in range(group_size):
                    square += v_c[j] * v_c[j]
                    along += g_c[j] * w[j] * v_c[j]
                scale = _scale(square, group_size, eps)
                along *= scale * scale / np.float32(group_size)
                for j in range(group_size):
                    o[j] = scale * (g_c[j] * w[j] - along * v_c[j])
                for j in range(group_size):
                    v_c[j] *= scale
                    dw[j] += g_c[j] * v_c[j]
            if norm_before_gate:
                for j in range(dim):
                    out_z[j] = d[j] * weight[j] * v[j] * silu_gradient(z_i[j])
            else:
                for j in range(dim):
                    out_z[j] = out[j] * x_i[j] * silu_gradient(z_i[j])
                for j in range(dim):
                    out[j] *= gate[j]
