"""What the Triton kernels of ssd share: step sizes, decays, where a sequence lies, how a tile is read.

A chunk has Q positions in the order of the recurrence; with REVERSE its rows lie in memory one before the other. Sums
of log2 decays are kept in two floats, a whole number and the part above it: the difference of two whole numbers is
exact, so that weak decays beside strong ones are not rounded away.

FAST is 0 in Triton's interpreter, which knows no inline assembly, 1 on a GPU, and 2 on GPUs for which Triton cannot
pipeline a loop that holds an operation with effects (of compute capability 10 and above; triton 3.8).
"""

# What Triton compiles has its own types.
# mypy: ignore-errors

import triton
import triton.language as tl

from mambaverse.kernels.triton_math import LOG2E, softplus

LEAST = tl.constexpr(-1024.0)  # log2 of a decay that is 0 in float32; bounds the sums


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def step_sizes(b_dt, ok, b_bias, low, high, SOFTPLUS: tl.constexpr):
    """Return dt + bias, Δ before its limits, and Δ, which is 0 where not `ok`."""
    raw = b_dt.to(tl.float32) + b_bias
    free = softplus(raw) if SOFTPLUS else raw
    delta = tl.where(free < low, low, free)  # a NaN stays one
    delta = tl.where(delta > high, high, delta)
    return raw, free, tl.where(ok, delta, 0.0)


@triton.jit
def split(total):
    """Return a float64 as the whole number below it and the rest, in float32."""
    whole = tl.floor(total)
    return whole.to(tl.float32), (total - whole).to(tl.float32)


@triton.jit
def load_rows(p, rows, step, ok):
    """Load one number a row of the positions `rows` after `p`; zeros where not `ok`."""
    return tl.load(p + rows.to(tl.int64) * step, mask=ok, other=0.0)


@triton.jit
def _sum_and_last(a_sum, a_last, b_sum, b_last):
    return a_sum + b_sum, b_last


@triton.jit
def sums_of_three(a, b, c, d, e, f):
    """Add up three tensors at once, in `tl.reduce`."""
    return a + d, b + e, c + f


@triton.jit
def log_decays(delta, weight, b_A, FAST: tl.constexpr):
    """Return `weight`, log2 of the decay from the chunk's start through each step, in two floats, and the whole's.

    The last is in float64. The weight, Δ without one, is what it was, but comes out of the scan: what does not, Triton
    loads and works out again for each of the layouts that it is needed in.
    """
    a = delta * (b_A * LOG2E)
    a = tl.where(a < LEAST, LEAST, a).to(tl.float64)  # a NaN stays one
    if FAST:
        sums, weight = tl.associative_scan((a, weight), 0, _sum_and_last)
    else:
        sums = tl.cumsum(a, 0)
    whole, part = split(sums)
    return weight, whole, part, tl.sum(a, 0)


@triton.jit
def decay_between(like, late, late_part, early, early_part, mask, FAST: tl.constexpr):
    """Return 2^(late - early) where `mask`, else 0, as a tile that is laid out as `like` is.

    One operation on GPUs: Triton would work the tile out in a layout of its own and move it through shared memory.
    """
    if FAST:
        decay = tl.inline_asm_elementwise(
            "{ .reg .f32 a, b; sub.f32 a, $2, $4; sub.f32 b, $3, $5; add.f32 a, a, b; ex2.approx.ftz.f32 $0, a; }",
            "=f,f,f,f,f,f", [like, late, late_part, early, early_part], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        return tl.where(mask, decay, 0.0)
    else:
        exponent = (late - early) + (late_part - early_part)
        return tl.exp2(tl.where(mask, exponent, float("-inf")))


@triton.jit
def through_gate(b_y, b_z, FAST: tl.constexpr):
    """Return y silu(z), worked out once: Triton takes it to have effects, and does not repeat it in another layout.

    Not where FAST is 2.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 g;
            mul.f32 g, $2, 0fBFB8AA3B;  // -log2 e
            ex2.approx.ftz.f32 g, g;
            add.f32 g, g, 0f3F800000;
            rcp.approx.ftz.f32 g, g;  // the sigmoid
            mul.f32 g, g, $2;
            mul.f32 $0, g, $1;
            }""",
            "=f,f,f", [b_y, b_z], dtype=tl.float32, is_pure=FAST == 2, pack=1,
        )  # fmt: skip
    else:
        return b_y * b_z * sigmoid(b_z)


