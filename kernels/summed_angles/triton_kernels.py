"""The Triton kernels of summed_angles, parallel over chunks of T tokens.

`turn_sums` and `gradient_sums` add up each chunk, `boundaries` walks a sequence's chunks and leaves what comes before
each of them, or for gradients what comes after it; `angles` and `gradients` then work inside chunks. Sums over chunks
are float64, as are those of turns inside; chunk j of packed sequence s, which begins at `start`, has place
start // T + s + j.
"""

# What Triton compiles has its own types.
# mypy: ignore-errors

import triton
import triton.language as tl

PI = tl.constexpr(3.141592653589793)
AHEAD = tl.constexpr(8)  # chunks that `boundaries` loads together


@triton.jit
def _sequence_of(cu, i_s, L, PACKED: tl.constexpr):
    """Return a sequence's first token and its length, inside [0, L] whatever the offsets are."""
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu + i_s).to(tl.int64), 0), L)
        end = tl.minimum(tl.maximum(tl.load(cu + i_s + 1).to(tl.int64), start), L)
        return start, end - start
    else:
        return tl.full([], 0, tl.int64), tl.full([], 0, tl.int64) + L


@triton.jit
def _place_of(cu, place, L, num_sequences, search, T: tl.constexpr, PACKED: tl.constexpr):
    """Return a chunk's row of the batch, its first token, and how many of its sequence follow from there, or 0."""
    if PACKED:
        low = tl.full([], 0, tl.int64)
        high = low + num_sequences
        for _step in range(search):
            middle = (low + high) // 2
            first = tl.minimum(tl.maximum(tl.load(cu + middle).to(tl.int64), 0), L) // T + middle
            low = tl.where(first <= place, middle, low)
            high = tl.where(first <= place, high, middle)
        start, count = _sequence_of(cu, low, L, PACKED)
        before = (place - (start // T + low)) * T
        there = (before >= 0) & (before < count)
        return low * 0, tl.where(there, start + before, 0), tl.where(there, count - before, 0)
    else:
        chunks = tl.cdiv(L, T)
        first = place % chunks * T
        return place // chunks, first, L - first


@triton.jit
def _columns(dt, rate, row, first, o, H, sd_b, sd_l, sd_h, sr_b, sr_l, sr_s, S: tl.constexpr):
    """Return pointers to dt and rate of a chunk's first token for the columns o, a head's pairs after another's.

    And the steps to the next token, int64: several of them may be 2^31.
    """
    heads, pairs = (o // S).to(tl.int64), (o % S).to(tl.int64)
    p_dt, p_rate = dt + row * sd_b + first * sd_l + heads * sd_h, rate + row * sr_b + first * sr_l + pairs * sr_s
    return p_dt, p_rate, tl.full([], sd_l, tl.int64), tl.full([], sr_l, tl.int64)


@triton.jit(do_not_specialize=["L", "num_sequences", "search"])
def turn_sums(
    dt, rate, cu, sums, L, num_sequences, search, H, sd_b, sd_l, sd_h, sr_b, sr_l, sr_s,
    S: tl.constexpr, T: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the sums of turns of each chunk: (places, H, S) float64. Grid: (places, blocks of columns)."""
    place = tl.program_id(0).to(tl.int64)
    row, first, left = _place_of(cu, place, L, num_sequences, search, T, PACKED)
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ok = o < H * S
    p_dt, p_rate, sd, sr = _columns(dt, rate, row, first, o, H, sd_b, sd_l, sd_h, sr_b, sr_l, sr_s, S)
    total = tl.zeros([COLUMNS], tl.float64)
    for t in range(0, tl.minimum(left, T), AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            there = ok & (t + i < left)
            b_dt = tl.load(p_dt + i * sd, mask=there, other=0.0).to(tl.float64)
            total += b_dt * tl.load(p_rate + i * sr, mask=there, other=0.0).to(tl.float64)
        p_dt += AT_ONCE * sd
        p_rate += AT_ONCE * sr
    tl.store(sums + place * (H * S) + o, total * 0.5, mask=ok)


@triton.jit(do_not_specialize=["L", "num_sequences", "search"])
def gradient_sums(
    dangles, cu, sums, L, num_sequences, search, H, sa_b, sa_l, sa_h, sa_s,
    S: tl.constexpr, T: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the sums of angles' gradients of each chunk: (places, H, S) float64. Grid: (places, blocks of columns)."""
    place = tl.program_id(0).to(tl.int64)
    row, first, left = _place_of(cu, place, L, num_sequences, search, T, PACKED)
    o_t, o = tl.arange(0, T), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = dangles + row * sa_b + ((first + o_t) * sa_l)[:, None]
    at += ((o // S).to(tl.int64) * sa_h + (o % S).to(tl.int64) * sa_s)[None, :]
    values = tl.load(at, mask=(o_t < left)[:, None] & (o < H * S)[None, :], other=0.0).to(tl.float64)
    tl.store(sums + place * (H * S) + o, tl.sum(values, 0), mask=o < H * S)


@triton.jit(do_not_specialize=["L"])
def boundaries(
    sums, initial, dinitial, cu, L, H, si_b, si_h, si_s,
    S: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Turn the sums of a sequence's chunks into what comes before each, or with GRADIENT after each, in place.

    Turns start from `initial`, in radians; what all gradients of a sequence add up to goes to `dinitial`.
    Grid: (sequences, blocks of H · S).
    """
    i_s = tl.program_id(0).to(tl.int64)
    start, count = _sequence_of(cu, i_s, L, PACKED)
    chunks = tl.cdiv(count, T)
    first = start // T + i_s if PACKED else i_s * chunks
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = o < H * S
    total = tl.zeros([BLOCK], tl.float64)
    if HAS_INITIAL and not GRADIENT:
        at = initial + i_s * si_b + (o // S).to(tl.int64) * si_h + (o % S).to(tl.int64) * si_s
        total += tl.load(at, mask=ok, other=0.0).to(tl.float64) / (2.0 * PI)
    for j in range(0, chunks, AHEAD):
        values = ()
        for i in tl.static_range(AHEAD):  # loads first: behind a store they would wait for it
            k = first + (chunks - 1 - j - i if GRADIENT else j + i)
            values = values + (tl.load(sums + k * (H * S) + o, mask=ok & (j + i < chunks), other=0.0),)  # noqa: RUF005
        for i in tl.static_range(AHEAD):
            k = first + (chunks - 1 - j - i if GRADIENT else j + i)
            tl.store(sums + k * (H * S) + o, total, mask=ok & (j + i < chunks))
            total += values[i]
    if HAS_INITIAL and GRADIENT:
        tl.store(dinitial + i_s * (H * S) + o, total.to(dinitial.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["L", "num_sequences", "search"])
def angles(
    dt, rate, cu, before, out, L, num_sequences, search, H, sd_b, sd_l, sd_h, sr_b, sr_l, sr_s,
    S: tl.constexpr, T: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the angles (B, L, H, S) of a chunk, token after token. Grid: (places, blocks of columns)."""
    place = tl.program_id(0).to(tl.int64)
    row, first, left = _place_of(cu, place, L, num_sequences, search, T, PACKED)
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ok = o < H * S
    p_dt, p_rate, sd, sr = _columns(dt, rate, row, first, o, H, sd_b, sd_l, sd_h, sr_b, sr_l, sr_s, S)
    p_out = out + (row * L + first) * H * S + o
    turns = tl.load(before + place * (H * S) + o, mask=ok & (left > 0), other=0.0)  # where no chunk is, no sum is
    for t in range(0, tl.minimum(left, T), AT_ONCE):
        steps = ()
        for i in tl.static_range(AT_ONCE):  # loads first: behind a store they would wait for it
            there = ok & (t + i < left)
            b_dt = tl.load(p_dt + i * sd, mask=there, other=0.0).to(tl.float64)
            steps = steps + (b_dt * tl.load(p_rate + i * sr, mask=there, other=0.0).to(tl.float64),)  # noqa: RUF005
        for i in tl.static_range(AT_ONCE):
            turns += steps[i] * 0.5
            value = ((turns - tl.floor(turns)) * (2.0 * PI)).to(tl.float32)
            tl.store(p_out + i * H * S, value, mask=ok & (t + i < left))
        p_dt += AT_ONCE * sd
        p_rate += AT_ONCE * sr
        p_out += AT_ONCE * H * S


@triton.jit(do_not_specialize=["L", "num_sequences", "search"])
def gradients(
    dangles, dt, rate, cu, after, ddt, drate, L, num_sequences, search, H,
    sa_b, sa_l, sa_h, sa_s, sd_b, sd_l, sd_h, sr_b, sr_l, sr_s,
    S: tl.constexpr, BS: tl.constexpr, T: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write ddt (B, L, H) and drate (B, L, S) of a chunk, head after head. Grid: (places,).

    The sums inside a chunk are a product with a triangle of ones, in two halves: tf32 has 11 digits.
    """
    place = tl.program_id(0).to(tl.int64)
    row, first, left = _place_of(cu, place, L, num_sequences, search, T, PACKED)
    o_t, o_s = tl.arange(0, T), tl.arange(0, BS)
    tokens, ok = first + o_t, o_t < left
    mask = ok[:, None] & (o_s < S)[None, :]
    columns = (o_s.to(tl.int64))[None, :]
    b_rate = tl.load(rate + row * sr_b + (tokens * sr_l)[:, None] + columns * sr_s, mask=mask, other=0.0)
    b_rate = b_rate.to(tl.float32)
    acc = tl.zeros([T, BS], tl.float32)
    after_or_at = (o_t[None, :] >= o_t[:, None]).to(tl.float32)
    p_angles = dangles + row * sa_b + (tokens * sa_l)[:, None] + columns * sa_s
    p_after, p_dt = after + place * H * S + o_s, dt + row * sd_b + tokens * sd_l
    p_ddt = ddt + (row * L + tokens) * H
    for _head in range(H):
        b_angles = tl.load(p_angles, mask=mask, other=0.0).to(tl.float32)
        high = (b_angles.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # all that tf32 keeps
        later = tl.dot(after_or_at, high, input_precision="tf32")
        later = tl.dot(after_or_at, b_angles - high, acc=later, input_precision="tf32")
        later += tl.load(p_after, mask=(o_s < S) & (left > 0), other=0.0).to(tl.float32)[None, :]
        acc += tl.load(p_dt, mask=ok, other=0.0).to(tl.float32)[:, None] * later
        b_ddt = tl.sum(b_rate * later, 1) * PI
        tl.store(p_ddt, b_ddt.to(ddt.dtype.element_ty), mask=ok)
        p_angles += sa_h
        p_after += S
        p_dt += sd_h
        p_ddt += 1
    at = drate + ((row * L + tokens) * S)[:, None] + columns
    tl.store(at, (acc * PI).to(drate.dtype.element_ty), mask=mask)
