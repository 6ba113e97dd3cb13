"""Triton kernels of ssd's gradient.

With c[t] the sum of log2 decays through t in a chunk of Q positions, E its end, S the state before the chunk, dS the
gradient of the state after it, K[s, t] = B[s]·C[t] and decay[s, t] = 2^(c[t] - c[s]) for s <= t, else 0:

    dM[s, t] = x[s]·dy[t]                        dK = Σ_heads dM ∘ decay ∘ Δ[s]           W = dM ∘ decay ∘ Δ[s] ∘ K
    dX[s] = Σ_t K[s, t] decay[s, t] dy[t] + 2^(E - c[s]) dS B[s]                          dx = Δ dX + D dy
    dC[t] = Σ_heads 2^c[t] Sᵀ dy[t] + Σ_s dK[s, t] B[s]
    dB[s] = Σ_heads 2^(E - c[s]) Δ[s] dSᵀ x[s] + Σ_t dK[s, t] C[t]
    dΔ[s] = x[s]·dX[s] + A da[s]                 dA = Σ_s Δ[s] da[s]

da[t], the gradient of the log decay of a step, is what goes from before it to t or later: within the chunk Σ_(s < t <=
r) W[s, r]; from S to the outputs from t on; from before t to dS; and from S to dS. (That sum over W is also the sum of
its columns less that of its rows, from t on, but where decays are strong their difference is rounding alone.)

`gradient` is parallel over chunks: a program has the heads of a group, or a part of them, one after the other, and
keeps dB, dC and dK of its chunk in registers all the while. States and their gradients come from every KEEP positions,
where `scan` and `carry` left them; those between are computed again.
"""

# What Triton compiles has its own types.
# mypy: ignore-errors

import triton
import triton.language as tl

from mambaverse.kernels.ssd.triton_common import (
    advance,
    decay_between,
    first_row,
    load_rows,
    load_tile,
    log_decays,
    pointers,
    sequence_of,
    sigmoid,
    split,
    step_sizes,
    touch,
)


@triton.jit
def _chunk_of(cu, slot, L, num_sequences, search, Q: tl.constexpr, PACKED: tl.constexpr):
    """Return the sequence of a slot, and which of its chunks that is (none if negative or past its end).

    Chunk j of packed sequence s, which begins at `start`, has slot start // Q + s + j: no two chunks share one.
    """
    if PACKED:
        low = tl.full([], 0, tl.int64)
        high = low + num_sequences
        for _step in range(search):
            middle = (low + high) // 2
            first = tl.minimum(tl.maximum(tl.load(cu + middle).to(tl.int64), 0), L) // Q + middle
            low = tl.where(first <= slot, middle, low)
            high = tl.where(first <= slot, high, middle)
        first = tl.minimum(tl.maximum(tl.load(cu + low).to(tl.int64), 0), L) // Q + low
        return low, (slot - first).to(tl.int32)
    else:
        chunks = tl.cdiv(L, Q)
        return slot // chunks, (slot % chunks).to(tl.int32)


