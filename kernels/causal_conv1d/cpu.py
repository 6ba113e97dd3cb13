"""causal_conv1d on the CPU with numba: rows of channels in SIMD, SiLU fused, x read where it lies.

A work item is a stretch of at most 64 positions of one sequence. Forward adds W products per channel into a row of y.
Backward recomputes the row, holds the last W rows of g = dy act'(p) and gathers dx from them:

    dx[q] = Σ_k weight[:, k] g[q + (W-1) - k],   dweight[:, k] = Σ_t g[t] x[t - (W-1) + k],   dbias = Σ_t g[t]

Positions q count in the order of processing, so `reverse` is a sign; q < 0 are rows of the initial state. The sums over
t are partial per item and added in a fixed order. Same signatures and results as reference.py, in float32.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambaverse.kernels import fastmath
from mambaverse.kernels.checks import sequence_bounds
from mambaverse.kernels.fastmath import silu as _silu
from mambaverse.kernels.fastmath import silu_gradient
from mambaverse.kernels.jit import cached_kernel
from mambaverse.kernels.rows import WORTH_A_CALL, as_array, dense, flat_rows, sum_rows
from mambaverse.kernels.threads import parallel_for

_ROWS = (
    64  # positions per item: W-1 of them are computed twice in backward, one row of W+1 partial sums is kept for all
)
_compiled = cached_kernel(fastmath, fastmath={"contract", "nsz"})


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and the final state, as `reference.forward`."""
    arguments, items, num_states = _prepare(x, weight, bias, initial_state, cu_seqlens, silu, reverse)
    y = torch.empty(x.shape)
    final_state = torch.empty((num_states, weight.shape[1] - 1, x.shape[2]))
    parallel_for(_forward, len(items), items, *arguments, as_array(y), as_array(final_state), grain=_grain(items, x))
    return y.to(x.dtype), final_state.to(x.dtype)


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and dinitial_state, as `reference.backward`."""
    arguments, items, num_states = _prepare(x, weight, bias, initial_state, cu_seqlens, silu, reverse)
    num_channels, width = weight.shape
    dstate = torch.empty((num_states, width - 1, num_channels))
    dfinal = dense(torch.zeros_like(dstate) if dfinal_state is None else dfinal_state)
    dx = torch.empty(x.shape)
    partial = torch.empty((len(items), width + 1, num_channels))
    outputs = as_array(dx), as_array(dstate), as_array(partial)
    dy = torch.zeros(x.shape) if dy is None else dy
    parallel_for(_backward, len(items), items, *arguments, *flat_rows(dy), dfinal, *outputs, grain=_grain(items, x))
    sums = sum_rows(partial)
    empty = x.new_empty(0)
    return (
        dx.to(x.dtype),
        sums[:width].t().to(weight.dtype, memory_format=torch.contiguous_format, copy=True),
        empty if bias is None else sums[width].to(bias.dtype, copy=True),
        empty.clone() if initial_state is None else dstate.to(initial_state.dtype),
    )


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[tuple[Any, ...], Any, int]:
    """Return the arguments that both kernels share, the work items and the number of sequences."""
    batch, length, num_channels = x.shape
    if cu_seqlens is None:
        num_states, items = batch, _batch_items(batch, length, reverse)
    else:
        bounds = sequence_bounds("causal_conv1d", cu_seqlens, length)
        num_states, items = len(bounds) - 1, _packed_items(bounds, reverse)
    state = torch.zeros((num_states, weight.shape[1] - 1, num_channels)) if initial_state is None else initial_state
    bias = torch.zeros(num_channels) if bias is None else bias
    arguments = (-1 if reverse else 1, *flat_rows(x), dense(state), dense(weight.t()), dense(bias), silu)
    return arguments, items, num_states


def _grain(items: Any, x: Tensor) -> int:
    return 1 + len(items) * WORTH_A_CALL // max(1, x.numel())


@lru_cache(maxsize=64)
def _batch_items(batch: int, length: int, reverse: bool) -> Any:
    return _items([(b, b, 0, length) for b in range(batch)], reverse)


def _packed_items(bounds: list[int], reverse: bool) -> Any:
    return _items([(s, 0, begin, end) for s, (begin, end) in enumerate(pairwise(bounds))], reverse)


def _items(sequences: list[tuple[int, int, int, int]], reverse: bool) -> Any:
    """Return rows (state, batch, row of position 0, length, first position, stop) of equal stretches of sequences."""
    items = []
    for state, batch, begin, end in sequences:
        length = end - begin
        first = end - 1 if reverse else begin
        num_items = max(1, -(-length // _ROWS))  # an empty sequence still hands its state through
        cuts = [i * length // num_items for i in range(num_items + 1)]
        items += [(state, batch, first, length, start, stop) for start, stop in pairwise(cuts)]
    return np.array(items, dtype=np.int64).reshape(-1, 6)


@_compiled
def _add_taps(out, p, s, first, step, x, state, weight, bias):
    """Set out to bias + Σ_k weight[k] x[p - (W-1) + k]; position p begins at first + p * step in x."""
    width, num_channels = weight.shape
    for j in range(num_channels):
        out[j] = bias[j]
    for k in range(width):
        w = weight[k]
        tap = _input(p - (width - 1) + k, s, first, step, x, state, width, num_channels)
        for j in range(num_channels):
            out[j] += w[j] * tap[j]


@_compiled
def _input(q, s, first, step, x, state, width, num_channels):
    """Return the row of inputs at position q >= -(W-1); those before 0 are rows of the initial state."""
    if q < 0:
        return state[s, q + width - 1]
    offset = first + q * step
    return x[offset : offset + num_channels]


@_compiled
def _forward(start, stop, items, sign, x, x_batch, x_row, state, weight, bias, silu, y, final_state):
    width, num_channels = weight.shape
    for i in range(start, stop):
        s, b, row, length, begin, end = items[i]
        first, step = b * x_batch + row * x_row, sign * x_row
        for p in range(begin, end):
            out = y[b, row + sign * p]
            _add_taps(out, p, s, first, step, x, state, weight, bias)
            if silu:
                for j in range(num_channels):
                    out[j] = _silu(out[j])
        if end == length:
            for m in range(width - 1):
                last = _input(length - (width - 1) + m, s, first, step, x, state, width, num_channels)
                final_state[s, m, :] = last


@_compiled
def _backward(
    start, stop, items, sign, x, x_batch, x_row, state, weight, bias, silu,
    dy, dy_batch, dy_row, dfinal, dx, dstate, partial,
):  # fmt: skip
    width, num_channels = weight.shape
    g = np.empty((width, num_channels), np.float32)  # of the last W positions, position p in row p % W
    pre = np.empty(num_channels, np.float32)
    for i in range(start, stop):
        s, b, row, length, begin, end = items[i]
        first, step = b * x_batch + row * x_row, sign * x_row
        sums = partial[i]
        sums[:] = np.float32(0)
        for p in range(begin, end + width - 1):
            gp = g[p % width]
            if p < length:
                offset = b * dy_batch + (row + sign * p) * dy_row
                dy_p = dy[offset : offset + num_channels]
                if silu:
                    _add_taps(pre, p, s, first, step, x, state, weight, bias)
                    for j in range(num_channels):
                        gp[j] = dy_p[j] * silu_gradient(pre[j])
                else:
                    for j in range(num_channels):
                        gp[j] = dy_p[j]
            if p < end:
                for k in range(width):
                    dw = sums[k]
                    tap = _input(p - (width - 1) + k, s, first, step, x, state, width, num_channels)
                    for j in range(num_channels):
                        dw[j] += gp[j] * tap[j]
                db = sums[width]
                for j in range(num_channels):
                    db[j] += gp[j]
            q = p - (width - 1)
            if q < begin and begin > 0:
                continue  # the item before this one does it
            out = dx[b, row + sign * q] if q >= 0 else dstate[s, p]
            m = q - (length - (width - 1))
            if m >= 0:
                out[:] = dfinal[s, m]
            else:
                out[:] = np.float32(0)
            for k in range(width):
                source = p - k
                if 0 <= source < length:
                    w, gk = weight[k], g[source % width]
                    for j in range(num_channels):
                        out[j] += w[j] * gk[j]
