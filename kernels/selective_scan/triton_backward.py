"""Triton kernels of the gradient of the selective scan.

    g[t] = C[t] gy[t] + a[t+1] g[t+1]          gradient of h[t]; a = exp(Δ A), gy = dy silu(z)
    dC[t] = Σ_d gy[t] h[t]     dB[t] = Σ_d g[t] Δ[t] u[t]     m[t] = a[t] h[t-1]
    du[t] = Δ[t] Σ_n g[t] B[t] + D gy[t]
    dΔ[t] = u[t] Σ_n g[t] B[t] + Σ_n g[t] m[t] A     dA = Σ_t g[t] m[t] Δ[t]     dh[0] = a[1] g[1]

Each program walks a sequence (or segment) from its end with 32 channels, chunk by chunk. The states of a chunk are
computed again from the one that forward kept; those before its tiles rest in `inside`. Within a tile of T steps and for
one state at a time, all of the above stays in registers. The sums over the 32 channels go to `dBC`, one slice for every
block of channels, and `reduce_BC` adds up the slices in a fixed order.
"""


# What Triton compiles has its own types, and it knows no unpacking into a tuple.
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from mambaverse.kernels.selective_scan.triton_common import (
    LN2,
    decays,
    finish_sums,
    lane_of,
    load,
    load_input,
    load_pairs,
    load_rows,
    place_of_sum,
    quarter_sums,
    sequence_of,
    sigmoid,
    step_size,
    store,
    store_rows,
    unpack,
    widen,
)
from mambaverse.kernels.selective_scan.triton_forward import SUMMARY, load_tile, scan_tile


