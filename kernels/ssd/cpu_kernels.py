"""The CPU kernels of `ssd`: one carries states over chunks, two work inside chunks; they differ in what is parallel.

    carry_states     over (sequence, head), chunk after chunk: the state at each boundary between chunks
    chunk_forward    over (chunk, group): y = (M + ...) x from the state at the chunk's start
    chunk_backward   over (chunk, group): every gradient, from that state and the gradient of the state at its end

Inside a chunk of q positions of one head, with s the cumulative log decay (arXiv 2405.21060, section 6):

    M[i, j] = (C[i] · B[j]) exp(s[i] - s[j]) w[j]     for j <= i
    y[i]    = sum over j of M[i, j] x[j] + exp(s[i]) C[i]ᵀ h0 + D x[i]
    h_end   = exp(s[q-1]) h0 + sum over j of exp(s[q-1] - s[j]) w[j] B[j] x[j]ᵀ

w is dt' or given, with another for j = i in M if that is given too.
Every exponent is a sum of dt' A over a stretch of the chunk: nothing is ever divided by a decay.

Arguments that the kernels share: flat float32 arrays, each with the strides (batch, position, head or group) of the
tensor in a tuple `*_at`; dt, the weights, the bias of dt (H,) and its limits as `decays` takes them; `sizes` = (L, H,
G, P, N, q, step, has_z, has_D, ...); row c of `chunks` (int64) is (batch row, first position, length, sequence,
boundary before, boundary after), -1 where the sequence ends; states at boundaries are (boundary, H, N, P) with N and P
padded. Work items start to stop - 1 are done.
"""

from __future__ import annotations

from mambaverse.kernels import simd
from mambaverse.kernels.jit import cached_kernel
from mambaverse.kernels.simd import flush_denormals, restore_denormals
from mambaverse.kernels.ssd import cpu_tiles, layout
from mambaverse.kernels.ssd.cpu_tiles import (
    FROM_START,
    FULL,
    LOG2_E,
    LOWER,
    NUM_DECAYS,
    OUT_UPPER,
    OWN,
    SLOPE,
    STEP,
    TO_END,
    UPPER,
    WEIGHT,
    add_scaled,
    advance,
    clear,
    decays,
    dot,
    dot_columns,
    fetch,
    gate,
    gate_backward,
    load_state,
    mask,
    mask_backward,
    pack,
    padded,
    product,
    save_state,
    scale_rows,
    scratch,
    transpose,
    unpack,
    weigh,
)
from mambaverse.kernels.ssd.layout import PAD

_kernel = cached_kernel(simd, cpu_tiles, layout)


@_kernel
def carry_states(start, stop, backward, sizes, chunks, offsets, rows, rows_at, columns, columns_at, z, z_at, dt, dt_at,
                 weight, weight_at, own, own_at, bias, limits, A, first, work):  # fmt: skip
    """Carry the state of one (sequence, head) through its chunks, from `first` (S, H, P, N), to every boundary.

    Forward:  h <- decay h + sum over j of B[j] (w[j] x[j])ᵀ from the initial state.
    Backward: the same along the gradient, dh <- decay dh + sum over i of C[i] (e[i] dy[i])ᵀ, from that of the final
    state, last chunk first; `rows` is then C, `columns` is dy (gated by z).
    """
    _, H, G, P, N, q, step, has_z, has_first = sizes
    n, p = padded(N), padded(P)
    o_rows, o_columns, o_z, o_h = 0, q * n, q * (n + p), q * (n + 2 * p)
    o_tmp, o_decay = o_h + n * p, o_h + 2 * n * p
    s = scratch(o_decay + NUM_DECAYS * q)
    before_flush = flush_denormals()
    for item in range(start, stop):
        sequence, h = item // H, item % H
        g = h // (H // G)
        has_h = has_first
        if has_h and offsets[sequence + 1] - offsets[sequence] > 1:
            load_state(s, o_h, o_tmp, -1, h, H, work, True, first, sequence, P, N)
        for visit in range(offsets[sequence + 1] - offsets[sequence] - 1):
            c = offsets[sequence + 1] - 1 - visit if backward else offsets[sequence] + visit
            b, t, length = chunks[c, 0], chunks[c, 1], chunks[c, 2]
            decay = decays(s, o_decay, q, step, b, t, h, dt, dt_at, weight, weight_at, own, own_at, bias, limits,
                           A[h] * LOG2_E, length)  # fmt: skip
            at = b * rows_at[0] + t * rows_at[1] + g * rows_at[2]
            pack(s, o_rows, rows, at, step * rows_at[1], length, N)
            at = b * columns_at[0] + t * columns_at[1] + h * columns_at[2]
            pack(s, o_columns, columns, at, step * columns_at[1], length, P)
            ahead = -q * columns_at[1] if backward else q * columns_at[1]
            fetch(columns, at + step * ahead, step * columns_at[1], length, P)
            if has_z:
                pack(s, o_z, z, b * z_at[0] + t * z_at[1] + h * z_at[2], step * z_at[1], length, P)
                gate(s, o_columns, o_z, length, p)
            scale_rows(s, o_columns, o_decay + (FROM_START if backward else WEIGHT) * q, length, p)
            advance(s, o_h, o_rows, o_columns, decay, n, p, length, has_h)
            has_h = True
            boundary = chunks[c, 4] if backward else chunks[c, 5]
            unpack(s, o_h, work, (boundary * H + h) * n * p, p, n, p)
    restore_denormals(before_flush)


