"""Triton kernels of ssd's forward pass, and the walk that carries states or their gradients through a sequence.

In a chunk of Q positions, with c[t] the sum of log2 decays through t and E its value at the end:

    y[t] = Σ_(s<=t) (C[t]·B[s]) 2^(c[t] - c[s]) w[s] x[s] + 2^c[t] S C[t]
    S   <- 2^E S + Σ_s 2^(E - c[s]) w[s] x[s] B[s]ᵀ                            S (P, N)

w is Δ, or with HAS_WEIGHT given; with HAS_OWN another weight takes its place where s = t, in y alone.

`scan` walks a sequence, or a segment of it, with one head's state in registers. Where heads and sequences are too few
to fill the GPU, the length is split: `carry` finds each segment's end from a start of zero, `combine` the starts.
`carry` also takes gradients of states backward, dS <- 2^E dS + Σ_t 2^c[t] dy[t] C[t]ᵀ, and leaves those that backward
needs. A program has 64 columns of x, some of them padding: those of a head do not meet in a state.

PRECISION is that of a product of float32 tiles: "tf32" where an input is float16, whose mantissa is as long and whose
range is too small for states; "tf32x3", three products of tf32 parts, where all are float32.
"""

# What Triton compiles has its own types.
# mypy: ignore-errors
# ruff: noqa: SIM102

import triton
import triton.language as tl

from mambaverse.kernels.ssd.triton_common import (
    advance,
    decay_between,
    first_row,
    load_rows,
    load_state,
    load_tile,
    log_decays,
    pointers,
    sequence_of,
    split,
    step_sizes,
    through_gate,
)

# Triton compiles anew where a number is 1 or a multiple of 16 and was not before, which is of no use in these.
LENGTHS = ["L", "segment", "num_segments", "kept"]


