"""Triton kernels of causal_conv1d beside the main ones: those that packed sequences need, and the sum of partial rows.

`cu_seqlens` is read here alone, on the device; offsets are clamped to [0, L], so that wrong ones cannot reach beyond a
tensor. Positions p count in the order of processing: with `REVERSE` the sequence at [a, b) is [L - b, L - a).
"""

# What Triton compiles has its own types.
# mypy: ignore-errors
# ruff: noqa: RUF005  (Triton knows no unpacking into a tuple)
from __future__ import annotations

import triton
import triton.language as tl

from mambaverse.kernels.causal_conv1d.triton_kernels import _sigmoid, _taps_of


@triton.jit
def _bounds(cu_seqlens, s, mask, length, REVERSE: tl.constexpr):
    """Return where the sequences s begin and end, clamped."""
    low = tl.load(cu_seqlens + s, mask=mask, other=0)
    high = tl.load(cu_seqlens + s + 1, mask=mask, other=0)
    low = tl.minimum(tl.maximum(low, 0), length).to(tl.int32)
    high = tl.minimum(tl.maximum(high, 0), length).to(tl.int32)
    return (length - high, length - low) if REVERSE else (low, high)


@triton.jit(do_not_specialize=["length", "num_sequences", "halvings"])
def find_spans(
    cu_seqlens, spans, length, num_sequences, halvings, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write spans (3, L) int32: the sequence of each position, where it begins and where it ends."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = p < length
    t = length - 1 - p if REVERSE else p
    low, high = p * 0, p * 0 + num_sequences - 1  # the first sequence that ends behind t lies in [low, high]
    for _ in range(halvings):
        middle = (low + high) // 2
        behind = tl.load(cu_seqlens + middle + 1, mask=ok, other=0) > t
        high = tl.where(behind, middle, high)
        low = tl.where(behind, low, tl.minimum(middle + 1, high))
    begin, end = _bounds(cu_seqlens, low, ok, length, REVERSE)
    spans += p
    tl.store(spans, low, mask=ok)
    tl.store(spans + length.to(tl.int64), begin, mask=ok)
    tl.store(spans + 2 * length.to(tl.int64), end, mask=ok)


@triton.jit(do_not_specialize=["length"])
def final_states(
    x, cu_seqlens, state, final, length, dim, x_row, s_row, s_tap, s_chan,
    W: tl.constexpr, REVERSE: tl.constexpr, HAS_STATE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write the final states (S, W-1, D): the last W-1 inputs of each sequence, those before its first from `state`."""
    blocks = tl.cdiv(dim, BD)
    s = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    begin, end = _bounds(cu_seqlens, s, True, length, REVERSE)
    for m in tl.static_range(W - 1):
        q = end - begin - (W - 1) + m
        p = begin + q
        t = (length - 1 - p if REVERSE else p).to(tl.int64)
        row = tl.load(x + t * x_row + d, mask=(d < dim) & (q >= 0), other=0.0)
        if HAS_STATE:
            offset = s.to(tl.int64) * s_row + (q + (W - 1)).to(tl.int64) * s_tap + d.to(tl.int64) * s_chan
            old = tl.load(state + offset, mask=(d < dim) & (q < 0) & (end >= begin), other=0.0)
            row = tl.where(q >= 0, row, old.to(row.dtype))
        tl.store(final + (s.to(tl.int64) * (W - 1) + m) * dim + d, row, mask=d < dim)


@triton.jit(do_not_specialize=["length"])
def state_gradient(
    dy, dfinal, x, weight, bias, state, cu_seqlens, dstate,
    length, dim, dy_row, x_row, w_chan, w_tap, b_chan, s_row, s_tap, s_chan,
    W: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DFINAL: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Write dstate (S, W-1, D) of packed sequences: what flows from their first W-1 positions into their state."""
    blocks = tl.cdiv(dim, BD)
    s = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    d_ok = d < dim
    begin, end = _bounds(cu_seqlens, s, True, length, REVERSE)
    taps = _taps_of(weight, w_chan, w_tap, d, d_ok, W)
    shift = tl.zeros((1, BD), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + d.to(tl.int64) * b_chan, mask=d_ok, other=0.0).to(tl.float32)[None, :]
    window, g_window = (), ()
    for j in tl.static_range(1, W):
        offset = s.to(tl.int64) * s_row + (W - 1 - j) * s_tap + d.to(tl.int64) * s_chan
        window = window + (tl.load(state + offset, mask=d_ok, other=0.0).to(tl.float32)[None, :],)
    window = window + (tl.zeros((1, BD), tl.float32),)
    for _ in tl.static_range(W):
        g_window = g_window + (tl.zeros((1, BD), tl.float32),)
    for i in tl.static_range(W - 1):
        p = begin + i
        ok = d_ok & (p < end)
        t = (length - 1 - p if REVERSE else p).to(tl.int64)
        row = tl.load(x + t * x_row + d, mask=ok, other=0.0).to(tl.float32)[None, :]
        g = tl.load(dy + t * dy_row + d, mask=ok, other=0.0).to(tl.float32)[None, :]
        window = (row,) + window[: W - 1]
        if SILU:
            sum_ = shift
            for j in tl.static_range(W):
                sum_ += taps[j] * window[j]
            sigmoid = _sigmoid(sum_)
            g = tl.where(ok[None, :], g * sigmoid * (1.0 + sum_ * (1.0 - sigmoid)), 0.0)
        g_window = (g,) + g_window[: W - 1]
        grad = tl.zeros((1, BD), tl.float32)
        for j in tl.static_range(W):
            grad += taps[j] * g_window[W - 1 - j]
        if HAS_DFINAL:
            m = i - (end - begin)  # this row of the state is that one of the final state
            entry = dfinal + (s.to(tl.int64) * (W - 1) + m) * dim + d
            grad += tl.load(entry, mask=d_ok & (m >= 0), other=0.0).to(tl.float32)[None, :]
        out = dstate + (s.to(tl.int64) * (W - 1) + i) * dim + d
        tl.store(out[None, :], grad.to(dstate.dtype.element_ty), mask=d_ok[None, :])


@triton.jit(do_not_specialize=["programs"])
def reduce(
    partial, dweight, dbias, programs, dim, W: tl.constexpr, HAS_BIAS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Write dweight (D, W) and dbias (D,), the sums over the rows of partial (P, W+1, D), in their order."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    row = tl.arange(0, BP)
    k, d = column // dim, column % dim
    sums = tl.zeros((BP, BC), tl.float32)
    for i in range(0, programs, BP):
        mask = (i + row < programs)[:, None] & (k < W + 1)[None, :]
        offset = (i + row).to(tl.int64) * ((W + 1) * dim)
        sums += tl.load(partial + offset[:, None] + column[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    tl.store(dweight + d.to(tl.int64) * W + k, total.to(dweight.dtype.element_ty), mask=k < W)
    if HAS_BIAS:
        tl.store(dbias + d, total.to(dbias.dtype.element_ty), mask=k == W)
