"""What the Triton kernels of the selective scan share: rows of a tile in registers, elementwise functions, sums.

A program is a few warps that know nothing of each other. A warp has 32 channels, one per thread, or 16 with two threads
each (SHARE), of which each has half of the states, times T steps. A "row" is what the channels hold at one step; a
tile's rows are a tuple of T tensors (BD,), so that sums over the states and recurrences over the steps stay inside a
thread, and nothing but the sum over channels (`finish_sums`) crosses threads.

`FAST` is False in Triton's interpreter, which knows no inline assembly.
"""

# What Triton compiles has its own types, and it knows no unpacking into a tuple.
# mypy: ignore-errors
# ruff: noqa: D103, RUF005

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def log2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    return reciprocal(1.0 + tl.exp2(x * -LOG2E), FAST)


@triton.jit
def softplus(x, FAST: tl.constexpr):
    """log(1 + exp(x)), by a series where 1 + exp(-|x|) would round: Δ may be 1e-4, and its relative error counts."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    series = e * (1.0 - e * (0.5 - e * (0.33333333 - e * (0.25 - e * 0.2))))
    return tl.maximum(x, 0.0) + tl.where(e < 0.0625, series, log2(1.0 + e, FAST) * LN2)


@triton.jit
def step_size(delta, bias, SOFTPLUS: tl.constexpr, FAST: tl.constexpr):
    x = delta + bias
    return softplus(x, FAST) if SOFTPLUS else x


@triton.jit
def load(p, FAST: tl.constexpr):
    """Load float32 from the pointers `p` (BD,).

    In assembly, because Triton's coalescing pass takes time quadratic in the size of a kernel for each tensor load:
    80 s for a backward kernel. There is nothing to coalesce: a warp's row is one access.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "ld.global.f32 $0, [$1];", "=r,l", [p.to(tl.int64)], dtype=tl.float32, is_pure=False, pack=1
        )
    else:
        return tl.load(p)


@triton.jit
def load_input(p, FAST: tl.constexpr):
    """Load what no kernel writes, as it is: 16-bit floats stay in the low half of an int32 until `widen`."""
    if FAST:
        if p.dtype.element_ty == tl.float32:
            return tl.inline_asm_elementwise(
                "ld.global.nc.f32 $0, [$1];", "=r,l", [p.to(tl.int64)], dtype=tl.float32, is_pure=False, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b16 t; ld.global.nc.b16 t, [$1]; cvt.u32.u16 $0, t; }",
                "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    else:
        return tl.load(p)


@triton.jit
def widen(value, p, FAST: tl.constexpr):
    """Return what `load_input(p)` loaded as float32."""
    if p.dtype.element_ty == tl.float32:
        return value
    elif FAST:
        if p.dtype.element_ty == tl.bfloat16:
            return (value << 16).to(tl.float32, bitcast=True)
        else:
            tl.static_assert(p.dtype.element_ty == tl.float16)
            return _half(value, FAST)
    else:
        return value.to(tl.float32)


