"""What the Triton kernels of the selective scan share: rows of a tile in registers, elementwise functions.

A program is a few warps that know nothing of each other. A warp has 32 channels, one per thread, or 16 with two threads
each (SHARE), of which each has half of the states, times T steps. A "row" is what the channels hold at one step; a
tile's rows are a tuple of T tensors (BD,), so that sums over the states and recurrences over the steps stay inside a
thread; what crosses threads is in `triton_threads`.

`FAST` is False in Triton's interpreter, which knows no inline assembly.
"""

# What Triton compiles has its own types, and it knows no unpacking into a tuple.
# mypy: ignore-errors
# ruff: noqa: D103, RUF005

import triton
import triton.language as tl

from mambaverse.kernels.triton_math import LOG2E, softplus

LN2 = tl.constexpr(0.6931471805599453)
# SPLIT, how a length is cut: 0, not; in segments that start from what `combine` finds; in pieces of a chain, each
# of which starts from what the program before it hands on.
JOINED, CHAINED = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    return reciprocal(1.0 + tl.exp2(x * -LOG2E), FAST)


@triton.jit
def step_size(delta, bias, SOFTPLUS: tl.constexpr):
    x = delta + bias
    return softplus(x) if SOFTPLUS else x


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
def load_where(p, mask, FAST: tl.constexpr):
    """`load_input` where `mask` holds, else 0."""
    if FAST:
        if p.dtype.element_ty == tl.float32:
            return tl.inline_asm_elementwise(
                "{ .reg .pred q; setp.ne.b32 q, $2, 0; mov.b32 $0, 0; @q ld.global.nc.f32 $0, [$1]; }",
                "=&r,l,r", [p.to(tl.int64), mask.to(tl.int32)], dtype=tl.float32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .pred q; .reg .b16 t; setp.ne.b32 q, $2, 0; mov.b16 t, 0; @q ld.global.nc.b16 t, [$1]; "
                "cvt.u32.u16 $0, t; }",
                "=&r,l,r", [p.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    else:
        return tl.load(p, mask=mask, other=0.0)


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
def store(p, value, mask, MASKED: tl.constexpr, FAST: tl.constexpr, CACHED: tl.constexpr = True):
    """Store float32 `value` (where `mask` holds, if MASKED), rounded to what `p` points to; see `load`.

    CACHED: this program reads it again; what it does not would take the place of what it does.
    """
    if FAST:
        held = mask.to(tl.int32) if MASKED else value.to(tl.int32, bitcast=True)
        CONDITION: tl.constexpr = "setp.ne.b32 q, $3, 0; @q" if MASKED else ""
        STORE: tl.constexpr = "st.global" if CACHED else "st.global.L1::no_allocate"
        if p.dtype.element_ty == tl.float32:
            code: tl.constexpr = f"{{ .reg .pred q; {CONDITION} {STORE}.f32 [$1], $2; mov.b32 $0, 0; }}"
        elif p.dtype.element_ty == tl.bfloat16:
            code: tl.constexpr = (
                f"{{ .reg .pred q; .reg .b16 t; cvt.rn.bf16.f32 t, $2; {CONDITION} {STORE}.b16 [$1], t; "
                "mov.b32 $0, 0; }"
            )
        else:
            tl.static_assert(p.dtype.element_ty == tl.float16)
            code: tl.constexpr = (
                f"{{ .reg .pred q; .reg .b16 t; cvt.rn.f16.f32 t, $2; {CONDITION} {STORE}.b16 [$1], t; "
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
        store(q + i * step, rows[i // SHARE], mask, not (FULL and EVEN), FAST, False)


@triton.jit
def touch(address, lane):
    """Ask for the lines at the addresses (int64), so that they are in the cache when they are needed. On a GPU only.

    Only for kernels that use no shared memory of Triton's, whose place it would move.
    An asynchronous copy of 4 bytes a thread into shared memory that nobody reads. Nothing waits for it, whereas a load
    into a register shares one of six scoreboards with other loads, whose users then wait for both; prefetch.global does
    nothing that could be measured.
    """
    tl.inline_asm_elementwise(
        "{ .shared .align 16 .b8 unread[128]; .reg .b32 s; mov.u32 s, unread; mad.lo.u32 s, $2, 4, s; "
        "cp.async.ca.shared.global [s], [$1], 4; mov.u32 $0, 0; }",
        "=r,l,r", [address & -4, lane], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def touch_tile(
    p_u, p_delta, p_z, p_BC, lane, ahead, left,
    u_step: tl.constexpr, delta_step: tl.constexpr, z_step: tl.constexpr, BC_STEP: tl.constexpr,
    WITH_Z: tl.constexpr, OWN_BC: tl.constexpr, T: tl.constexpr, WARP: tl.constexpr,
):  # fmt: skip
    """`touch` what a warp will read `ahead` steps on: a row a thread, of u and delta by half of the warp each.

    There are `left` rows.
    """
    row = tl.minimum(ahead + lane % T, left - 1).to(tl.int64)
    at_u, at_delta = (p_u + row * u_step).to(tl.int64), (p_delta + row * delta_step).to(tl.int64)
    touch(tl.where(lane < WARP // 2, at_u, at_delta), lane)
    if WITH_Z:
        touch((p_z + row * z_step).to(tl.int64), lane)
    if not OWN_BC:
        touch((p_BC + row * BC_STEP).to(tl.int64), lane)  # with two threads a channel, each has half of a row


@triton.jit
def sequence_of(cu, i_s, L, PACKED: tl.constexpr):
    """First position and length of sequence i_s, inside [0, L] whatever the offsets are."""
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu + i_s).to(tl.int64), 0), L)
        end = tl.minimum(tl.maximum(tl.load(cu + i_s + 1).to(tl.int64), start), L)
        return start, end - start
    else:
        return tl.full([], 0, tl.int64), L.to(tl.int64)
