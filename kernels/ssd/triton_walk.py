"""Triton kernels of ssd's gradient where dx comes from the walk that carries the gradients of states.

With the names of `triton_backward`: dX of a chunk needs dS, the gradient of the state after it, which a walk from right
to left has in registers when it comes by. So `walk`, forward's `scan` with B and C in each other's place, works out dx
there, and leaves dS at every chunk. All else is parallel over chunks. Of da, the gradient of a step's log decay, it
leaves parts, which `sum_up` adds up:

- `within` takes the heads of a group, one after the other: parts that need no state, and dK, their sum.
- `through_states` does so with both states of each head: dB, dC, and the other parts.
- `rest_of_one`, for a program of one head, does both, and dz, for which it has the state that y needs.

So B Cᵀ and x dyᵀ are worked out twice for each head, and states and their gradients read once; `carry`, `gradient_BC`
and `gradient_x` work out the former three times and read the latter twice. Here a head is one tile of columns, and no
state is given, nor a gradient of the last.
"""

# What Triton compiles has its own types.
# mypy: ignore-errors

import triton
import triton.language as tl

from mambaverse.kernels.ssd.triton_common import (
    decay_between,
    first_row,
    gate_gradient,
    load_rows,
    load_tile,
    place_of,
    pointers,
    sequence_of,
    sigmoid,
    step_sizes,
    steps_of,
    sums_of_three,
    through_gate,
)
from mambaverse.kernels.ssd.triton_forward import LENGTHS

# What is left of each chunk and head: rows of Q numbers, by position. x·dX but for what comes from dS; Σ_(s < t <= r)
# W[s, r]; x·dy; what goes from S to t; from t, without its weight, to dS; and S·dS, by columns of x.
DIRECT, WITHIN, DIAGONAL, FROM_START, TO_END, THROUGH, ROWS = (tl.constexpr(i) for i in range(7))
PLACES = ["L", "num_sequences", "search", "first_chunk", "num_chunks"]