@triton.jit
def _half(value, FAST: tl.constexpr):
    """Return the fp16 in the low half of an int32 as float32."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 t; cvt.u16.u32 t, $1; cvt.f32.f16 $0, t; }",
            "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return value.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_pair(p, PAIR: tl.constexpr, FAST: tl.constexpr):
    """Load B and C of a state from the pointers `p`, all equal, to int64 (PAIR 32) or int32 (16-bit PAIR)."""
    if FAST:
        if PAIR == 32:
            return tl.inline_asm_elementwise(
                "ld.global.nc.b64 $0, [$1];", "=l,l", [p.to(tl.int64)], dtype=tl.int64, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "ld.global.nc.b32 $0, [$1];", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        return tl.load(p)


@triton.jit
def load_pairs(p, COUNT: tl.constexpr, PAIR: tl.constexpr, FAST: tl.constexpr):
    """Load `load_pair` of COUNT states that follow each other, up to 16 bytes at once; COUNT divides their number."""
    words = ()
    if FAST and PAIR != 32 and COUNT % 4 == 0:
        for k in tl.static_range(0, COUNT, 4):
            words = words + tl.inline_asm_elementwise(
                "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [(p + k).to(tl.int64)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
    elif FAST and PAIR != 32 and COUNT % 2 == 0:
        for k in tl.static_range(0, COUNT, 2):
            words = words + tl.inline_asm_elementwise(
                "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [(p + k).to(tl.int64)],
                dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
    elif FAST and PAIR == 32 and COUNT % 2 == 0:
        for k in tl.static_range(0, COUNT, 2):
            words = words + tl.inline_asm_elementwise(
                "ld.global.nc.v2.b64 {$0, $1}, [$2];", "=l,=l,l", [(p + k).to(tl.int64)],
                dtype=(tl.int64, tl.int64), is_pure=True, pack=1,
            )  # fmt: skip
    else:
        for k in tl.static_range(COUNT):
            words = words + (load_pair(p + k, PAIR, FAST),)
    return words


@triton.jit
def decays(dt, A, COUNT: tl.constexpr):
    """exp(Δ A) of COUNT states; A has been multiplied by log2(e)."""
    a = ()
    for k in tl.static_range(COUNT):
        a = a + (tl.exp2(dt * A[k]),)
    return a


@triton.jit
def unpack(word, PAIR: tl.constexpr, FAST: tl.constexpr):
    """Return the two floats that `load_pair` loaded: float32 (PAIR 32), bfloat16 (16) or float16 (-16)."""
    if PAIR == 32:
        return (
            word.to(tl.int32).to(tl.float32, bitcast=True),
            (word >> 32).to(tl.int32).to(tl.float32, bitcast=True),
        )
    elif PAIR == 16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        return _half(word & 65535, FAST), _half((word >> 16) & 65535, FAST)


@triton.jit
def store(p, value, mask, MASKED: tl.constexpr, FAST: tl.constexpr):
    """Store float32 `value` (where `mask` holds, if MASKED), rounded to what `p` points to; see `load`."""
    if FAST:
        held = mask.to(tl.int32) if MASKED else value.to(tl.int32, bitcast=True)
        CONDITION: tl.constexpr = "setp.ne.b32 q, $3, 0; @q" if MASKED else ""
        if p.dtype.element_ty == tl.float32:
            code: tl.constexpr = f"{{ .reg .pred q; {CONDITION} st.global.f32 [$1], $2; mov.b32 $0, 0; }}"
        elif p.dtype.element_ty == tl.bfloat16:
            code: tl.constexpr = (
                f"{{ .reg .pred q; .reg .b16 t; cvt.rn.bf16.f32 t, $2; {CONDITION} st.global.b16 [$1], t; "
                "mov.b32 $0, 0; }"
            )
        else:
            tl.static_assert(p.dtype.element_ty == tl.float16)
            code: tl.constexpr = (
                f"{{ .reg .pred q; .reg .b16 t; cvt.rn.f16.f32 t, $2; {CONDITION} st.global.b16 [$1], t; "
                "mov.b32 $0, 0; }"
            )
        tl.inline_asm_elementwise(
            code, "=r,l,r,r", [p.to(tl.int64), value, held], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        tl.store(p, value.to(p.dtype.element_ty), mask=mask if MASKED else None)


@triton.jit
def load_rows(
    p, step, which, count, T: tl.constexpr, SHARE: tl.constexpr, FULL: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Load T rows, `step` apart from the pointers `p` on; unless FULL, rows from `count` on repeat the last one.

    With SHARE threads a channel, a thread loads every SHARE-th row, from its number `which` on.
    """
    rows = ()
    q = p + which * step if SHARE > 1 else p
    for i in tl.static_range(0, T, SHARE):
        if FULL:
            rows = rows + (load_input(q + i * step, FAST),)
        else:
            rows = rows + (load_input(p + tl.minimum(i + which, count - 1) * step, FAST),)
    return rows