@triton.jit
def fence(FAST: tl.constexpr):
    """Keep loads and stores on their side of here: moved together, they take more registers than there are."""
    if FAST:
        tl.inline_asm_elementwise(
            "fence.acq_rel.cta; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip


@triton.jit
def gate_gradient(b_dy, b_y, b_z, FAST: tl.constexpr):
    """Return the gradient of the gate z of y silu(z), that of the product being dy.

    One operation on GPUs, as in `decay_between`: of the factors alone Triton would work sigmoids out in two layouts.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 g, t;
            mul.f32 g, $3, 0fBFB8AA3B;  // -log2 e
            ex2.approx.ftz.f32 g, g;
            add.f32 g, g, 0f3F800000;
            rcp.approx.ftz.f32 g, g;  // the sigmoid
            sub.f32 t, 0f3F800000, g;
            fma.rn.f32 t, $3, t, 0f3F800000;
            mul.f32 t, t, g;
            mul.f32 t, t, $2;
            mul.f32 $0, t, $1;
            }""",
            "=f,f,f,f", [b_dy, b_y, b_z], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        gate = sigmoid(b_z)
        return b_dy * b_y * (gate * (1.0 + b_z * (1.0 - gate)))


@triton.jit
def sequence_of(cu, i_s, L, PACKED: tl.constexpr):
    """First position (int64) and length of sequence i_s, inside [0, L] whatever the offsets are."""
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu + i_s).to(tl.int64), 0), L)
        end = tl.minimum(tl.maximum(tl.load(cu + i_s + 1).to(tl.int64), start), L)
        return start, (end - start).to(tl.int32)
    else:
        return tl.full([], 0, tl.int64), tl.full([], 0, tl.int32) + L


