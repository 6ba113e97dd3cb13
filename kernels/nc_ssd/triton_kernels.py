"""The Triton kernels of nc_ssd: `write` sums states, `read` applies them, `gradient` has all of backward but a `write`.

A tile is BT tokens of one head, or group. States are (B, H, P, N), and are worked on as (P, N).
"""

# What Triton compiles has its own types.
# mypy: ignore-errors

import triton
import triton.language as tl

from mambaverse.kernels.triton_math import sigmoid, softplus


@triton.jit
def _tile(p, rows, step, columns, stride, ok, C: tl.constexpr, BF16: tl.constexpr):
    """Load the rows `rows` and the columns `columns` below C after `p`, as a product's operand; zeros elsewhere."""
    at = p + rows.to(tl.int64)[:, None] * step + columns.to(tl.int64)[None, :] * stride
    tile = tl.load(at, mask=ok[:, None] & (columns < C)[None, :], other=0.0)
    return tile.to(tl.bfloat16) if BF16 else tile.to(tl.float32)


@triton.jit
def _state(p, o_p, o_n, P: tl.constexpr, N: tl.constexpr):
    """Load a state (BP, BN)."""
    return tl.load(p + o_p[:, None] * N + o_n[None, :], mask=(o_p < P)[:, None] & (o_n < N)[None, :], other=0.0)


@triton.jit
def _steps(dt, dt_bias, rows, step, h, ok, SOFTPLUS: tl.constexpr):
    """Return dt + bias and Δ of a head's tokens, which is 0 where not `ok`."""
    shifted = tl.load(dt + rows.to(tl.int64) * step, mask=ok, other=0.0).to(tl.float32)
    if dt_bias is not None:
        shifted += tl.load(dt_bias + h).to(tl.float32)
    return shifted, tl.where(ok, softplus(shifted) if SOFTPLUS else shifted, 0.0)