@triton.jit
def store_rows(
    p, rows, step, which, count, m_d,
    T: tl.constexpr, SHARE: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Store the first `count` of T rows, `step` apart from the pointers `p` on. EVEN: all channels are there."""
    q = p + which * step if SHARE > 1 else p
    for i in tl.static_range(0, T, SHARE):
        mask = m_d if FULL else m_d & (i + which < count)
        store(q + i * step, rows[i // SHARE], mask, not (FULL and EVEN), FAST)


@triton.jit
def spread(rows, lane, T: tl.constexpr, SHARE: tl.constexpr, BD: tl.constexpr, FAST: tl.constexpr):
    """Give all T rows to both threads of a channel, of which each has every other one."""
    if SHARE == 1:
        return rows
    else:
        both = ()
        for i in tl.static_range(T // 2):
            both = both + _of_halves(rows[i], lane, BD, FAST)
        return both


@triton.jit
def _of_halves(x, lane, BD: tl.constexpr, FAST: tl.constexpr):
    """Return for every channel what its thread in the first half of the warp holds, and what the other one holds."""
    if FAST:
        return _from_lane(x, lane & 15), _from_lane(x, lane | 16)
    else:
        a, b = tl.split(tl.trans(tl.reshape(x, [2, BD // 2])))
        return _in_halves(a, a, BD), _in_halves(b, b, BD)


@triton.jit
def _in_halves(a, b, BD: tl.constexpr):
    return tl.reshape(tl.trans(tl.join(a, b)), [BD])


@triton.jit
def _from_lane(x, lane):
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=r,r,r", [x, lane], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def pair_sums(rows, which, T: tl.constexpr, SHARE: tl.constexpr, BD: tl.constexpr, FAST: tl.constexpr):
    """Add up T rows over the two threads of a channel: each thread ends with the rows that `load_rows` gives it."""
    if SHARE == 1:
        return rows
    else:
        sums = ()
        for i in tl.static_range(0, T, 2):
            if FAST:
                sums = sums + (_exchange(rows[i], rows[i + 1], which != 0, 16),)
            else:
                a, b = tl.sum(tl.reshape(rows[i], [2, BD // 2]), 0), tl.sum(tl.reshape(rows[i + 1], [2, BD // 2]), 0)
                sums = sums + (_in_halves(a, b, BD),)
        return sums


@triton.jit
def touch(p, FAST: tl.constexpr):
    """Load a byte of each of the pointers `p`, so that their lines are in the cache when they are needed.

    The result must be used, or nothing is loaded. (prefetch.global does nothing that could be measured, and loads into
    registers are put off by the compiler until shortly before their use.)
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 t; ld.global.nc.u8 t, [$1]; cvt.u32.u16 $0, t; }",
            "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return (p.to(tl.int64) * 0).to(tl.int32)


@triton.jit
def thread_of(place, SHARE: tl.constexpr, WARP: tl.constexpr):
    """Which of the SHARE threads of its channel a thread is, and its channel: a warp has WARP / SHARE of them."""
    CHANNELS: tl.constexpr = WARP // SHARE
    return place % WARP // CHANNELS, place // WARP * CHANNELS + place % CHANNELS


@triton.jit
def sequence_of(cu, i_s, L, PACKED: tl.constexpr):
    """First position and length of sequence i_s, inside [0, L] whatever the offsets are."""
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu + i_s).to(tl.int64), 0), L)
        end = tl.minimum(tl.maximum(tl.load(cu + i_s + 1).to(tl.int64), start), L)
        return start, end - start
    else:
        return tl.full([], 0, tl.int64), L.to(tl.int64)


