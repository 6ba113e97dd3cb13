"""The Triton kernels of causal_conv1d: a window of W inputs slides through registers, every input is loaded once.

A tile is [TB, BD]: TB chunks of consecutive positions by BD channels; each chunk walks its positions in steps of U, and
loads the next U rows before it works on the present ones. Positions p count in the order of processing, so `REVERSE` is
a sign in the address. Rows before position 0 come from the initial state. Backward walks W-1 positions past its chunk:

    g[p] = dy[p] act'(p),   dx[q] = Σ_j weight[:, W-1-j] g[q+j]
    dweight[:, W-1-j] = Σ_p g[p] x[p-j],   dbias = Σ_p g[p]

Sums over p are partial, a row for each program, and `reduce` adds them in a fixed order. With `PACKED` a table `spans`
(3, L) tells the sequence of each position and where it begins and ends. Offsets that grow with the tensor are int64.
"""

# What Triton compiles has its own types.
# mypy: ignore-errors
# ruff: noqa: RUF005  (Triton knows no unpacking into a tuple)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(p):
    root = tl.rsqrt(1.0 + tl.exp(-p))  # its square is a reciprocal of fewer instructions than a division
    return root * root


@triton.jit
def _span(spans, p, length, stop, PACKED: tl.constexpr):
    """Return the sequence of each position p < stop, where it begins and where it ends."""
    if PACKED:
        ok = (p >= 0) & (p < stop)
        sequence = tl.load(spans + p, mask=ok, other=0)
        begin = tl.load(spans + length.to(tl.int64) + p, mask=ok, other=0)
        end = tl.load(spans + 2 * length.to(tl.int64) + p, mask=ok, other=0)
    else:
        sequence, begin, end = p * 0, p * 0, p * 0 + length
    return sequence, begin, end


@triton.jit
def _tap(window, j: tl.constexpr, p, span, state, steps, d, ok, W: tl.constexpr, PACKED: tl.constexpr,
         HAS_STATE: tl.constexpr):  # fmt: skip
    """Return x[p - j], which in a packed batch may belong to the state of the sequence of p."""
    value = window[j]
    if PACKED and j > 0:
        q = p - j - span[1]
        value = tl.where((q >= 0)[:, None], value, 0.0)
        if HAS_STATE:
            m = q + (W - 1)
            offset = span[0].to(tl.int64) * steps[0] + m.to(tl.int64) * steps[1]
            mask = ok & ((q < 0) & (m >= 0))[:, None]
            value += tl.load(state + offset[:, None] + d.to(tl.int64)[None, :] * steps[2], mask=mask, other=0.0).to(
                tl.float32
            )
    return value


@triton.jit
def _row_before(x, q, x_step, state, sequence, steps, d, live, d_ok, W: tl.constexpr, FROM_STATE: tl.constexpr):
    """Return the row at q < L; for q < 0 the state's, or 0."""
    mask = (live & (q >= 0))[:, None] & d_ok[None, :]
    row = tl.load(x + (q.to(tl.int64) * x_step)[:, None], mask=mask, other=0.0)
    if FROM_STATE:
        m = q + (W - 1)
        offset = sequence.to(tl.int64) * steps[0] + m.to(tl.int64) * steps[1]
        mask = (live & (q < 0))[:, None] & d_ok[None, :]
        old = tl.load(state + offset[:, None] + d.to(tl.int64)[None, :] * steps[2], mask=mask, other=0.0)
        row = tl.where((q >= 0)[:, None], row, old.to(row.dtype))
    return row


@triton.jit
def _rows(base, p, step, stop, d_ok, U: tl.constexpr):
    """Load the rows p, ..., p + U - 1, zeros from `stop` on."""
    rows = ()
    for u in tl.static_range(U):
        mask = (p + u < stop)[:, None] & d_ok[None, :]
        rows = rows + (tl.load(base + ((p + u).to(tl.int64) * step)[:, None], mask=mask, other=0.0),)
    return rows


@triton.jit
def _taps_of(weight, w_chan, w_tap, d, d_ok, W: tl.constexpr):
    """Return the weights [1, BD] of the inputs j = 0, ..., W-1 steps ago."""
    taps = ()
    for j in tl.static_range(W):
        w = tl.load(weight + d.to(tl.int64) * w_chan + (W - 1 - j) * w_tap, mask=d_ok, other=0.0)
        taps = taps + (w.to(tl.float32)[None, :],)
    return taps