@triton.jit
def _chunk_of(
    cu, program, L, num_sequences, search, first_chunk, num_chunks, Q: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Return a program's slot, its sequence, and which of its chunks that is (none if negative or past its end).

    Programs take `num_chunks` chunks of a sequence from its `first_chunk` on, or with packed sequences all. Chunk j of
    packed sequence s, which begins at `start`, has slot start // Q + s + j: no two chunks share one.
    """
    if PACKED:
        low = tl.full([], 0, tl.int64)
        high = low + num_sequences
        for _step in range(search):
            middle = (low + high) // 2
            first = tl.minimum(tl.maximum(tl.load(cu + middle).to(tl.int64), 0), L) // Q + middle
            low = tl.where(first <= program, middle, low)
            high = tl.where(first <= program, high, middle)
        first = tl.minimum(tl.maximum(tl.load(cu + low).to(tl.int64), 0), L) // Q + low
        return program, low, (program - first).to(tl.int32)
    else:
        i_s, i_c = program // num_chunks, first_chunk + (program % num_chunks).to(tl.int32)
        return i_s * tl.cdiv(L, Q) + i_c, i_s, i_c


@triton.jit
def place_of(
    cu, program, L, num_sequences, search, first_chunk, num_chunks, Q: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Return a program's slot, sequence, its start and length, its chunk's first position, how many follow it, or 0."""
    slot, i_s, i_c = _chunk_of(cu, program, L, num_sequences, search, first_chunk, num_chunks, Q, PACKED)
    start, count = sequence_of(cu, i_s, L, PACKED)
    there = (i_c >= 0) & (i_c * Q < count)
    t = tl.where(there, i_c * Q, 0)
    return slot, i_s, start, count, t, tl.where(there, count - t, 0)


@triton.jit
def first_row(p, start, count, stride, REVERSE: tl.constexpr):
    """Return the pointer to a sequence's first position in the order of the recurrence, and the step to the next."""
    if REVERSE:
        return p + (start + count - 1) * stride, -stride
    else:
        return p + start * stride, stride


@triton.jit
def pointers(p, rows, step, o_c, stride):
    """Return a tile of pointers, of the positions `rows` (int32) after `p` and the columns `o_c`; offsets are int64.

    Worked out anew for each chunk, which is one operation a row: kept, they would take more registers than there are.
    """
    return p + rows.to(tl.int64)[:, None] * step + (o_c.to(tl.int64) * stride)[None, :]


@triton.jit
def steps_of(chunk_steps, at, o_l, Q: tl.constexpr):
    """Load the weights, the sums through each step, and those through the last, which `steps` wrote."""
    p = chunk_steps + at * (3 * Q)
    b_w, whole, part = tl.load(p + o_l), tl.load(p + Q + o_l), tl.load(p + 2 * Q + o_l)
    return b_w, whole, part, tl.load(p + 2 * Q - 1), tl.load(p + 3 * Q - 1)


@triton.jit
def load_tile(p, ok_l, o_c, C: tl.constexpr, BC: tl.constexpr, DT: tl.constexpr):
    """Load a tile of pointers with rows `ok_l` and the columns `o_c` below C as DT; zeros elsewhere."""
    if C % BC == 0:
        return tl.load(p, mask=ok_l[:, None], other=0.0).to(DT)
    else:
        return tl.load(p, mask=ok_l[:, None] & (o_c < C)[None, :], other=0.0).to(DT)


@triton.jit
def load_state(p, o_p, o_n, P: tl.constexpr, N: tl.constexpr):
    """Load a tile (BP, BN) of a state from its pointers as float32; zeros where it has no rows or columns."""
    return tl.load(p, mask=(o_p < P)[:, None] & (o_n < N)[None, :], other=0.0).to(tl.float32)


@triton.jit
def advance(
    S, p_x, p_z, p_B, p_gated, p_rest, b_dt, b_w, ok, o_p, o_n, b_A, b_bias, low, high,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_WEIGHT: tl.constexpr, SOFTPLUS: tl.constexpr, GRADIENT: tl.constexpr, GATES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Take a state over the chunk that the pointers are at; with GRADIENT its gradient, the other way: x is dy, B is C.

    With GATES what dy is behind the gate is left at `p_gated` in DT, and at `p_rest` what 16 bits round away. Returns
    the state and log2 of the chunk's decay.
    """
    b_x = load_tile(p_x, ok, o_p, P, BP, tl.float32)
    b_B = load_tile(p_B, ok, o_n, N, BN, DT)
    _, _, delta = step_sizes(b_dt, ok, b_bias, low, high, SOFTPLUS)
    b_w, whole, part, total = log_decays(delta, b_w.to(tl.float32) if HAS_WEIGHT else delta, b_A, FAST)
    end, end_part = split(total)
    if GRADIENT:
        weight = tl.exp2(whole + part)
        if HAS_Z:
            b_z = load_tile(p_z, ok, o_p, P, BP, tl.float32)
            b_x = through_gate(b_x, b_z, FAST)
            if GATES:
                gated = b_x.to(DT)
                mask = ok[:, None] & (o_p < P)[None, :]
                tl.store(p_gated, gated, mask=mask)
                if DT.primitive_bitwidth == 16:
                    tl.store(p_rest, (b_x - gated.to(tl.float32)).to(DT), mask=mask)
    else:
        weight = tl.exp2((end - whole) + (end_part - part)) * b_w
    weighted = (b_x * weight[:, None]).to(DT)
    return tl.dot(tl.trans(weighted), b_B, acc=S * tl.exp2(end + end_part), input_precision=PRECISION), total
