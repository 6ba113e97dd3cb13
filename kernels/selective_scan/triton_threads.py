"""What crosses threads in the Triton kernels of the selective scan.

Rows given to both threads of a channel, sums over the threads of a channel, sums over the channels of a warp; and
between programs, what one of a chain hands on to the next.
"""

# What Triton compiles has its own types, and it knows no unpacking into a tuple.
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl


@triton.jit
def thread_of(place, SHARE: tl.constexpr, WARP: tl.constexpr):
    """Which of the SHARE threads of its channel a thread is, and its channel: a warp has WARP / SHARE of them."""
    CHANNELS: tl.constexpr = WARP // SHARE
    return place % WARP // CHANNELS, place // WARP * CHANNELS + place % CHANNELS


@triton.jit
def lane_of(channels):
    """The thread that holds each of the 32 channels (BD,), whatever the layout."""
    return tl.inline_asm_elementwise(
        "mov.u32 $0, %laneid; // $1", "=r,r", [channels], dtype=tl.int32, is_pure=True, pack=1
    )


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
def _shuffle(x, MASK: tl.constexpr):
    return tl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {MASK}, 31, -1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _exchange(a, b, bit, MASK: tl.constexpr):
    """Threads whose `bit` is unset end with the sum of a over the pair of threads, the others with that of b."""
    return tl.where(bit, b, a) + _shuffle(tl.where(bit, a, b), MASK)


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
        "{ .reg .pred q; setp.ne.b32 q, $4, 0; @q st.global.L1::no_allocate.v2.f32 [$1], {$2, $3}; mov.b32 $0, 0; }",
        "=r,l,r,r,r", [p.to(tl.int64), x, y, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def add_warps(
    p_parts, p_sum, place, steps, L, sign: tl.constexpr, N: tl.constexpr, ROUND: tl.constexpr, BD: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Add up `p_parts` (WARPS, N, ROUND, 2), which the program's warps have just written, into `p_sum` (N, L, 2).

    Of the ROUND steps there are `steps`; `sign` is the direction in which they follow each other in `p_sum`. A second
    call must find other parts: no warp waits here for those that still read. On a GPU only.
    """
    tl.debug_barrier()
    for first in range(0, N * ROUND, 4 * BD):
        pairs = ()
        for i in tl.static_range(4 * WARPS):  # all on their way at once
            o = first + i // WARPS * BD + place
            inside = (o < N * ROUND) & (o % ROUND < steps)
            pairs = pairs + (_load_two(p_parts + (i % WARPS * N * ROUND + o) * 2, inside),)
        for i in tl.static_range(4):
            o = first + i * BD + place
            n, t = o // ROUND, o % ROUND
            x, y = pairs[i * WARPS]
            for w in tl.static_range(1, WARPS):
                x_w, y_w = pairs[i * WARPS + w]
                x, y = x + x_w, y + y_w
            store_pair(p_sum + (n * L + sign * t) * 2, x, y, (o < N * ROUND) & (t < steps))


@triton.jit
def _load_two(p, mask):
    """Load two float32 that another warp has written, past the L1 cache; zeros where `mask` does not hold."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred q; setp.ne.b32 q, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; @q ld.global.cg.v2.f32 {$0, $1}, [$2]; }",
        "=&r,=&r,l,r", [p.to(tl.int64), mask.to(tl.int32)], dtype=(tl.float32, tl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def wait_for_piece(flags, place, count, WARP: tl.constexpr, FAST: tl.constexpr):
    """Wait until this program's warps have been handed what `count` programs before it left: see `hand_on`.

    `flags` are those of the program. What is loaded afterwards, not by way of a read-only cache, is what they stored.
    """
    if FAST:
        tl.inline_asm_elementwise(
            "{ .reg .pred q; .reg .u32 v; WAIT: ld.relaxed.gpu.global.u32 v, [$1]; setp.lo.u32 q, v, $2; "
            "@q nanosleep.u32 200; @q bra WAIT; fence.acq_rel.gpu; mov.u32 $0, v; }",
            "=r,l,r", [(flags + place // WARP).to(tl.int64), place * 0 + count * WARP],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def hand_on(flags, place, WARP: tl.constexpr, FAST: tl.constexpr):
    """Let the next program of a chain read what each thread has stored: its flag grows by one a thread of a warp."""
    if FAST:
        tl.inline_asm_elementwise(
            "{ red.release.gpu.global.add.u32 [$1], 1; mov.u32 $0, 0; }",
            "=r,l", [(flags + place // WARP).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