@triton.jit
def _states_of(
    p_A2, p_before, p_g, p_dA, n_0, dim: tl.constexpr, BD: tl.constexpr, NU: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Load, of NU states from n_0 on, A, the state before the tile, the gradient after it, and dA so far."""
    A, hs, gs, dA = (), (), (), ()
    p_A2, p_before, p_g, p_dA = p_A2 + n_0 * dim, p_before + n_0 * BD, p_g + n_0 * BD, p_dA + n_0 * dim
    for k in tl.static_range(NU):
        A = A + (load_input(p_A2 + k * dim, FAST),)
        hs = hs + (load(p_before + k * BD, FAST),)
        gs = gs + (load(p_g + k * BD, FAST),)
        dA = dA + (load(p_dA + k * dim, FAST),)
    return A, hs, gs, dA


@triton.jit
def _gradient_tile(
    p_dy, p_u, p_delta, p_z, p_du, p_ddelta, p_dz, p_B, p_C, p_BC, p_A2, p_before, p_g, p_dA, p_dB, p_dC, p_dBC,
    B_step, C_step, sB_n, sC_n, N, L, left, m_d, b_D, b_bias,
    dy_step: tl.constexpr, u_step: tl.constexpr, delta_step: tl.constexpr, z_step: tl.constexpr,
    out_step: tl.constexpr, dBC_step: tl.constexpr, dim: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, OWN_BC: tl.constexpr, BC_STEP: tl.constexpr, PAIR: tl.constexpr,
    FULL: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, NU: tl.constexpr, EXACT: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Take the gradients of the states (N, BD) in `p_g` back over a tile; return what it adds to dD and d delta_bias.

    NU states go together, to fill the latency of each other's recurrence; NU T rows are what `quarter_sums` sums.
    """
    b_dy = load_rows(p_dy, dy_step, left, T, FULL, FAST)
    b_u = load_rows(p_u, u_step, left, T, FULL, FAST)
    b_delta = load_rows(p_delta, delta_step, left, T, FULL, FAST)
    b_z = b_u
    if HAS_Z:
        b_z = load_rows(p_z, z_step, left, T, FULL, FAST)
    A, hs, gs, dA = _states_of(p_A2, p_before, p_g, p_dA, 0, dim, BD, NU, FAST)
    dt, x, gy, y, gx, gd = (), (), (), (), (), ()
    zero = tl.zeros([BD], tl.float32)
    for i in tl.static_range(T):
        dt_i = step_size(widen(b_delta[i], p_delta, FAST), b_bias, SOFTPLUS, FAST)
        gy_i, u_i = widen(b_dy[i], p_dy, FAST), widen(b_u[i], p_u, FAST)
        if HAS_Z:
            z_i = widen(b_z[i], p_z, FAST)
            gy_i = gy_i * z_i * sigmoid(z_i, FAST)
        if not (FULL and EVEN):  # a step or channel that is not there changes no sum
            m_row = m_d if FULL else m_d & (i < left)
            gy_i, u_i = tl.where(m_row, gy_i, 0.0), tl.where(m_row, u_i, 0.0)
        if not FULL:
            dt_i = tl.where(i < left, dt_i, 0.0)
        dt, gy, x = dt + (dt_i,), gy + (gy_i,), x + (dt_i * u_i,)
        y, gx, gd = y + (b_D * u_i,), gx + (zero,), gd + (zero,)
    p_sum, m_sum = p_dBC, m_d
    if FAST:
        lane = lane_of(tl.arange(0, BD))
        o_row, o_which = place_of_sum(lane)
        p_sum = p_dBC + (o_row % NU) * L * 2 + (o_row // NU) * dBC_step + o_which
        m_sum = o_row < NU * T if FULL else o_row < NU * tl.minimum(T, left)

    for n_0 in range(0, N, NU):
        next_A, next_h, next_g, next_dA = _states_of(
            p_A2, p_before, p_g, p_dA, tl.minimum(n_0 + NU, N - NU), dim, BD, NU, FAST
        )
        q_BC, q_B, q_C = p_BC + n_0, p_B + n_0 * sB_n, p_C + n_0 * sC_n
        a, words = (), ()  # by step, then by state: states take their steps together
        for i in tl.static_range(T):
            a = a + decays(dt[i], A, NU)
            row = i if FULL else tl.minimum(i, left - 1)
            if not OWN_BC:
                words = words + load_pairs(q_BC + row * BC_STEP, NU, PAIR, FAST)
        m, bs, cs, dC, new_y = (), (), (), (), ()
        for i in tl.static_range(T):
            row = i if FULL else tl.minimum(i, left - 1)
            after = ()
            y_i = y[i]
            for k in tl.static_range(NU):
                if OWN_BC:
                    b = widen(load_input(q_B + row * B_step + k * sB_n, FAST), p_B, FAST)
                    c = widen(load_input(q_C + row * C_step + k * sC_n, FAST), p_C, FAST)
                else:
                    b, c = unpack(words[i * NU + k], PAIR, FAST)
                m_i = a[i * NU + k] * hs[k]
                h = x[i] * b + m_i
                if HAS_Z:
                    y_i += c * h
                m, bs, cs, dC, after = m + (m_i,), bs + (b,), cs + (c,), dC + (gy[i] * h,), after + (h,)
            hs, new_y = after, new_y + (y_i,)
        sums_C = (zero, zero, zero, zero)
        sums_B = (zero, zero, zero, zero)
        if FAST and not OWN_BC:
            for j in tl.static_range(0, NU * T, 4):
                sums_C = quarter_sums(sums_C, (dC[j], dC[j + 1], dC[j + 2], dC[j + 3]), lane, j // 4, EXACT)
        dB, new_gx, new_gd = (), (), ()  # these grow from the last step to the first
        for i in tl.static_range(T - 1, -1, -1):
            before, new_dA, dB_i = (), (), ()
            gx_i, gd_i = gx[i], gd[i]
            for k in tl.static_range(NU):
                g = gy[i] * cs[i * NU + k] + gs[k]
                gz = g * m[i * NU + k]
                gx_i += g * bs[i * NU + k]
                gd_i += gz * A[k]
                new_dA, dB_i = new_dA + (dA[k] + gz * dt[i],), dB_i + (g * x[i],)
                before = before + (a[i * NU + k] * g,)
            gs, dA, dB = before, new_dA, dB_i + dB
            new_gx, new_gd = (gx_i,) + new_gx, (gd_i,) + new_gd
        if FAST and not OWN_BC:
            for j in tl.static_range(0, NU * T, 4):
                sums_B = quarter_sums(sums_B, (dB[j], dB[j + 1], dB[j + 2], dB[j + 3]), lane, j // 4, EXACT)
        y, gx, gd, new_g, new_dA = new_y, new_gx, new_gd, gs, dA
        for k in tl.static_range(NU):
            store(p_g + n_0 * BD + k * BD, new_g[k], None, False, FAST)
            store(p_dA + n_0 * dim + k * dim, new_dA[k], m_d, not EVEN, FAST)
        if OWN_BC:
            for k in tl.static_range(NU):
                for i in tl.static_range(T):
                    o_n = i * out_step * N + n_0 + k
                    store(p_dB + o_n, dB[i * NU + k], m_d & (i < left), True, FAST)
                    store(p_dC + o_n, dC[i * NU + k], m_d & (i < left), True, FAST)
        elif FAST:
            total = finish_sums(sums_B, sums_C, lane)
            store(p_sum + n_0 * L * 2, total, m_sum, True, FAST)
        else:
            for k in tl.static_range(NU):
                for i in tl.static_range(T):
                    p_i = p_dBC + (n_0 + k) * L * 2 + i * dBC_step
                    store(p_i, tl.sum(tl.where(m_d, dB[i * NU + k], 0.0)), i < left, True, FAST)
                    store(p_i + 1, tl.sum(tl.where(m_d, dC[i * NU + k], 0.0)), i < left, True, FAST)
        A, hs, gs, dA = next_A, next_h, next_g, next_dA

    b_dy = load_rows(p_dy, dy_step, left, T, FULL, FAST)  # once more, from the cache: registers are scarcer
    b_u = load_rows(p_u, u_step, left, T, FULL, FAST)
    b_delta = load_rows(p_delta, delta_step, left, T, FULL, FAST)
    if HAS_Z:
        b_z = load_rows(p_z, z_step, left, T, FULL, FAST)
    dD, dbias = zero, zero
    du, ddelta, dz = (), (), ()
    for i in tl.static_range(T):
        u_i = widen(b_u[i], p_u, FAST)
        du = du + (gx[i] * dt[i] + gy[i] * b_D,)
        ddelta_i = gx[i] * u_i + gd[i] * LN2
        if SOFTPLUS:
            ddelta_i = ddelta_i * sigmoid(widen(b_delta[i], p_delta, FAST) + b_bias, FAST)
        ddelta = ddelta + (ddelta_i,)
        if HAS_Z:
            z_i = widen(b_z[i], p_z, FAST)
            s = sigmoid(z_i, FAST)
            dz = dz + (widen(b_dy[i], p_dy, FAST) * y[i] * s * (1.0 + z_i * (1.0 - s)),)
        dD += gy[i] * (u_i if FULL else tl.where(i < left, u_i, 0.0))
        dbias += ddelta_i if FULL else tl.where(i < left, ddelta_i, 0.0)
    store_rows(p_du, du, out_step, left, m_d, T, FULL, EVEN, FAST)
    store_rows(p_ddelta, ddelta, out_step, left, m_d, T, FULL, EVEN, FAST)
    if HAS_Z:
        store_rows(p_dz, dz, out_step, left, m_d, T, FULL, EVEN, FAST)
    return dD, dbias


@triton.jit
def _again(
    p_u, p_delta, p_z, p_dy, p_B, p_C, p_BC, p_A2, p_before, p_after, B_step, C_step, sB_n, sC_n, N, m_d, b_D, b_bias,
    u_step: tl.constexpr, delta_step: tl.constexpr, out_step: tl.constexpr, dim: tl.constexpr,
    SOFTPLUS: tl.constexpr, OWN_BC: tl.constexpr, BC_STEP: tl.constexpr, PAIR: tl.constexpr, EVEN: tl.constexpr,
    T: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Compute the states after a tile again."""
    b_u, b_delta, b_z = load_tile(p_u, p_delta, p_z, T, u_step, delta_step, 0, SUMMARY, False, T, True, FAST)
    scan_tile(
        b_u, b_delta, b_z, p_u, p_delta, p_z, p_dy, p_B, p_C, p_BC, p_A2, p_before, p_after, p_before,
        B_step, C_step, sB_n, sC_n, N, T, m_d, m_d, b_D, b_bias, out_step, dim,
        SUMMARY, SOFTPLUS, False, False, OWN_BC, BC_STEP, PAIR, True, EVEN, T, BD, UNROLL, FAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "L", "segment", "sB_l", "sC_l"])
def gradient(
    dy, dfinal, u, delta, z, B, C, BC, A2, D, bias, h0, cu, states, inside, carry, starts,
    du, ddelta, dz, dB, dC, dBC, dparams, dh0,
    sy_b, sy_d, su_b, su_d, sd_b, sd_d, sz_b, sz_d,
    sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n, sh_s, sh_d, sh_n,
    batch, L, group_dim, N, segment,
    sy_l: tl.constexpr, su_l: tl.constexpr, sd_l: tl.constexpr, sz_l: tl.constexpr, dim: tl.constexpr,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr, HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, OWN_BC: tl.constexpr, BC_STEP: tl.constexpr, PAIR: tl.constexpr,
    EVEN: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr, TAIL: tl.constexpr, BD: tl.constexpr,
    UNROLL: tl.constexpr, NU: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradients of everything.

    Grid: (blocks of channels of all groups, times sequences; segments). Memory of a program: `inside`
    (CHUNK / T + T / TAIL, N, BD) and `carry` (N, BD). `dparams` (sequences, segments, N + 2, D) gets dA, dD and
    d delta_bias; `dBC` (blocks of a group, B, G, N, L, 2) dB and dC, or `dB` and `dC` (B, L, D, N) if OWN_BC. If SPLIT,
    `starts` (sequences, segments, N, D) has the gradients of the states after the segments.
    """
    blocks = tl.cdiv(group_dim, BD)
    i_p, i_c, num_segments = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    i_d, i_s = i_p % (blocks * (dim // group_dim)), i_p // (blocks * (dim // group_dim))
    i_g = i_d // blocks
    within = (i_d % blocks) * BD + tl.arange(0, BD)
    m_d = within < group_dim
    o_d = i_g * group_dim + tl.minimum(within, group_dim - 1)

    start, length = sequence_of(cu, i_s, L, PACKED)
    i_b = i_s * 0 if PACKED else i_s
    low = i_c * segment
    count = tl.maximum(tl.minimum(length - low, segment), 0).to(tl.int32)
    sign: tl.constexpr = -1 if REVERSE else 1
    dy_step: tl.constexpr = sy_l * sign
    u_step: tl.constexpr = su_l * sign
    delta_step: tl.constexpr = sd_l * sign
    z_step: tl.constexpr = sz_l * sign
    out_step: tl.constexpr = dim * sign
    B_step, C_step = sB_l.to(tl.int64) * sign, sC_l.to(tl.int64) * sign
    long_L = L.to(tl.int64)

    first = start + (length - 1 - low if REVERSE else low)
    p_dy = dy + i_b * sy_b + first * sy_l + o_d * sy_d
    p_u = u + i_b * su_b + first * su_l + o_d * su_d
    p_delta = delta + i_b * sd_b + first * sd_l + o_d * sd_d
    p_z = z + i_b * sz_b + first * sz_l + o_d * sz_d
    o_out = (i_b * L + first) * dim + o_d
    p_BC = BC + (i_b * L + first) * BC_STEP + i_g * N + tl.zeros([BD], tl.int64)
    p_B = B + i_b * sB_b + first * sB_l + o_d * sB_g
    p_C = C + i_b * sC_b + first * sC_l + o_d * sC_g
    p_dBC = dBC + 2 * ((((i_d % blocks) * batch + i_b) * (dim // group_dim) + i_g) * N * long_L + first)
    b_bias = widen(load_input(bias + o_d, FAST), bias, FAST) if HAS_BIAS else tl.zeros([BD], tl.float32)
    b_D = widen(load_input(D + o_d, FAST), D, FAST) if HAS_D else tl.zeros([BD], tl.float32)

    program = i_c * tl.num_programs(0) + i_p
    p_inside = inside + program * (CHUNK // T + T // TAIL) * N * BD + tl.arange(0, BD)
    p_g = carry + program * N * BD + tl.arange(0, BD)
    o_segment = (i_s * num_segments + i_c) * N * dim + o_d
    p_dA = dparams + (i_s * num_segments + i_c) * (N + 2) * dim + o_d
    zero = tl.zeros([BD], tl.float32)
    for n in range(N):
        g = zero
        if SPLIT:
            g = load(starts + o_segment + n * dim, FAST)
        elif HAS_FINAL:
            g = load(dfinal + (i_s * dim + o_d) * N + n, FAST)
        store(p_g + n * BD, g, None, False, FAST)
        store(p_dA + n * dim, zero, m_d, True, FAST)

    b_dD, b_dbias = zero, zero
    row_of_chunk = i_b * (L // CHUNK) + start // CHUNK - 1
    chunks = tl.cdiv(count, CHUNK)
    for k in range(chunks):
        t_chunk = (chunks - 1 - k) * CHUNK
        now = low + t_chunk
        for n in range(N):
            h = zero
            if now > 0:
                h = load(states + ((row_of_chunk + now // CHUNK) * N + n) * dim + o_d, FAST)
            elif HAS_H0:
                h = widen(load_input(h0 + i_s * sh_s + o_d * sh_d + n * sh_n, FAST), h0, FAST)
            store(p_inside + n * BD, h, None, False, FAST)
        steps = tl.minimum(count - t_chunk, CHUNK)
        whole = steps // T  # tiles of T steps, then tiles of TAIL steps
        ends = tl.cdiv(steps - whole * T, TAIL)
        for r in range(whole - (1 if ends == 0 else 0)):
            t = (t_chunk + r * T).to(tl.int64)
            _again(
                p_u + t * u_step, p_delta + t * delta_step, p_z, p_dy, p_B + t * B_step, p_C + t * C_step,
                p_BC + t * sign * BC_STEP, A2 + o_d, p_inside + r * N * BD, p_inside + (r + 1) * N * BD,
                B_step, C_step, sB_n, sC_n, N, m_d, b_D, b_bias, u_step, delta_step, out_step, dim,
                SOFTPLUS, OWN_BC, sign * BC_STEP, PAIR, EVEN, T, BD, UNROLL, FAST,
            )  # fmt: skip
        for k_end in range(ends - 1):
            r = whole + k_end
            t = (t_chunk + whole * T + k_end * TAIL).to(tl.int64)
            _again(
                p_u + t * u_step, p_delta + t * delta_step, p_z, p_dy, p_B + t * B_step, p_C + t * C_step,
                p_BC + t * sign * BC_STEP, A2 + o_d, p_inside + r * N * BD, p_inside + (r + 1) * N * BD,
                B_step, C_step, sB_n, sC_n, N, m_d, b_D, b_bias, u_step, delta_step, out_step, dim,
                SOFTPLUS, OWN_BC, sign * BC_STEP, PAIR, EVEN, TAIL, BD, UNROLL, FAST,
            )  # fmt: skip
        for k_end in range(ends):
            r = whole + ends - 1 - k_end
            t = (t_chunk + whole * T + (ends - 1 - k_end) * TAIL).to(tl.int64)
            o_t = o_out + t * out_step
            dD_t, dbias_t = _gradient_tile(
                p_dy + t * dy_step, p_u + t * u_step, p_delta + t * delta_step, p_z + t * z_step,
                du + o_t, ddelta + o_t, dz + o_t,
                p_B + t * B_step, p_C + t * C_step, p_BC + t * sign * BC_STEP, A2 + o_d, p_inside + r * N * BD, p_g,
                p_dA, dB + o_t * N, dC + o_t * N, p_dBC + t * 2 * sign,
                B_step, C_step, sB_n, sC_n, N, long_L, (count - t).to(tl.int32), m_d, b_D, b_bias,
                dy_step, u_step, delta_step, z_step, out_step, 2 * sign, dim,
                SOFTPLUS, HAS_Z, OWN_BC, sign * BC_STEP, PAIR, False, EVEN, TAIL, BD, NU, EXACT, FAST,
            )  # fmt: skip
            b_dD += dD_t
            b_dbias += dbias_t
        for k_tile in range(whole):
            r = whole - 1 - k_tile
            t = (t_chunk + r * T).to(tl.int64)
            o_t = o_out + t * out_step
            dD_t, dbias_t = _gradient_tile(
                p_dy + t * dy_step, p_u + t * u_step, p_delta + t * delta_step, p_z + t * z_step,
                du + o_t, ddelta + o_t, dz + o_t,
                p_B + t * B_step, p_C + t * C_step, p_BC + t * sign * BC_STEP, A2 + o_d, p_inside + r * N * BD, p_g,
                p_dA, dB + o_t * N, dC + o_t * N, p_dBC + t * 2 * sign,
                B_step, C_step, sB_n, sC_n, N, long_L, T, m_d, b_D, b_bias,
                dy_step, u_step, delta_step, z_step, out_step, 2 * sign, dim,
                SOFTPLUS, HAS_Z, OWN_BC, sign * BC_STEP, PAIR, True, EVEN, T, BD, NU, EXACT, FAST,
            )  # fmt: skip
            b_dD += dD_t
            b_dbias += dbias_t

    store(p_dA + N * dim, b_dD, m_d, True, FAST)
    store(p_dA + (N + 1) * dim, b_dbias, m_d, True, FAST)
    if HAS_H0 and i_c == 0:
        for n in range(N):
            store(dh0 + (i_s * dim + o_d) * N + n, load(p_g + n * BD, FAST), m_d, True, FAST)


@triton.jit
def reduce_BC(  # noqa: N802
    dBC, dB, dC, slice_size, L, N, G, num_slices, NB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    """Add up the slices of dBC (slices, B, G, N, L, 2) into dB and dC (B, L, G, N). Grid: (B G, blocks of L)."""
    i_bg = tl.program_id(0).to(tl.int64)
    o_l = tl.program_id(1).to(tl.int64) * LB + tl.arange(0, LB)
    o_pair = tl.program_id(1).to(tl.int64) * LB * 2 + tl.arange(0, 2 * LB)
    for first in range(0, N, NB):
        n = first + tl.arange(0, NB)
        mask = (n < N)[:, None] & (o_pair < 2 * L)[None, :]
        p = dBC + (i_bg * N + n)[:, None] * L * 2 + o_pair[None, :]
        total = tl.zeros([NB, 2 * LB], tl.float32)
        for s in range(num_slices):
            total += tl.load(p + s * slice_size, mask=mask, other=0.0)
        b, c = tl.split(tl.reshape(total, [NB, LB, 2]))
        o_out = (((i_bg // G) * L + o_l) * G + i_bg % G)[None, :] * N + n[:, None]
        m_out = (n < N)[:, None] & (o_l < L)[None, :]
        tl.store(dB + o_out, b.to(dB.dtype.element_ty), mask=m_out)
        tl.store(dC + o_out, c.to(dC.dtype.element_ty), mask=m_out)
