"""The Triton kernels of trapezoid_weights, a block of tokens and all heads a program.

A token's weight needs the next token's β, and its gradient that of the token before: both are read, and worked out, a
second time. Everything inside is float32.
"""

# What Triton compiles has its own types.
# mypy: ignore-errors

import triton
import triton.language as tl

from mambaverse.kernels.triton_math import sigmoid, softplus


@triton.jit
def _starts(cu, tokens, num_sequences, search, PACKED: tl.constexpr):
    """Return which tokens are the first of a sequence (not empty, so that more than one bound may be a token)."""
    if PACKED:
        low = tokens * 0
        high = low + num_sequences
        for _step in range(search):  # low: the last of bounds that is not above the token
            middle = (low + high + 1) // 2
            below = tl.load(cu + middle).to(tl.int64) <= tokens
            low = tl.where(below, middle, low)
            high = tl.where(below, high, middle - 1)
        return tl.load(cu + low).to(tl.int64) == tokens
    else:
        return tokens == 0


@triton.jit
def _decay(a, HEAVY: tl.constexpr):
    """Return f(a); of a NaN a NaN."""
    return tl.where(a < 0.0, 1.0 / (1.0 - tl.minimum(a, 0.0)), 1.0 + a) if HEAVY else softplus(a)


@triton.jit(do_not_specialize=["num_tokens", "L", "num_sequences", "search"])
def forward(
    dt, a, trap, dt_bias, cu, step, rate, weight, own, num_tokens, L, num_sequences, search, A_floor,
    sd_b, sd_l, sd_h, sa_b, sa_l, sa_h, st_b, st_l, st_h, sb_h,
    H: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, HEAVY: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write Δ, rate, weight and own weight (B, L, H). Grid: (blocks of tokens,)."""
    o = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    row, token = o // L, o % L
    o_h = tl.arange(0, BH)[None, :].to(tl.int64)
    mask = (o < num_tokens)[:, None] & (o_h < H)
    goes_on = (o < num_tokens) & (token + 1 < L)
    if PACKED:
        goes_on = goes_on & (_starts(cu, token + 1, num_sequences, search, PACKED) == 0)
    bias = tl.load(dt_bias + o_h * sb_h, mask=o_h < H, other=0.0).to(tl.float32)
    p_dt = dt + (row * sd_b + token * sd_l)[:, None] + o_h * sd_h
    p_trap = trap + (row * st_b + token * st_l)[:, None] + o_h * st_h
    b_a = tl.load(a + (row * sa_b + token * sa_l)[:, None] + o_h * sa_h, mask=mask, other=0.0).to(tl.float32)
    b_step = softplus(tl.load(p_dt, mask=mask, other=0.0).to(tl.float32) + bias)
    b_own = sigmoid(tl.load(p_trap, mask=mask, other=0.0).to(tl.float32)) * b_step
    after = mask & goes_on[:, None]
    next_step = softplus(tl.load(p_dt + sd_l, mask=after, other=0.0).to(tl.float32) + bias)
    beta = sigmoid(-tl.load(p_trap + st_l, mask=after, other=0.0).to(tl.float32)) * next_step
    at = o[:, None] * H + o_h
    tl.store(step + at, b_step, mask=mask)
    tl.store(rate + at, b_step * tl.maximum(_decay(b_a, HEAVY), A_floor, propagate_nan=tl.PropagateNan.ALL), mask=mask)
    tl.store(weight + at, b_own + tl.where(after, beta, 0.0), mask=mask)
    tl.store(own + at, b_own, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "L", "num_sequences", "search"])
def backward(
    dstep, drate, dweight, down, dt, a, trap, dt_bias, cu, ddt, da, dtrap, dbias,
    num_tokens, L, num_sequences, search, A_floor,
    s0_b, s0_l, s0_h, s1_b, s1_l, s1_h, s2_b, s2_l, s2_h, s3_b, s3_l, s3_h,
    sd_b, sd_l, sd_h, sa_b, sa_l, sa_h, st_b, st_l, st_h, sb_h,
    H: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, HEAVY: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of δ, a and μ (B, L, H), and of the bias a sum a program (blocks, H). Grid: as `forward`."""
    o = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    row, token = o // L, o % L
    o_h = tl.arange(0, BH)[None, :].to(tl.int64)
    mask = (o < num_tokens)[:, None] & (o_h < H)
    bias = tl.load(dt_bias + o_h * sb_h, mask=o_h < H, other=0.0).to(tl.float32)
    x = tl.load(dt + (row * sd_b + token * sd_l)[:, None] + o_h * sd_h, mask=mask, other=0.0).to(tl.float32) + bias
    b_a = tl.load(a + (row * sa_b + token * sa_l)[:, None] + o_h * sa_h, mask=mask, other=0.0).to(tl.float32)
    b_trap = tl.load(trap + (row * st_b + token * st_l)[:, None] + o_h * st_h, mask=mask, other=0.0).to(tl.float32)
    d_step = tl.load(dstep + (row * s0_b + token * s0_l)[:, None] + o_h * s0_h, mask=mask, other=0.0)
    d_rate = tl.load(drate + (row * s1_b + token * s1_l)[:, None] + o_h * s1_h, mask=mask, other=0.0)
    p_weight = dweight + (row * s2_b + token * s2_l)[:, None] + o_h * s2_h
    d_gamma = tl.load(p_weight, mask=mask, other=0.0)
    d_gamma += tl.load(down + (row * s3_b + token * s3_l)[:, None] + o_h * s3_h, mask=mask, other=0.0)
    follows = mask & (_starts(cu, token, num_sequences, search, PACKED) == 0)[:, None]
    d_beta = tl.load(p_weight - s2_l, mask=follows, other=0.0)
    b_step, decay = softplus(x), _decay(b_a, HEAVY)
    late, early = sigmoid(b_trap), sigmoid(-b_trap)
    slope = tl.where(b_a >= 0.0, 1.0, decay * decay) if HEAVY else sigmoid(b_a)
    clamped = tl.maximum(decay, A_floor, propagate_nan=tl.PropagateNan.ALL)
    d_dt = sigmoid(x) * (d_step + d_rate * clamped + late * d_gamma + early * d_beta)
    at = o[:, None] * H + o_h
    tl.store(ddt + at, d_dt.to(ddt.dtype.element_ty), mask=mask)
    tl.store(da + at, tl.where(decay >= A_floor, d_rate * b_step * slope, 0.0).to(da.dtype.element_ty), mask=mask)
    d_trap = late * early * b_step * (d_gamma - d_beta)
    tl.store(dtrap + at, d_trap.to(dtrap.dtype.element_ty), mask=mask)
    total = tl.sum(tl.where(mask, d_dt, 0.0), 0)[None, :]
    tl.store(dbias + tl.program_id(0).to(tl.int64) * H + o_h, total, mask=o_h < H)
