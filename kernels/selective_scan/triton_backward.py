"""Triton kernels of the gradient of the selective scan.

    g[t] = C[t] gy[t] + a[t+1] g[t+1]          gradient of h[t]; a = exp(Δ A), gy = dy silu(z)
    dC[t] = Σ_d gy[t] h[t]     dB[t] = Σ_d g[t] Δ[t] u[t]     m[t] = a[t] h[t-1]
    du[t] = Δ[t] Σ_n g[t] B[t] + D gy[t]
    dΔ[t] = u[t] Σ_n g[t] B[t] + Σ_n g[t] m[t] A     dA = Σ_t g[t] m[t] Δ[t]     dh[0] = a[1] g[1]

Each program walks a sequence (or segment) from its end with a block of channels, a tile of T steps at a time: forward
kept the states before every tile. Within a tile and for a few states at a time, all of the above stays in registers.
The sums over a warp's channels rest in `parts` for a round of ROUND steps, then the program adds up those of its warps
into its slice of `dBC`, and `reduce_BC` adds up the slices, all in a fixed order.
"""


# What Triton compiles has its own types, and it knows no unpacking into a tuple.
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from mambaverse.kernels.selective_scan.triton_common import (
    CHAINED,
    JOINED,
    LN2,
    decays,
    load,
    load_input,
    load_pairs,
    load_rows,
    load_where,
    sequence_of,
    sigmoid,
    step_size,
    store,
    store_rows,
    touch,
    unpack,
    widen,
)
from mambaverse.kernels.selective_scan.triton_threads import (
    add_warps,
    finish_sums,
    hand_on,
    lane_of,
    pair_sums,
    place_of_sum,
    quarter_sums,
    spread,
    store_pair,
    thread_of,
    wait_for_piece,
)