@triton.jit(do_not_specialize=[*LENGTHS, "first_segment", "first_chunk"])
def walk(
    dy, B, C, D, z, own, cu, starts, chunk_steps, dstates, dx,
    L, segment, num_segments, first_segment, H, per_group, kept, first_chunk,
    sy_b, sy_l, sy_h, sy_p, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n, sD, sz_b, sz_l, sz_h, sz_p,
    so_b, so_l, so_h,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_OWN: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Carry the gradient of a head's state through a segment, from right to left; write it after every chunk, and dx.

    Grid: (sequences x heads, segments).
    """
    pid = tl.program_id(0)
    i_s, i_h = (pid // H).to(tl.int64), (pid % H).to(tl.int64)
    i_k = first_segment + tl.program_id(1)
    first = i_k * segment
    start, count = sequence_of(cu, i_s, L, PACKED)
    left = tl.minimum(count - first, segment)
    row, i_g = i_s * 0 if PACKED else i_s, i_h // per_group
    first_slot = start // Q + i_s if PACKED else i_s * tl.cdiv(L, Q)
    o_l, o_p, o_n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    p_y, sy = first_row(dy + row * sy_b + i_h * sy_h, start, count, sy_l, REVERSE)
    p_z, sz = first_row(z + row * sz_b + i_h * sz_h, start, count, sz_l, REVERSE)
    p_B, sB = first_row(B + row * sB_b + i_g * sB_g, start, count, sB_l, REVERSE)
    p_C, sC = first_row(C + row * sC_b + i_g * sC_g, start, count, sC_l, REVERSE)
    p_dx, s_out = first_row(dx + (row * L * H + i_h) * P, start, count, H * P, REVERSE)
    p_own, so = first_row(own + row * so_b + i_h * so_h, start, count, so_l, REVERSE)
    # From here on positions are those of the segment, and chunks have pointers that the loop moves, which takes fewer
    # registers than indices: one that was spilled and is read back waits for all loads before it.
    ahead = first.to(tl.int64)
    p_y, p_z = p_y + ahead * sy, p_z + ahead * sz
    p_B, p_C = p_B + ahead * sB, p_C + ahead * sC
    p_dx, p_own = p_dx + ahead * s_out, p_own + ahead * so
    dS = tl.zeros([BP, BN], tl.float32)
    if SPLIT:
        p_start = starts + ((i_s * H + i_h) * num_segments + i_k) * (P * N)
        p_start += o_p.to(tl.int64)[:, None] * N + o_n.to(tl.int64)[None, :]
        dS += tl.load(p_start, mask=(o_p < P)[:, None] & (o_n < N)[None, :], other=0.0)
    chunks = tl.cdiv(left, Q)
    heads = tl.full([], 0, tl.int64) + H
    last = first // Q + chunks - 1
    p_dS = dstates + ((row * kept + start // Q + last - first_chunk) * H + i_h) * (BP * BN)
    p_steps = chunk_steps + ((first_slot + last) * H + i_h) * (3 * Q)
    for t in tl.range((chunks - 1) * Q, -1, -Q, num_stages=STAGES):
        if first + t + Q < count:  # no gradient enters a sequence's last chunk
            tl.store(p_dS + (o_p[:, None] * BN + o_n[None, :]), dS.to(dstates.dtype.element_ty))
        rows = t + o_l
        ok = rows < left
        b_dy = load_tile(pointers(p_y, rows, sy, o_p, sy_p), ok, o_p, P, BP, DT)
        b_B = load_tile(pointers(p_B, rows, sB, o_n, sB_n), ok, o_n, N, BN, DT)
        b_C = load_tile(pointers(p_C, rows, sC, o_n, sC_n), ok, o_n, N, BN, DT)
        b_w, whole, part, end, end_part = steps_of(p_steps, 0, o_l, Q)
        dX = tl.dot(b_B, tl.trans(dS.to(DT)), input_precision=PRECISION)  # first: it takes most registers
        dX *= (tl.exp2((end - whole) + (end_part - part)) * b_w)[:, None]
        stepped = b_dy.to(tl.float32)
        if HAS_Z:
            b_z = load_tile(pointers(p_z, rows, sz, o_p, sz_p), ok, o_p, P, BP, tl.float32)
            stepped = through_gate(stepped, b_z, FAST)
            b_dy = stepped.to(DT)
        stepped = (stepped * tl.exp2(whole + part)[:, None]).to(DT)
        dS = tl.dot(tl.trans(stepped), b_C, acc=dS * tl.exp2(end + end_part), input_precision=PRECISION)
        K = tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION)
        decay = decay_between(
            K, whole[None, :], part[None, :], whole[:, None], part[:, None], o_l[None, :] >= o_l[:, None], FAST
        )
        M = K * decay * b_w[:, None]
        if HAS_OWN:
            b_own = load_rows(p_own, rows, so, ok).to(tl.float32)
            M = tl.where(o_l[:, None] == o_l[None, :], K * b_own[:, None], M)
        if HAS_D:
            b_D = tl.load(D + i_h * sD).to(tl.float32)  # here, or the tile that it becomes would be kept
            M += tl.where(o_l[:, None] == o_l[None, :], b_D, 0.0)
        dX = tl.dot(M.to(DT), b_dy, acc=dX, input_precision=PRECISION)
        ok_out = ok[:, None] & (o_p < P)[None, :]
        tl.store(pointers(p_dx, rows, s_out, o_p, 1), dX.to(dx.dtype.element_ty), mask=ok_out)
        p_dS -= heads * (BP * BN)
        p_steps -= heads * (3 * Q)


@triton.jit
def _leave_chunk(p_left, dM, W, b_w, o_l, Q: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """Write what goes on within a chunk; W is without weights here. Returns the diagonal of dM, x·dy."""
    diagonal = tl.sum(tl.where(o_l[:, None] == o_l[None, :], dM, 0.0), 1)
    tl.store(p_left + DIAGONAL * Q, diagonal)
    tl.store(p_left + DIRECT * Q, tl.sum(W, 1))
    W *= b_w[:, None]
    earlier = (o_l[:, None] > o_l[None, :]).to(tl.float32).to(DT)
    if DT.primitive_bitwidth == 16:  # both halves: dA adds up many, whose signs differ
        # cut off, which takes fewer instructions than rounding
        W_high = (W.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        crossing = tl.dot(earlier, W_high.to(DT), input_precision=PRECISION)
        crossing = tl.dot(earlier, (W - W_high).to(DT), acc=crossing, input_precision=PRECISION)
    else:
        crossing = tl.dot(earlier, W, input_precision=PRECISION)
    tl.store(p_left + WITHIN * Q, tl.sum(tl.where(o_l[:, None] <= o_l[None, :], crossing, 0.0), 1))
    return diagonal


@triton.jit
def _leave_states(
    p_left, b_B, b_C, S, dS, b_x, b_dy, from_start, to_end, o_l, o_p,
    Q: tl.constexpr, PRECISION: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write what goes through the states around a chunk.

    The sums AT_ONCE take fewer steps where warps share a row, and more registers.
    """
    before = tl.dot(b_C, tl.trans(S), input_precision=PRECISION) * b_dy
    if not AT_ONCE:
        tl.store(p_left + FROM_START * Q + o_l, tl.sum(before, 1) * from_start)
    after = tl.dot(b_B, tl.trans(dS), input_precision=PRECISION) * b_x.to(tl.float32)
    if not AT_ONCE:
        tl.store(p_left + TO_END * Q + o_l, tl.sum(after, 1) * to_end)
    products = tl.dot(S, tl.trans(dS), input_precision=PRECISION)  # of matrices: neither need lie in registers
    through = tl.where(o_p[:, None] == o_p[None, :], products, 0.0)
    if AT_ONCE:
        before, after, through = tl.reduce((before, after, through), 1, sums_of_three)
        tl.store(p_left + FROM_START * Q + o_l, before * from_start)
        tl.store(p_left + TO_END * Q + o_l, after * to_end)
    else:
        through = tl.sum(through, 1)
    tl.store(p_left + THROUGH * Q + o_p, through)


@triton.jit
def _kept(states, boundary, first, i_h, H, inside, o_p, o_n, BP: tl.constexpr, BN: tl.constexpr, DT: tl.constexpr):
    """Load the state (or gradient) that a chunk shares with a neighbour; zeros where there is none `inside`."""
    p = states + ((boundary - first) * H + i_h) * (BP * BN)
    p += o_p.to(tl.int64)[:, None] * BN + o_n.to(tl.int64)[None, :]
    return tl.load(p, mask=(o_p >= 0)[:, None] & (o_n >= 0)[None, :] & inside, other=0.0).to(DT)


@triton.jit(do_not_specialize=[*PLACES, "heads"])
def within(
    dy, x, B, C, cu, chunk_steps, left_over, dK,
    L, num_sequences, search, first_chunk, num_chunks, H, per_group, heads,
    sy_b, sy_l, sy_h, sy_p, sx_b, sx_l, sx_h, sx_p, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, STAGES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Write three rows of `left_over` of each of `heads` heads of a group, and dK, their sum; see `through_states`."""
    pid = tl.program_id(0).to(tl.int64)
    parts, groups = per_group // heads, H // per_group
    i_part, i_g = pid % parts, pid // parts % groups
    slot, i_s, start, count, t, left = place_of(
        cu, pid // (parts * groups), L, num_sequences, search, first_chunk, num_chunks, Q, PACKED
    )
    row = i_s * 0 if PACKED else i_s
    o_l, o_n, o_p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    rows, ok = t + o_l, o_l < left
    p_B, sB = first_row(B + row * sB_b + i_g * sB_g, start, count, sB_l, REVERSE)
    p_C, sC = first_row(C + row * sC_b + i_g * sC_g, start, count, sC_l, REVERSE)
    b_B = load_tile(pointers(p_B, rows, sB, o_n, sB_n), ok, o_n, N, BN, DT)
    b_C = load_tile(pointers(p_C, rows, sC, o_n, sC_n), ok, o_n, N, BN, DT)
    K = tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION)
    total = tl.zeros([Q, Q], tl.float32)
    for k in tl.range(0, heads, num_stages=STAGES):
        i_h = i_g * per_group + i_part * heads + k
        p_x, sx = first_row(x + row * sx_b + i_h * sx_h, start, count, sx_l, REVERSE)
        p_y, sy = first_row(dy + row * sy_b + i_h * sy_h, start, count, sy_l, REVERSE)
        b_x = load_tile(pointers(p_x, rows, sx, o_p, sx_p), ok, o_p, P, BP, DT)
        b_dy = load_tile(pointers(p_y, rows, sy, o_p, sy_p), ok, o_p, P, BP, DT)
        b_w, whole, part, _, _ = steps_of(chunk_steps, slot * H + i_h, o_l, Q)
        dM = tl.dot(b_x, tl.trans(b_dy), input_precision=PRECISION)
        decay = decay_between(
            dM, whole[None, :], part[None, :], whole[:, None], part[:, None], o_l[None, :] >= o_l[:, None], FAST
        )
        total += dM * decay * b_w[:, None]
        p_left = left_over + (slot * H + i_h) * (ROWS * Q) + o_l
        _leave_chunk(p_left, dM, dM * decay * K, b_w, o_l, Q, DT, PRECISION)
    p_dK = dK + ((slot * groups + i_g) * parts + i_part) * (Q * Q)
    tl.store(p_dK + (o_l[:, None] * Q + o_l[None, :]), total.to(dK.dtype.element_ty))


@triton.jit(do_not_specialize=[*PLACES, "kept", "first_state", "first_gradient", "heads"])
def through_states(
    dy, x, B, C, cu, states, dstates, chunk_steps, dK, dB, dC, left_over,
    L, num_sequences, search, first_chunk, num_chunks, kept, first_state, first_gradient, H, per_group, heads,
    part_size,
    sy_b, sy_l, sy_h, sy_p, sx_b, sx_l, sx_h, sx_p, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, STAGES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Write dB and dC of a chunk from `heads` heads of a group, and three rows of `left_over` of each.

    They go to part i of their buffers, `part_size` elements each, where the program is the i-th of its group's.
    """
    pid = tl.program_id(0).to(tl.int64)
    parts, groups = per_group // heads, H // per_group
    i_part, i_g = pid % parts, pid // parts % groups
    slot, i_s, start, count, t, left = place_of(
        cu, pid // (parts * groups), L, num_sequences, search, first_chunk, num_chunks, Q, PACKED
    )
    row = i_s * 0 if PACKED else i_s
    o_l, o_n, o_p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    rows, ok = t + o_l, o_l < left
    boundary = row * kept + start // Q + t // Q
    p_B, sB = first_row(B + row * sB_b + i_g * sB_g, start, count, sB_l, REVERSE)
    p_C, sC = first_row(C + row * sC_b + i_g * sC_g, start, count, sC_l, REVERSE)
    b_B = load_tile(pointers(p_B, rows, sB, o_n, sB_n), ok, o_n, N, BN, DT)
    b_C = load_tile(pointers(p_C, rows, sC, o_n, sC_n), ok, o_n, N, BN, DT)
    acc_B, acc_C = tl.zeros([Q, BN], tl.float32), tl.zeros([Q, BN], tl.float32)
    for k in tl.range(0, heads, num_stages=STAGES):
        i_h = i_g * per_group + i_part * heads + k
        p_x, sx = first_row(x + row * sx_b + i_h * sx_h, start, count, sx_l, REVERSE)
        p_y, sy = first_row(dy + row * sy_b + i_h * sy_h, start, count, sy_l, REVERSE)
        b_w, whole, part, end, end_part = steps_of(chunk_steps, slot * H + i_h, o_l, Q)
        from_start, to_end = tl.exp2(whole + part), tl.exp2((end - whole) + (end_part - part))
        b_x = load_tile(pointers(p_x, rows, sx, o_p, sx_p), ok, o_p, P, BP, DT)
        b_dy = load_tile(pointers(p_y, rows, sy, o_p, sy_p), ok, o_p, P, BP, tl.float32)
        S = _kept(states, boundary, first_state, i_h, H, (t > 0) & (left > 0), o_p, o_n, BP, BN, DT)
        dS = _kept(dstates, boundary, first_gradient, i_h, H, left > Q, o_p, o_n, BP, BN, DT)
        acc_C = tl.dot((b_dy * from_start[:, None]).to(DT), S, acc=acc_C, input_precision=PRECISION)
        acc_B = tl.dot((b_x.to(tl.float32) * (to_end * b_w)[:, None]).to(DT), dS, acc=acc_B, input_precision=PRECISION)
        p_left = left_over + (slot * H + i_h) * (ROWS * Q)
        _leave_states(p_left, b_B, b_C, S, dS, b_x, b_dy, from_start, to_end, o_l, o_p, Q, PRECISION, BN > 64)
    p_dK = dK + ((slot * groups + i_g) * parts + i_part) * (Q * Q)
    b_dK = tl.load(p_dK + (o_l[:, None] * Q + o_l[None, :]))
    b_B = load_tile(pointers(p_B, rows, sB, o_n, sB_n), ok, o_n, N, BN, DT)
    b_C = load_tile(pointers(p_C, rows, sC, o_n, sC_n), ok, o_n, N, BN, DT)
    acc_B = tl.dot(b_dK, b_C, acc=acc_B, input_precision=PRECISION)
    acc_C = tl.dot(tl.trans(b_dK), b_B, acc=acc_C, input_precision=PRECISION)
    at_BC = i_part * part_size + (row * L * groups + i_g) * N
    p_dB, s_out = first_row(dB + at_BC, start, count, groups * N, REVERSE)
    p_dC, _ = first_row(dC + at_BC, start, count, groups * N, REVERSE)
    ok_BC = ok[:, None] & (o_n < N)[None, :]
    tl.store(pointers(p_dB, rows, s_out, o_n, 1), acc_B.to(dB.dtype.element_ty), mask=ok_BC)
    tl.store(pointers(p_dC, rows, s_out, o_n, 1), acc_C.to(dC.dtype.element_ty), mask=ok_BC)


@triton.jit(do_not_specialize=[*PLACES, "kept", "first_state", "first_gradient"])
def rest_of_one(
    dy, x, B, C, D, z, own, cu, states, dstates, chunk_steps, dB, dC, dz, down, left_over,
    L, num_sequences, search, first_chunk, num_chunks, kept, first_state, first_gradient, H, per_group, part_size,
    sy_b, sy_l, sy_h, sy_p, sx_b, sx_l, sx_h, sx_p, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n, sD,
    sz_b, sz_l, sz_h, sz_p, so_b, so_l, so_h,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_OWN: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Write dB and dC of a chunk from one head, all six rows of `left_over`, and dz and do."""
    pid = tl.program_id(0).to(tl.int64)
    i_h, groups = pid % H, H // per_group
    i_g, i_part = i_h // per_group, i_h % per_group
    slot, i_s, start, count, t, left = place_of(
        cu, pid // H, L, num_sequences, search, first_chunk, num_chunks, Q, PACKED
    )
    row = i_s * 0 if PACKED else i_s
    o_l, o_n, o_p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    rows, ok = t + o_l, o_l < left
    boundary = row * kept + start // Q + t // Q
    p_B, sB = first_row(B + row * sB_b + i_g * sB_g, start, count, sB_l, REVERSE)
    p_C, sC = first_row(C + row * sC_b + i_g * sC_g, start, count, sC_l, REVERSE)
    p_x, sx = first_row(x + row * sx_b + i_h * sx_h, start, count, sx_l, REVERSE)
    p_y, sy = first_row(dy + row * sy_b + i_h * sy_h, start, count, sy_l, REVERSE)
    p_z, sz = first_row(z + row * sz_b + i_h * sz_h, start, count, sz_l, REVERSE)
    p_left = left_over + (slot * H + i_h) * (ROWS * Q)
    b_w, whole, part, end, end_part = steps_of(chunk_steps, slot * H + i_h, o_l, Q)
    from_start, to_end = tl.exp2(whole + part), tl.exp2((end - whole) + (end_part - part))
    ok_x, ok_BC = ok[:, None] & (o_p < P)[None, :], ok[:, None] & (o_n < N)[None, :]

    b_x = load_tile(pointers(p_x, rows, sx, o_p, sx_p), ok, o_p, P, BP, DT)
    b_dy = load_tile(pointers(p_y, rows, sy, o_p, sy_p), ok, o_p, P, BP, tl.float32)
    if HAS_Z:
        b_z = load_tile(pointers(p_z, rows, sz, o_p, sz_p), ok, o_p, P, BP, tl.float32)
        b_dy = through_gate(b_dy, b_z, FAST)
    dy_high = b_dy.to(DT)
    dM = tl.dot(b_x, tl.trans(dy_high), input_precision=PRECISION)
    if HAS_Z and DT.primitive_bitwidth == 16:  # both halves: see `_leave_chunk`
        dM = tl.dot(b_x, tl.trans((b_dy - dy_high.to(tl.float32)).to(DT)), acc=dM, input_precision=PRECISION)
    b_B = load_tile(pointers(p_B, rows, sB, o_n, sB_n), ok, o_n, N, BN, DT)
    b_C = load_tile(pointers(p_C, rows, sC, o_n, sC_n), ok, o_n, N, BN, DT)
    K = tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION)
    on_diagonal = o_l[:, None] == o_l[None, :]
    counts = o_l[None, :] > o_l[:, None] if HAS_OWN else o_l[None, :] >= o_l[:, None]
    decay = decay_between(dM, whole[None, :], part[None, :], whole[:, None], part[:, None], counts, FAST)
    dK, M = dM * decay * b_w[:, None], K * decay * b_w[:, None]
    if HAS_OWN:
        p_own, so = first_row(own + row * so_b + i_h * so_h, start, count, so_l, REVERSE)
        b_own = load_rows(p_own, rows, so, ok).to(tl.float32)[:, None]
        dK, M = tl.where(on_diagonal, dM * b_own, dK), tl.where(on_diagonal, K * b_own, M)
    if HAS_D:
        M += tl.where(on_diagonal, tl.load(D + i_h * sD).to(tl.float32), 0.0)
    dK, M = dK.to(DT), M.to(DT)
    diagonal = _leave_chunk(p_left + o_l, dM, dM * decay * K, b_w, o_l, Q, DT, PRECISION)
    if HAS_OWN:
        p_down, s_out = first_row(down + row * L * H + i_h, start, count, H, REVERSE)
        b_down = diagonal * tl.sum(tl.where(on_diagonal, K, 0.0), 1)
        tl.store(p_down + rows.to(tl.int64) * s_out, b_down.to(down.dtype.element_ty), mask=ok)

    S = _kept(states, boundary, first_state, i_h, H, (t > 0) & (left > 0), o_p, o_n, BP, BN, DT)
    b_y = tl.dot(b_C, tl.trans(S), input_precision=PRECISION)
    tl.store(p_left + FROM_START * Q + o_l, tl.sum(b_y * b_dy, 1) * from_start)
    if HAS_Z:
        b_y = tl.dot(tl.trans(M), b_x, acc=b_y * from_start[:, None], input_precision=PRECISION)
        b_z = load_tile(pointers(p_z, rows, sz, o_p, sz_p), ok, o_p, P, BP, tl.float32)
        b_dz = load_tile(pointers(p_y, rows, sy, o_p, sy_p), ok, o_p, P, BP, tl.float32)
        b_dz = gate_gradient(b_dz, b_y, b_z, FAST)
        p_dz, s_out = first_row(dz + (row * L * H + i_h) * P, start, count, H * P, REVERSE)
        tl.store(pointers(p_dz, rows, s_out, o_p, 1), b_dz.to(dz.dtype.element_ty), mask=ok_x)
        # dy is loaded and gated again: kept, it would take more registers than there are
        b_dy = load_tile(pointers(p_y, rows, sy, o_p, sy_p), ok, o_p, P, BP, tl.float32)
        b_z = load_tile(pointers(p_z, rows, sz, o_p, sz_p), ok, o_p, P, BP, tl.float32)
        b_dy = through_gate(b_dy, b_z, FAST)
    at_BC = i_part * part_size + (row * L * groups + i_g) * N
    p_dC, s_out = first_row(dC + at_BC, start, count, groups * N, REVERSE)
    acc = tl.dot((b_dy * from_start[:, None]).to(DT), S, input_precision=PRECISION)
    acc = tl.dot(tl.trans(dK), b_B, acc=acc, input_precision=PRECISION)
    tl.store(pointers(p_dC, rows, s_out, o_n, 1), acc.to(dC.dtype.element_ty), mask=ok_BC)

    dS = _kept(dstates, boundary, first_gradient, i_h, H, left > Q, o_p, o_n, BP, BN, DT)
    products = tl.dot(S, tl.trans(dS), input_precision=PRECISION)
    tl.store(p_left + THROUGH * Q + o_p, tl.sum(tl.where(o_p[:, None] == o_p[None, :], products, 0.0), 1))
    b_x = load_tile(pointers(p_x, rows, sx, o_p, sx_p), ok, o_p, P, BP, DT).to(tl.float32)
    after = tl.dot(b_B, tl.trans(dS), input_precision=PRECISION) * b_x
    tl.store(p_left + TO_END * Q + o_l, tl.sum(after, 1) * to_end)
    p_dB, s_out = first_row(dB + at_BC, start, count, groups * N, REVERSE)
    acc = tl.dot((b_x * (to_end * b_w)[:, None]).to(DT), dS, input_precision=PRECISION)
    acc = tl.dot(dK, b_C, acc=acc, input_precision=PRECISION)
    tl.store(pointers(p_dB, rows, s_out, o_n, 1), acc.to(dB.dtype.element_ty), mask=ok_BC)


@triton.jit(do_not_specialize=["L", "num_sequences", "search"])
def sum_up(
    dt, A, bias, cu, chunk_steps, left_over, ddt, dw, dparams, L, num_sequences, search, H, low, high,
    sdt_b, sdt_l, sdt_h, sA, sbias,
    Q: tl.constexpr, HEADS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Write ddt and dw of a chunk; dA, d dt_bias and with HAS_D dD go to `dparams` (slots, H, 2 + HAS_D).

    Grid: (slots, heads).
    """
    slot, i_s, start, count, t, left = place_of(
        cu, tl.program_id(0).to(tl.int64), L, num_sequences, search, 0, tl.cdiv(L, Q), Q, PACKED
    )
    row = i_s * 0 if PACKED else i_s
    o_l, o_h = tl.arange(0, Q), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    ok_h, ok = (o_h < H)[:, None], (o_l < left)[None, :] & (o_h < H)[:, None]
    at, s_l = (slot * H + o_h)[:, None], o_l[None, :]
    p_left, p_steps = left_over + at * (ROWS * Q) + s_l, chunk_steps + at * (3 * Q)
    there = ok_h & (left > 0)
    factor = tl.exp2(tl.load(p_steps + (2 * Q - 1), mask=there, other=0.0))
    factor *= tl.exp2(tl.load(p_steps + (3 * Q - 1), mask=there, other=0.0))
    da = tl.sum(tl.load(p_left + THROUGH * Q, mask=there, other=0.0), 1)[:, None] * factor
    da += tl.load(p_left + WITHIN * Q, mask=ok, other=0.0)
    # what goes from before t: those of the positions above, each with its weight
    above = tl.load(p_left + (TO_END * Q - 1), mask=ok & (s_l > 0), other=0.0)
    da += tl.cumsum(above * tl.load(p_steps + (s_l - 1), mask=ok & (s_l > 0), other=0.0), 1)
    da += tl.cumsum(tl.load(p_left + FROM_START * Q, mask=ok, other=0.0), 1, reverse=True)
    da = tl.where(ok, da, 0.0)
    direct = tl.load(p_left + DIRECT * Q, mask=ok, other=0.0) + tl.load(p_left + TO_END * Q, mask=ok, other=0.0)

    s_h = o_h.to(tl.int64)[:, None]
    b_A = tl.load(A + s_h * sA, mask=ok_h, other=0.0).to(tl.float32)
    b_bias = tl.zeros([HEADS, 1], tl.float32)
    if HAS_BIAS:
        b_bias += tl.load(bias + s_h * sbias, mask=ok_h, other=0.0).to(tl.float32)
    p_dt, sdt = first_row(dt + row * sdt_b, start, count, sdt_l, REVERSE)
    rows = (t + s_l).to(tl.int64)
    b_dt = tl.load(p_dt + s_h * sdt_h + rows * sdt, mask=ok, other=0.0)
    raw, free, delta = step_sizes(b_dt, ok, b_bias, low, high, SOFTPLUS)
    b_ddt = b_A * da
    if HAS_WEIGHT:
        p_dw, s_out = first_row(dw + row * L * H, start, count, H, REVERSE)
        tl.store(p_dw + s_h + rows * s_out, direct.to(dw.dtype.element_ty), mask=ok)
    else:
        b_ddt += direct
    b_ddt = tl.where((free >= low) & (free <= high) & ok, b_ddt, 0.0)
    if SOFTPLUS:
        b_ddt *= sigmoid(raw)
    p_ddt, s_out = first_row(ddt + row * L * H, start, count, H, REVERSE)
    tl.store(p_ddt + s_h + rows * s_out, b_ddt.to(ddt.dtype.element_ty), mask=ok)
    p_params = dparams + (slot * H + o_h) * (2 + HAS_D)
    tl.store(p_params, tl.sum(delta * da, 1), mask=o_h < H)
    tl.store(p_params + 1, tl.sum(b_ddt, 1), mask=o_h < H)
    if HAS_D:
        tl.store(p_params + 2, tl.sum(tl.load(p_left + DIAGONAL * Q, mask=ok, other=0.0), 1), mask=o_h < H)