@triton.jit(do_not_specialize=LENGTHS)
def scan(
    x, dt, A, B, C, D, z, bias, initial, entry, own, cu, starts, y, final, states,
    L, segment, num_segments, H, per_group, kept, low, high,
    sx_b, sx_l, sx_h, sx_p, sdt_b, sdt_l, sdt_h, sA, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n,
    sD_h, sD_p, sz_b, sz_l, sz_h, sz_p, sbias, si_s, si_h, si_p, si_n, sw_b, sw_l, sw_h, so_b, so_l, so_h,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, KEEP: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, D_WIDTH: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr, SAVE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_OWN: tl.constexpr, STAGES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Write y, the final state (S, H, P, N), and with SAVE the state (PB BP, BN) after every KEEP positions."""
    PB: tl.constexpr = (P + BP - 1) // BP
    pid = tl.program_id(0)
    i_s, i_h = (pid // (PB * H)).to(tl.int64), (pid // PB % H).to(tl.int64)
    first_p = pid % PB * BP
    first = tl.program_id(1) * segment
    start, count = sequence_of(cu, i_s, L, PACKED)
    left = tl.minimum(count - first, segment)
    row = i_s * 0 if PACKED else i_s
    i_g = i_h // per_group
    o_l, o_p, o_n = tl.arange(0, Q), first_p + tl.arange(0, BP), tl.arange(0, BN)
    s_p, s_n = o_p.to(tl.int64), o_n.to(tl.int64)
    p_x, sx = first_row(x + row * sx_b + i_h * sx_h, start, count, sx_l, REVERSE)
    p_z, sz = first_row(z + row * sz_b + i_h * sz_h, start, count, sz_l, REVERSE)
    p_B, sB = first_row(B + row * sB_b + i_g * sB_g, start, count, sB_l, REVERSE)
    p_C, sC = first_row(C + row * sC_b + i_g * sC_g, start, count, sC_l, REVERSE)
    p_y, sy = first_row(y + (row * L * H + i_h) * P, start, count, H * P, REVERSE)
    p_dt, sdt = first_row(dt + row * sdt_b + i_h * sdt_h, start, count, sdt_l, REVERSE)
    p_w, sw = first_row(entry + row * sw_b + i_h * sw_h, start, count, sw_l, REVERSE)
    p_own, so = first_row(own + row * so_b + i_h * so_h, start, count, so_l, REVERSE)
    b_A = tl.load(A + i_h * sA).to(tl.float32)
    b_bias = tl.load(bias + i_h * sbias).to(tl.float32) if HAS_BIAS else 0.0
    if D_WIDTH > 1:
        b_D = tl.load(D + i_h * sD_h + s_p * sD_p, mask=o_p < P, other=0.0).to(tl.float32)
    ok_state = (o_p < P)[:, None] & (o_n < N)[None, :]
    o_state = s_p[:, None] * N + s_n[None, :]
    if SPLIT:
        p_start = starts + ((i_s * H + i_h) * num_segments + tl.program_id(1)) * (P * N) + o_state
        S = tl.load(p_start, mask=ok_state, other=0.0)
    elif HAS_INITIAL:
        p_start = initial + i_s * si_s + i_h * si_h + s_p[:, None] * si_p + s_n[None, :] * si_n
        S = load_state(p_start, o_p, o_n, P, N)
    else:
        S = tl.zeros([BP, BN], tl.float32)

    next_dt = load_rows(p_dt, first + o_l, sdt, o_l < left)  # a chunk ahead: much waits for it
    if HAS_WEIGHT:
        next_w = load_rows(p_w, first + o_l, sw, o_l < left)
    if HAS_OWN:
        next_own = load_rows(p_own, first + o_l, so, o_l < left)
    for t in tl.range(0, left, Q, num_stages=STAGES):
        if SAVE:
            if ((first + t) % KEEP == 0) & (first + t > 0):
                boundary = row * kept + start // KEEP + (first + t) // KEEP - 1
                p_S = states + (boundary * H + i_h) * (PB * BP * BN) + (s_p[:, None] * BN + s_n[None, :])
                tl.store(p_S, S.to(states.dtype.element_ty))
        rows = first + t + o_l
        ok = t + o_l < left
        b_dt, next_dt = next_dt, load_rows(p_dt, rows + Q, sdt, t + Q + o_l < left)
        if HAS_WEIGHT:
            b_w, next_w = next_w, load_rows(p_w, rows + Q, sw, t + Q + o_l < left)
        if HAS_OWN:
            b_own, next_own = next_own, load_rows(p_own, rows + Q, so, t + Q + o_l < left)
        b_x = load_tile(pointers(p_x, rows, sx, o_p, sx_p), ok, o_p, P, BP, DT)
        b_B = load_tile(pointers(p_B, rows, sB, o_n, sB_n), ok, o_n, N, BN, DT)
        b_C = load_tile(pointers(p_C, rows, sC, o_n, sC_n), ok, o_n, N, BN, DT)
        out = tl.dot(b_C, tl.trans(S.to(DT)), input_precision=PRECISION)  # the state first: it takes most registers
        _, _, delta = step_sizes(b_dt, ok, b_bias, low, high, SOFTPLUS)
        b_w, whole, part, total = log_decays(delta, b_w.to(tl.float32) if HAS_WEIGHT else delta, b_A, FAST)
        end, end_part = split(total)
        weight = tl.exp2((end - whole) + (end_part - part)) * b_w
        weighted = (b_x.to(tl.float32) * weight[:, None]).to(DT)
        S = tl.dot(tl.trans(weighted), b_B, acc=S * tl.exp2(end + end_part), input_precision=PRECISION)
        G = tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION)
        decay = decay_between(
            G, whole[:, None], part[:, None], whole[None, :], part[None, :], o_l[:, None] >= o_l[None, :], FAST
        )
        M = G * decay * b_w[None, :]
        if HAS_OWN:
            M = tl.where(o_l[:, None] == o_l[None, :], G * b_own.to(tl.float32)[None, :], M)
        if D_WIDTH == 1:
            b_D = tl.load(D + i_h * sD_h).to(tl.float32)  # here, or the tile that it becomes would be kept
            M += tl.where(o_l[:, None] == o_l[None, :], b_D, 0.0)
        out *= tl.exp2(whole + part)[:, None]
        out = tl.dot(M.to(DT), b_x, acc=out, input_precision=PRECISION)
        if D_WIDTH > 1:
            out += b_D[None, :] * b_x.to(tl.float32)
        if HAS_Z:
            b_z = load_tile(pointers(p_z, rows, sz, o_p, sz_p), ok, o_p, P, BP, tl.float32)
            out = through_gate(out, b_z, FAST)
        tl.store(pointers(p_y, rows, sy, o_p, 1), out.to(y.dtype.element_ty), mask=ok[:, None] & (o_p < P)[None, :])

    if first + segment >= count:
        tl.store(final + (i_s * H + i_h) * (P * N) + o_state, S, mask=ok_state)


@triton.jit(do_not_specialize=[*LENGTHS, "first_segment", "first_chunk"])
def carry(
    x, dt, A, B, z, bias, incoming, entry, cu, starts, ends, sums, outgoing, states, gated, rest,
    L, segment, num_segments, first_segment, H, per_group, kept, first_chunk, low, high,
    sx_b, sx_l, sx_h, sx_p, sdt_b, sdt_l, sdt_h, sA, sB_b, sB_l, sB_g, sB_n, sz_b, sz_l, sz_h, sz_p, sbias,
    si_s, si_h, si_p, si_n, sw_b, sw_l, sw_h,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, KEEP: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INCOMING: tl.constexpr, HAS_OUTGOING: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr, SPLIT: tl.constexpr, GRADIENT: tl.constexpr, SUMMARY: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, GATES: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Carry a state through a segment, or with GRADIENT (x is dy then, and B is C) its gradient the other way.

    SUMMARY: from zero; write what comes out to `ends` and the factor 2^ΣE to `sums`. Else: from `starts` or `incoming`;
    write to `states` what enters every KEEP positions, `kept` of a sequence from its `first_chunk` on, and of gradients
    to `outgoing` what leaves the sequence. States, not gradients, start from those that `scan` left every segment. With
    GATES dy behind the gate goes to `gated` and `rest` (batch, L, H, P): see `advance`.
    """
    RESTORE: tl.constexpr = not (GRADIENT or SUMMARY)
    PB: tl.constexpr = (P + BP - 1) // BP
    pid = tl.program_id(0)
    i_s, i_h = (pid // (PB * H)).to(tl.int64), (pid // PB % H).to(tl.int64)
    first_p = pid % PB * BP
    i_k = first_segment + tl.program_id(1)
    first = i_k * segment
    start, count = sequence_of(cu, i_s, L, PACKED)
    left = tl.minimum(count - first, segment)
    row = i_s * 0 if PACKED else i_s
    i_g = i_h // per_group
    o_l, o_p, o_n = tl.arange(0, Q), first_p + tl.arange(0, BP), tl.arange(0, BN)
    s_p, s_n = o_p.to(tl.int64), o_n.to(tl.int64)
    o_kept = s_p[:, None] * BN + s_n[None, :]
    p_x, sx = first_row(x + row * sx_b + i_h * sx_h, start, count, sx_l, REVERSE)
    p_z, sz = first_row(z + row * sz_b + i_h * sz_h, start, count, sz_l, REVERSE)
    p_B, sB = first_row(B + row * sB_b + i_g * sB_g, start, count, sB_l, REVERSE)
    p_dt, sdt = first_row(dt + row * sdt_b + i_h * sdt_h, start, count, sdt_l, REVERSE)
    p_w, sw = first_row(entry + row * sw_b + i_h * sw_h, start, count, sw_l, REVERSE)
    at_gated = (row * L * H + i_h) * P
    p_gated, s_gated = first_row(gated + at_gated, start, count, H * P, REVERSE)
    p_rest, _ = first_row(rest + at_gated, start, count, H * P, REVERSE)
    b_A = tl.load(A + i_h * sA).to(tl.float32)
    b_bias = tl.load(bias + i_h * sbias).to(tl.float32) if HAS_BIAS else 0.0
    ok_state = (o_p < P)[:, None] & (o_n < N)[None, :]
    o_state = s_p[:, None] * N + s_n[None, :]
    at_segment = (i_s * H + i_h) * num_segments + i_k
    if SUMMARY:
        S = tl.zeros([BP, BN], tl.float32)
    elif SPLIT:
        S = tl.load(starts + at_segment * (P * N) + o_state, mask=ok_state, other=0.0)
    else:
        S = tl.zeros([BP, BN], tl.float32)
        if HAS_INCOMING:
            p_start = incoming + i_s * si_s + i_h * si_h + s_p[:, None] * si_p + s_n[None, :] * si_n
            S += tl.load(p_start, mask=ok_state & ((i_k == 0) | GRADIENT), other=0.0).to(tl.float32)
        if RESTORE:
            p_S = starts + ((i_s * (num_segments - 1) + i_k - 1) * H + i_h) * (PB * BP * BN) + o_kept
            S += tl.load(p_S, mask=ok_state & (i_k > 0), other=0.0).to(tl.float32)
    summed = tl.full([], 0.0, tl.float64)
    chunks = tl.cdiv(left, Q)

    begin = (chunks - 1) * Q * GRADIENT + o_l
    next_dt = load_rows(p_dt, first + begin, sdt, (begin >= 0) & (begin < left))  # a chunk ahead: much waits for it
    if HAS_WEIGHT:
        next_w = load_rows(p_w, first + begin, sw, (begin >= 0) & (begin < left))
    for k in tl.range(0, chunks, num_stages=STAGES):
        t = (chunks - 1 - k) * Q if GRADIENT else k * Q
        if not SUMMARY:
            entered = first + t + Q if GRADIENT else first + t  # a gradient enters a chunk from the right
            if (entered % KEEP == 0) & (entered > 0) & (entered < count):
                boundary = row * kept + start // KEEP + entered // KEEP - GRADIENT - first_chunk
                tl.store(states + (boundary * H + i_h) * (PB * BP * BN) + o_kept, S.to(states.dtype.element_ty))
        rows = first + t + o_l
        ok = t + o_l < left
        next_t = t - Q if GRADIENT else t + Q
        next_ok = (next_t + o_l >= 0) & (next_t + o_l < left)
        b_dt, next_dt = next_dt, load_rows(p_dt, first + next_t + o_l, sdt, next_ok)
        b_w = b_dt
        if HAS_WEIGHT:
            b_w, next_w = next_w, load_rows(p_w, first + next_t + o_l, sw, next_ok)
        S, total = advance(
            S, pointers(p_x, rows, sx, o_p, sx_p), pointers(p_z, rows, sz, o_p, sz_p),
            pointers(p_B, rows, sB, o_n, sB_n), pointers(p_gated, rows, s_gated, o_p, 1),
            pointers(p_rest, rows, s_gated, o_p, 1), b_dt, b_w, ok, o_p, o_n, b_A, b_bias, low, high,
            P, N, BP, BN, DT, PRECISION, HAS_Z, HAS_WEIGHT, SOFTPLUS, GRADIENT, GATES, FAST,
        )  # fmt: skip
        summed += total

    if SUMMARY:
        tl.store(ends + at_segment * (P * N) + o_state, S, mask=ok_state)
        end, end_part = split(summed)
        tl.store(sums + at_segment, tl.exp2(end + end_part))
    elif HAS_OUTGOING:
        if i_k == 0:
            tl.store(outgoing + (i_s * H + i_h) * (P * N) + o_state, S, mask=ok_state)


@triton.jit(do_not_specialize=["num_segments"])
def combine(
    ends, sums, incoming, starts, H, num_segments, si_s, si_h, si_p, si_n,
    SIZE: tl.constexpr, N: tl.constexpr, HAS_INCOMING: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what enters each segment: the state from the segments before it, or the gradient from those after it."""
    pid = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = o < SIZE
    S = tl.zeros([BLOCK], tl.float32)
    if HAS_INCOMING:
        p_start = incoming + pid // H * si_s + pid % H * si_h
        S += tl.load(p_start + (o // N).to(tl.int64) * si_p + (o % N).to(tl.int64) * si_n, mask=ok, other=0.0).to(
            tl.float32
        )
    for k in range(num_segments):
        at = pid * num_segments + (num_segments - 1 - k if GRADIENT else k)
        tl.store(starts + at * SIZE + o, S, mask=ok)
        S = S * tl.load(sums + at) + tl.load(ends + at * SIZE + o, mask=ok, other=0.0)