@triton.jit(do_not_specialize=["groups", "chunks", "rows", "length"])
def forward(
    x, weight, bias, state, spans, y, final,
    groups, chunks, rows, length, dim, x_batch, x_row, w_chan, w_tap, b_chan, s_row, s_tap, s_chan,
    W: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr, U: tl.constexpr, TB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write y (B, L, D) and, unless packed, the final state (B, W-1, D), both contiguous."""
    blocks = tl.cdiv(dim, BD)
    pid = tl.program_id(0)
    d = pid % blocks * BD + tl.arange(0, BD)
    group = pid // blocks * TB + tl.arange(0, TB)
    b, start = group // chunks, group % chunks * rows
    live = group < groups
    stop = tl.where(live, tl.minimum(start + rows, length), 0)
    d_ok = d < dim
    sign = -1 if REVERSE else 1
    first = (length - 1).to(tl.int64) if REVERSE else length.to(tl.int64) * 0
    x_base = x + (b.to(tl.int64) * x_batch + first * x_row)[:, None] + d[None, :]
    y_base = y + ((b.to(tl.int64) * length + first) * dim)[:, None] + d[None, :]
    x_step, y_step, steps = x_row * sign, dim * sign, (s_row, s_tap, s_chan)
    taps = _taps_of(weight, w_chan, w_tap, d, d_ok, W)
    shift = tl.zeros((1, BD), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + d.to(tl.int64) * b_chan, mask=d_ok, other=0.0).to(tl.float32)[None, :]

    window = ()
    for j in tl.static_range(1, W):
        row = _row_before(x_base, start - j, x_step, state, b, steps, d, live, d_ok, W, HAS_STATE and not PACKED)
        window = window + (row.to(tl.float32),)
    window = window + (tl.zeros((TB, BD), tl.float32),)  # is shifted out at once

    ahead = _rows(x_base, start, x_step, stop, d_ok, U)
    for i in range(0, rows, U):
        now = ahead
        ahead = _rows(x_base, start + i + U, x_step, stop, d_ok, U)
        for u in tl.static_range(U):
            p = start + i + u
            ok = (p < stop)[:, None] & d_ok[None, :]
            window = (now[u].to(tl.float32),) + window[: W - 1]
            span = _span(spans, p, length, stop, PACKED)
            sum_ = shift + taps[0] * window[0]
            for j in tl.static_range(1, W):
                sum_ += taps[j] * _tap(window, j, p, span, state, steps, d, ok, W, PACKED, HAS_STATE)
            if SILU:
                sum_ = sum_ * _sigmoid(sum_)
            tl.store(y_base + (p.to(tl.int64) * y_step)[:, None], sum_.to(y.dtype.element_ty), mask=ok)
    if not PACKED:
        last = live & (group % chunks == chunks - 1)
        for m in tl.static_range(W - 1):
            q = start * 0 + length - (W - 1) + m
            row = _row_before(x_base, q, x_step, state, b, steps, d, last, d_ok, W, HAS_STATE)
            out = final + ((b.to(tl.int64) * (W - 1) + m) * dim)[:, None] + d[None, :]
            tl.store(out, row, mask=last[:, None] & d_ok[None, :])


@triton.jit
def _through_activation(
    dy, window, taps, shift, spans, p, length, stop, state, steps, d, d_ok,
    W: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Return g[p], 0 from `stop` on as dy is, and the inputs x[p - j]."""
    span = _span(spans, p, length, stop, PACKED)
    ok = (p < stop)[:, None] & d_ok[None, :]
    inputs = ()
    for j in tl.static_range(W):
        inputs = inputs + (_tap(window, j, p, span, state, steps, d, ok, W, PACKED, HAS_STATE),)
    g = dy.to(tl.float32)
    if SILU:
        total = shift + taps[0] * inputs[0]
        for j in tl.static_range(1, W):
            total += taps[j] * inputs[j]
        s = _sigmoid(total)
        g *= s * (1.0 + total * (1.0 - s))
    return g, inputs


@triton.jit
def _emit(
    g_window, taps, q, start, stop, live, b, spans, length, dim, dfinal, dx, dx_base, dx_step, dstate, d, d_ok,
    W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write dx[q], and for q < 0 the row of dstate, from g[q], ..., g[q + W-1]."""
    span = _span(spans, q, length, stop, PACKED)
    grad = taps[0] * g_window[W - 1]
    for j in tl.static_range(1, W):
        term = g_window[W - 1 - j]  # g[q + j]
        if PACKED:
            term = tl.where((q + j < span[2])[:, None], term, 0.0)
        grad += taps[j] * term
    if HAS_DFINAL:
        m = q - (span[2] - (W - 1))
        sequence = tl.where(live, span[0] if PACKED else b, 0).to(tl.int64)
        entry = dfinal + ((sequence * (W - 1) + m) * dim)[:, None] + d[None, :]
        known = (m >= 0) & (m < W - 1) & (q < stop)
        grad += tl.load(entry, mask=known[:, None] & d_ok[None, :], other=0.0).to(tl.float32)
    mask = ((q >= start) & (q < stop))[:, None] & d_ok[None, :]
    tl.store(dx_base + (q.to(tl.int64) * dx_step)[:, None], grad.to(dx.dtype.element_ty), mask=mask)
    if HAS_STATE and not PACKED:
        place = dstate + ((b.to(tl.int64) * (W - 1) + q + (W - 1)) * dim)[:, None] + d[None, :]
        mask = (live & (q < 0) & (start == 0))[:, None] & d_ok[None, :]
        tl.store(place, grad.to(dstate.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["groups", "chunks", "rows", "length"])
def backward(
    dy, dfinal, x, weight, bias, state, spans, dx, dstate, partial,
    groups, chunks, rows, length, dim, dy_batch, dy_row, x_batch, x_row, w_chan, w_tap, b_chan, s_row, s_tap, s_chan,
    W: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr, U: tl.constexpr, TB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write dx (B, L, D), a row of partial (P, W+1, D) and, unless packed, dstate (B, W-1, D); all contiguous."""
    blocks = tl.cdiv(dim, BD)
    pid = tl.program_id(0)
    d = pid % blocks * BD + tl.arange(0, BD)
    group = pid // blocks * TB + tl.arange(0, TB)
    b, start = group // chunks, group % chunks * rows
    live = group < groups
    stop = tl.where(live, tl.minimum(start + rows, length), 0)
    beyond = tl.where(live, tl.minimum(start + rows + (W - 1), length), 0)
    d_ok = d < dim
    sign = -1 if REVERSE else 1
    first = (length - 1).to(tl.int64) if REVERSE else length.to(tl.int64) * 0
    x_base = x + (b.to(tl.int64) * x_batch + first * x_row)[:, None] + d[None, :]
    dy_base = dy + (b.to(tl.int64) * dy_batch + first * dy_row)[:, None] + d[None, :]
    dx_base = dx + ((b.to(tl.int64) * length + first) * dim)[:, None] + d[None, :]
    x_step, dy_step, dx_step, steps = x_row * sign, dy_row * sign, dim * sign, (s_row, s_tap, s_chan)
    taps = _taps_of(weight, w_chan, w_tap, d, d_ok, W)
    shift = tl.zeros((1, BD), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + d.to(tl.int64) * b_chan, mask=d_ok, other=0.0).to(tl.float32)[None, :]

    window, g_window, dweight, dbias = (), (), (), tl.zeros((TB, BD), tl.float32)
    for j in tl.static_range(1, W):
        row = _row_before(x_base, start - j, x_step, state, b, steps, d, live, d_ok, W, HAS_STATE and not PACKED)
        window = window + (row.to(tl.float32),)
    window = window + (tl.zeros((TB, BD), tl.float32),)  # is shifted out at once
    for _ in tl.static_range(W):
        g_window = g_window + (tl.zeros((TB, BD), tl.float32),)
        dweight = dweight + (tl.zeros((TB, BD), tl.float32),)

    ahead = _rows(x_base, start, x_step, stop, d_ok, U)
    dy_ahead = _rows(dy_base, start, dy_step, stop, d_ok, U)
    for i in range(0, rows, U):
        now, dy_now = ahead, dy_ahead
        ahead = _rows(x_base, start + i + U, x_step, stop, d_ok, U)
        dy_ahead = _rows(dy_base, start + i + U, dy_step, stop, d_ok, U)
        for u in tl.static_range(U):
            p = start + i + u
            window = (now[u].to(tl.float32),) + window[: W - 1]
            g, inputs = _through_activation(
                dy_now[u],
                window,
                taps,
                shift,
                spans,
                p,
                length,
                stop,
                state,
                steps,
                d,
                d_ok,
                W,
                SILU,
                PACKED,
                HAS_STATE,
            )
            g_window = (g,) + g_window[: W - 1]
            dbias += g
            sums = ()
            for j in tl.static_range(W):
                sums = sums + (dweight[j] + g * inputs[j],)
            dweight = sums
            _emit(
                g_window, taps, p - (W - 1), start, stop, live, b, spans, length, dim, dfinal, dx, dx_base, dx_step,
                dstate, d, d_ok, W, HAS_STATE, HAS_DFINAL, PACKED,
            )  # fmt: skip
    now = _rows(x_base, start + rows, x_step, beyond, d_ok, W - 1)
    dy_now = _rows(dy_base, start + rows, dy_step, beyond, d_ok, W - 1)
    for u in tl.static_range(W - 1):
        p = start + rows + u
        window = (now[u].to(tl.float32),) + window[: W - 1]
        g, inputs = _through_activation(
            dy_now[u], window, taps, shift, spans, p, length, beyond, state, steps, d, d_ok, W, SILU, PACKED, HAS_STATE
        )
        g_window = (g,) + g_window[: W - 1]
        _emit(
            g_window, taps, p - (W - 1), start, stop, live, b, spans, length, dim, dfinal, dx, dx_base, dx_step,
            dstate, d, d_ok, W, HAS_STATE, HAS_DFINAL, PACKED,
        )  # fmt: skip

    row = partial + (pid // blocks).to(tl.int64) * (W + 1) * dim + d
    for j in tl.static_range(W):
        tl.store(row + (W - 1 - j) * dim, tl.sum(dweight[j], 0), mask=d_ok)
    tl.store(row + W * dim, tl.sum(dbias, 0), mask=d_ok)