@triton.jit
def _before(
    p_kept, p_h0, sh_n, n_0, m_kept, dim: tl.constexpr, HAS_H0: tl.constexpr, NU: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Load NU states before a tile, from n_0 on: where `m_kept` holds those that forward kept, else the initial."""
    hs = ()
    for k in tl.static_range(NU):
        h = widen(load_where(p_kept + (n_0 + k) * dim, m_kept, FAST), p_kept, FAST)
        if HAS_H0:
            h += widen(load_where(p_h0 + (n_0 + k) * sh_n, ~m_kept, FAST), p_h0, FAST)  # one of the two is 0
        hs = hs + (h,)
    return hs


@triton.jit
def _rest_of(p_A2, p_g, p_dA, n_0, dim: tl.constexpr, BD: tl.constexpr, NU: tl.constexpr, FAST: tl.constexpr):
    """Load, of NU states from n_0 on, A, the gradient after the tile, and dA so far."""
    A, gs, dA = (), (), ()
    p_A2, p_g, p_dA = p_A2 + n_0 * dim, p_g + n_0 * BD, p_dA + n_0 * dim
    for k in tl.static_range(NU):
        A = A + (load_input(p_A2 + k * dim, FAST),)
        gs = gs + (load(p_g + k * BD, FAST),)
        dA = dA + (load(p_dA + k * dim, FAST),)
    return A, gs, dA


@triton.jit
def _some_states(
    A, hs, gs, dA, dt, x, gy, y, gx, gd, p_B, p_C, p_BC, p_dB, p_dC, p_dBC, p_sum, m_sum,
    B_step, C_step, sB_n, sC_n, L, lane, left, m_d,
    out_step: tl.constexpr, dBC_step: tl.constexpr, N: tl.constexpr, HAS_Z: tl.constexpr, OWN_BC: tl.constexpr,
    BC_STEP: tl.constexpr, PAIR: tl.constexpr, FULL: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
    SHARE: tl.constexpr, NU: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Take NU states through a tile and back; return their gradients before it, dA, and y, gx and gd with their parts.

    They go together, to fill the latency of each other's recurrence; NU T rows are what `quarter_sums` sums.
    """
    zero = tl.zeros([BD], tl.float32)
    a, words = (), ()  # by step, then by state: states take their steps together
    for i in tl.static_range(T):
        a = a + decays(dt[i], A, NU)
        row = i if FULL else tl.minimum(i, left - 1)
        if not OWN_BC:
            words = words + load_pairs(p_BC + row * BC_STEP, NU, PAIR, FAST)
    m, bs, cs, dC, new_y = (), (), (), (), ()
    for i in tl.static_range(T):
        row = i if FULL else tl.minimum(i, left - 1)
        after = ()
        y_i = y[i]
        for k in tl.static_range(NU):
            if OWN_BC:
                b = widen(load_input(p_B + row * B_step + k * sB_n, FAST), p_B, FAST)
                c = widen(load_input(p_C + row * C_step + k * sC_n, FAST), p_C, FAST)
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
        now, new_dA, dB_i = (), (), ()
        gx_i, gd_i = gx[i], gd[i]
        for k in tl.static_range(NU):
            gyc = gy[i] * cs[i * NU + k]
            if i == T - 1:
                g = gs[k] + gyc
            else:
                g = a[(i + 1) * NU + k] * gs[k] + gyc  # one operation on the way from step to step
            gz = g * m[i * NU + k]
            gx_i += g * bs[i * NU + k]
            gd_i += gz * A[k]
            new_dA, dB_i = new_dA + (dA[k] + gz * dt[i],), dB_i + (g * x[i],)
            now = now + (g,)
        gs, dA, dB = now, new_dA, dB_i + dB
        new_gx, new_gd = (gx_i,) + new_gx, (gd_i,) + new_gd
    before = ()
    for k in tl.static_range(NU):
        before = before + (a[k] * gs[k],)
    if OWN_BC:
        for k in tl.static_range(NU):
            for i in tl.static_range(T):
                o_n = i * out_step * N + k
                store(p_dB + o_n, dB[i * NU + k], m_d & (i < left), True, FAST)
                store(p_dC + o_n, dC[i * NU + k], m_d & (i < left), True, FAST)
    elif FAST:
        for j in tl.static_range(0, NU * T, 4):
            sums_B = quarter_sums(sums_B, (dB[j], dB[j + 1], dB[j + 2], dB[j + 3]), lane, j // 4, EXACT)
        total_B, total_C = finish_sums(sums_B, sums_C, lane, SHARE)
        if SHARE == 1:
            store(p_sum, total_B, m_sum, True, FAST)
        else:
            store_pair(p_sum, total_B, total_C, m_sum)
    else:
        halves = tl.arange(0, SHARE) * (N // SHARE) * L * 2
        for k in tl.static_range(NU):
            for i in tl.static_range(T):
                p_i = p_dBC + k * L * 2 + i * dBC_step + halves
                b = tl.sum(tl.reshape(tl.where(m_d, dB[i * NU + k], 0.0), [SHARE, BD // SHARE]), 1)
                c = tl.sum(tl.reshape(tl.where(m_d, dC[i * NU + k], 0.0), [SHARE, BD // SHARE]), 1)
                store(p_i, b, i < left, True, FAST)
                store(p_i + 1, c, i < left, True, FAST)
    return before, dA, new_y, new_gx, new_gd


@triton.jit
def _gradient_tile(
    gs, dA, A, p_dy, p_u, p_delta, p_z, p_du, p_ddelta, p_dz, p_B, p_C, p_BC, p_A2, p_kept, p_h0, p_g, p_dA,
    p_dB, p_dC, p_dBC, p_parts, B_step, C_step, sB_n, sC_n, sh_n, L, which, lane, left, m_d, m_kept, b_D, b_bias,
    dy_step: tl.constexpr, u_step: tl.constexpr, delta_step: tl.constexpr, z_step: tl.constexpr,
    out_step: tl.constexpr, dBC_step: tl.constexpr, dim: tl.constexpr, N: tl.constexpr,
    SOFTPLUS: tl.constexpr, SCALE: tl.constexpr, HAS_Z: tl.constexpr, HAS_H0: tl.constexpr, OWN_BC: tl.constexpr,
    BC_STEP: tl.constexpr, PAIR: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr, ROUND: tl.constexpr,
    T: tl.constexpr, BD: tl.constexpr, NU: tl.constexpr, SHARE: tl.constexpr, HELD: tl.constexpr, EXACT: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Take the gradients of the states back over a tile; return them, dA, and what it adds to dD and d delta_bias.

    If HELD, `gs`, `dA` and `A` are those of all states of a thread; else they are read from `p_g` and `p_dA`, and
    written there. The states before the tile: see `_before`.
    """
    OWN: tl.constexpr = N // SHARE
    b_dy = load_rows(p_dy, dy_step, which, left, T, SHARE, FULL, FAST)
    b_u = load_rows(p_u, u_step, which, left, T, SHARE, FULL, FAST)
    b_delta = load_rows(p_delta, delta_step, which, left, T, SHARE, FULL, FAST)
    b_z = b_u
    if HAS_Z:
        b_z = load_rows(p_z, z_step, which, left, T, SHARE, FULL, FAST)
    own_dt, own_x, own_gy, y, gx, gd = (), (), (), (), (), ()
    zero = tl.zeros([BD], tl.float32)
    for j in tl.static_range(T // SHARE):
        here = SHARE * j + which < left
        dt_i = step_size(widen(b_delta[j], p_delta, FAST), b_bias, SOFTPLUS)
        gy_i, u_i = widen(b_dy[j], p_dy, FAST) * SCALE, widen(b_u[j], p_u, FAST)
        if HAS_Z:
            z_i = widen(b_z[j], p_z, FAST)
            gy_i = gy_i * z_i * sigmoid(z_i, FAST)
        if not (FULL and EVEN):  # a step or channel that is not there changes no sum
            m_row = m_d if FULL else m_d & here
            gy_i, u_i = tl.where(m_row, gy_i, 0.0), tl.where(m_row, u_i, 0.0)
        if not FULL:
            dt_i = tl.where(here, dt_i, 0.0)
        own_dt, own_gy, own_x = own_dt + (dt_i,), own_gy + (gy_i,), own_x + (dt_i * u_i,)
    dt, x = spread(own_dt, lane, T, SHARE, BD, FAST), spread(own_x, lane, T, SHARE, BD, FAST)
    gy = spread(own_gy, lane, T, SHARE, BD, FAST)
    for _ in tl.static_range(T):
        y, gx, gd = y + (zero,), gx + (zero,), gd + (zero,)
    p_sum, m_sum = p_dBC, m_d
    if FAST:
        o_row, o_which = place_of_sum(lane, SHARE)
        p_sum = p_parts + ((o_row % NU + which * OWN) * ROUND + o_row // NU) * 2 + o_which
        m_sum = o_row < NU * T if FULL else o_row < NU * tl.minimum(T, left)

    if HELD:
        all_g, all_dA = (), ()
        for n_0 in tl.static_range(0, OWN, NU):
            hs = _before(p_kept, p_h0, sh_n, n_0, m_kept, dim, HAS_H0, NU, FAST)
            some_A, some_g, some_dA = (), (), ()
            for k in tl.static_range(NU):
                some_A, some_g, some_dA = some_A + (A[n_0 + k],), some_g + (gs[n_0 + k],), some_dA + (dA[n_0 + k],)
            some_g, some_dA, y, gx, gd = _some_states(
                some_A, hs, some_g, some_dA, dt, x, gy, y, gx, gd, p_B + n_0 * sB_n, p_C + n_0 * sC_n, p_BC + n_0,
                p_dB + n_0, p_dC + n_0, p_dBC + n_0 * L * 2, p_sum + n_0 * ROUND * 2, m_sum,
                B_step, C_step, sB_n, sC_n, L, lane, left, m_d, out_step, dBC_step, N, HAS_Z, OWN_BC, BC_STEP, PAIR,
                FULL, T, BD, SHARE, NU, EXACT, FAST,
            )  # fmt: skip
            all_g, all_dA = all_g + some_g, all_dA + some_dA
        gs, dA = all_g, all_dA
    else:
        hs = _before(p_kept, p_h0, sh_n, 0, m_kept, dim, HAS_H0, NU, FAST)
        block_A, block_g, block_dA = _rest_of(p_A2, p_g, p_dA, 0, dim, BD, NU, FAST)
        for n_0 in range(0, OWN, NU):
            n_1 = tl.minimum(n_0 + NU, OWN - NU)
            next_h = _before(p_kept, p_h0, sh_n, n_1, m_kept, dim, HAS_H0, NU, FAST)
            next_A, next_g, next_dA = _rest_of(p_A2, p_g, p_dA, n_1, dim, BD, NU, FAST)
            block_g, block_dA, y, gx, gd = _some_states(
                block_A, hs, block_g, block_dA, dt, x, gy, y, gx, gd, p_B + n_0 * sB_n, p_C + n_0 * sC_n, p_BC + n_0,
                p_dB + n_0, p_dC + n_0, p_dBC + n_0 * L * 2, p_sum + n_0 * ROUND * 2, m_sum,
                B_step, C_step, sB_n, sC_n, L, lane, left, m_d, out_step, dBC_step, N, HAS_Z, OWN_BC, BC_STEP, PAIR,
                FULL, T, BD, SHARE, NU, EXACT, FAST,
            )  # fmt: skip
            for k in tl.static_range(NU):
                store(p_g + (n_0 + k) * BD, block_g[k], None, False, FAST)
                store(p_dA + (n_0 + k) * dim, block_dA[k], m_d, not EVEN, FAST)
            block_A, hs, block_g, block_dA = next_A, next_h, next_g, next_dA

    # once more, from the cache: registers are scarce
    b_dy = load_rows(p_dy, dy_step, which, left, T, SHARE, FULL, FAST)
    b_u = load_rows(p_u, u_step, which, left, T, SHARE, FULL, FAST)
    b_delta = load_rows(p_delta, delta_step, which, left, T, SHARE, FULL, FAST)
    if HAS_Z:
        b_z = load_rows(p_z, z_step, which, left, T, SHARE, FULL, FAST)
    y, gx, gd = (
        pair_sums(y, which, T, SHARE, BD, FAST),
        pair_sums(gx, which, T, SHARE, BD, FAST),
        pair_sums(gd, which, T, SHARE, BD, FAST),
    )
    dD, dbias = zero, zero
    du, ddelta, dz = (), (), ()
    for j in tl.static_range(T // SHARE):
        here = SHARE * j + which < left
        u_i = widen(b_u[j], p_u, FAST)
        du = du + (gx[j] * own_dt[j] + own_gy[j] * b_D,)
        ddelta_i = gx[j] * u_i + gd[j] * LN2
        if SOFTPLUS:
            ddelta_i = ddelta_i * sigmoid(widen(b_delta[j], p_delta, FAST) + b_bias, FAST)
        ddelta = ddelta + (ddelta_i,)
        if HAS_Z:
            z_i = widen(b_z[j], p_z, FAST)
            s = sigmoid(z_i, FAST)
            y_i = y[j] + b_D * u_i
            dz = dz + (widen(b_dy[j], p_dy, FAST) * SCALE * y_i * s * (1.0 + z_i * (1.0 - s)),)
        dD += own_gy[j] * (u_i if FULL else tl.where(here, u_i, 0.0))
        dbias += ddelta_i if FULL else tl.where(here, ddelta_i, 0.0)
    store_rows(p_du, du, out_step, which, left, m_d, T, SHARE, FULL, EVEN, FAST)
    store_rows(p_ddelta, ddelta, out_step, which, left, m_d, T, SHARE, FULL, EVEN, FAST)
    if HAS_Z:
        store_rows(p_dz, dz, out_step, which, left, m_d, T, SHARE, FULL, EVEN, FAST)
    return gs, dA, dD, dbias


@triton.jit
def _ahead(
    u, delta, dy, z, kept, BC, lane,
    u_step: tl.constexpr, delta_step: tl.constexpr, dy_step: tl.constexpr, z_step: tl.constexpr,
    kept_step: tl.constexpr, BC_STEP: tl.constexpr, dim: tl.constexpr, N: tl.constexpr, OWN_BC: tl.constexpr,
    T: tl.constexpr, WARP: tl.constexpr,
):  # fmt: skip
    """Return what each thread of a warp has to `touch` of a tile: two addresses in the first one, their steps a tile.

    A quarter of the warp each: a row of u, of delta, of dy, of z. Half of it each: a state before the tile, half a row
    of B and C. The pointers are those of the threads' channels, at step 0.
    """
    row, tensor = (lane % T).to(tl.int64), lane // T
    at_u, at_delta = (u + row * u_step).to(tl.int64), (delta + row * delta_step).to(tl.int64)
    at_dy, at_z = (dy + row * dy_step).to(tl.int64), (z + row * z_step).to(tl.int64)
    rows = tl.where(tensor == 0, at_u, tl.where(tensor == 1, at_delta, tl.where(tensor == 2, at_dy, at_z)))
    by_u: tl.constexpr = T * u_step * u.dtype.element_ty.primitive_bitwidth // 8
    by_delta: tl.constexpr = T * delta_step * delta.dtype.element_ty.primitive_bitwidth // 8
    by_dy: tl.constexpr = T * dy_step * dy.dtype.element_ty.primitive_bitwidth // 8
    by_z: tl.constexpr = T * z_step * z.dtype.element_ty.primitive_bitwidth // 8
    by_rows = tl.where(tensor == 0, by_u, tl.where(tensor == 1, by_delta, tl.where(tensor == 2, by_dy, by_z)))
    half = lane % (WARP // 2)
    at_kept = (kept + tl.minimum(half, N - 1) * dim).to(tl.int64)
    at_BC = (BC + (half // 2).to(tl.int64) * BC_STEP + half % 2 * (N // 2)).to(tl.int64)
    by_kept: tl.constexpr = kept_step * kept.dtype.element_ty.primitive_bitwidth // 8
    by_BC: tl.constexpr = T * BC_STEP * BC.dtype.element_ty.primitive_bitwidth // 8
    if OWN_BC:
        others, by_others = at_kept, tl.full([], by_kept, tl.int64)
    else:
        others = tl.where(lane < WARP // 2, at_kept, at_BC)
        by_others = tl.where(lane < WARP // 2, by_kept, by_BC)
    return rows, others, by_rows.to(tl.int64), by_others.to(tl.int64)


@triton.jit(do_not_specialize=["batch", "L", "segment", "sB_l", "sC_l"])
def gradient(
    dy, dfinal, u, delta, z, B, C, D, bias, h0, u_2, delta_2, z_2, B_2, C_2, D_2, bias_2, h0_2,
    BC, A2, cu, states, parts, carry, starts, flags, du, ddelta, dz, dB, dC, dBC, dparams, dh0,
    sy_b, sy_d, su_b, su_d, sd_b, sd_d, sz_b, sz_d, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n, sh_s, sh_d, sh_n,
    batch, L, group_dim, segment, N: tl.constexpr,
    sy_l: tl.constexpr, su_l: tl.constexpr, sd_l: tl.constexpr, sz_l: tl.constexpr, dim: tl.constexpr,
    BOTH: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, SCALE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr, HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, OWN_BC: tl.constexpr, BC_STEP: tl.constexpr, PAIR: tl.constexpr,
    EVEN: tl.constexpr, CHUNK: tl.constexpr, ROUND: tl.constexpr, TAIL: tl.constexpr, BD: tl.constexpr,
    WARP: tl.constexpr, UNROLL: tl.constexpr, NU: tl.constexpr, SHARE: tl.constexpr, EXACT: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """The gradients of everything.

    Grid: (blocks of channels of all groups, times sequences; directions; segments), as that of `scan`. Memory of a
    program: `parts` (2, warps, N, ROUND, 2) and, where a thread has more states than UNROLL, `carry` (N / SHARE, BD).
    `dparams` (sequences, segments, N + 2, D) gets dA, dD and d delta_bias; `dBC` (programs of a group, B, G, N, L, 2)
    dB and dC, or `dB` and `dC` (B, L, D, N) if OWN_BC. Tiles are of CHUNK steps: `states` has those before each. If
    SPLIT is JOINED, `starts` (sequences, segments, N, D) has the gradients of the states after the segments; if it is
    CHAINED, `starts` (sequences, N, D) and `dparams` (sequences, N + 2, D) are what a program hands on, the last piece
    first, and `flags` (programs, warps) zeros. All these have a leading axis of directions; `dy`, which SCALE
    multiplies, has none.
    """
    others = (BC, A2, cu, states, parts, carry, starts, flags, du, ddelta, dz, dB, dC, dBC, dparams, dh0)
    strides = (
        sy_b, sy_d, su_b, su_d, sd_b, sd_d, sz_b, sz_d, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n,
        sh_s, sh_d, sh_n, batch, L, group_dim, segment,
    )  # fmt: skip
    if not BOTH or tl.program_id(1) == 0:
        _walk(
            (dy, dfinal, u, delta, z, B, C, D, bias, h0), others, strides, N, sy_l, su_l, sd_l, sz_l, dim, REVERSE,
            SOFTPLUS, SCALE, HAS_D, HAS_Z, HAS_BIAS, HAS_H0, HAS_FINAL, PACKED, SPLIT, OWN_BC, BC_STEP, PAIR, EVEN,
            CHUNK, ROUND, TAIL, BD, WARP, UNROLL, NU, SHARE, EXACT, FAST,
        )  # fmt: skip
    else:
        _walk(
            (dy, dfinal, u_2, delta_2, z_2, B_2, C_2, D_2, bias_2, h0_2), others, strides, N, sy_l, su_l, sd_l, sz_l,
            dim, True, SOFTPLUS, SCALE, HAS_D, HAS_Z, HAS_BIAS, HAS_H0, HAS_FINAL, PACKED, SPLIT, OWN_BC, BC_STEP,
            PAIR, EVEN, CHUNK, ROUND, TAIL, BD, WARP, UNROLL, NU, SHARE, EXACT, FAST,
        )  # fmt: skip


@triton.jit
def _first_gradients(
    p_start, p_final, p_dA, last, SPLIT: tl.constexpr, HAS_FINAL: tl.constexpr, BD: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Return the gradient of a state after a segment, the `last` or not, and what dA begins with."""
    g, dA = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    if SPLIT == JOINED:
        g = load(p_start, FAST)
    else:
        if HAS_FINAL:
            g = load(p_final, FAST)
        if SPLIT == CHAINED:
            g, dA = tl.where(last, g, load(p_start, FAST)), tl.where(last, 0.0, load(p_dA, FAST))
    return g, dA


@triton.jit
def _walk(
    inputs, others, strides, N: tl.constexpr,
    sy_l: tl.constexpr, su_l: tl.constexpr, sd_l: tl.constexpr, sz_l: tl.constexpr, dim: tl.constexpr,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, SCALE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr, HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, OWN_BC: tl.constexpr, BC_STEP: tl.constexpr, PAIR: tl.constexpr,
    EVEN: tl.constexpr, CHUNK: tl.constexpr, ROUND: tl.constexpr, TAIL: tl.constexpr, BD: tl.constexpr,
    WARP: tl.constexpr, UNROLL: tl.constexpr, NU: tl.constexpr, SHARE: tl.constexpr, EXACT: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """See `gradient`."""
    dy, dfinal, u, delta, z, B, C, D, bias, h0 = inputs
    BC, A2, cu, states, parts, carry, starts, flags, du, ddelta, dz, dB, dC, dBC, dparams, dh0 = others
    (
        sy_b, sy_d, su_b, su_d, sd_b, sd_d, sz_b, sz_d, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n,
        sh_s, sh_d, sh_n, batch, L, group_dim, segment,
    ) = strides  # fmt: skip
    CHANNELS: tl.constexpr = BD // SHARE
    OWN: tl.constexpr = N // SHARE  # states of a thread
    HELD: tl.constexpr = OWN == UNROLL  # their gradients and dA in registers, all the way
    T: tl.constexpr = CHUNK
    WARPS: tl.constexpr = BD // WARP
    PARTS: tl.constexpr = N * ROUND * 2  # floats of a warp
    blocks = tl.cdiv(group_dim, CHANNELS)
    i_p, i_c, num_segments = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    i_d, i_s = i_p % (blocks * (dim // group_dim)), i_p // (blocks * (dim // group_dim))
    i_g = i_d // blocks
    i_2 = tl.program_id(1).to(tl.int64)
    if SPLIT == CHAINED:
        i_c = num_segments - 1 - i_c
    num_sequences = tl.num_programs(0) // (blocks * (dim // group_dim))
    i_q = i_2 * num_sequences + i_s  # among the sequences of both directions
    place = tl.arange(0, BD)
    lane = place
    if FAST:
        lane = lane_of(place)
    which, channel = thread_of(place, SHARE, WARP)
    within = (i_d % blocks) * CHANNELS + channel
    m_d = within < group_dim
    o_d = i_g * group_dim + tl.minimum(within, group_dim - 1)
    o_n = which * OWN

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
    o_out = ((i_2 * batch + i_b) * L + first) * dim + o_d
    p_BC = BC + ((i_2 * batch + i_b) * L + first) * BC_STEP + i_g * N + o_n.to(tl.int64)
    p_B = B + i_b * sB_b + first * sB_l + o_d * sB_g + o_n * sB_n
    p_C = C + i_b * sC_b + first * sC_l + o_d * sC_g + o_n * sC_n
    p_A2 = A2 + i_2 * N * dim + o_d + o_n * dim
    i_slice = i_2 * blocks + i_d % blocks
    p_dBC = dBC + 2 * (((i_slice * batch + i_b) * (dim // group_dim) + i_g) * N * long_L + first)
    row = (i_2 * batch + i_b) * (L // T) + start // T - 1  # of the state before step 0, where there is none
    p_kept = states + (row * N + o_n) * dim + o_d
    p_h0 = h0 + i_s * sh_s + o_d * sh_d + o_n * sh_n
    ahead = (p_A2, p_A2, i_s, i_s)
    if FAST:
        ahead = _ahead(
            p_u, p_delta, p_dy, p_z if HAS_Z else p_u,
            states + ((row + low // T) * N * dim + o_d), p_BC - o_n, lane,
            u_step, delta_step, dy_step, z_step if HAS_Z else u_step, N * dim, sign * BC_STEP, dim, N, OWN_BC, T, WARP,
        )  # fmt: skip
        for i in tl.static_range(2):  # the last two tiles, before anything is waited for
            tile = tl.maximum((count - 1) // T - i, 0).to(tl.int64)
            there = tile * T + lane % T < count
            touch(tl.where(there, ahead[0] + tile * ahead[2], A2.to(tl.int64)), lane)
            there = (tile * T + lane % (WARP // 2) // 2 < count) & (low + tile > 0)
            touch(tl.where(there, ahead[1] + tile * ahead[3], A2.to(tl.int64)), lane)
    b_bias = widen(load_input(bias + o_d, FAST), bias, FAST) if HAS_BIAS else tl.zeros([BD], tl.float32)
    b_D = widen(load_input(D + o_d, FAST), D, FAST) if HAS_D else tl.zeros([BD], tl.float32)

    program = (i_2 if SPLIT == CHAINED else i_2 * num_segments + i_c) * tl.num_programs(0) + i_p
    p_parts = parts + program * 2 * WARPS * PARTS
    p_g = carry + program * OWN * BD + place
    p_flags = flags + program * WARPS
    i_row = i_q if SPLIT == CHAINED else i_q * num_segments + i_c
    o_segment = (i_row * N + o_n) * dim + o_d
    p_params = dparams + i_row * (N + 2) * dim + o_d
    p_dA = p_params + o_n * dim
    last = i_c == num_segments - 1
    if SPLIT == CHAINED:
        wait_for_piece(p_flags, place, (num_segments - 1 - i_c).to(tl.int32), WARP, FAST)
    zero = tl.zeros([BD], tl.float32)
    gs, dA, A = (), (), ()
    if HELD:
        for n in tl.static_range(OWN):
            g, dA_n = _first_gradients(
                starts + o_segment + n * dim, dfinal + (i_q * dim + o_d) * N + o_n + n, p_dA + n * dim, last,
                SPLIT, HAS_FINAL, BD, FAST,
            )  # fmt: skip
            gs, dA, A = gs + (g,), dA + (dA_n,), A + (load_input(p_A2 + n * dim, FAST),)
    else:
        for n in range(OWN):
            g, dA_n = _first_gradients(
                starts + o_segment + n * dim, dfinal + (i_q * dim + o_d) * N + o_n + n, p_dA + n * dim, last,
                SPLIT, HAS_FINAL, BD, FAST,
            )  # fmt: skip
            store(p_g + n * BD, g, None, False, FAST)
            store(p_dA + n * dim, dA_n, m_d, True, FAST)

    b_dD, b_dbias = zero, zero
    rounds = tl.cdiv(count, ROUND)
    for k in range(rounds):
        t_round = (rounds - 1 - k) * ROUND
        p_round = p_parts + (low + t_round) // ROUND % 2 * WARPS * PARTS  # the last one may still be read
        p_warp = p_round
        if FAST:
            p_warp += place // WARP * PARTS
        steps = tl.minimum(count - t_round, ROUND)
        whole = steps // T
        if TAIL > 0:  # the steps of the last tile: as few as hold what no whole tile does
            for _ in range(tl.cdiv(steps, T) - whole):
                t = (t_round + whole * T).to(tl.int64)
                o_t = o_out + t * out_step
                gs, dA, dD_t, dbias_t = _gradient_tile(
                    gs, dA, A, p_dy + t * dy_step, p_u + t * u_step, p_delta + t * delta_step, p_z + t * z_step,
                    du + o_t, ddelta + o_t, dz + o_t, p_B + t * B_step, p_C + t * C_step, p_BC + t * sign * BC_STEP,
                    p_A2, p_kept + (low + t) // T * N * dim, p_h0, p_g, p_dA, dB + o_t * N + o_n, dC + o_t * N + o_n,
                    p_dBC + t * 2 * sign, p_warp + whole * T * 2,
                    B_step, C_step, sB_n, sC_n, sh_n, long_L, which, lane, (count - t).to(tl.int32), m_d,
                    m_d & (low + t > 0), b_D, b_bias,
                    dy_step, u_step, delta_step, z_step, out_step, 2 * sign, dim, N, SOFTPLUS, SCALE, HAS_Z, HAS_H0,
                    OWN_BC, sign * BC_STEP, PAIR, False, EVEN, ROUND, TAIL, BD, NU, SHARE, HELD, EXACT, FAST,
                )  # fmt: skip
                b_dD += dD_t
                b_dbias += dbias_t
        for k_tile in range(whole):
            r = whole - 1 - k_tile
            t = (t_round + r * T).to(tl.int64)
            o_t = o_out + t * out_step
            if FAST:  # what the next tile will read; before the first step of all there is no state
                next_tile = tl.maximum(t // T - 1, 0)
                touch(ahead[0] + next_tile * ahead[2], lane)
                touch(tl.where(low + next_tile == 0, A2.to(tl.int64), ahead[1] + next_tile * ahead[3]), lane)
            gs, dA, dD_t, dbias_t = _gradient_tile(
                gs, dA, A, p_dy + t * dy_step, p_u + t * u_step, p_delta + t * delta_step, p_z + t * z_step,
                du + o_t, ddelta + o_t, dz + o_t, p_B + t * B_step, p_C + t * C_step, p_BC + t * sign * BC_STEP,
                p_A2, p_kept + (low + t) // T * N * dim, p_h0, p_g, p_dA, dB + o_t * N + o_n, dC + o_t * N + o_n,
                p_dBC + t * 2 * sign, p_warp + r * T * 2,
                B_step, C_step, sB_n, sC_n, sh_n, long_L, which, lane, T, m_d, m_d & (low + t > 0), b_D, b_bias,
                dy_step, u_step, delta_step, z_step, out_step, 2 * sign, dim, N, SOFTPLUS, SCALE, HAS_Z, HAS_H0, OWN_BC,
                sign * BC_STEP, PAIR, True, EVEN, ROUND, T, BD, NU, SHARE, HELD, EXACT, FAST,
            )  # fmt: skip
            b_dD += dD_t
            b_dbias += dbias_t
        if FAST and not OWN_BC:
            add_warps(p_round, p_dBC + t_round.to(tl.int64) * 2 * sign, place, steps, long_L, sign, N, ROUND, BD, WARPS)

    if SHARE > 1:
        both = pair_sums((b_dD, b_dbias), which, 2, SHARE, BD, FAST)  # dD in the first half of the warp
        b_dD = both[0]
    p_dD = p_params + (N + which) * dim
    if SPLIT == CHAINED:
        b_dD += tl.where(last, 0.0, load(p_dD, FAST))
    store(p_dD, b_dD, m_d, True, FAST)
    if SHARE == 1:
        if SPLIT == CHAINED:
            b_dbias += tl.where(last, 0.0, load(p_dD + dim, FAST))
        store(p_dD + dim, b_dbias, m_d, True, FAST)
    p_dh0 = dh0 + (i_q * dim + o_d) * N + o_n
    if HELD:
        for n in tl.static_range(OWN):
            store(p_dA + n * dim, dA[n], m_d, True, FAST)
            if SPLIT == CHAINED:
                store(starts + o_segment + n * dim, gs[n], m_d, True, FAST)
        if HAS_H0 and i_c == 0:
            for n in tl.static_range(OWN):
                store(p_dh0 + n, gs[n], m_d, True, FAST)
    elif HAS_H0 or SPLIT == CHAINED:
        for n in range(OWN):
            g = load(p_g + n * BD, FAST)
            if SPLIT == CHAINED:
                store(starts + o_segment + n * dim, g, m_d, True, FAST)
            if HAS_H0 and i_c == 0:
                store(p_dh0 + n, g, m_d, True, FAST)
    if SPLIT == CHAINED:
        hand_on(p_flags, place, WARP, FAST)


@triton.jit
def reduce_BC(  # noqa: N802
    dBC, dB, dC, slice_size, L, N, G, of_one, num_slices, NB: tl.constexpr, LB: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Add up the slices of dBC (directions, slices, B, G, N, L, 2) into dB and dC (directions, B, L, G, N).

    Grid: (directions B G, times blocks of L; blocks of N). `of_one` is B G. TOGETHER slices are on their way at once.
    """
    blocks = tl.cdiv(L, LB)
    i_bg, i_l = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    o_l = i_l * LB + tl.arange(0, LB)
    o_pair = i_l * LB * 2 + tl.arange(0, 2 * LB)
    n = tl.program_id(1) * NB + tl.arange(0, NB)
    mask = (n < N)[:, None] & (o_pair < 2 * L)[None, :]
    p = dBC + i_bg // of_one * num_slices * slice_size + (i_bg % of_one * N + n)[:, None] * L * 2 + o_pair[None, :]
    total = tl.zeros([NB, 2 * LB], tl.float32)
    for s in range(0, num_slices, TOGETHER):
        parts = ()
        for k in tl.static_range(TOGETHER):
            i_slice = tl.full([], k, tl.int64) + s
            parts = parts + (tl.load(p + i_slice * slice_size, mask=mask & (s + k < num_slices), other=0.0),)
        for k in tl.static_range(TOGETHER):
            total += parts[k]
    b, c = tl.split(tl.reshape(total, [NB, LB, 2]))
    o_out = (((i_bg // G) * L + o_l) * G + i_bg % G)[None, :] * N + n[:, None]
    m_out = (n < N)[:, None] & (o_l < L)[None, :]
    tl.store(dB + o_out, b.to(dB.dtype.element_ty), mask=m_out)
    tl.store(dC + o_out, c.to(dC.dtype.element_ty), mask=m_out)


@triton.jit
def reduce_params(
    dparams, dA, dD, dbias, num_rows, dim, N,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add up dparams (directions, rows, N + 2, D) into dA (directions, D, N), dD and d delta_bias (directions, D).

    Grid: (blocks of D, N + 2, directions).
    """
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    n, i_2 = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dparams += i_2 * num_rows * (N + 2) * dim
    dA, dD, dbias = dA + i_2 * dim * N, dD + i_2 * dim, dbias + i_2 * dim
    m_d = o_d < dim
    total = tl.zeros([ROWS, BD], tl.float32)
    for first in range(0, num_rows, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < num_rows) & m_d[None, :]
        total += tl.load(dparams + (row * (N + 2) + n) * dim + o_d[None, :], mask=mask, other=0.0)
    value = tl.sum(total, 0)
    if n < N:
        tl.store(dA + o_d.to(tl.int64) * N + n, value.to(dA.dtype.element_ty), mask=m_d)
    elif n == N:
        if HAS_D:
            tl.store(dD + o_d, value.to(dD.dtype.element_ty), mask=m_d)
    elif HAS_BIAS:
        tl.store(dbias + o_d, value.to(dbias.dtype.element_ty), mask=m_d)