@triton.jit
def _shuffle(x, MASK: tl.constexpr):
    return tl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {MASK}, 31, -1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _exchange(a, b, bit, MASK: tl.constexpr):
    """Threads whose `bit` is unset end with the sum of a over the pair of threads, the others with that of b."""
    return tl.where(bit, b, a) + _shuffle(tl.where(bit, a, b), MASK)


@triton.jit
def _mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _rest(x):
    """What is left of x beside its tf32 part."""
    return x - (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def quarter_sums(sums, rows, lane, PLACE: tl.constexpr, EXACT: tl.constexpr):
    """Add to `sums` 4 rows, each summed over every 4 neighbouring threads, by the tensor cores.

    The rows are the matrix A of an m16n8k8 product, B selects columns. After rows have gone to all of the places 0 to
    3, thread l holds the sums of rows 0 to 3 of place l % 4. tf32 keeps 10 bits of what is summed; EXACT adds the
    product of the rest, which makes it 21.
    """
    c0, c1, c2, c3 = sums
    b0 = tl.where(lane // 4 == 2 * PLACE, 1.0, 0.0)
    b1 = tl.where(lane // 4 == 2 * PLACE + 1, 1.0, 0.0)
    c0, c1, c2, c3 = _mma(rows[0], rows[2], rows[1], rows[3], b0, b1, c0, c1, c2, c3)
    if EXACT:
        c0, c1, c2, c3 = _mma(_rest(rows[0]), _rest(rows[2]), _rest(rows[1]), _rest(rows[3]), b0, b1, c0, c1, c2, c3)
    return c0, c1, c2, c3


@triton.jit
def finish_sums(xs, ys, lane, SHARE: tl.constexpr):
    """Add up two results of `quarter_sums` over the threads that have the same states: see `place_of_sum`.

    With SHARE 1 that is the warp, and each thread ends with one sum, of xs or of ys; with SHARE 2 it is half the warp,
    and each thread ends with one of both.
    """
    bit2, bit3, bit4 = (lane & 4) != 0, (lane & 8) != 0, (lane & 16) != 0
    if SHARE == 1:
        x0, x1 = _exchange(xs[0], xs[2], bit4, 16), _exchange(xs[1], xs[3], bit4, 16)
        y0, y1 = _exchange(ys[0], ys[2], bit4, 16), _exchange(ys[1], ys[3], bit4, 16)
        total = _exchange(_exchange(x0, x1, bit3, 8), _exchange(y0, y1, bit3, 8), bit2, 4)
        return total, total
    else:
        x0, x1 = _exchange(xs[0], xs[2], bit3, 8), _exchange(xs[1], xs[3], bit3, 8)
        y0, y1 = _exchange(ys[0], ys[2], bit3, 8), _exchange(ys[1], ys[3], bit3, 8)
        return _exchange(x0, x1, bit2, 4), _exchange(y0, y1, bit2, 4)


@triton.jit
def place_of_sum(lane, SHARE: tl.constexpr):
    """Of the sums that `finish_sums` leaves in a thread: their row, and with SHARE 1 whether it is of xs (0) or ys."""
    if SHARE == 1:
        return 4 * (lane & 3) + ((lane & 16) >> 3) + ((lane & 8) >> 3), (lane & 4) >> 2
    else:
        return 4 * (lane & 3) + ((lane & 8) >> 2) + ((lane & 4) >> 2), lane & 0


@triton.jit
def store_pair(p, x, y, mask):
    """Store two float32 side by side where `mask` holds. On a GPU only."""
    tl.inline_asm_elementwise(
        "{ .reg .pred q; setp.ne.b32 q, $4, 0; @q st.global.v2.f32 [$1], {$2, $3}; mov.b32 $0, 0; }", "=r,l,r,r,r",
        [p.to(tl.int64), x, y, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def lane_of(channels):
    """The thread that holds each of the 32 channels (BD,), whatever the layout."""
    return tl.inline_asm_elementwise(
        "mov.u32 $0, %laneid; // $1", "=r,r", [channels], dtype=tl.int32, is_pure=True, pack=1
    )
