"""The Triton kernels of turned_qk: a program has some tokens, one of the R vectors and one group.

A tile is [BT, M]: the first channels of all M pairs, those that do not turn included, of BT tokens, or the second ones.
What is normalised is loaded once and used for the heads of the group one after the other: `forward` has up to HEADS of
them; `backward` has all, so that the sums over heads stay in registers. Sums over tokens are partial, a row for each
block of tokens, to be added in a fixed order.

FAST is False in Triton's interpreter, which knows no inline assembly.
"""

# What Triton compiles has its own types.
# mypy: ignore-errors

import triton
import triton.language as tl

TURNS_A_RADIAN = tl.constexpr(0.15915494309189535)
TWO_PI_HIGH = tl.constexpr(6.28125)  # few digits: times a small whole number it is exact
TWO_PI_LOW = tl.constexpr(0.0019353071795864769)


@triton.jit
def _load_pairs(p, ok, step, N: tl.constexpr, M: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load pairs of rows of N channels, `step` apart, at the pointers p [BT]: two tiles, float32, zeros past them."""
    BT: tl.constexpr = p.shape[0]
    if INTERLEAVED:
        o = tl.arange(0, 2 * M)
        x = tl.load(p[:, None] + (o.to(tl.int64) * step)[None, :], mask=ok[:, None] & (o < N)[None, :], other=0.0)
        return tl.split(tl.reshape(x.to(tl.float32), [BT, M, 2]))
    else:
        o = tl.arange(0, M)
        at = p[:, None] + (o.to(tl.int64) * step)[None, :]
        mask = ok[:, None] & (o < N // 2)[None, :]
        first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        return first, tl.load(at + (N // 2) * step, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_pairs(p, ok, first, second, N: tl.constexpr, M: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Store what `_load_pairs` would load, at rows whose channels lie side by side."""
    BT: tl.constexpr = p.shape[0]
    if INTERLEAVED:
        o = tl.arange(0, 2 * M)
        x = tl.reshape(tl.join(first, second), [BT, 2 * M])
        tl.store(p[:, None] + o[None, :], x.to(p.dtype.element_ty), mask=ok[:, None] & (o < N)[None, :])
    else:
        o = tl.arange(0, M)
        mask = ok[:, None] & (o < N // 2)[None, :]
        tl.store(p[:, None] + o[None, :], first.to(p.dtype.element_ty), mask=mask)
        tl.store(p[:, None] + (N // 2 + o)[None, :], second.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _scale_of(first, second, eps, N: tl.constexpr):
    """Return 1 / sqrt(mean of squares + eps) of each row, [BT, 1]."""
    squares = tl.sum(first * first + second * second, 1)
    return (1.0 / tl.sqrt_rn(squares / N + eps))[:, None]


@triton.jit
def _turn_of(p, ok, step, S: tl.constexpr, M: tl.constexpr, FAST: tl.constexpr):
    """Load angles at the pointers p [BT]; return cosine and sine [BT, M], of 0 past the S-th.

    Brought to [-π, π] first, where the fast functions are most exact (their error here: not measured).
    """
    o = tl.arange(0, M)
    at = p[:, None] + (o.to(tl.int64) * step)[None, :]
    theta = tl.load(at, mask=ok[:, None] & (o < S)[None, :], other=0.0).to(tl.float32)
    turns = tl.floor(theta * TURNS_A_RADIAN + 0.5)
    theta = (theta - turns * TWO_PI_HIGH) - turns * TWO_PI_LOW
    if FAST:
        cos = tl.inline_asm_elementwise(
            "cos.approx.f32 $0, $1;", "=f,f", [theta], dtype=tl.float32, is_pure=True, pack=1
        )
        sin = tl.inline_asm_elementwise(
            "sin.approx.f32 $0, $1;", "=f,f", [theta], dtype=tl.float32, is_pure=True, pack=1
        )
        return cos, sin
    else:
        return tl.cos(theta), tl.sin(theta)


@triton.jit(do_not_specialize=["tokens", "L"])
def forward(
    B, C, B_weight, C_weight, B_bias, C_bias, angles, k, q, tokens, L, R, H, per_group, eps,
    sB_b, sB_l, sB_r, sB_g, sB_n, sC_b, sC_l, sC_r, sC_g, sC_n, swB, swC,
    sbB_h, sbB_r, sbB_n, sbC_h, sbC_r, sbC_n, sa_b, sa_l, sa_h, sa_s,
    N: tl.constexpr, S: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Write k and q (tokens, R, H, N) of up to HEADS heads. Grid: (blocks of tokens, R · groups · parts of a group)."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    ok, one = token < tokens, tl.full([1], True, tl.int1)
    i_b, i_l = token // L, token % L
    parts = tl.cdiv(per_group, HEADS)
    i_part, rest = tl.program_id(1) % parts, tl.program_id(1) // parts
    i_r, i_g = (rest % R).to(tl.int64), (rest // R).to(tl.int64)
    origin = tl.zeros([1], tl.int64)
    B_a, B_b = _load_pairs(B + i_b * sB_b + i_l * sB_l + i_r * sB_r + i_g * sB_g, ok, sB_n, N, M, INTERLEAVED)
    C_a, C_b = _load_pairs(C + i_b * sC_b + i_l * sC_l + i_r * sC_r + i_g * sC_g, ok, sC_n, N, M, INTERLEAVED)
    w_a, w_b = _load_pairs(B_weight + origin, one, swB, N, M, INTERLEAVED)
    scale = _scale_of(B_a, B_b, eps, N)
    B_a, B_b = B_a * scale * w_a, B_b * scale * w_b
    w_a, w_b = _load_pairs(C_weight + origin, one, swC, N, M, INTERLEAVED)
    scale = _scale_of(C_a, C_b, eps, N)
    C_a, C_b = C_a * scale * w_a, C_b * scale * w_b
    first = i_part * HEADS
    for j in range(first, tl.minimum(first + HEADS, per_group)):
        i_h = i_g * per_group + j
        cos, sin = _turn_of(angles + i_b * sa_b + i_l * sa_l + i_h * sa_h, ok, sa_s, S, M, FAST)
        out = ((token * R + i_r) * H + i_h) * N
        b_a, b_b = _load_pairs(B_bias + origin + i_h * sbB_h + i_r * sbB_r, one, sbB_n, N, M, INTERLEAVED)
        k_a, k_b = B_a + b_a, B_b + b_b
        _store_pairs(k + out, ok, k_a * cos - k_b * sin, k_a * sin + k_b * cos, N, M, INTERLEAVED)
        b_a, b_b = _load_pairs(C_bias + origin + i_h * sbC_h + i_r * sbC_r, one, sbC_n, N, M, INTERLEAVED)
        q_a, q_b = C_a + b_a, C_b + b_b
        _store_pairs(q + out, ok, q_a * cos - q_b * sin, q_a * sin + q_b * cos, N, M, INTERLEAVED)


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _store_sums(p, first, second, N: tl.constexpr, M: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Store what is left of a tile of pairs after a sum over its tokens: N channels from p on."""
    o = tl.arange(0, M)
    if INTERLEAVED:
        tl.store(p + 2 * o, first, mask=2 * o < N)
        tl.store(p + 2 * o + 1, second, mask=2 * o + 1 < N)
    else:
        tl.store(p + o, first, mask=o < N // 2)
        tl.store(p + N // 2 + o, second, mask=o < N // 2)


@triton.jit
def _back_through_norm(d_a, d_b, n_a, n_b, w_a, w_b, scale, N: tl.constexpr):
    """Return the gradient of what was normalised to n, from that of n w."""
    d_a, d_b = d_a * w_a, d_b * w_b
    mean = (tl.sum(d_a * n_a + d_b * n_b, 1) / N)[:, None]
    return scale * (d_a - n_a * mean), scale * (d_b - n_b * mean)


@triton.jit
def _back_through_turn(d_a, d_b, x_a, x_b, cos, sin):
    """Return the gradient of a pair from that of the turned pair, and that of the angle, the same before the turn."""
    d_a, d_b = d_a * cos + d_b * sin, d_b * cos - d_a * sin
    return d_a, d_b, d_b * x_a - d_a * x_b


@triton.jit(do_not_specialize=["tokens", "L", "groups"])
def backward(
    dk, dq, B, C, B_weight, C_weight, B_bias, C_bias, angles, dB, dC, dangles, parts,
    tokens, L, R, H, groups, per_group, eps,
    sk_b, sk_l, sk_r, sk_h, sk_n, sq_b, sq_l, sq_r, sq_h, sq_n,
    sB_b, sB_l, sB_r, sB_g, sB_n, sC_b, sC_l, sC_r, sC_g, sC_n, swB, swC,
    sbB_h, sbB_r, sbB_n, sbC_h, sbC_r, sbC_n, sa_b, sa_l, sa_h, sa_s,
    N: tl.constexpr, S: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, INTERLEAVED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Write dB and dC (tokens, R, G, N), and parts of the rest. Grid: (blocks of tokens, R · groups).

    dangles is (R, tokens, H, S); a row of parts has those of the biases (2, H, R, N) and weights (2, R · groups, N).
    """
    block = tl.program_id(0).to(tl.int64)
    token = block * BT + tl.arange(0, BT)
    ok, one = token < tokens, tl.full([1], True, tl.int1)
    i_b, i_l = token // L, token % L
    i_rg = tl.program_id(1).to(tl.int64)
    i_r, i_g = i_rg % R, i_rg // R
    origin, o_m = tl.zeros([1], tl.int64), tl.arange(0, M)
    B_a, B_b = _load_pairs(B + i_b * sB_b + i_l * sB_l + i_r * sB_r + i_g * sB_g, ok, sB_n, N, M, INTERLEAVED)
    C_a, C_b = _load_pairs(C + i_b * sC_b + i_l * sC_l + i_r * sC_r + i_g * sC_g, ok, sC_n, N, M, INTERLEAVED)
    B_scale, C_scale = _scale_of(B_a, B_b, eps, N), _scale_of(C_a, C_b, eps, N)
    w_a, w_b = _load_pairs(B_weight + origin, one, swB, N, M, INTERLEAVED)
    B_a, B_b = B_a * B_scale * w_a, B_b * B_scale * w_b
    w_a, w_b = _load_pairs(C_weight + origin, one, swC, N, M, INTERLEAVED)
    C_a, C_b = C_a * C_scale * w_a, C_b * C_scale * w_b
    p_parts = parts + block * (2 * (H + groups) * R * N)
    acc_Ba, acc_Bb = tl.zeros([BT, M], tl.float32), tl.zeros([BT, M], tl.float32)
    acc_Ca, acc_Cb = tl.zeros([BT, M], tl.float32), tl.zeros([BT, M], tl.float32)
    for j in tl.range(per_group, num_stages=3):
        i_h = i_g * per_group + j
        cos, sin = _turn_of(angles + i_b * sa_b + i_l * sa_l + i_h * sa_h, ok, sa_s, S, M, FAST)
        # all loads first: behind a store they would wait for it
        k_a, k_b = _load_pairs(dk + i_b * sk_b + i_l * sk_l + i_r * sk_r + i_h * sk_h, ok, sk_n, N, M, INTERLEAVED)
        q_a, q_b = _load_pairs(dq + i_b * sq_b + i_l * sq_l + i_r * sq_r + i_h * sq_h, ok, sq_n, N, M, INTERLEAVED)
        bB_a, bB_b = _load_pairs(B_bias + origin + i_h * sbB_h + i_r * sbB_r, one, sbB_n, N, M, INTERLEAVED)
        bC_a, bC_b = _load_pairs(C_bias + origin + i_h * sbC_h + i_r * sbC_r, one, sbC_n, N, M, INTERLEAVED)
        k_a, k_b, dtheta = _back_through_turn(k_a, k_b, B_a + bB_a, B_b + bB_b, cos, sin)
        q_a, q_b, dtheta_q = _back_through_turn(q_a, q_b, C_a + bC_a, C_b + bC_b, cos, sin)
        acc_Ba += k_a
        acc_Bb += k_b
        acc_Ca += q_a
        acc_Cb += q_b
        at_bias = p_parts + (i_h * R + i_r) * N
        k_a, k_b, q_a, q_b = tl.reduce((k_a, k_b, q_a, q_b), 0, _add_four)
        _store_sums(at_bias, k_a, k_b, N, M, INTERLEAVED)
        _store_sums(at_bias + H * R * N, q_a, q_b, N, M, INTERLEAVED)
        p_angles = dangles + (((i_r * tokens + token) * H + i_h) * S)[:, None] + o_m[None, :]
        dtheta = (dtheta + dtheta_q).to(dangles.dtype.element_ty)
        tl.store(p_angles, dtheta, mask=ok[:, None] & (o_m < S)[None, :])

    at_weight = p_parts + (2 * H * R + i_rg) * N
    out = ((token * R + i_r) * groups + i_g) * N
    B_a, B_b = _load_pairs(B + i_b * sB_b + i_l * sB_l + i_r * sB_r + i_g * sB_g, ok, sB_n, N, M, INTERLEAVED)
    B_a, B_b = B_a * B_scale, B_b * B_scale
    _store_sums(at_weight, tl.sum(acc_Ba * B_a, 0), tl.sum(acc_Bb * B_b, 0), N, M, INTERLEAVED)
    w_a, w_b = _load_pairs(B_weight + origin, one, swB, N, M, INTERLEAVED)
    d_a, d_b = _back_through_norm(acc_Ba, acc_Bb, B_a, B_b, w_a, w_b, B_scale, N)
    _store_pairs(dB + out, ok, d_a, d_b, N, M, INTERLEAVED)
    C_a, C_b = _load_pairs(C + i_b * sC_b + i_l * sC_l + i_r * sC_r + i_g * sC_g, ok, sC_n, N, M, INTERLEAVED)
    C_a, C_b = C_a * C_scale, C_b * C_scale
    _store_sums(at_weight + (R * groups) * N, tl.sum(acc_Ca * C_a, 0), tl.sum(acc_Cb * C_b, 0), N, M, INTERLEAVED)
    w_a, w_b = _load_pairs(C_weight + origin, one, swC, N, M, INTERLEAVED)
    d_a, d_b = _back_through_norm(acc_Ca, acc_Cb, C_a, C_b, w_a, w_b, C_scale, N)
    _store_pairs(dC + out, ok, d_a, d_b, N, M, INTERLEAVED)
