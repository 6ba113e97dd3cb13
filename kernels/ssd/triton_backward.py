"""Triton kernels of ssd's gradient.

With c[t] the sum of log2 decays through t in a chunk of Q positions, E its end, S the state before the chunk, dS the
gradient of the state after it, K[s, t] = B[s]·C[t] and decay[s, t] = 2^(c[t] - c[s]) for s <= t, else 0:

    dM[s, t] = x[s]·dy[t]                        dK = Σ_heads dM ∘ decay ∘ w[s]           W = dM ∘ decay ∘ w[s] ∘ K
    dX[s] = Σ_t K[s, t] decay[s, t] dy[t] + 2^(E - c[s]) dS B[s]                          dx = w dX + D dy
    dC[t] = Σ_heads 2^c[t] Sᵀ dy[t] + Σ_s dK[s, t] B[s]
    dB[s] = Σ_heads 2^(E - c[s]) w[s] dSᵀ x[s] + Σ_t dK[s, t] C[t]
    dw[s] = x[s]·dX[s],  dΔ[s] = A da[s]         dA = Σ_s Δ[s] da[s]                      w = Δ: dΔ = x·dX + A da

With HAS_OWN decay[t, t] is 0, and what a token adds to its own output apart: K[t, t] o[t] dy[t] to dx, dM[t, t] o[t] to
dK[t, t], and do[t] = dM[t, t] K[t, t].

da[t], the gradient of the log decay of a step, is what goes from before it to t or later: within the chunk Σ_(s < t <=
r) W[s, r]; from S to the outputs from t on; from before t to dS; and from S to dS. (That sum over W is also the sum of
its columns less that of its rows, from t on, but where decays are strong their difference is rounding alone.)

Everything is parallel over chunks of Q positions, where `scan` and `carry` left states and their gradients. `steps`
finds the step sizes and decays of a chunk once, for the kernels that follow: `gradient_x` has a program a head,
whose few tiles leave room for several on a multiprocessor; `gradient_BC` has one for the heads of a group, or a part of
them, one after the other, and keeps dB, dC and dK of its chunk in registers all the while. `gradient_BC_of_one` is for
programs of one head: dC is written before dB is begun, so that only one of them takes registers.

Beside a gate z, dy above is dy silu(z). `carry` may have left it in dx (and its rest in dz), where dB's and dC's kernel
reads it as if it were dy; `gradient_x` overwrites it, and is launched last.
"""

# What Triton compiles has its own types.
# mypy: ignore-errors

import triton
import triton.language as tl

from mambaverse.kernels.ssd.triton_common import (
    LEAST,
    decay_between,
    fence,
    first_row,
    gate_gradient,
    load_rows,
    load_tile,
    place_of,
    pointers,
    sigmoid,
    split,
    step_sizes,
    steps_of,
    sums_of_three,
    through_gate,
)
from mambaverse.kernels.triton_math import LOG2E


