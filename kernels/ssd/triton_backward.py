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
    load_tile,
    log_decays,
    position,
    sequence_of,
    sigmoid,
    split,
    step_sizes,
)


@triton.jit
def _chunk_of(cu, slot, L, num_sequences, search, Q: tl.constexpr, PACKED: tl.constexpr):
    """Return the sequence of a slot, and which of its chunks that is (none if negative or past its end).

    Chunk j of packed sequence s, which begins at `start`, has slot start // Q + s + j: no two chunks share one.
    """
    if PACKED:
        low = tl.full([], 0, tl.int64)
        high = low + num_sequences
        for _ in range(search):
            middle = (low + high) // 2
            first = tl.minimum(tl.maximum(tl.load(cu + middle).to(tl.int64), 0), L) // Q + middle
            low = tl.where(first <= slot, middle, low)
            high = tl.where(first <= slot, high, middle)
        first = tl.minimum(tl.maximum(tl.load(cu + low).to(tl.int64), 0), L) // Q + low
        return low, (slot - first).to(tl.int32)
    else:
        chunks = tl.cdiv(L, Q)
        return slot // chunks, (slot % chunks).to(tl.int32)


@triton.jit
def gradient(
    dy, dfinal, x, dt, A, B, C, D, z, bias, initial, cu, states, dstates, dx, ddt, dz, dB, dC, params,
    L, num_sequences, search, H, per_group, heads, part_size, kept, low, high,
    sy_b, sy_l, sy_h, sy_p, sf_s, sf_h, sf_p, sf_n,
    sx_b, sx_l, sx_h, sx_p, sdt_b, sdt_l, sdt_h, sA, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n,
    sD_h, sD_p, sz_b, sz_l, sz_h, sz_p, sbias, si_s, si_h, si_p, si_n,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, KEEP: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, HAS_D: tl.constexpr, D_WIDTH: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, STAGES: tl.constexpr,
    OFFSETS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a chunk for `heads` heads of a group.

    dB and dC go to part i of their buffers, `part_size` elements each, where the program is the i-th of its group's;
    dA, d dt_bias and dD of the chunk go to `params` (slots, H, 2 + D_WIDTH).
    """
    PB: tl.constexpr = (P + BP - 1) // BP
    STEP: tl.constexpr = -1 if REVERSE else 1
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
    here = position(start, count, t, REVERSE)

    o_l, o_n = tl.arange(0, Q), tl.arange(0, BN)
    s_l, s_n = STEP * o_l.to(OFFSETS), o_n.to(OFFSETS)
    ok = o_l < left
    p_B = B + row * sB_b + i_g * sB_g + s_l[:, None] * sB_l + s_n[None, :] * sB_n
    p_C = C + row * sC_b + i_g * sC_g + s_l[:, None] * sC_l + s_n[None, :] * sC_n
    b_B = load_tile(p_B + here * sB_l, ok, o_n, N, BN, DT)
    b_C = load_tile(p_C + here * sC_l, ok, o_n, N, BN, DT)
    K = tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION)
    strict, later = o_l[:, None] < o_l[None, :], (o_l[:, None] >= o_l[None, :]).to(DT)
    acc_B, acc_C = tl.zeros([Q, BN], tl.float32), tl.zeros([Q, BN], tl.float32)
    acc_K = tl.zeros([Q, Q], tl.float32)

    # what is kept before and after: boundary i is that between positions i KEEP - 1 and i KEEP
    i_k = t // KEEP
    first, sub = i_k * KEEP, (t - i_k * KEEP) // Q
    chunks = tl.cdiv(tl.minimum(count - first, KEEP), Q)
    has_before, has_after = there & (i_k > 0), there & (first + KEEP < count)
    boundary = row * kept + start // KEEP + i_k

    for k in tl.range(0, heads, num_stages=STAGES):
        i_h = i_g * per_group + i_part * heads + k
        p_dt = dt + row * sdt_b + i_h * sdt_h + s_l * sdt_l
        b_A = tl.load(A + i_h * sA).to(tl.float32)
        b_bias = tl.load(bias + i_h * sbias).to(tl.float32) if HAS_BIAS else 0.0
        raw, free, delta = step_sizes(p_dt + here * sdt_l, ok, b_bias, low, high, SOFTPLUS)
        delta, whole, part, total = log_decays(delta, b_A, FAST)
        end, end_part = split(total)
        factor = tl.exp2(end + end_part)
        from_start = tl.exp2(whole + part)
        to_end = tl.exp2((end - whole) + (end_part - part))
        decay = decay_between(
            K, whole[None, :], part[None, :], whole[:, None], part[:, None], o_l[None, :], o_l[:, None], FAST
        )
        M = (K * decay).to(DT)
        dM = tl.zeros([Q, Q], tl.float32)
        through_start, through_end = tl.zeros([Q], tl.float32), tl.zeros([Q], tl.float32)
        direct = tl.zeros([Q], tl.float32)
        through, dD = 0.0, 0.0
        p_params = params + (slot * H + i_h) * WIDTH
        for i_p in tl.static_range(PB):
            o_p = i_p * BP + tl.arange(0, BP)
            s_p = o_p.to(OFFSETS)
            p_x = x + row * sx_b + i_h * sx_h + s_l[:, None] * sx_l + s_p[None, :] * sx_p
            p_y = dy + row * sy_b + i_h * sy_h + s_l[:, None] * sy_l + s_p[None, :] * sy_p
            p_z = z + row * sz_b + i_h * sz_h + s_l[:, None] * sz_l + s_p[None, :] * sz_p
            o_out = ((row * L + here) * H + i_h) * P + s_l[:, None] * (H * P) + s_p[None, :]
            ok_out = ok[:, None] & (o_p < P)[None, :]
            ok_state = (o_p < P)[:, None] & (o_n < N)[None, :]
            o_state = (boundary * H + i_h) * (PB * BP * BN) + s_p[:, None] * BN + s_n[None, :]
            step_state = H * (PB * BP * BN)
            S = tl.load(states + (o_state - step_state), mask=ok_state & has_before, other=0.0).to(tl.float32)
            if HAS_INITIAL:
                p_S = initial + i_s * si_s + i_h * si_h + s_p[:, None] * si_p + s_n[None, :] * si_n
                S += tl.load(p_S, mask=ok_state & there & (i_k == 0), other=0.0).to(tl.float32)
            dS = tl.load(dstates + o_state, mask=ok_state & has_after, other=0.0).to(tl.float32)
            if HAS_FINAL:
                p_S = dfinal + i_s * sf_s + i_h * sf_h + s_p[:, None] * sf_p + s_n[None, :] * sf_n
                dS += tl.load(p_S, mask=ok_state & there & (first + KEEP >= count), other=0.0).to(tl.float32)
            if KEEP > Q:
                for j in range(0, sub):
                    there_j = position(start, count, first + j * Q, REVERSE)
                    S, _ = advance(
                        S, p_x + there_j * sx_l, p_z, p_B + there_j * sB_l, p_dt + there_j * sdt_l,
                        first + j * Q + o_l < count, o_p, o_n, b_A, b_bias, low, high,
                        P, N, BP, BN, DT, PRECISION, False, SOFTPLUS, False, FAST,
                    )  # fmt: skip
                for j in range(0, chunks - 1 - sub):
                    t_j = first + (chunks - 1 - j) * Q
                    there_j = position(start, count, t_j, REVERSE)
                    dS, _ = advance(
                        dS, p_y + there_j * sy_l, p_z + there_j * sz_l, p_C + there_j * sC_l, p_dt + there_j * sdt_l,
                        t_j + o_l < count, o_p, o_n, b_A, b_bias, low, high,
                        P, N, BP, BN, DT, PRECISION, HAS_Z, SOFTPLUS, True, FAST,
                    )  # fmt: skip
            through += tl.sum(S * dS) * factor
            S16, dS16 = S.to(DT), dS.to(DT)

            b_x = load_tile(p_x + here * sx_l, ok, o_p, P, BP, DT)
            b_dy = load_tile(p_y + here * sy_l, ok, o_p, P, BP, tl.float32)
            if HAS_D:
                b_D = tl.load(D + i_h * sD_h + s_p * sD_p, mask=o_p < P, other=0.0).to(tl.float32)
            if HAS_Z:
                b_z = load_tile(p_z + here * sz_l, ok, o_p, P, BP, tl.float32)
                gate = sigmoid(b_z)
                b_y = tl.dot(b_C, tl.trans(S16), input_precision=PRECISION) * from_start[:, None]
                stepped = (b_x.to(tl.float32) * delta[:, None]).to(DT)
                b_y = tl.dot(tl.trans(M), stepped, acc=b_y, input_precision=PRECISION)
                if HAS_D:
                    b_y += b_D[None, :] * b_x.to(tl.float32)
                b_y = b_dy * b_y * gate * (1.0 + b_z * (1.0 - gate))
                tl.store(dz + o_out, b_y.to(dz.dtype.element_ty), mask=ok_out)
                b_dy *= b_z * gate
            b_dy16 = b_dy.to(DT)

            part_C = tl.dot((b_dy * from_start[:, None]).to(DT), S16, input_precision=PRECISION)
            through_start += tl.sum(part_C * b_C.to(tl.float32), 1)
            acc_C += part_C
            weighted = (b_x.to(tl.float32) * (to_end * delta)[:, None]).to(DT)
            acc_B = tl.dot(weighted, dS16, acc=acc_B, input_precision=PRECISION)
            dM = tl.dot(b_x, tl.trans(b_dy16), acc=dM, input_precision=PRECISION)
            dX = tl.dot(b_B, tl.trans(dS16), input_precision=PRECISION) * to_end[:, None]
            through_end += tl.sum(dX * b_x.to(tl.float32), 1)
            dX = tl.dot(M, b_dy16, acc=dX, input_precision=PRECISION)
            direct += tl.sum(dX * b_x.to(tl.float32), 1)
            b_dx = dX * delta[:, None]
            if HAS_D:
                b_dx += b_D[None, :] * b_dy
                if D_WIDTH == 1:
                    dD += tl.sum(b_dy * b_x.to(tl.float32))
                else:
                    tl.store(p_params + 2 + o_p, tl.sum(b_dy * b_x.to(tl.float32), 0), mask=o_p < P)
            tl.store(dx + o_out, b_dx.to(dx.dtype.element_ty), mask=ok_out)

        dK = dM * (decay * delta[:, None])
        acc_K += dK
        late = tl.dot((dK * K).to(DT), later, input_precision=PRECISION)  # [s, t]: of W[s, r], r >= t
        late += (through_end * delta)[:, None]
        da = tl.sum(tl.where(strict, late, 0.0), 0) + tl.cumsum(through_start, 0, reverse=True) + through
        da = tl.where(ok, da, 0.0)
        b_ddt = direct + b_A * da
        b_ddt = tl.where((free >= low) & (free <= high), b_ddt, 0.0)
        if SOFTPLUS:
            b_ddt *= sigmoid(raw)
        b_ddt = tl.where(ok, b_ddt, 0.0)
        p_ddt = ddt + (row * L + here) * H + i_h + s_l * H
        tl.store(p_ddt, b_ddt.to(ddt.dtype.element_ty), mask=ok)
        tl.store(p_params, tl.sum(delta * da))
        tl.store(p_params + 1, tl.sum(b_ddt))
        if D_WIDTH == 1:
            tl.store(p_params + 2, dD)

    dK16 = acc_K.to(DT)
    acc_B = tl.dot(dK16, b_C, acc=acc_B, input_precision=PRECISION)
    acc_C = tl.dot(tl.trans(dK16), b_B, acc=acc_C, input_precision=PRECISION)
    o_BC = i_part * part_size + ((row * L + here) * groups + i_g) * N + s_l[:, None] * (groups * N) + s_n[None, :]
    ok_BC = ok[:, None] & (o_n < N)[None, :]
    tl.store(dB + o_BC, acc_B.to(dB.dtype.element_ty), mask=ok_BC)
    tl.store(dC + o_BC, acc_C.to(dC.dtype.element_ty), mask=ok_BC)


@triton.jit
def reduce_params(
    params, dA, dbias, dD, rows, H,
    D_WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up what the chunks left in `params` (rows, H, 2 + D_WIDTH), always in the same order."""
    WIDTH: tl.constexpr = 2 + D_WIDTH
    i_h = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(params + (row[:, None] * H + i_h) * WIDTH + column[None, :], mask=mask, other=0.0)
    total = tl.sum(total, 0)
    tl.store(dA + i_h + column * 0, total.to(dA.dtype.element_ty), mask=column == 0)
    if HAS_BIAS:
        tl.store(dbias + i_h + column * 0, total.to(dbias.dtype.element_ty), mask=column == 1)
    if D_WIDTH > 0:
        is_D = (column >= 2) & (column < WIDTH)
        tl.store(dD + i_h * D_WIDTH + column - 2, total.to(dD.dtype.element_ty), mask=is_D)


@triton.jit
def reduce_parts(parts_B, parts_C, dB, dC, size, num_parts, BLOCK: tl.constexpr):
    """Add up the parts (num_parts, size) of dB and dC, always in the same order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = o < size
    total_B, total_C = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for _ in range(num_parts):
        total_B += tl.load(parts_B + o, mask=ok, other=0.0)
        total_C += tl.load(parts_C + o, mask=ok, other=0.0)
        parts_B += size
        parts_C += size
    tl.store(dB + o, total_B.to(dB.dtype.element_ty), mask=ok)
    tl.store(dC + o, total_C.to(dC.dtype.element_ty), mask=ok)