@_kernel
def chunk_forward(start, stop, sizes, chunks, x, x_at, z, z_at, B, B_at, C, C_at, dt, dt_at, weight, weight_at, own,
                  own_at, bias, limits, A, D, first, work, y, final):  # fmt: skip
    """Write y for the (chunk, group) pairs start .. stop - 1, and the final state where a sequence ends."""
    L, H, G, P, N, q, step, has_z, has_D, has_first = sizes
    n, p, heads = padded(N), padded(P), H // G
    o_B, o_C, o_Ct, o_cb, o_m = 0, q * n, 2 * q * n, 3 * q * n, 3 * q * n + q * q
    o_x = o_m + q * q
    o_y, o_z, o_h, o_tmp = o_x + q * p, o_x + 2 * q * p, o_x + 3 * q * p, o_x + 3 * q * p + n * p
    o_decay = o_tmp + n * p
    o_D = o_decay + NUM_DECAYS * q
    s = scratch(o_D + PAD * p)
    before_flush = flush_denormals()
    for item in range(start, stop):
        c, g = item // G, item % G
        b, t, length, sequence, before = chunks[c, 0], chunks[c, 1], chunks[c, 2], chunks[c, 3], chunks[c, 4]
        rows = padded(length)
        pack(s, o_B, B, b * B_at[0] + t * B_at[1] + g * B_at[2], step * B_at[1], length, N)
        pack(s, o_C, C, b * C_at[0] + t * C_at[1] + g * C_at[2], step * C_at[1], length, N)
        transpose(s, o_C, n, o_Ct, q, rows, n)
        product(s, o_B, n, 1, s, o_Ct, q, o_cb, q, length, rows, N, OUT_UPPER, False)
        for h in range(g * heads, (g + 1) * heads):
            decay = decays(s, o_decay, q, step, b, t, h, dt, dt_at, weight, weight_at, own, own_at, bias, limits,
                           A[h] * LOG2_E, length)  # fmt: skip
            mask(s, o_m, o_cb, q, o_decay, length, limits[4])
            at = b * x_at[0] + t * x_at[1] + h * x_at[2]
            pack(s, o_x, x, at, step * x_at[1], length, P)
            fetch(x, at + x_at[2], step * x_at[1], length, P)
            has_state = load_state(s, o_h, o_tmp, before, h, H, work, has_first, first, sequence, P, N)
            if has_state:
                product(s, o_C, n, 1, s, o_h, p, o_y, p, length, p, N, FULL, False)
                scale_rows(s, o_y, o_decay + FROM_START * q, length, p)
            product(s, o_m, 1, q, s, o_x, p, o_y, p, length, p, length, LOWER, has_state)
            if has_D:
                pack(s, o_D, D, h * P, 0, 1, P)
                add_scaled(s, o_y, o_x, o_D, length, p)
            if has_z:
                pack(s, o_z, z, b * z_at[0] + t * z_at[1] + h * z_at[2], step * z_at[1], length, P)
                gate(s, o_y, o_z, length, p)
            unpack(s, o_y, y, ((b * L + t) * H + h) * P, step * H * P, length, P)
            if chunks[c, 5] < 0:
                scale_rows(s, o_x, o_decay + WEIGHT * q, length, p)
                advance(s, o_h, o_B, o_x, decay, n, p, length, has_state)
                save_state(s, o_h, o_tmp, final, (sequence * H + h) * P * N, P, N)
    restore_denormals(before_flush)


