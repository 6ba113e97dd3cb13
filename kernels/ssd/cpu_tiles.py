"""Tiles in cache: the pieces that the kernels of `cpu_kernels.py` put together.

A chunk of q positions of one head is a handful of small matrices that stay in the first two cache levels. They live in
one flat float32 scratch array `s` and are named by their offset in it; a row-major tile has its rows `ld` apart, both
sides padded with zeros to a multiple of PAD. Position i of a chunk is the i-th in the order of the recurrence; with
`reverse` that is backwards in memory (a negative `step`), which only `pack` and `unpack` ever see.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from mambaverse.kernels.simd import (
    LANES,
    ROWS,
    absolute,
    add,
    clamp,
    div,
    drop_below,
    exp2,
    fma,
    inside,
    load,
    mul,
    prefetch,
    product_block_1,
    product_block_2,
    splat,
    store,
    sub,
    total,
    transpose_block,
)
from mambaverse.kernels.ssd.layout import PAD

LINE = 16  # floats in a cache line
LOG2_E = 1.4426950408889634
# log1p(e) / e on [0, 1], highest power first: least maximum relative error (5e-9 before rounding) at degree 9, 1 at 0
LOG1P = (
    -0.003318473327, 0.02020458849, -0.05766445103, 0.1068055623, -0.1535539675, 0.1969540072, -0.2495858746,
    0.3333051133, -0.4999993276, 1.0,
)  # fmt: skip
FULL, LOWER, UPPER, OUT_UPPER = 0, 1, 2, 3  # which part of a triangular product is worked out
# rows that `decays` fills
HIGH, LOW, STEP, SLOPE, FROM_START, TO_END, WEIGHT, ENTRY, OWN, NUM_DECAYS = range(10)
_jit = register_jitable(error_model="numpy", boundscheck=False)  # compiled into the kernels, and cached with them


@_jit
def padded(n):
    """Return n rounded up to a multiple of PAD."""
    return (n + PAD - 1) // PAD * PAD


@_jit
def scratch(count):
    """Return `count` floats at a multiple of 64 bytes, not set to anything."""
    memory = np.empty(count + PAD, np.float32)
    first = -memory.ctypes.data % 64 // 4
    return memory[first : first + count]


@_jit
def clear(s, o, count):
    """Write `count` zeros at `o`."""
    for i in range(o, o + count, LANES):
        store(s, i, splat(np.float32(0)))


@_jit
def product(s, oa, ai, ak, b, ob, ldb, oc, ldc, m, n, k, part, accumulate):
    """Write c (m, n) (+)= a (m, k) @ b (k, n); a[i, l] is s[oa + i ai + l ak], c is in `s`, b in its own array.

    LOWER: a is lower triangular (zero for l > i). UPPER: upper triangular. OUT_UPPER: only c[i, j >= i] is needed.
    """
    for i in range(0, m, ROWS):
        start = i if part == UPPER else 0
        stop = min(k, i + ROWS) if part == LOWER else k
        j = i // PAD * PAD if part == OUT_UPPER else 0
        pa, pc = oa + i * ai, oc + i * ldc
        while j + 2 * LANES <= n:
            product_block_2(s, pa, ai, ak, b, ob + j, ldb, pc + j, ldc, start, stop, accumulate)
            j += 2 * LANES
        if j < n:
            product_block_1(s, pa, ai, ak, b, ob + j, ldb, pc + j, ldc, start, stop, accumulate)


@_jit
def transpose(s, source, source_ld, target, target_ld, rows, columns):
    """Write the transpose of the tile (rows, columns) at `source` to `target`; both sides are padded already."""
    for i in range(0, rows, LANES):
        for j in range(0, columns, LANES):
            transpose_block(s, source + i * source_ld + j, source_ld, target + j * target_ld + i, target_ld)


@_jit
def pack(s, o, source, base, step, rows, columns):
    """Copy rows source[base + i step :][:columns] to the tile at `o`, padding both sides with zeros."""
    ld = padded(columns)
    for i in range(rows):
        row, at = o + i * ld, base + i * step
        j = 0
        while j + LANES <= columns:
            store(s, row + j, load(source, at + j))
            j += LANES
        if j < columns:
            clear(s, row + j, ld - j)
            for q in range(j, columns):
                s[row + q] = source[at + q]
        elif j < ld:
            clear(s, row + j, ld - j)
    clear(s, o + rows * ld, (padded(rows) - rows) * ld)


@_jit
def fetch(source, base, step, rows, columns):
    """Ask for the rows source[base + i step :][:columns], to be packed later."""
    for i in range(rows):
        for j in range(base + i * step, base + i * step + columns, LINE):
            prefetch(source, j)


@_jit
def unpack(s, o, target, base, step, rows, columns):
    """Copy the tile at `o` to rows target[base + i step :][:columns]."""
    ld = padded(columns)
    for i in range(rows):
        row, at = o + i * ld, base + i * step
        j = 0
        while j + LANES <= columns:
            store(target, at + j, load(s, row + j))
            j += LANES
        for q in range(j, columns):
            target[at + q] = s[row + q]


@_jit
def sigmoid(v):
    """Return 1 / (1 + exp(-v)) of a vector."""
    one = splat(np.float32(1))
    return div(one, add(one, exp2(mul(v, splat(np.float32(-LOG2_E))))))


@_jit
def gate(s, o, oz, rows, ld):
    """Multiply the tile at `o` by silu of the tile at `oz`."""
    for i in range(0, rows * ld, LANES):
        z = load(s, oz + i)
        store(s, o + i, mul(load(s, o + i), mul(z, sigmoid(z))))


@_jit
def add_scaled(s, o, ox, od, rows, ld):
    """Add D[p] x[i, p]: the tile at `ox` times the row at `od`."""
    for i in range(rows):
        for j in range(0, ld, LANES):
            at = i * ld + j
            store(s, o + at, fma(load(s, od + j), load(s, ox + at), load(s, o + at)))


@_jit
def scale_rows(s, o, ow, rows, ld):
    """Multiply row i of the tile at `o` by s[ow + i]."""
    for i in range(rows):
        w = splat(s[ow + i])
        for at in range(o + i * ld, o + (i + 1) * ld, LANES):
            store(s, at, mul(w, load(s, at)))


@_jit
def softplus(v):
    """Return log(1 + exp(v)) = max(v, 0) + log1p(exp(-|v|)) of a vector; its derivative is `sigmoid`."""
    size = absolute(v)
    e = exp2(mul(size, splat(np.float32(-LOG2_E))))
    p = splat(np.float32(LOG1P[0]))
    for coefficient in LOG1P[1:]:
        p = fma(p, e, splat(np.float32(coefficient)))
    return fma(p, e, mul(add(v, size), splat(np.float32(0.5))))


@_jit
def decays(s, o, q, step, b, t, h, dt, dt_at, weight, weight_at, own, own_at, bias, limits, rate, rows):
    """Fill the rows of length `q` at `o` for the chunk from position t on, step by `step`, of row b and head h.

    STEP: dt' = clamp(softplus(dt + bias)); `limits` is (whether softplus is taken, least, greatest, whether there are
    weights, and own ones). SLOPE: its derivative. HIGH + LOW: the log2 of the decay from the chunk's start through i,
    as two floats, so that differences of neighbours stay exact where the decay is strong. FROM_START, TO_END: the
    decays from the start through i, and from i (exclusive) to the end. ENTRY: what x enters the state with, STEP or its
    weight. WEIGHT: ENTRY * TO_END. OWN: with own weights, what x enters its own output with.

    Returns:
        The decay over the whole chunk.
    """
    with_softplus, low, high, has_weight, has_own = limits
    base = b * dt_at[0] + t * dt_at[1] + h
    least, greatest = splat(np.float32(low)), splat(np.float32(high))
    for i in range(padded(rows)):
        s[o + STEP * q + i] = dt[base + min(i, rows - 1) * step * dt_at[1]] + bias[h]
    for i in range(o, o + padded(rows), LANES):
        raw = load(s, i + STEP * q)
        free = softplus(raw) if with_softplus else raw
        slope = inside(free, least, greatest)
        store(s, i + STEP * q, clamp(free, least, greatest))
        store(s, i + SLOPE * q, mul(slope, sigmoid(raw)) if with_softplus else slope)
    log = 0.0
    for i in range(padded(rows)):
        if i >= rows:
            s[o + STEP * q + i] = np.float32(0)
        log += np.float64(s[o + STEP * q + i]) * rate
        s[o + HIGH * q + i] = np.float32(log)
        s[o + LOW * q + i] = np.float32(log - np.float64(np.float32(log)))
    last, rest = splat(s[o + HIGH * q + rows - 1]), splat(s[o + LOW * q + rows - 1])
    for i in range(o, o + padded(rows), LANES):
        high_part = load(s, i + HIGH * q)
        store(s, i + FROM_START * q, exp2(high_part))
        to_end = exp2(add(sub(last, high_part), sub(rest, load(s, i + LOW * q))))
        store(s, i + TO_END * q, to_end)
        store(s, i + ENTRY * q, load(s, i + STEP * q))
    if has_weight:
        base = b * weight_at[0] + t * weight_at[1] + h
        for i in range(rows):
            s[o + ENTRY * q + i] = weight[base + i * step * weight_at[1]]
    for i in range(o, o + padded(rows), LANES):
        store(s, i + WEIGHT * q, mul(load(s, i + TO_END * q), load(s, i + ENTRY * q)))
    if has_own:
        base = b * own_at[0] + t * own_at[1] + h
        for i in range(rows):
            s[o + OWN * q + i] = own[base + i * step * own_at[1]]
    return s[o + FROM_START * q + rows - 1]


@_jit
def decay_between(s, o, q, j, i):
    """Return the decay from position j to positions i, i + 1, ... (0 where the position is before j)."""
    high = sub(load(s, o + HIGH * q + i), splat(s[o + HIGH * q + j]))
    low = sub(load(s, o + LOW * q + i), splat(s[o + LOW * q + j]))
    decay = exp2(add(high, low))
    return drop_below(decay, j - i) if j > i else decay


@_jit
def mask(s, o_m, o_cb, q, o_decay, rows, has_own):
    """Write Mᵀ[j, i] = (C[i] · B[j]) decay(j -> i) w[j] for i >= j, and 0 for i < j as far as products read it.

    w is what `decays` wrote as ENTRY, or OWN for i = j if there is one.
    """
    for j in range(rows):
        d = splat(s[o_decay + ENTRY * q + j])
        for i in range(j // PAD * PAD, padded(rows), LANES):
            at = j * q + i
            store(s, o_m + at, mul(mul(load(s, o_cb + at), d), decay_between(s, o_decay, q, j, i)))
        if has_own:
            s[o_m + j * q + j] = s[o_cb + j * q + j] * s[o_decay + OWN * q + j]


@_jit
def mask_backward(s, o_m, o_dcb, o_dw, o_da, o_run, o_cb, o_t, q, o_decay, rows, has_own):
    """Given Tᵀ[j, i] = dy[i] · x[j], the gradient of M, write what follows from it; `o_run` has room for a row.

    With U[i, j] = T[i, j] (C[i] · B[j]) decay(j -> i): Mᵀ as `mask` writes it; dCBᵀ[j, i] += T[i, j] decay w[j];
    dw[j] = sum over i of U[i, j]; da[t] = sum over j < t <= i of U[i, j] w[j], the gradient of the log decay at t,
    added up without a difference of sums, which would lose small gradients under strong decay. An own weight takes
    w[j]'s place for i = j, and its gradient U[j, j] takes its place in the row OWN.
    """
    clear(s, o_run, padded(rows))
    s[o_da] = np.float32(0)
    for j in range(rows):
        d = splat(s[o_decay + ENTRY * q + j])
        column, later = splat(np.float32(0)), splat(np.float32(0))
        for i in range(j // PAD * PAD, padded(rows), LANES):
            at = j * q + i
            decay = decay_between(s, o_decay, q, j, i)
            if has_own and j >= i:
                decay = drop_below(decay, j + 1 - i)
            cb, t = load(s, o_cb + at), mul(load(s, o_t + at), decay)
            store(s, o_m + at, mul(mul(cb, decay), d))
            store(s, o_dcb + at, fma(t, d, load(s, o_dcb + at)))
            u = mul(t, cb)
            column = add(column, u)
            run = fma(u, d, load(s, o_run + i))
            store(s, o_run + i, run)
            later = add(later, drop_below(run, j + 1 - i) if j >= i else run)
        s[o_dw + j] = total(column)
        if has_own:
            at = j * q + j
            own, cb, t = s[o_decay + OWN * q + j], s[o_cb + at], s[o_t + at]
            s[o_m + at] = cb * own
            s[o_dcb + at] += t * own
            s[o_decay + OWN * q + j] = cb * t
        if j + 1 < rows:
            s[o_da + j + 1] = total(later)


@_jit
def weigh(s, o_sum, o_acc, o_part, o_tile, ow, q, count, rows):
    """Write sum[i] = sum over k of tile[k, i] part[k, i], and acc[k, i] += w[i] part[k, i], for `count` rows k."""
    for i in range(0, padded(rows), LANES):
        w, sums = load(s, ow + i), splat(np.float32(0))
        for at in range(i, i + count * q, q):
            part = load(s, o_part + at)
            sums = fma(load(s, o_tile + at), part, sums)
            store(s, o_acc + at, fma(w, part, load(s, o_acc + at)))
        store(s, o_sum + i, sums)


@_jit
def dot(s, oa, ob, count):
    """Return the sum of products of the `count` numbers at `oa` and at `ob`."""
    sums = splat(np.float32(0))
    for i in range(0, count, LANES):
        sums = fma(load(s, oa + i), load(s, ob + i), sums)
    return total(sums)


@_jit
def dot_columns(s, o, oa, ob, rows, ld):
    """Write sum over i of a[i, p] b[i, p] to the row at `o`."""
    for j in range(0, ld, LANES):
        sums = splat(np.float32(0))
        for at in range(j, j + rows * ld, ld):
            sums = fma(load(s, oa + at), load(s, ob + at), sums)
        store(s, o + j, sums)


@_jit
def gate_backward(s, o, oy, oz, rows, ld):
    """Turn the tile at `o`, the gradient of y silu(z), into the gradient of z."""
    one = splat(np.float32(1))
    for at in range(0, rows * ld, LANES):
        z = load(s, oz + at)
        sig = sigmoid(z)
        slope = mul(sig, fma(z, sub(one, sig), one))
        store(s, o + at, mul(mul(load(s, o + at), load(s, oy + at)), slope))


@_jit
def load_state(s, o, tmp, boundary, h, H, work, has_end, end, sequence, P, N):
    """Write a state of head `h` to the tile at `o` as (N, P), and return whether there is one.

    It is that at `boundary` in `work`, or, where that is -1, the one of `sequence` in `end` (S, H, P, N).
    """
    n, p = padded(N), padded(P)
    if boundary >= 0:
        pack(s, o, work, (boundary * H + h) * n * p, p, n, p)
    elif has_end:
        pack(s, tmp, end, (sequence * H + h) * P * N, N, P, N)
        transpose(s, tmp, n, o, p, p, n)
    return boundary >= 0 or has_end


@_jit
def save_state(s, o, tmp, target, base, P, N):
    """Copy the state (N, P) at `o` to target[base] as (P, N)."""
    n, p = padded(N), padded(P)
    transpose(s, o, p, tmp, n, n, p)
    unpack(s, tmp, target, base, N, P, N)


@_jit
def advance(s, o, o_rows, o_columns, decay, n, p, length, has_state):
    """Set the state at `o` to decay * state + sum over i of rows[i] columns[i]ᵀ; without a state it counts as 0."""
    if has_state:
        for i in range(o, o + n * p, LANES):
            store(s, i, mul(splat(decay), load(s, i)))
    product(s, o_rows, 1, n, s, o_columns, p, o, p, n, p, length, FULL, has_state)