@triton.jit(do_not_specialize=["L", "num_sequences", "search", "heads", "kept"])
def gradient(
    dy, dfinal, x, dt, A, B, C, D, z, bias, initial, cu, states, dstates, dx, ddt, dz, dB, dC, dparams,
    L, num_sequences, search, H, per_group, heads, part_size, kept, low, high,
    sy_b, sy_l, sy_h, sy_p, sf_s, sf_h, sf_p, sf_n,
    sx_b, sx_l, sx_h, sx_p, sdt_b, sdt_l, sdt_h, sA, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n,
    sD_h, sD_p, sz_b, sz_l, sz_h, sz_p, sbias, si_s, si_h, si_p, si_n,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, KEEP: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, D_WIDTH: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, STAGES: tl.constexpr, TOUCH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a chunk for `heads` heads of a group.

    dB and dC go to part i of their buffers, `part_size` elements each, where the program is the i-th of its group's;
    dA, d dt_bias and dD of the chunk go to `dparams` (slots, H, 2 + D_WIDTH).
    """
    PB: tl.constexpr = (P + BP - 1) // BP
    WIDTH: tl.constexpr = 2 + D_WIDTH
    pid = tl.program_id(0).to(tl.int64)
    parts, groups = per_group // heads, H // per_group
    i_part, i_g, slot = pid % parts, pid // parts % groups, pid // (parts * groups)
    i_s, i_c = _chunk_of(cu, slot, L, num_sequences, search, Q, PACKED)
    start, count = sequence_of(cu, i_s, L, PACKED)
    there = (i_c >= 0) & (i_c * Q < count)
    t = tl.where(there, i_c * Q, 0)
    left = tl.where(there, count - t, 0)
    row = i_s * 0 if PACKED else i_s

    o_l, o_n = tl.arange(0, Q), tl.arange(0, BN)
    s_n = o_n.to(tl.int64)
    rows, ok = t + o_l, o_l < left
    p_B, sB = first_row(B + row * sB_b + i_g * sB_g, start, count, sB_l, REVERSE)
    p_C, sC = first_row(C + row * sC_b + i_g * sC_g, start, count, sC_l, REVERSE)
    b_B = load_tile(pointers(p_B, rows, sB, o_n, sB_n), ok, o_n, N, BN, DT)
    b_C = load_tile(pointers(p_C, rows, sC, o_n, sC_n), ok, o_n, N, BN, DT)
    # Where a product leads to another, Triton gives its rows to all warps, and two of them the same ones if there are
    # eight: half of the registers. It does not look past the end of a loop.
    once = tl.minimum(heads, 1)
    K = tl.zeros([Q, Q], tl.float32)
    for _once in range(0, once):
        K = tl.dot(b_B, tl.trans(b_C), acc=K, input_precision=PRECISION)
    earlier = (o_l[:, None] > o_l[None, :]).to(tl.float32).to(DT)
    acc_B, acc_C = tl.zeros([Q, BN], tl.float32), tl.zeros([Q, BN], tl.float32)
    acc_K = tl.zeros([Q, Q], tl.float32)

    # what is kept before and after: boundary i is that between positions i KEEP - 1 and i KEEP
    i_k = t // KEEP
    first, sub = i_k * KEEP, (t - i_k * KEEP) // Q
    chunks = tl.cdiv(tl.minimum(count - first, KEEP), Q)
    has_before, has_after = there & (i_k > 0), there & (first + KEEP < count)
    boundary = row * kept + start // KEEP + i_k
    lane = tl.arange(0, 256)

    for k in tl.range(0, heads, num_stages=STAGES):
        i_h = i_g * per_group + i_part * heads + k
        p_dt, sdt = first_row(dt + row * sdt_b + i_h * sdt_h, start, count, sdt_l, REVERSE)
        b_A = tl.load(A + i_h * sA).to(tl.float32)
        b_bias = tl.load(bias + i_h * sbias).to(tl.float32) if HAS_BIAS else 0.0
        raw, free, delta = step_sizes(load_rows(p_dt, rows, sdt, ok), ok, b_bias, low, high, SOFTPLUS)
        delta, whole, part, total = log_decays(delta, b_A, FAST)
        end, end_part = split(total)
        factor = tl.exp2(end + end_part)
        from_start = tl.exp2(whole + part)
        to_end = tl.exp2((end - whole) + (end_part - part))
        decay = decay_between(
            K, whole[None, :], part[None, :], whole[:, None], part[:, None], o_l[None, :] >= o_l[:, None], FAST
        )
        M = (K * decay).to(DT)
        p_x, sx = first_row(x + row * sx_b + i_h * sx_h, start, count, sx_l, REVERSE)
        p_y, sy = first_row(dy + row * sy_b + i_h * sy_h, start, count, sy_l, REVERSE)
        p_z, sz = first_row(z + row * sz_b + i_h * sz_h, start, count, sz_l, REVERSE)
        p_params = dparams + (slot * H + i_h) * WIDTH
        if TOUCH:
            _touch_next(
                states, dstates, p_x + sx_h, p_y + sy_h, p_z + sz_h, sx, sy, sz, boundary * H + i_h + 1, H, first, t,
                count, there & (k + 1 < heads), has_before, has_after, lane, PB * BP * BN, Q, KEEP, HAS_Z,
            )  # fmt: skip

        # within the chunk
        dM = tl.zeros([Q, Q], tl.float32)
        for i_p in tl.static_range(PB):
            o_p = i_p * BP + tl.arange(0, BP)
            b_x = load_tile(pointers(p_x, rows, sx, o_p, sx_p), ok, o_p, P, BP, DT)
            b_dy = load_tile(pointers(p_y, rows, sy, o_p, sy_p), ok, o_p, P, BP, tl.float32)
            if HAS_Z:
                b_z = load_tile(pointers(p_z, rows, sz, o_p, sz_p), ok, o_p, P, BP, tl.float32)
                b_dy *= b_z * sigmoid(b_z)
            for _once in range(0, once):
                dM = tl.dot(b_x, tl.trans(b_dy.to(DT)), acc=dM, input_precision=PRECISION)
        if D_WIDTH == 1:
            tl.store(p_params + 2, tl.sum(tl.where(o_l[:, None] == o_l[None, :], dM, 0.0)))
        dM *= decay
        acc_K += dM * delta[:, None]
        dM *= K
        direct = tl.sum(dM, 1)
        crossing = tl.dot(earlier, (dM * delta[:, None]).to(DT), input_precision=PRECISION)
        da = tl.sum(tl.where(o_l[:, None] <= o_l[None, :], crossing, 0.0), 1)

        # from the state before it, and to the state after it
        through_start, through_end = tl.zeros([Q], tl.float32), tl.zeros([Q], tl.float32)
        if D_WIDTH == 1:
            b_D = tl.load(D + i_h * sD_h).to(tl.float32)
        for i_p in tl.static_range(PB):
            o_p = i_p * BP + tl.arange(0, BP)
            s_p = o_p.to(tl.int64)
            ok_out = ok[:, None] & (o_p < P)[None, :]
            ok_state = (o_p < P)[:, None] & (o_n < N)[None, :]
            at_out = (row * L * H + i_h) * P
            at_state = (boundary * H + i_h) * (PB * BP * BN)
            o_state = s_p[:, None] * BN + s_n[None, :]
            p_S = states + (at_state - H * (PB * BP * BN)) + o_state
            S = tl.load(p_S, mask=ok_state & has_before, other=0.0).to(tl.float32)
            if HAS_INITIAL:
                p_S = initial + i_s * si_s + i_h * si_h + (s_p[:, None] * si_p + s_n[None, :] * si_n)
                S += tl.load(p_S, mask=ok_state & there & (i_k == 0), other=0.0).to(tl.float32)
            if KEEP > Q:
                for j in range(0, sub):
                    rows_j = first + j * Q + o_l
                    S, _total = advance(
                        S, pointers(p_x, rows_j, sx, o_p, sx_p), p_z, pointers(p_B, rows_j, sB, o_n, sB_n),
                        load_rows(p_dt, rows_j, sdt, rows_j < count), rows_j < count, o_p, o_n, b_A, b_bias, low, high,
                        P, N, BP, BN, DT, PRECISION, False, SOFTPLUS, False, FAST,
                    )  # fmt: skip
            S16 = S.to(DT)
            if PB > 1 or HAS_Z:
                b_x = load_tile(pointers(p_x, rows, sx, o_p, sx_p), ok, o_p, P, BP, DT)
                b_dy = load_tile(pointers(p_y, rows, sy, o_p, sy_p), ok, o_p, P, BP, tl.float32)
            if D_WIDTH > 1:
                b_D = tl.load(D + i_h * sD_h + s_p * sD_p, mask=o_p < P, other=0.0).to(tl.float32)[None, :]
            b_y = tl.zeros([Q, BP], tl.float32)
            for _once in range(0, once):
                b_y = tl.dot(b_C, tl.trans(S16), acc=b_y, input_precision=PRECISION)
            b_y *= from_start[:, None]
            if HAS_Z:
                b_z = load_tile(pointers(p_z, rows, sz, o_p, sz_p), ok, o_p, P, BP, tl.float32)
                gate = sigmoid(b_z)
                stepped = (b_x.to(tl.float32) * delta[:, None]).to(DT)
                whole_y = b_y + tl.dot(tl.trans(M), stepped, input_precision=PRECISION)
                if D_WIDTH > 0:
                    whole_y += b_D * b_x.to(tl.float32)
                b_dz = b_dy * whole_y * gate * (1.0 + b_z * (1.0 - gate))
                p_out, s_out = first_row(dz + at_out, start, count, H * P, REVERSE)
                tl.store(pointers(p_out, rows, s_out, o_p, 1), b_dz.to(dz.dtype.element_ty), mask=ok_out)
                b_dy *= b_z * gate
            through_start += tl.sum(b_y * b_dy, 1)
            acc_C = tl.dot((b_dy * from_start[:, None]).to(DT), S16, acc=acc_C, input_precision=PRECISION)

            dS = tl.load(dstates + at_state + o_state, mask=ok_state & has_after, other=0.0).to(tl.float32)
            if HAS_FINAL:
                p_S = dfinal + i_s * sf_s + i_h * sf_h + (s_p[:, None] * sf_p + s_n[None, :] * sf_n)
                dS += tl.load(p_S, mask=ok_state & there & (first + KEEP >= count), other=0.0).to(tl.float32)
            if KEEP > Q:
                for j in range(0, chunks - 1 - sub):
                    rows_j = first + (chunks - 1 - j) * Q + o_l
                    dS, _total = advance(
                        dS, pointers(p_y, rows_j, sy, o_p, sy_p), pointers(p_z, rows_j, sz, o_p, sz_p),
                        pointers(p_C, rows_j, sC, o_n, sC_n), load_rows(p_dt, rows_j, sdt, rows_j < count),
                        rows_j < count, o_p, o_n, b_A, b_bias, low, high,
                        P, N, BP, BN, DT, PRECISION, HAS_Z, SOFTPLUS, True, FAST,
                    )  # fmt: skip
            dS16 = dS.to(DT)
            da += tl.sum(S16.to(tl.float32) * dS16.to(tl.float32)) * factor
            weighted = (b_x.to(tl.float32) * (to_end * delta)[:, None]).to(DT)
            acc_B = tl.dot(weighted, dS16, acc=acc_B, input_precision=PRECISION)
            dX = tl.zeros([Q, BP], tl.float32)
            for _once in range(0, once):
                dX = tl.dot(b_B, tl.trans(dS16), acc=dX, input_precision=PRECISION)
            dX *= to_end[:, None]
            through_end += tl.sum(dX * b_x.to(tl.float32), 1)
            dX = tl.dot(M, b_dy.to(DT), acc=dX, input_precision=PRECISION)
            b_dx = dX * delta[:, None]
            if D_WIDTH > 0:
                b_dx += b_D * b_dy
            if D_WIDTH > 1:
                tl.store(p_params + 2 + o_p, tl.sum(b_dy * b_x.to(tl.float32), 0), mask=o_p < P)
            p_out, s_out = first_row(dx + at_out, start, count, H * P, REVERSE)
            tl.store(pointers(p_out, rows, s_out, o_p, 1), b_dx.to(dx.dtype.element_ty), mask=ok_out)

        direct += through_end
        through_end *= delta  # row t has what goes from before t, or to t and later
        da += tl.sum(tl.where(o_l[:, None] <= o_l[None, :], through_start[None, :], through_end[None, :]), 1)
        da = tl.where(ok, da, 0.0)
        b_ddt = direct + b_A * da
        b_ddt = tl.where((free >= low) & (free <= high), b_ddt, 0.0)
        if SOFTPLUS:
            b_ddt *= sigmoid(raw)
        b_ddt = tl.where(ok, b_ddt, 0.0)
        p_ddt, sddt = first_row(ddt + row * L * H + i_h, start, count, H, REVERSE)
        tl.store(p_ddt + rows.to(tl.int64) * sddt, b_ddt.to(ddt.dtype.element_ty), mask=ok)
        tl.store(p_params, tl.sum(delta * da))
        tl.store(p_params + 1, tl.sum(b_ddt))

    dK16 = acc_K.to(DT)
    acc_B = tl.dot(dK16, b_C, acc=acc_B, input_precision=PRECISION)
    acc_C = tl.dot(tl.trans(dK16), b_B, acc=acc_C, input_precision=PRECISION)
    at_BC = i_part * part_size + (row * L * groups + i_g) * N
    p_dB, sdB = first_row(dB + at_BC, start, count, groups * N, REVERSE)
    p_dC, sdC = first_row(dC + at_BC, start, count, groups * N, REVERSE)
    ok_BC = ok[:, None] & (o_n < N)[None, :]
    tl.store(pointers(p_dB, rows, sdB, o_n, 1), acc_B.to(dB.dtype.element_ty), mask=ok_BC)
    tl.store(pointers(p_dC, rows, sdC, o_n, 1), acc_C.to(dC.dtype.element_ty), mask=ok_BC)


@triton.jit
def _touch_next(
    states, dstates, p_x, p_y, p_z, sx, sy, sz, at, H, first, t, count, there, has_before, has_after, lane,
    SIZE: tl.constexpr, Q: tl.constexpr, KEEP: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """`touch` what the next head needs: its kept states, and its rows of x, dy and z between them."""
    LINE: tl.constexpr = 1024 // states.dtype.element_ty.primitive_bitwidth  # 128 bytes
    for o in tl.static_range(0, SIZE, 256 * LINE):
        place = o + lane * LINE
        ok = there & (place < SIZE)
        touch(states + (at - H) * SIZE + place, ok & has_before, lane)
        touch(dstates + at * SIZE + place, ok & has_after, lane)
    rows = first + lane
    ok = there & (lane < KEEP) & (rows < count)
    rows = rows.to(tl.int64)
    touch(p_x + rows * sx, ok & (rows < t + Q), lane)
    touch(p_y + rows * sy, ok & (rows >= t), lane)
    if HAS_Z:
        touch(p_z + rows * sz, ok & (rows >= t), lane)


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