@triton.jit(do_not_specialize=["batch", "runs", "L", "rows"])
def write(
    v, dt, A, dt_bias, m, out, batch, runs, L, rows, sv_b, sv_l, sv_h, sv_p, sd_b, sd_l, sd_h, sm_b, sm_l, sm_g, sm_n,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, SOFTPLUS: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Write Σ_t w[t] v[t] m[t]ᵀ over a run of tokens: (runs, B, H, P, N). Grid: (B · runs · H,)."""
    pid = tl.program_id(0).to(tl.int64)
    h, run, b = pid % H, pid // H % runs, pid // H // runs
    o_p, o_n, o_t = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, BT)
    p_v, p_m, p_dt = v + b * sv_b + h * sv_h, m + b * sm_b + h // R * sm_g, dt + b * sd_b + h * sd_h
    rate = 0.0
    if WEIGHTED:
        rate = -tl.load(A + h).to(tl.float32)
    S = tl.zeros((BP, BN), tl.float32)
    start = run * rows
    for first in range(0, rows, BT):
        t = start + first + o_t
        ok = t < L
        tile = _tile(p_v, t, sv_l, o_p, sv_p, ok, P, BF16)
        if WEIGHTED:
            _, delta = _steps(p_dt, dt_bias, t, sd_l, h, ok, SOFTPLUS)
            tile = (tile * (rate * delta)[:, None]).to(tile.dtype)
        S = tl.dot(tl.trans(tile), _tile(p_m, t, sm_l, o_n, sm_n, ok, N, BF16), acc=S, input_precision=PRECISION)
    at = out + ((run * batch + b) * H + h) * P * N + o_p[:, None] * N + o_n[None, :]
    tl.store(at, S.to(out.dtype.element_ty), mask=(o_p < P)[:, None] & (o_n < N)[None, :])


@triton.jit(do_not_specialize=["size", "runs"])
def add(parts, out, size, runs, BLOCK: tl.constexpr):
    """Write the sum over the runs (runs, size) to (size,). Grid: (blocks,)."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    p = parts + o
    for _run in range(runs):
        total += tl.load(p, mask=o < size, other=0.0)
        p += size
    tl.store(out + o, total.to(out.dtype.element_ty), mask=o < size)


@triton.jit(do_not_specialize=["runs", "L", "rows"])
def read(
    x, C, D, state, y, runs, L, rows, sx_b, sx_l, sx_h, sx_p, sc_b, sc_l, sc_g, sc_n,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, SOFTPLUS: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write y[t] = S C[t] + D x[t] of a run of tokens, contiguous. Grid: (B · runs · H,)."""
    pid = tl.program_id(0).to(tl.int64)
    h, run, b = pid % H, pid // H % runs, pid // H // runs
    o_p, o_n, o_t = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, BT)
    S = _state(state + (b * H + h) * P * N, o_p, o_n, P, N)
    S = S.to(tl.bfloat16) if BF16 else S.to(tl.float32)
    p_x, p_C, p_y = x + b * sx_b + h * sx_h, C + b * sc_b + h // R * sc_g, y + (b * L * H + h) * P
    start = run * rows
    for first in range(0, rows, BT):
        t = start + first + o_t
        ok = t < L
        tile = tl.dot(_tile(p_C, t, sc_l, o_n, sc_n, ok, N, BF16), tl.trans(S), input_precision=PRECISION)
        if D is not None:
            tile += tl.load(D + h).to(tl.float32) * _tile(p_x, t, sx_l, o_p, sx_p, ok, P, BF16).to(tl.float32)
        at = p_y + t[:, None] * (H * P) + o_p[None, :]
        tl.store(at, tile.to(y.dtype.element_ty), mask=ok[:, None] & (o_p < P)[None, :])


@triton.jit(do_not_specialize=["blocks", "L"])
def gradient(
    dy, x, dt, A, B, C, D, dt_bias, state, dstate, dx, ddt, dB, dC, parts, blocks, L,
    sg_b, sg_l, sg_h, sg_p, sx_b, sx_l, sx_h, sx_p, sd_b, sd_l, sd_h, sb_b, sb_l, sb_g, sb_n, sc_b, sc_l, sc_g, sc_n,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, SOFTPLUS: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write all gradients of a tile of tokens and a group's heads; of A, D and dt_bias parts (B · blocks, 3, H).

    Grid: (B · blocks · G,).
    """
    pid = tl.program_id(0).to(tl.int64)
    g, block = pid % (H // R), pid // (H // R)
    b = block // blocks
    o_p, o_n = tl.arange(0, BP), tl.arange(0, BN)
    t = block % blocks * BT + tl.arange(0, BT)
    ok = t < L
    b_B = _tile(B + b * sb_b + g * sb_g, t, sb_l, o_n, sb_n, ok, N, BF16)
    sum_B, sum_C = tl.zeros((BT, BN), tl.float32), tl.zeros((BT, BN), tl.float32)
    for h in range(g * R, g * R + R):
        b_dy = _tile(dy + b * sg_b + h * sg_h, t, sg_l, o_p, sg_p, ok, P, BF16)
        b_x = _tile(x + b * sx_b + h * sx_h, t, sx_l, o_p, sx_p, ok, P, BF16)
        dS_wide = _state(dstate + (b * H + h) * P * N, o_p, o_n, P, N)
        dS = dS_wide.to(b_x.dtype)
        shifted, delta = _steps(dt + b * sd_b + h * sd_h, dt_bias, t, sd_l, h, ok, SOFTPLUS)
        rate = -tl.load(A + h).to(tl.float32)
        weight = (rate * delta)[:, None]
        written = tl.dot(b_B, tl.trans(dS), input_precision=PRECISION)
        if BF16:  # what rounding took, too: a sum over all tokens, dA, would see the same error at each
            rest = (dS_wide - dS.to(tl.float32)).to(tl.bfloat16)
            written = tl.dot(b_B, tl.trans(rest), acc=written)
        sum_B = tl.dot((b_x * weight).to(b_x.dtype), dS, acc=sum_B, input_precision=PRECISION)
        S = _state(state + (b * H + h) * P * N, o_p, o_n, P, N).to(b_x.dtype)
        sum_C = tl.dot(b_dy, S, acc=sum_C, input_precision=PRECISION)
        x_wide, dy_wide = b_x.to(tl.float32), b_dy.to(tl.float32)
        dweight = tl.sum(x_wide * written, 1)
        of_x = weight * written
        if D is not None:
            of_x += tl.load(D + h).to(tl.float32) * dy_wide
        row = b * L + t
        at = dx + (row * H + h)[:, None] * P + o_p[None, :]
        tl.store(at, of_x.to(dx.dtype.element_ty), mask=ok[:, None] & (o_p < P)[None, :])
        of_dt = tl.where(ok, rate * dweight * (sigmoid(shifted) if SOFTPLUS else 1.0), 0.0)
        tl.store(ddt + row * H + h, of_dt.to(ddt.dtype.element_ty), mask=ok)
        tl.store(parts + block * 3 * H + h, -tl.sum(delta * dweight))
        tl.store(parts + (block * 3 + 1) * H + h, tl.sum(x_wide * dy_wide))
        tl.store(parts + (block * 3 + 2) * H + h, tl.sum(of_dt))
    at = ((b * L + t) * (H // R) + g)[:, None] * N + o_n[None, :]
    mask = ok[:, None] & (o_n < N)[None, :]
    tl.store(dB + at, sum_B.to(dB.dtype.element_ty), mask=mask)
    tl.store(dC + at, sum_C.to(dC.dtype.element_ty), mask=mask)