@_kernel
def chunk_backward(start, stop, sizes, chunks, x, x_at, z, z_at, B, B_at, C, C_at, dt, dt_at, weight, weight_at, own,
                   own_at, bias, limits, A, D, first, work, dy, dy_at, dfinal, dwork, dx, ddt, dB, dC, dz, dfirst, dw,
                   down, per_head, per_row):  # fmt: skip
    """Write every gradient for the (chunk, group) pairs start .. stop - 1.

    What is summed over time comes chunk by chunk: `per_head` (2, chunks, H) for A and dt_bias, `per_row` (chunks, H, P)
    for D.
    """
    L, H, G, P, N, q, step, has_z, has_D, has_first, has_dfinal = sizes
    n, p, heads = padded(N), padded(P), H // G
    o_B, o_C, o_Bt, o_Ct = 0, q * n, 2 * q * n, 3 * q * n
    o_dB, o_dBt, o_dCt, o_part = 4 * q * n, 5 * q * n, 6 * q * n, 7 * q * n
    o_cb, o_dcb, o_m, o_t = 8 * q * n, 8 * q * n + q * q, 8 * q * n + 2 * q * q, 8 * q * n + 3 * q * q
    o_x = 8 * q * n + 4 * q * q
    o_xt, o_g, o_gt, o_dx, o_z = o_x + q * p, o_x + 2 * q * p, o_x + 3 * q * p, o_x + 4 * q * p, o_x + 5 * q * p
    o_h = o_x + 6 * q * p
    o_dh, o_tmp = o_h + n * p, o_h + 2 * n * p
    o_decay = o_h + 3 * n * p
    o_dw = o_decay + NUM_DECAYS * q
    o_da, o_run, o_in, o_out, o_D = o_dw + q, o_dw + 2 * q, o_dw + 3 * q, o_dw + 4 * q, o_dw + 5 * q
    s = scratch(o_D + PAD * p)
    before_flush = flush_denormals()
    for item in range(start, stop):
        c, g = item // G, item % G
        b, t, length, sequence = chunks[c, 0], chunks[c, 1], chunks[c, 2], chunks[c, 3]
        rows = padded(length)
        at_B = b * B_at[0] + t * B_at[1] + g * B_at[2]
        at_C = b * C_at[0] + t * C_at[1] + g * C_at[2]
        pack(s, o_B, B, at_B, step * B_at[1], length, N)
        pack(s, o_C, C, at_C, step * C_at[1], length, N)
        transpose(s, o_B, n, o_Bt, q, rows, n)
        transpose(s, o_C, n, o_Ct, q, rows, n)
        product(s, o_B, n, 1, s, o_Ct, q, o_cb, q, length, rows, N, OUT_UPPER, False)
        clear(s, o_dBt, 2 * q * n)
        clear(s, o_dcb, q * q)
        for h in range(g * heads, (g + 1) * heads):
            first_row = (b * L + t) * H + h
            at_dy = b * dy_at[0] + t * dy_at[1] + h * dy_at[2]
            decay = decays(s, o_decay, q, step, b, t, h, dt, dt_at, weight, weight_at, own, own_at, bias, limits,
                           A[h] * LOG2_E, length)  # fmt: skip
            at = b * x_at[0] + t * x_at[1] + h * x_at[2]
            pack(s, o_x, x, at, step * x_at[1], length, P)
            fetch(x, at + x_at[2], step * x_at[1], length, P)
            pack(s, o_g, dy, at_dy, step * dy_at[1], length, P)
            fetch(dy, at_dy + dy_at[2], step * dy_at[1], length, P)
            if has_z:
                pack(s, o_z, z, b * z_at[0] + t * z_at[1] + h * z_at[2], step * z_at[1], length, P)
                gate(s, o_g, o_z, length, p)
            transpose(s, o_g, p, o_gt, q, rows, p)
            product(s, o_x, p, 1, s, o_gt, q, o_t, q, length, rows, P, OUT_UPPER, False)
            mask_backward(s, o_m, o_dcb, o_dw, o_da, o_run, o_cb, o_t, q, o_decay, length, limits[4])

            has_dh = load_state(s, o_dh, o_tmp, chunks[c, 5], h, H, dwork, has_dfinal, dfinal, sequence, P, N)
            has_h = load_state(s, o_h, o_tmp, chunks[c, 4], h, H, work, has_first, first, sequence, P, N)
            through = 0.0  # gradient of the log decay at t by the state at the end, from all that came before t
            if has_dh:
                product(s, o_B, n, 1, s, o_dh, p, o_dx, p, length, p, N, FULL, False)
                scale_rows(s, o_dx, o_decay + WEIGHT * q, length, p)
                transpose(s, o_x, p, o_xt, q, rows, p)
                product(s, o_dh, p, 1, s, o_xt, q, o_part, q, N, rows, P, FULL, False)
                weigh(s, o_out, o_dBt, o_part, o_Bt, o_decay + WEIGHT * q, q, N, length)
                if has_h:
                    through = decay * dot(s, o_h, o_dh, n * p)
            else:
                clear(s, o_out, rows)
            if has_h:
                product(s, o_h, p, 1, s, o_gt, q, o_part, q, N, rows, P, FULL, False)
                weigh(s, o_in, o_dCt, o_part, o_Ct, o_decay + FROM_START * q, q, N, length)
            else:
                clear(s, o_in, rows)
            product(s, o_m, q, 1, s, o_g, p, o_dx, p, length, p, length, UPPER, has_dh)

            for i in range(length):
                s[o_da + i] += through
                through += s[o_decay + WEIGHT * q + i] * s[o_out + i]
            after, sum_A, sum_dt = (
                0.0,
                0.0,
                0.0,
            )  # `after` is that by the outputs from t on, from the state at the start
            for i in range(length - 1, -1, -1):
                after += s[o_decay + FROM_START * q + i] * s[o_in + i]
                da = s[o_da + i] + after
                at = first_row + i * step * H
                sum_A += da * s[o_decay + STEP * q + i]
                d = s[o_dw + i] + s[o_decay + TO_END * q + i] * s[o_out + i]
                if limits[3]:
                    dw[at] = d
                    d = da * A[h] * s[o_decay + SLOPE * q + i]
                else:
                    d = (d + da * A[h]) * s[o_decay + SLOPE * q + i]
                if limits[4]:
                    down[at] = s[o_decay + OWN * q + i]
                sum_dt += d
                ddt[at] = d
            per_head[c * H + h] = sum_A
            per_head[(len(chunks) + c) * H + h] = sum_dt

            if has_D:
                pack(s, o_D, D, h * P, 0, 1, P)
                add_scaled(s, o_dx, o_g, o_D, length, p)
                dot_columns(s, o_tmp, o_g, o_x, length, p)
                unpack(s, o_tmp, per_row, (c * H + h) * P, 0, 1, P)
            if has_first and chunks[c, 4] < 0:
                scale_rows(s, o_g, o_decay + FROM_START * q, length, p)
                advance(s, o_dh, o_C, o_g, decay, n, p, length, has_dh)
                save_state(s, o_dh, o_tmp, dfirst, (sequence * H + h) * P * N, P, N)
            unpack(s, o_dx, dx, first_row * P, step * H * P, length, P)
            if has_z:
                if has_h:
                    product(s, o_C, n, 1, s, o_h, p, o_dx, p, length, p, N, FULL, False)
                    scale_rows(s, o_dx, o_decay + FROM_START * q, length, p)
                product(s, o_m, 1, q, s, o_x, p, o_dx, p, length, p, length, LOWER, has_h)
                if has_D:
                    add_scaled(s, o_dx, o_x, o_D, length, p)
                pack(s, o_g, dy, at_dy, step * dy_at[1], length, P)
                gate_backward(s, o_g, o_dx, o_z, length, p)
                unpack(s, o_g, dz, first_row * P, step * H * P, length, P)

        row = ((b * L + t) * G + g) * N
        transpose(s, o_dBt, q, o_dB, n, n, rows)
        product(s, o_dcb, q, 1, s, o_C, n, o_dB, n, length, n, length, UPPER, True)
        unpack(s, o_dB, dB, row, step * G * N, length, N)
        product(s, o_Bt, q, 1, s, o_dcb, q, o_dCt, q, N, rows, length, FULL, True)
        transpose(s, o_dCt, q, o_dB, n, n, rows)
        unpack(s, o_dB, dC, row, step * G * N, length, N)
    restore_denormals(before_flush)
