"""Triton kernels of the forward selective scan.

Each program walks one sequence (or one segment of it) with a block of channels, T steps at a time: it loads the next
tile's u, delta and z, then runs the recurrence over this one, all states of a thread together. Up to UNROLL of them
stay in registers from tile to tile; more rest in `carry`, which the L1 cache holds.

Where channels are too few to fill the GPU, the length is split: `SUMMARY` runs first, for the state of each segment
from a start of zero and its sum of Δ (the product of its decays is exp(A ΣΔ)), `combine` then finds the state that each
segment starts from.
"""


# What Triton compiles has its own types, and it knows no unpacking into a tuple.
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from mambaverse.kernels.selective_scan.triton_common import (
    JOINED,
    decays,
    load,
    load_input,
    load_pairs,
    load_rows,
    sequence_of,
    sigmoid,
    step_size,
    store,
    store_rows,
    touch_tile,
    unpack,
    widen,
)
from mambaverse.kernels.selective_scan.triton_threads import lane_of, pair_sums, spread, thread_of

SCAN, SUMMARY, GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # modes


@triton.jit
def load_tile(
    p_u, p_delta, p_z, which, left, u_step, delta_step, z_step,
    MODE: tl.constexpr, HAS_Z: tl.constexpr, T: tl.constexpr, SHARE: tl.constexpr, FULL: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Load the rows of u, delta and, where `scan_tile` needs it, z."""
    b_u = load_rows(p_u, u_step, which, left, T, SHARE, FULL, FAST)
    b_delta = load_rows(p_delta, delta_step, which, left, T, SHARE, FULL, FAST)
    b_z = b_u
    if HAS_Z and MODE != SUMMARY:
        b_z = load_rows(p_z, z_step, which, left, T, SHARE, FULL, FAST)
    return b_u, b_delta, b_z


@triton.jit
def _advance(
    hs, A, dt, x, out, p_B, p_C, p_BC, p_state, B_step, C_step, sB_n, sC_n, left, m_d, m_save,
    dim: tl.constexpr, N: tl.constexpr, SAVE: tl.constexpr, CHUNK: tl.constexpr,
    MODE: tl.constexpr, OWN_BC: tl.constexpr, BC_STEP: tl.constexpr, PAIR: tl.constexpr, FULL: tl.constexpr,
    T: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Take UNROLL states through T steps; return them and, in SCAN, `out` with what they add to it.

    If SAVE, the states before every CHUNK-th step go to `p_state` (chunks, N, dim), before the first if `m_save`.

    All of the states take a step together, and their decays are a step ahead: a warp that takes one state through a
    step after the other spends its time waiting for the exponential.
    """
    outs = ()
    a = decays(dt[0], A, UNROLL)
    for i in tl.static_range(T):
        if SAVE and i % CHUNK == 0:
            for k in tl.static_range(UNROLL):
                store(p_state + (i // CHUNK * N + k) * dim, hs[k], m_save if i == 0 else m_d, True, FAST, False)
        next_a = a
        if i + 1 < T:
            next_a = decays(dt[i + 1], A, UNROLL)
        row = i if FULL else tl.minimum(i, left - 1)
        if not OWN_BC:
            words = load_pairs(p_BC + row * BC_STEP, UNROLL, PAIR, FAST)
        after = ()
        if MODE == SCAN:
            even, odd = out[i], tl.zeros([BD], tl.float32)
        for k in tl.static_range(UNROLL):
            if OWN_BC:
                b = widen(load_input(p_B + row * B_step + k * sB_n, FAST), p_B, FAST)
                c = widen(load_input(p_C + row * C_step + k * sC_n, FAST), p_C, FAST)
            else:
                b, c = unpack(words[k], PAIR, FAST)
            if MODE == GRADIENT:
                h = a[k] * (hs[k] + x[i] * c)
            else:
                h = x[i] * b + a[k] * hs[k]
            if MODE == SCAN:
                if k % 2 == 0:
                    even = even + c * h
                else:
                    odd = odd + c * h
            after = after + (h,)
        if MODE == SCAN:
            outs = outs + (even + odd,)
        hs, a = after, next_a
    return hs, outs


@triton.jit
def scan_tile(
    hs, A, b_u, b_delta, b_z, p_u, p_delta, p_z, p_y, p_B, p_C, p_BC, p_A2, p_before, p_after, p_state,
    B_step, C_step, sB_n, sC_n, which, lane, left, m_d, m_save, b_D, b_bias,
    y_step: tl.constexpr, dim: tl.constexpr, N: tl.constexpr,
    MODE: tl.constexpr, SOFTPLUS: tl.constexpr, SCALE: tl.constexpr, HAS_Z: tl.constexpr, SAVE: tl.constexpr,
    CHUNK: tl.constexpr, OWN_BC: tl.constexpr, BC_STEP: tl.constexpr, PAIR: tl.constexpr, FULL: tl.constexpr,
    EVEN: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr, SHARE: tl.constexpr,
    HELD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Advance every state by T steps, or by the `left` steps that there are; return the states and the sum of Δ.

    The rows are those of `load_tile`, the pointers beside them say what they point to. If HELD, `hs` are all states of
    a thread and `A` theirs; else the states (N / SHARE, BD) come from `p_before` and go to `p_after`.
    """
    dt, x, skip = (), (), ()
    total = tl.zeros([BD], tl.float32)
    for j in tl.static_range(T // SHARE):
        dt_i = step_size(widen(b_delta[j], p_delta, FAST), b_bias, SOFTPLUS)
        here = SHARE * j + which < left
        if not FULL:
            dt_i = tl.where(here, dt_i, 0.0)  # a step that is not there changes no state
        u_i = widen(b_u[j], p_u, FAST)
        if MODE == SCAN:
            skip = skip + (b_D * u_i,)
        if MODE == GRADIENT:
            if HAS_Z:
                z_i = widen(b_z[j], p_z, FAST)
                u_i = u_i * z_i * sigmoid(z_i, FAST)
            if SCALE != 1.0:
                u_i = u_i * SCALE
            x = x + (u_i if FULL else tl.where(here, u_i, 0.0),)
        else:
            x = x + (dt_i * u_i if FULL else tl.where(here, dt_i * u_i, 0.0),)
        dt = dt + (dt_i,)
        total += dt_i
    dt, x = spread(dt, lane, T, SHARE, BD, FAST), spread(x, lane, T, SHARE, BD, FAST)
    out = ()
    if MODE == SCAN:
        for _ in tl.static_range(T):
            out = out + (tl.zeros([BD], tl.float32),)
    if HELD:
        hs, out = _advance(
            hs, A, dt, x, out, p_B, p_C, p_BC, p_state, B_step, C_step, sB_n, sC_n, left, m_d, m_save,
            dim, N, SAVE, CHUNK, MODE, OWN_BC, BC_STEP, PAIR, FULL, T, BD, UNROLL, FAST,
        )  # fmt: skip
    else:
        for n_0 in range(0, N // SHARE, UNROLL):
            block_A, block = (), ()
            for k in tl.static_range(UNROLL):
                block_A = block_A + (load_input(p_A2 + (n_0 + k) * dim, FAST),)
                block = block + (load(p_before + (n_0 + k) * BD, FAST),)
            block, out = _advance(
                block, block_A, dt, x, out, p_B + n_0 * sB_n, p_C + n_0 * sC_n, p_BC + n_0, p_state + n_0 * dim,
                B_step, C_step, sB_n, sC_n, left, m_d, m_save,
                dim, N, SAVE, CHUNK, MODE, OWN_BC, BC_STEP, PAIR, FULL, T, BD, UNROLL, FAST,
            )  # fmt: skip
            for k in tl.static_range(UNROLL):
                store(p_after + (n_0 + k) * BD, block[k], None, False, FAST)
    if MODE == SCAN:
        sums, out = pair_sums(out, which, T, SHARE, BD, FAST), ()
        for j in tl.static_range(T // SHARE):
            y_i = sums[j] + skip[j]
            if HAS_Z:
                z_i = widen(b_z[j], p_z, FAST)
                y_i = y_i * z_i * sigmoid(z_i, FAST)
            if SCALE != 1.0:
                y_i = y_i * SCALE
            out = out + (y_i,)
        store_rows(p_y, out, y_step, which, left, m_d, T, SHARE, FULL, EVEN, FAST)
    return hs, total


@triton.jit(do_not_specialize=["batch", "L", "segment", "sB_l", "sC_l"])
def scan(
    u, delta, z, B, C, D, bias, h0, u_2, delta_2, z_2, B_2, C_2, D_2, bias_2, h0_2,
    BC, A2, cu, y, final, states, carry, starts, ends, sums,
    su_b, su_d, sd_b, sd_d, sz_b, sz_d, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n, sh_s, sh_d, sh_n,
    batch, L, group_dim, segment, N: tl.constexpr, su_l: tl.constexpr, sd_l: tl.constexpr, sz_l: tl.constexpr,
    dim: tl.constexpr, MODE: tl.constexpr, BOTH: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    SCALE: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, SAVE: tl.constexpr, OWN_BC: tl.constexpr, BC_STEP: tl.constexpr,
    PAIR: tl.constexpr, EVEN: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr, TAIL: tl.constexpr,
    BD: tl.constexpr, WARP: tl.constexpr, UNROLL: tl.constexpr, SHARE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Scan (SCAN), or find what a segment does to a state (SUMMARY) or to the gradient of a state (GRADIENT).

    Grid: (blocks of channels of all groups, times sequences; directions; segments). If BOTH, the second direction is
    the reverse one and has inputs of its own (`u_2`, ...), with the same strides; all that the kernels write has a
    leading axis of directions, and so have BC and A2.

    SCAN writes y times SCALE, the final state and, if SAVE, the state before every chunk but the first; if SPLIT it
    reads the states before the segments from `starts` (sequences, segments, N, D). The other two write what a start of
    zero ends as to `ends` (shape of `starts`) and ΣΔ to `sums` (sequences, segments, D). GRADIENT walks the other way,
    and takes dy times SCALE for u. SHARE threads, one or two, share a channel: each has N / SHARE of its states and
    every SHARE-th step of what is done once a step.
    """
    outputs = (BC, A2, cu, y, final, states, carry, starts, ends, sums)
    strides = (
        su_b, su_d, sd_b, sd_d, sz_b, sz_d, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n, sh_s, sh_d, sh_n,
        batch, L, group_dim, segment,
    )  # fmt: skip
    if not BOTH or tl.program_id(1) == 0:  # each order has code of its own: strides as arguments cost 5 to 7 %
        _walk(
            (u, delta, z, B, C, D, bias, h0), outputs, strides, N, su_l, sd_l, sz_l, dim, MODE, REVERSE, SOFTPLUS,
            SCALE, HAS_D, HAS_Z, HAS_BIAS, HAS_H0, PACKED, SPLIT, SAVE, OWN_BC, BC_STEP, PAIR, EVEN, CHUNK, T, TAIL,
            BD, WARP, UNROLL, SHARE, FAST,
        )  # fmt: skip
    else:
        _walk(
            (u_2, delta_2, z_2, B_2, C_2, D_2, bias_2, h0_2), outputs, strides, N, su_l, sd_l, sz_l, dim, MODE, True,
            SOFTPLUS, SCALE, HAS_D, HAS_Z, HAS_BIAS, HAS_H0, PACKED, SPLIT, SAVE, OWN_BC, BC_STEP, PAIR, EVEN, CHUNK,
            T, TAIL, BD, WARP, UNROLL, SHARE, FAST,
        )  # fmt: skip


@triton.jit
def _walk(
    inputs, outputs, strides, N: tl.constexpr, su_l: tl.constexpr, sd_l: tl.constexpr, sz_l: tl.constexpr,
    dim: tl.constexpr, MODE: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, SCALE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr, PACKED: tl.constexpr,
    SPLIT: tl.constexpr, SAVE: tl.constexpr, OWN_BC: tl.constexpr, BC_STEP: tl.constexpr, PAIR: tl.constexpr,
    EVEN: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr, TAIL: tl.constexpr, BD: tl.constexpr,
    WARP: tl.constexpr, UNROLL: tl.constexpr, SHARE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """See `scan`."""
    u, delta, z, B, C, D, bias, h0 = inputs
    BC, A2, cu, y, final, states, carry, starts, ends, sums = outputs
    (
        su_b, su_d, sd_b, sd_d, sz_b, sz_d, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n, sh_s, sh_d, sh_n,
        batch, L, group_dim, segment,
    ) = strides  # fmt: skip
    CHANNELS: tl.constexpr = BD // SHARE
    OWN: tl.constexpr = N // SHARE  # states of a thread
    HELD: tl.constexpr = OWN == UNROLL  # in registers, all the way
    blocks = tl.cdiv(group_dim, CHANNELS)
    i_p, i_c, num_segments = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    i_d, i_s = i_p % (blocks * (dim // group_dim)), i_p // (blocks * (dim // group_dim))
    i_g = i_d // blocks
    i_2 = tl.program_id(1).to(tl.int64)
    num_sequences = tl.num_programs(0) // (blocks * (dim // group_dim))
    i_q = i_2 * num_sequences + i_s  # among the sequences of both directions
    place = tl.arange(0, BD)
    lane = place
    if FAST:
        lane = lane_of(place)
    which, channel = thread_of(place, SHARE, WARP)
    inside = (i_d % blocks) * CHANNELS + channel
    m_d = inside < group_dim
    o_d = i_g * group_dim + tl.minimum(inside, group_dim - 1)  # the last channel again where there is none
    o_n = which * OWN

    start, length = sequence_of(cu, i_s, L, PACKED)
    i_b = i_s * 0 if PACKED else i_s
    low = i_c * segment
    count = tl.maximum(tl.minimum(length - low, segment), 0).to(tl.int32)
    at = low + count - 1 if MODE == GRADIENT else low  # the walk's first step, counted in the order of the scan
    first = start + (length - 1 - at if REVERSE else at)
    sign: tl.constexpr = -1 if (MODE == GRADIENT) != REVERSE else 1
    u_step: tl.constexpr = su_l * sign
    delta_step: tl.constexpr = sd_l * sign
    z_step: tl.constexpr = sz_l * sign
    y_step: tl.constexpr = dim * sign
    B_step, C_step = sB_l.to(tl.int64) * sign, sC_l.to(tl.int64) * sign

    p_u = u + i_b * su_b + first * su_l + o_d * su_d
    p_delta = delta + i_b * sd_b + first * sd_l + o_d * sd_d
    p_z = z + i_b * sz_b + first * sz_l + o_d * sz_d
    p_y = y + ((i_2 * batch + i_b) * L + first) * dim + o_d
    p_BC = BC + ((i_2 * batch + i_b) * L + first) * BC_STEP + i_g * N + o_n.to(tl.int64)
    p_B = B + i_b * sB_b + first * sB_l + o_d * sB_g + o_n * sB_n
    p_C = C + i_b * sC_b + first * sC_l + o_d * sC_g + o_n * sC_n
    p_A2 = A2 + i_2 * N * dim + o_d + o_n * dim
    if FAST and count > 0:  # the first two tiles, before anything is waited for
        for i in tl.static_range(2):
            touch_tile(
                p_u, p_delta, p_z, p_BC, lane, i * T, count, u_step, delta_step, z_step,
                sign * BC_STEP, HAS_Z and MODE != SUMMARY, OWN_BC, T, WARP,
            )  # fmt: skip
    b_bias = widen(load_input(bias + o_d, FAST), bias, FAST) if HAS_BIAS else tl.zeros([BD], tl.float32)
    b_D = widen(load_input(D + o_d, FAST), D, FAST) if HAS_D else tl.zeros([BD], tl.float32)

    program = (i_2 * num_segments + i_c) * tl.num_programs(0) + i_p
    p_carry = carry + program * OWN * BD + place
    o_segment = ((i_q * num_segments + i_c) * N + o_n) * dim + o_d
    o_h0 = i_s * sh_s + o_d * sh_d + o_n * sh_n
    hs, A = (), ()
    if HELD:
        for n in tl.static_range(OWN):
            h = tl.zeros([BD], tl.float32)
            if MODE == SCAN:
                if SPLIT == JOINED:
                    h = load(starts + o_segment + n * dim, FAST)
                elif HAS_H0:
                    h = widen(load_input(h0 + o_h0 + n * sh_n, FAST), h0, FAST)
            hs, A = hs + (h,), A + (load_input(p_A2 + n * dim, FAST),)
    else:
        for n in range(OWN):
            h = tl.zeros([BD], tl.float32)
            if MODE == SCAN:
                if SPLIT == JOINED:
                    h = load(starts + o_segment + n * dim, FAST)
                elif HAS_H0:
                    h = widen(load_input(h0 + o_h0 + n * sh_n, FAST), h0, FAST)
            store(p_carry + n * BD, h, None, False, FAST)

    total = tl.zeros([BD], tl.float32)
    row_of_chunk = (i_2 * batch + i_b) * (L // CHUNK) + start // CHUNK - 1
    p_state = states + o_n * dim + o_d
    full = count // T * T
    if full > 0:
        b_u, b_delta, b_z = load_tile(
            p_u, p_delta, p_z, which, T, u_step, delta_step, z_step, MODE, HAS_Z, T, SHARE, True, FAST
        )
        for t in range(0, full, T):
            q_u, q_delta, q_z = p_u, p_delta, p_z  # the tile after this one, or this one if there is none
            if t + T < full:
                q_u, q_delta, q_z = p_u + T * u_step, p_delta + T * delta_step, p_z + T * z_step
            next_u, next_delta, next_z = load_tile(
                q_u, q_delta, q_z, which, T, u_step, delta_step, z_step, MODE, HAS_Z, T, SHARE, True, FAST
            )
            if FAST:
                touch_tile(
                    p_u, p_delta, p_z, p_BC, lane, 2 * T, count - t, u_step, delta_step, z_step,
                    sign * BC_STEP, HAS_Z and MODE != SUMMARY, OWN_BC, T, WARP,
                )  # fmt: skip
            now = low + t
            hs, total_t = scan_tile(
                hs, A, b_u, b_delta, b_z, p_u, p_delta, p_z, p_y, p_B, p_C, p_BC, p_A2, p_carry, p_carry,
                p_state + (row_of_chunk + now // CHUNK) * N * dim,
                B_step, C_step, sB_n, sC_n, which, lane, T, m_d, m_d & (now > 0) & (now % CHUNK == 0), b_D, b_bias,
                y_step, dim, N, MODE, SOFTPLUS, SCALE, HAS_Z, SAVE, CHUNK, OWN_BC, sign * BC_STEP, PAIR, True, EVEN, T,
                BD, UNROLL, SHARE, HELD, FAST,
            )  # fmt: skip
            total += total_t
            b_u, b_delta, b_z = next_u, next_delta, next_z
            p_u, p_delta, p_z, p_y = p_u + T * u_step, p_delta + T * delta_step, p_z + T * z_step, p_y + T * y_step
            p_B, p_C, p_BC = p_B + T * B_step, p_C + T * C_step, p_BC + T * sign * BC_STEP
    if TAIL > 0:  # else every length is a multiple of T: half of the code need not be compiled
        for t in range(full, count, TAIL):
            now = low + t
            e_u, e_delta, e_z = load_tile(
                p_u, p_delta, p_z, which, count - t, u_step, delta_step, z_step, MODE, HAS_Z, TAIL, SHARE, False, FAST
            )
            hs, total_t = scan_tile(
                hs, A, e_u, e_delta, e_z, p_u, p_delta, p_z, p_y, p_B, p_C, p_BC, p_A2, p_carry, p_carry,
                p_state + (row_of_chunk + now // CHUNK) * N * dim,
                B_step, C_step, sB_n, sC_n, which, lane, count - t, m_d, m_d & (now > 0) & (now % CHUNK == 0), b_D,
                b_bias, y_step, dim, N, MODE, SOFTPLUS, SCALE, HAS_Z, SAVE, CHUNK, OWN_BC, sign * BC_STEP, PAIR, False,
                EVEN, TAIL, BD, UNROLL, SHARE, HELD, FAST,
            )  # fmt: skip
            total += total_t
            p_u, p_delta, p_y = p_u + TAIL * u_step, p_delta + TAIL * delta_step, p_y + TAIL * y_step
            p_z, p_B, p_C = p_z + TAIL * z_step, p_B + TAIL * B_step, p_C + TAIL * C_step
            p_BC = p_BC + TAIL * sign * BC_STEP

    if MODE == SCAN:
        if i_c == num_segments - 1:
            p_final = final + (i_q * dim + o_d) * N + o_n
            if HELD:
                for n in tl.static_range(OWN):
                    store(p_final + n, hs[n], m_d, True, FAST)
            else:
                for n in range(OWN):
                    store(p_final + n, load(p_carry + n * BD, FAST), m_d, True, FAST)
    else:
        if HELD:
            for n in tl.static_range(OWN):
                store(ends + o_segment + n * dim, hs[n], m_d, True, FAST)
        else:
            for n in range(OWN):
                store(ends + o_segment + n * dim, load(p_carry + n * BD, FAST), m_d, True, FAST)
        if SHARE > 1:
            both = pair_sums((total, total), which, 2, SHARE, BD, FAST)
            total = both[0]
        store(sums + (i_q * num_segments + i_c) * dim + o_d, total, m_d & (which == 0), True, FAST)