@triton.jit(do_not_specialize=["L", "num_sequences", "search"])
def steps(
    dt, A, bias, entry, cu, out, L, num_sequences, search, H, low, high, sdt_b, sdt_l, sdt_h, sA, sbias,
    sw_b, sw_l, sw_h,
    Q: tl.constexpr, HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Write weights (Δ without) and the two parts of the sums of log2 decays of every chunk, (slots, H, 3, Q).

    Grid: (slots, heads).
    """
    slot, i_s, start, count, t, left = place_of(
        cu, tl.program_id(0).to(tl.int64), L, num_sequences, search, 0, tl.cdiv(L, Q), Q, PACKED
    )
    row = i_s * 0 if PACKED else i_s
    o_l, o_h = tl.arange(0, Q), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    ok_h = o_h < H
    b_A = tl.load(A + o_h * sA, mask=ok_h, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.zeros([1, HEADS], tl.float32)
    if HAS_BIAS:
        b_bias += tl.load(bias + o_h * sbias, mask=ok_h, other=0.0).to(tl.float32)[None, :]
    ok = (o_l < left)[:, None] & ok_h[None, :]
    p_dt, sdt = first_row(dt + row * sdt_b, start, count, sdt_l, REVERSE)
    b_dt = tl.load(pointers(p_dt, t + o_l, sdt, o_h, sdt_h), mask=ok, other=0.0)
    _, _, delta = step_sizes(b_dt, ok, b_bias, low, high, SOFTPLUS)
    a = delta * (b_A * LOG2E)
    a = tl.where(a < LEAST, LEAST, a).to(tl.float64)  # a NaN stays one
    whole, part = split(tl.cumsum(a, 0))
    p_out = out + (slot * H + o_h[None, :]) * (3 * Q) + o_l[:, None]
    if HAS_WEIGHT:
        p_w, sw = first_row(entry + row * sw_b, start, count, sw_l, REVERSE)
        b_w = tl.load(pointers(p_w, t + o_l, sw, o_h, sw_h), mask=ok, other=0.0).to(tl.float32)
        tl.store(p_out, b_w, mask=ok_h[None, :])
    else:
        tl.store(p_out, delta, mask=ok_h[None, :])
    tl.store(p_out + Q, whole, mask=ok_h[None, :])
    tl.store(p_out + 2 * Q, part, mask=ok_h[None, :])


@triton.jit
def _gated(
    p_y, p_z, rows, sy, sz, sy_p, sz_p, ok, o_p, P: tl.constexpr, BP: tl.constexpr, HAS_Z: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Load dy in float32, through the gate."""
    b_dy = load_tile(pointers(p_y, rows, sy, o_p, sy_p), ok, o_p, P, BP, tl.float32)
    if HAS_Z:
        b_z = load_tile(pointers(p_z, rows, sz, o_p, sz_p), ok, o_p, P, BP, tl.float32)
        b_dy = through_gate(b_dy, b_z, FAST)
    return b_dy


@triton.jit
def _kept_states(
    states, initial, boundary, i_s, i_h, H, si_s, si_h, si_p, si_n, o_p, o_n, is_kept, is_end, P: tl.constexpr,
    N: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    """Load the state (or gradient) that a chunk shares with a neighbour, or what is given at the sequence's end."""
    s_p, s_n = o_p.to(tl.int64)[:, None], o_n.to(tl.int64)[None, :]
    ok = (o_p < P)[:, None] & (o_n < N)[None, :]
    S = tl.load(states + (boundary * H + i_h) * SIZE + s_p * BN + s_n, mask=ok & is_kept, other=0.0).to(tl.float32)
    if HAS_END:
        p_S = initial + i_s * si_s + i_h * si_h + (s_p * si_p + s_n * si_n)
        S += tl.load(p_S, mask=ok & is_end, other=0.0).to(tl.float32)
    return S


@triton.jit
def _states_around(
    states, initial, dstates, dfinal, boundary, first_state, first_gradient, i_s, i_h, H, t, left,
    si_s, si_h, si_p, si_n, sf_s, sf_h, sf_p, sf_n, o_p, o_n,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr, Q: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """Load the state before a chunk, and the gradient of the state after it."""
    S = _kept_states(
        states, initial, boundary - first_state, i_s, i_h, H, si_s, si_h, si_p, si_n, o_p, o_n,
        (left > 0) & (t > 0), (left > 0) & (t == 0), P, N, BN, SIZE, HAS_INITIAL,
    )  # fmt: skip
    dS = _kept_states(
        dstates, dfinal, boundary - first_gradient, i_s, i_h, H, sf_s, sf_h, sf_p, sf_n, o_p, o_n, left > Q,
        (left > 0) & (left <= Q), P, N, BN, SIZE, HAS_FINAL,
    )  # fmt: skip
    return S, dS


@triton.jit
def _times_state(b, S, DT: tl.constexpr, PRECISION: tl.constexpr, GIVEN: tl.constexpr):
    """Return b Sᵀ. A state that was GIVEN has digits that one in DT has not, and dA adds up products with them."""
    high = S.to(DT)
    product = tl.dot(b, tl.trans(high), input_precision=PRECISION)
    if GIVEN and DT.primitive_bitwidth == 16:
        low = (S - high.to(tl.float32)).to(DT)
        product = tl.dot(b, tl.trans(low), acc=product, input_precision=PRECISION)
    return product


# Where a kernel's chunks lie and the states beside them. Not compiled in, as in `triton_forward`.
PLACES = ["L", "num_sequences", "search", "first_chunk", "num_chunks", "kept", "first_state", "first_gradient"]


@triton.jit(do_not_specialize=PLACES)
def gradient_x(
    dy, dfinal, x, dt, A, B, C, D, z, bias, initial, own, cu, states, dstates, chunk_steps, dx, ddt, dz, dw, down,
    dparams,
    L, num_sequences, search, first_chunk, num_chunks, kept, first_state, first_gradient, H, per_group, low, high,
    sy_b, sy_l, sy_h, sy_p, sf_s, sf_h, sf_p, sf_n,
    sx_b, sx_l, sx_h, sx_p, sdt_b, sdt_l, sdt_h, sA, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n,
    sD_h, sD_p, sz_b, sz_l, sz_h, sz_p, sbias, si_s, si_h, si_p, si_n, so_b, so_l, so_h,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, D_WIDTH: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_OWN: tl.constexpr, GATED: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Write dx, ddt, dz, dw, do of a chunk of a head; dA, d dt_bias and dD go to `dparams` (slots, H, 2 + D_WIDTH).

    With GATED dy behind the gate lies in dx, and what rounding took from it in dz: see `advance`.
    """
    HALVES: tl.constexpr = HAS_Z and DT.primitive_bitwidth == 16
    PB: tl.constexpr = (P + BP - 1) // BP
    SIZE: tl.constexpr = PB * BP * BN
    pid = tl.program_id(0).to(tl.int64)
    i_h = pid % H
    slot, i_s, start, count, t, left = place_of(
        cu, pid // H, L, num_sequences, search, first_chunk, num_chunks, Q, PACKED
    )
    row, i_g = i_s * 0 if PACKED else i_s, i_h // per_group
    o_l, o_n = tl.arange(0, Q), tl.arange(0, BN)
    rows, ok = t + o_l, o_l < left
    p_B, sB = first_row(B + row * sB_b + i_g * sB_g, start, count, sB_l, REVERSE)
    p_C, sC = first_row(C + row * sC_b + i_g * sC_g, start, count, sC_l, REVERSE)
    p_x, sx = first_row(x + row * sx_b + i_h * sx_h, start, count, sx_l, REVERSE)
    p_y, sy = first_row(dy + row * sy_b + i_h * sy_h, start, count, sy_l, REVERSE)
    p_z, sz = first_row(z + row * sz_b + i_h * sz_h, start, count, sz_l, REVERSE)
    at_out = (row * L * H + i_h) * P
    p_dx, s_out = first_row(dx + at_out, start, count, H * P, REVERSE)
    p_dz, _ = first_row(dz + at_out, start, count, H * P, REVERSE)
    b_B = load_tile(pointers(p_B, rows, sB, o_n, sB_n), ok, o_n, N, BN, DT)
    b_C = load_tile(pointers(p_C, rows, sC, o_n, sC_n), ok, o_n, N, BN, DT)
    b_w, whole, part, end, end_part = steps_of(chunk_steps, slot * H + i_h, o_l, Q)
    factor, from_start = tl.exp2(end + end_part), tl.exp2(whole + part)
    to_end = tl.exp2((end - whole) + (end_part - part))
    K = tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION)
    counts = o_l[None, :] > o_l[:, None] if HAS_OWN else o_l[None, :] >= o_l[:, None]
    decay = decay_between(K, whole[None, :], part[None, :], whole[:, None], part[:, None], counts, FAST)
    M = (K * decay).to(DT)
    if HAS_OWN:
        p_own, so = first_row(own + row * so_b + i_h * so_h, start, count, so_l, REVERSE)
        b_own = load_rows(p_own, rows, so, ok).to(tl.float32)
        own_score = tl.sum(tl.where(o_l[:, None] == o_l[None, :], K, 0.0), 1)
        own_factor = own_score * b_own
    p_params = dparams + (slot * H + i_h) * (2 + D_WIDTH)

    # within the chunk
    dM = tl.zeros([Q, Q], tl.float32)
    for i_p in tl.static_range(PB):
        o_p = i_p * BP + tl.arange(0, BP)
        b_x = load_tile(pointers(p_x, rows, sx, o_p, sx_p), ok, o_p, P, BP, DT)
        if GATED:
            dy_high = load_tile(pointers(p_dx, rows, s_out, o_p, 1), ok, o_p, P, BP, DT)
            if HALVES:
                dy_low = load_tile(pointers(p_dz, rows, s_out, o_p, 1), ok, o_p, P, BP, DT)
        else:
            b_dy = _gated(p_y, p_z, rows, sy, sz, sy_p, sz_p, ok, o_p, P, BP, HAS_Z, FAST)
            dy_high = b_dy.to(DT)
            if HALVES:
                dy_low = (b_dy - dy_high.to(tl.float32)).to(DT)
        dM = tl.dot(b_x, tl.trans(dy_high), acc=dM, input_precision=PRECISION)
        if HALVES:  # dA adds up many products with it, whose signs differ
            dM = tl.dot(b_x, tl.trans(dy_low), acc=dM, input_precision=PRECISION)
    if D_WIDTH == 1 or HAS_OWN:
        diagonal = tl.sum(tl.where(o_l[:, None] == o_l[None, :], dM, 0.0), 1)
    boundary = row * kept + start // Q + t // Q
    dM *= decay * K
    direct = tl.sum(dM, 1)
    fence(FAST)
    earlier = (o_l[:, None] > o_l[None, :]).to(tl.float32).to(DT)
    W = dM * b_w[:, None]
    W_high = W.to(DT)
    crossing = tl.dot(earlier, W_high, input_precision=PRECISION)
    if DT.primitive_bitwidth == 16:  # as above
        W_low = (W - W_high.to(tl.float32)).to(DT)
        crossing = tl.dot(earlier, W_low, acc=crossing, input_precision=PRECISION)
    da = tl.sum(tl.where(o_l[:, None] <= o_l[None, :], crossing, 0.0), 1)

    # from the state before it, and to the state after it
    through_start, through_end = tl.zeros([Q], tl.float32), tl.zeros([Q], tl.float32)
    if D_WIDTH == 1:
        b_D = tl.load(D + i_h * sD_h).to(tl.float32)
    for i_p in tl.static_range(PB):
        o_p = i_p * BP + tl.arange(0, BP)
        ok_out = ok[:, None] & (o_p < P)[None, :]
        if D_WIDTH > 1:
            b_D = tl.load(D + i_h * sD_h + o_p.to(tl.int64) * sD_p, mask=o_p < P, other=0.0).to(tl.float32)[None, :]
        S, dS = _states_around(
            states, initial, dstates, dfinal, boundary, first_state, first_gradient, i_s, i_h, H, t, left,
            si_s, si_h, si_p, si_n, sf_s, sf_h, sf_p, sf_n, o_p, o_n, P, N, BN, SIZE, Q, HAS_INITIAL, HAS_FINAL,
        )  # fmt: skip
        da += tl.sum(S * dS) * factor
        if GATED:
            fence(FAST)
        b_x = load_tile(pointers(p_x, rows, sx, o_p, sx_p), ok, o_p, P, BP, DT)
        if GATED:
            b_dy = load_tile(pointers(p_dx, rows, s_out, o_p, 1), ok, o_p, P, BP, tl.float32)
            if HALVES:
                b_dy += load_tile(pointers(p_dz, rows, s_out, o_p, 1), ok, o_p, P, BP, tl.float32)
        else:
            b_dy = _gated(p_y, p_z, rows, sy, sz, sy_p, sz_p, ok, o_p, P, BP, HAS_Z, FAST)
        b_y = _times_state(b_C, S, DT, PRECISION, HAS_INITIAL) * from_start[:, None]
        through_start += tl.sum(b_y * b_dy, 1)
        if HAS_Z:
            if GATED:
                fence(FAST)
            stepped = (b_x.to(tl.float32) * b_w[:, None]).to(DT)
            b_y = tl.dot(tl.trans(M), stepped, acc=b_y, input_precision=PRECISION)
            if HAS_OWN:
                b_y += own_factor[:, None] * b_x.to(tl.float32)
            if D_WIDTH > 0:
                b_y += b_D * b_x.to(tl.float32)
            b_z = load_tile(pointers(p_z, rows, sz, o_p, sz_p), ok, o_p, P, BP, tl.float32)
            b_dz = load_tile(pointers(p_y, rows, sy, o_p, sy_p), ok, o_p, P, BP, tl.float32)
            b_dz = gate_gradient(b_dz, b_y, b_z, FAST)
            if GATED:
                tl.debug_barrier()  # what lies there has been read
            tl.store(pointers(p_dz, rows, s_out, o_p, 1), b_dz.to(dz.dtype.element_ty), mask=ok_out)
        dX = _times_state(b_B, dS, DT, PRECISION, HAS_FINAL) * to_end[:, None]
        through_end += tl.sum(dX * b_x.to(tl.float32), 1)
        dX = tl.dot(M, b_dy.to(DT), acc=dX, input_precision=PRECISION)
        b_dx = dX * b_w[:, None]
        if HAS_OWN:
            b_dx += own_factor[:, None] * b_dy
        if D_WIDTH > 0:
            b_dx += b_D * b_dy
        if D_WIDTH > 1:
            tl.store(p_params + 2 + o_p, tl.sum(b_dy * b_x.to(tl.float32), 0), mask=o_p < P)
        if GATED:
            tl.debug_barrier()
        tl.store(pointers(p_dx, rows, s_out, o_p, 1), b_dx.to(dx.dtype.element_ty), mask=ok_out)

    direct += through_end
    through_end *= b_w  # row t has what goes from before t, or to t and later
    da += tl.sum(tl.where(o_l[:, None] <= o_l[None, :], through_start[None, :], through_end[None, :]), 1)
    da = tl.where(ok, da, 0.0)
    b_A = tl.load(A + i_h * sA).to(tl.float32)
    b_bias = tl.load(bias + i_h * sbias).to(tl.float32) if HAS_BIAS else 0.0
    p_dt, sdt = first_row(dt + row * sdt_b + i_h * sdt_h, start, count, sdt_l, REVERSE)
    raw, free, delta = step_sizes(load_rows(p_dt, rows, sdt, ok), ok, b_bias, low, high, SOFTPLUS)
    at_step = row * L * H + i_h
    if HAS_WEIGHT:
        b_ddt = b_A * da
        p_out, s_out = first_row(dw + at_step, start, count, H, REVERSE)
        tl.store(p_out + rows.to(tl.int64) * s_out, direct.to(dw.dtype.element_ty), mask=ok)
    else:
        delta = b_w
        b_ddt = direct + b_A * da
    if HAS_OWN:
        p_out, s_out = first_row(down + at_step, start, count, H, REVERSE)
        tl.store(p_out + rows.to(tl.int64) * s_out, (diagonal * own_score).to(down.dtype.element_ty), mask=ok)
    b_ddt = tl.where((free >= low) & (free <= high), b_ddt, 0.0)
    if SOFTPLUS:
        b_ddt *= sigmoid(raw)
    b_ddt = tl.where(ok, b_ddt, 0.0)
    p_ddt, sddt = first_row(ddt + at_step, start, count, H, REVERSE)
    tl.store(p_ddt + rows.to(tl.int64) * sddt, b_ddt.to(ddt.dtype.element_ty), mask=ok)
    if D_WIDTH == 1:
        of_A, of_bias, of_D = tl.reduce((delta * da, b_ddt, diagonal), 0, sums_of_three)
        tl.store(p_params + 2, of_D)
    else:
        of_A, of_bias = tl.sum(delta * da), tl.sum(b_ddt)
    tl.store(p_params, of_A)
    tl.store(p_params + 1, of_bias)


@triton.jit(do_not_specialize=[*PLACES, "heads"])
def gradient_BC(  # noqa: N802
    dy, dfinal, x, B, C, z, initial, own, cu, states, dstates, chunk_steps, dB, dC,
    L, num_sequences, search, first_chunk, num_chunks, kept, first_state, first_gradient, H, per_group, heads,
    part_size,
    sy_b, sy_l, sy_h, sy_p, sf_s, sf_h, sf_p, sf_n, sx_b, sx_l, sx_h, sx_p,
    sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n, sz_b, sz_l, sz_h, sz_p, si_s, si_h, si_p, si_n,
    so_b, so_l, so_h,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, HAS_Z: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr, HAS_OWN: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, STAGES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Write dB and dC of a chunk from `heads` heads of a group.

    They go to part i of their buffers, `part_size` elements each, where the program is the i-th of its group's.
    """
    PB: tl.constexpr = (P + BP - 1) // BP
    SIZE: tl.constexpr = PB * BP * BN
    pid = tl.program_id(0).to(tl.int64)
    parts, groups = per_group // heads, H // per_group
    i_part, i_g = pid % parts, pid // parts % groups
    slot, i_s, start, count, t, left = place_of(
        cu, pid // (parts * groups), L, num_sequences, search, first_chunk, num_chunks, Q, PACKED
    )
    row = i_s * 0 if PACKED else i_s
    o_l, o_n = tl.arange(0, Q), tl.arange(0, BN)
    rows, ok = t + o_l, o_l < left
    boundary = row * kept + start // Q + t // Q
    acc_B, acc_C = tl.zeros([Q, BN], tl.float32), tl.zeros([Q, BN], tl.float32)
    acc_K = tl.zeros([Q, Q], tl.float32)
    for k in tl.range(0, heads, num_stages=STAGES):
        i_h = i_g * per_group + i_part * heads + k
        p_x, sx = first_row(x + row * sx_b + i_h * sx_h, start, count, sx_l, REVERSE)
        p_y, sy = first_row(dy + row * sy_b + i_h * sy_h, start, count, sy_l, REVERSE)
        p_z, sz = first_row(z + row * sz_b + i_h * sz_h, start, count, sz_l, REVERSE)
        b_w, whole, part, end, end_part = steps_of(chunk_steps, slot * H + i_h, o_l, Q)
        from_start, to_end = tl.exp2(whole + part), tl.exp2((end - whole) + (end_part - part))
        dM = tl.zeros([Q, Q], tl.float32)
        for i_p in tl.static_range(PB):
            o_p = i_p * BP + tl.arange(0, BP)
            b_x = load_tile(pointers(p_x, rows, sx, o_p, sx_p), ok, o_p, P, BP, DT)
            b_dy = _gated(p_y, p_z, rows, sy, sz, sy_p, sz_p, ok, o_p, P, BP, HAS_Z, FAST)
            S, dS = _states_around(
                states, initial, dstates, dfinal, boundary, first_state, first_gradient, i_s, i_h, H, t, left,
                si_s, si_h, si_p, si_n, sf_s, sf_h, sf_p, sf_n, o_p, o_n, P, N, BN, SIZE, Q, HAS_INITIAL, HAS_FINAL,
            )  # fmt: skip
            dM = tl.dot(b_x, tl.trans(b_dy.to(DT)), acc=dM, input_precision=PRECISION)
            acc_C = tl.dot((b_dy * from_start[:, None]).to(DT), S.to(DT), acc=acc_C, input_precision=PRECISION)
            weighted = (b_x.to(tl.float32) * (to_end * b_w)[:, None]).to(DT)
            acc_B = tl.dot(weighted, dS.to(DT), acc=acc_B, input_precision=PRECISION)
        decay = decay_between(
            dM, whole[None, :], part[None, :], whole[:, None], part[:, None], o_l[None, :] >= o_l[:, None], FAST
        )
        if HAS_OWN:
            p_own, so = first_row(own + row * so_b + i_h * so_h, start, count, so_l, REVERSE)
            b_own = load_rows(p_own, rows, so, ok).to(tl.float32)
            acc_K += tl.where(o_l[:, None] == o_l[None, :], dM * b_own[:, None], dM * decay * b_w[:, None])
        else:
            acc_K += dM * decay * b_w[:, None]

    p_B, sB = first_row(B + row * sB_b + i_g * sB_g, start, count, sB_l, REVERSE)
    p_C, sC = first_row(C + row * sC_b + i_g * sC_g, start, count, sC_l, REVERSE)
    b_B = load_tile(pointers(p_B, rows, sB, o_n, sB_n), ok, o_n, N, BN, DT)
    b_C = load_tile(pointers(p_C, rows, sC, o_n, sC_n), ok, o_n, N, BN, DT)
    dK = acc_K.to(DT)
    acc_B = tl.dot(dK, b_C, acc=acc_B, input_precision=PRECISION)
    acc_C = tl.dot(tl.trans(dK), b_B, acc=acc_C, input_precision=PRECISION)
    at_BC = i_part * part_size + (row * L * groups + i_g) * N
    p_dB, sdB = first_row(dB + at_BC, start, count, groups * N, REVERSE)
    p_dC, sdC = first_row(dC + at_BC, start, count, groups * N, REVERSE)
    ok_BC = ok[:, None] & (o_n < N)[None, :]
    tl.store(pointers(p_dB, rows, sdB, o_n, 1), acc_B.to(dB.dtype.element_ty), mask=ok_BC)
    tl.store(pointers(p_dC, rows, sdC, o_n, 1), acc_C.to(dC.dtype.element_ty), mask=ok_BC)


@triton.jit(do_not_specialize=[*PLACES, "heads"])
def gradient_BC_of_one(  # noqa: N802
    dy, dfinal, x, B, C, z, initial, own, cu, states, dstates, chunk_steps, dB, dC,
    L, num_sequences, search, first_chunk, num_chunks, kept, first_state, first_gradient, H, per_group, heads,
    part_size,
    sy_b, sy_l, sy_h, sy_p, sf_s, sf_h, sf_p, sf_n, sx_b, sx_l, sx_h, sx_p,
    sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n, sz_b, sz_l, sz_h, sz_p, si_s, si_h, si_p, si_n,
    so_b, so_l, so_h,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, HAS_Z: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr, HAS_OWN: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, STAGES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Do what `gradient_BC` does, where `heads` is 1."""
    PB: tl.constexpr = (P + BP - 1) // BP
    SIZE: tl.constexpr = PB * BP * BN
    pid = tl.program_id(0).to(tl.int64)
    i_h, groups = pid % H, H // per_group
    i_g, i_part = i_h // per_group, i_h % per_group
    slot, i_s, start, count, t, left = place_of(
        cu, pid // H, L, num_sequences, search, first_chunk, num_chunks, Q, PACKED
    )
    row = i_s * 0 if PACKED else i_s
    o_l, o_n = tl.arange(0, Q), tl.arange(0, BN)
    rows, ok = t + o_l, o_l < left
    boundary = row * kept + start // Q + t // Q
    p_B, sB = first_row(B + row * sB_b + i_g * sB_g, start, count, sB_l, REVERSE)
    p_C, sC = first_row(C + row * sC_b + i_g * sC_g, start, count, sC_l, REVERSE)
    p_x, sx = first_row(x + row * sx_b + i_h * sx_h, start, count, sx_l, REVERSE)
    p_y, sy = first_row(dy + row * sy_b + i_h * sy_h, start, count, sy_l, REVERSE)
    p_z, sz = first_row(z + row * sz_b + i_h * sz_h, start, count, sz_l, REVERSE)
    at_BC = i_part * part_size + (row * L * groups + i_g) * N
    p_dB, sdB = first_row(dB + at_BC, start, count, groups * N, REVERSE)
    p_dC, sdC = first_row(dC + at_BC, start, count, groups * N, REVERSE)
    ok_BC = ok[:, None] & (o_n < N)[None, :]
    b_w, whole, part, end, end_part = steps_of(chunk_steps, slot * H + i_h, o_l, Q)

    dM = tl.zeros([Q, Q], tl.float32)
    for i_p in tl.static_range(PB):
        o_p = i_p * BP + tl.arange(0, BP)
        b_x = load_tile(pointers(p_x, rows, sx, o_p, sx_p), ok, o_p, P, BP, DT)
        b_dy = _gated(p_y, p_z, rows, sy, sz, sy_p, sz_p, ok, o_p, P, BP, HAS_Z, FAST)
        dM = tl.dot(b_x, tl.trans(b_dy.to(DT)), acc=dM, input_precision=PRECISION)
    decay = decay_between(
        dM, whole[None, :], part[None, :], whole[:, None], part[:, None], o_l[None, :] >= o_l[:, None], FAST
    )
    dK = dM * decay * b_w[:, None]
    if HAS_OWN:
        p_own, so = first_row(own + row * so_b + i_h * so_h, start, count, so_l, REVERSE)
        b_own = load_rows(p_own, rows, so, ok).to(tl.float32)
        dK = tl.where(o_l[:, None] == o_l[None, :], dM * b_own[:, None], dK)
    dK = dK.to(DT)

    b_B = load_tile(pointers(p_B, rows, sB, o_n, sB_n), ok, o_n, N, BN, DT)
    acc = tl.dot(tl.trans(dK), b_B, input_precision=PRECISION)
    from_start = tl.exp2(whole + part)
    for i_p in tl.static_range(PB):
        o_p = i_p * BP + tl.arange(0, BP)
        b_dy = _gated(p_y, p_z, rows, sy, sz, sy_p, sz_p, ok, o_p, P, BP, HAS_Z, FAST)
        S = _kept_states(
            states, initial, boundary - first_state, i_s, i_h, H, si_s, si_h, si_p, si_n, o_p, o_n,
            (left > 0) & (t > 0), (left > 0) & (t == 0), P, N, BN, SIZE, HAS_INITIAL,
        ).to(DT)  # fmt: skip
        acc = tl.dot((b_dy * from_start[:, None]).to(DT), S, acc=acc, input_precision=PRECISION)
    tl.store(pointers(p_dC, rows, sdC, o_n, 1), acc.to(dC.dtype.element_ty), mask=ok_BC)

    b_C = load_tile(pointers(p_C, rows, sC, o_n, sC_n), ok, o_n, N, BN, DT)
    acc = tl.dot(dK, b_C, input_precision=PRECISION)
    to_end = tl.exp2((end - whole) + (end_part - part))
    for i_p in tl.static_range(PB):
        o_p = i_p * BP + tl.arange(0, BP)
        b_x = load_tile(pointers(p_x, rows, sx, o_p, sx_p), ok, o_p, P, BP, DT)
        dS = _kept_states(
            dstates, dfinal, boundary - first_gradient, i_s, i_h, H, sf_s, sf_h, sf_p, sf_n, o_p, o_n, left > Q,
            (left > 0) & (left <= Q), P, N, BN, SIZE, HAS_FINAL,
        ).to(DT)  # fmt: skip
        weighted = (b_x.to(tl.float32) * (to_end * b_w)[:, None]).to(DT)
        acc = tl.dot(weighted, dS, acc=acc, input_precision=PRECISION)
    tl.store(pointers(p_dB, rows, sdB, o_n, 1), acc.to(dB.dtype.element_ty), mask=ok_BC)


@triton.jit(do_not_specialize=["rows"])
def reduce_params(
    dparams, dA, dbias, dD, rows, H,
    D_WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up what the chunks left in `dparams` (rows, H, 2 + D_WIDTH), always in the same order."""
    WIDTH: tl.constexpr = 2 + D_WIDTH
    i_h = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(dparams + (row[:, None] * H + i_h) * WIDTH + column[None, :], mask=mask, other=0.0)
    total = tl.sum(total, 0)
    tl.store(dA + i_h + column * 0, total.to(dA.dtype.element_ty), mask=column == 0)
    if HAS_BIAS:
        tl.store(dbias + i_h + column * 0, total.to(dbias.dtype.element_ty), mask=column == 1)
    if D_WIDTH > 0:
        is_D = (column >= 2) & (column < WIDTH)
        tl.store(dD + i_h * D_WIDTH + column - 2, total.to(dD.dtype.element_ty), mask=is_D)


@triton.jit(do_not_specialize=["num_parts"])
def reduce_parts(parts_B, parts_C, dB, dC, size, num_parts, BLOCK: tl.constexpr):
    """Add up the parts (num_parts, size) of dB and dC, always in the same order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = o < size
    total_B, total_C = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for _part in range(num_parts):
        total_B += tl.load(parts_B + o, mask=ok, other=0.0)
        total_C += tl.load(parts_C + o, mask=ok, other=0.0)
        parts_B += size
        parts_C += size
    tl.store(dB + o, total_B.to(dB.dtype.element_ty), mask=ok)
    tl.store(dC + o, total_C.to(dC.dtype.element_ty), mask=ok)
