"""Selective scan on the CPU: the numba kernels, SIMD over channels, a chunk of inputs in the cache.

    Δ = softplus(delta + delta_bias)
    h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] u[t]
    y[t] = (C[t]·h[t] + D u[t]) silu(z[t])

A block of `WIDTH` channels walks its sequence in chunks of `CHUNK` steps. Per chunk the inputs are copied into buffers,
rows of `WIDTH` (the last block is padded with zeros), and `cpu_chunk` does the rest:

- forward, chunk after chunk; the states that each chunk but the first starts from are kept for backward;
- backward, from the last chunk to the first, each followed once more from the states that it starts from. dB and dC are
  sums over channels and dA, dD, ddelta_bias over sequences: each work item has its own, which the caller then adds up.

Sequence s is batch element b, positions [first, end); reverse=True walks from end - 1 down to first, by the sign of the
strides. Arrays are flat. An input's last dimension is contiguous, its other strides are in `strides`. Arrays of states
are (.., D, N), complex ones in pairs (`parts` is 2).
"""

import numpy as np
from numba import njit

from mambaverse.kernels import fastmath, simd
from mambaverse.kernels.fastmath import sigmoid, softplus
from mambaverse.kernels.jit import cached_kernel
from mambaverse.kernels.selective_scan import cpu_chunk, cpu_layout, cpu_rows, shapes
from mambaverse.kernels.selective_scan.cpu_chunk import (
    backward_complex,
    backward_real,
    forward_complex,
    forward_real,
    forward_real_bounded,
)
from mambaverse.kernels.selective_scan.cpu_layout import BOUND, STEPS, WIDTH
from mambaverse.kernels.selective_scan.cpu_rows import gated, prepare
from mambaverse.kernels.selective_scan.shapes import CHUNK
from mambaverse.kernels.simd import LANES, flush_denormals, restore_denormals

f32 = np.float32
LOG2_E, LN_2 = f32(1.44269504), f32(0.69314718)

_FLAGS = {"contract", "reassoc", "nsz"}
_part = njit(fastmath=_FLAGS, error_model="numpy", boundscheck=False)
_kernel = cached_kernel(fastmath, simd, cpu_layout, cpu_chunk, cpu_rows, shapes, fastmath=_FLAGS)


@_part
def _load(source, first, stride, num, width, rows):
    """Copy `num` rows of `width` elements, `stride` apart, into a buffer; zeros beyond `width`."""
    for q in range(num):
        row = source[first + q * stride : first + q * stride + width]
        for j in range(width):
            rows[q * WIDTH + j] = row[j]
        for j in range(width, WIDTH):
            rows[q * WIDTH + j] = f32(0)


@_part
def _store(rows, num, width, target, first, stride):
    """Copy `num` rows of `width` elements out of a buffer."""
    for q in range(num):
        row = target[first + q * stride : first + q * stride + width]
        for j in range(width):
            row[j] = rows[q, j]


@_part
def _read(source, first, width, states):
    """Transpose `width` channels of (D, N, parts), from `first` on, to (parts, N, WIDTH); zeros beyond, or if empty."""
    parts, state_dim, _ = states.shape
    for part in range(parts):
        for n in range(state_dim):
            for j in range(WIDTH):
                inside = j < width and len(source) > 0
                states[part, n, j] = source[((first + j) * state_dim + n) * parts + part] if inside else f32(0)


@_part
def _write(states, target, first, width):
    """Transpose (parts, N, WIDTH) to `width` channels of (D, N, parts), from `first` on."""
    parts, state_dim, _ = states.shape
    for part in range(parts):
        for n in range(state_dim):
            for j in range(width):
                target[((first + j) * state_dim + n) * parts + part] = states[part, n, j]


@_part
def largest(values):
    """Return the largest magnitude; NaN if one value is."""
    most = f32(0)
    for value in values.flat:
        size = abs(value)
        most = most if size <= most else size
        if size != size:
            return size
    return most


@_part
def _sequence(s, length, cu_seqlens):
    """Return batch index, first and one-past-last position of sequence s (dense batch, or packed by cu_seqlens)."""
    if len(cu_seqlens):
        return 0, cu_seqlens[s], cu_seqlens[s + 1]
    return s, 0, length


@_kernel
def scan_forward(
    start, stop, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens,
    strides, length, dim, groups, state_dim, parts, delta_softplus, reverse, num_parts,
    y, final_state, chunk_states,
):  # fmt: skip
    """Scan work items start .. stop - 1; an item is one of `num_parts` parts of the blocks of a group, of one sequence.

    Its blocks take turns, STEPS steps each, so that what is read and written lies side by side in memory.
    """
    group_dim = dim // groups
    num_blocks = -(-group_dim // WIDTH)
    most_blocks = -(-num_blocks // num_parts)
    step = -1 if reverse else 1
    (u_b, u_t), (d_b, d_t), (z_b, z_t), (B_b, B_t, B_g), (C_b, C_t, C_g) = strides
    dt = np.zeros((STEPS, WIDTH), f32)
    x = np.zeros((STEPS, WIDTH), f32)  # Δ u
    out = np.zeros((STEPS, WIDTH), f32)
    padded_u = np.zeros(STEPS * WIDTH, f32)
    padded = np.zeros(STEPS * WIDTH, f32)
    peak = np.zeros(LANES, f32)
    rates = np.zeros((most_blocks, parts, state_dim, WIDTH), f32)
    states = np.zeros((most_blocks, parts, state_dim, WIDTH), f32)
    biases = np.zeros((most_blocks, 1, 1, WIDTH), f32)
    skips = np.zeros((most_blocks, 1, 1, WIDTH), f32)
    fastest = np.zeros(most_blocks, f32)
    denormals = flush_denormals()
    for item in range(start, stop):
        s, rest = divmod(item, groups * num_parts)
        g, part = divmod(rest, num_parts)
        b, first, end = _sequence(s, length, cu_seqlens)
        first_block, last_block = part * num_blocks // num_parts, (part + 1) * num_blocks // num_parts
        for block in range(first_block, last_block):
            d0 = g * group_dim + block * WIDTH
            width = min(WIDTH, (g + 1) * group_dim - d0)
            k = block - first_block
            _read(delta_bias, d0, width, biases[k])
            _read(D, d0, width, skips[k])
            _read(A, d0, width, rates[k])
            rates[k] *= LOG2_E
            fastest[k] = largest(rates[k])
            _read(initial_state, s * dim + d0, width, states[k])
        for c in range((end - first + STEPS - 1) // STEPS):
            num = min(STEPS, end - first - c * STEPS)
            t = end - 1 - c * STEPS if reverse else first + c * STEPS
            b_first, c_first = b * B_b + t * B_t + g * B_g, b * C_b + t * C_t + g * C_g
            for block in range(first_block, last_block):
                d0 = g * group_dim + block * WIDTH
                width = min(WIDTH, (g + 1) * group_dim - d0)
                k = block - first_block
                rate, h, bias, skip = rates[k], states[k], biases[k], skips[k]
                if c > 0 and c * STEPS % CHUNK == 0 and len(chunk_states):
                    row = b * (length // CHUNK) + first // CHUNK + c * STEPS // CHUNK - 1
                    _write(h, chunk_states, row * dim + d0, width)
                u_, u_first, u_stride = u, b * u_b + t * u_t + d0, step * u_t
                d_, d_first, d_stride = delta, b * d_b + t * d_t + d0, step * d_t
                if width < WIDTH:
                    _load(u, u_first, u_stride, num, width, padded_u)
                    _load(delta, d_first, d_stride, num, width, padded)
                    u_, u_first, u_stride = padded_u, 0, WIDTH
                    d_, d_first, d_stride = padded, 0, WIDTH
                prepare(
                    num, u_, u_first, u_stride, d_, d_first, d_stride, bias, skip, delta_softplus, dt, x, out, peak,
                )  # fmt: skip
                if parts == 2:
                    forward_complex(num, rate, h, dt, x, B, b_first, step * B_t, C, c_first, step * C_t, out)
                elif largest(peak) * fastest[k] <= BOUND:
                    forward_real_bounded(num, rate, h, dt, x, B, b_first, step * B_t, C, c_first, step * C_t, out)
                else:
                    forward_real(num, rate, h, dt, x, B, b_first, step * B_t, C, c_first, step * C_t, out)
                y_first = (b * length + t) * dim + d0
                if not len(z):
                    _store(out, num, width, y, y_first, step * dim)
                elif width < WIDTH:
                    _load(z, b * z_b + t * z_t + d0, step * z_t, num, width, padded)
                    gated(num, out, padded, 0, WIDTH, x, 0, WIDTH)
                    _store(x, num, width, y, y_first, step * dim)
                else:
                    gated(num, out, z, b * z_b + t * z_t + d0, step * z_t, y, y_first, step * dim)
        for block in range(first_block, last_block):
            d0 = g * group_dim + block * WIDTH
            _write(states[block - first_block], final_state, s * dim + d0, min(WIDTH, (g + 1) * group_dim - d0))
    restore_denormals(denormals)


@_kernel
def scan_backward(
    start, stop, dy, dfinal_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, chunk_states,
    strides, length, dim, groups, state_dim, parts, delta_softplus, reverse, sequences, batch, num_parts, seq_parts,
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state,
):  # fmt: skip
    """Differentiate work items start .. stop - 1; an item is some sequences of some blocks of channels of one group.

    dA, dD and ddelta_bias have a leading axis of `seq_parts`, dB and dC, which must be zeros, one of `num_parts`.
    """
    group_dim = dim // groups
    num_blocks = -(-group_dim // WIDTH)
    step = -1 if reverse else 1
    (dy_b, dy_t), (u_b, u_t), (d_b, d_t), (z_b, z_t), (B_b, B_t, B_g), (C_b, C_t, C_g) = strides
    v = np.zeros((CHUNK, WIDTH), f32)  # u
    dt = np.zeros((CHUNK, WIDTH), f32)
    x = np.zeros((CHUNK, WIDTH), f32)  # Δ u
    slope = np.zeros((CHUNK, WIDTH), f32)  # dΔ / ddelta
    gate = np.zeros((CHUNK, WIDTH), f32)  # z, then the part of dz that is known before y is
    out = np.zeros((CHUNK, WIDTH), f32)  # y before the gate
    g_out = np.zeros((CHUNK, WIDTH), f32)
    g_x = np.zeros((CHUNK, WIDTH), f32)
    g_dt = np.zeros((CHUNK, WIDTH), f32)
    a = np.zeros((parts, CHUNK, WIDTH), f32)
    h = np.zeros((parts, CHUNK + 1, WIDTH), f32)
    h_first = np.zeros((parts, state_dim, WIDTH), f32)
    g_h = np.zeros((parts, state_dim, WIDTH), f32)
    rate = np.zeros((parts, state_dim, WIDTH), f32)
    g_rate = np.zeros((parts, state_dim, WIDTH), f32)
    g_B = np.zeros((parts, state_dim, CHUNK), f32)
    g_C = np.zeros((parts, state_dim, CHUNK), f32)
    bias = np.zeros((1, 1, WIDTH), f32)
    skip = np.zeros((1, 1, WIDTH), f32)
    g_bias = np.zeros((1, 1, WIDTH), f32)
    g_skip = np.zeros((1, 1, WIDTH), f32)
    g_b = np.zeros((CHUNK, LANES), f32)
    g_c = np.zeros((CHUNK, LANES), f32)
    sums = np.zeros((2, WIDTH), f32)  # over one chunk: a long float32 sum keeps its digits in two levels only
    denormals = flush_denormals()
    for item in range(start, stop):
        seq_part, rest = divmod(item, groups * num_parts)
        g, part = divmod(rest, num_parts)
        for block in range(part * num_blocks // num_parts, (part + 1) * num_blocks // num_parts):
            d0 = g * group_dim + block * WIDTH
            width = min(WIDTH, (g + 1) * group_dim - d0)
            _read(delta_bias, d0, width, bias)
            _read(D, d0, width, skip)
            _read(A, d0, width, rate)
            rate *= LOG2_E
            g_rate[:] = f32(0)
            g_bias[:] = f32(0)
            g_skip[:] = f32(0)
            for s in range(seq_part * sequences // seq_parts, (seq_part + 1) * sequences // seq_parts):
                b, first, end = _sequence(s, length, cu_seqlens)
                _read(dfinal_state, s * dim + d0, width, g_h)
                for c in range((end - first + CHUNK - 1) // CHUNK - 1, -1, -1):
                    num = min(CHUNK, end - first - c * CHUNK)
                    t = end - 1 - c * CHUNK if reverse else first + c * CHUNK
                    _load(u, b * u_b + t * u_t + d0, step * u_t, num, width, v.reshape(-1))
                    _load(delta, b * d_b + t * d_t + d0, step * d_t, num, width, dt.reshape(-1))
                    _load(dy, b * dy_b + t * dy_t + d0, step * dy_t, num, width, g_out.reshape(-1))
                    for q in range(num):
                        for j in range(WIDTH):
                            d = dt[q, j] + bias[0, 0, j]
                            slope[q, j] = sigmoid(d) if delta_softplus else f32(1)
                            dt[q, j] = softplus(d) if delta_softplus else d
                            x[q, j] = v[q, j] * dt[q, j]
                            out[q, j] = skip[0, 0, j] * v[q, j]
                            g_x[q, j] = f32(0)
                            g_dt[q, j] = f32(0)
                    if len(z):
                        _load(z, b * z_b + t * z_t + d0, step * z_t, num, width, gate.reshape(-1))
                        for q in range(num):
                            for j in range(WIDTH):
                                p = sigmoid(gate[q, j])
                                w = gate[q, j] * p
                                gate[q, j] = g_out[q, j] * (p + w * (f32(1) - p))
                                g_out[q, j] *= w
                    if c > 0:
                        _read(chunk_states, (b * (length // CHUNK) + first // CHUNK + c - 1) * dim + d0, width, h_first)
                    else:
                        _read(initial_state, s * dim + d0, width, h_first)
                    b_first, c_first = b * B_b + t * B_t + g * B_g, b * C_b + t * C_t + g * C_g
                    if parts == 1:
                        backward_real(
                            num, rate, h_first, dt, x, B, b_first, step * B_t, C, c_first, step * C_t, g_out,
                            a, h, g_b, g_c, out, g_x, g_dt, g_B, g_C, g_h, g_rate,
                        )  # fmt: skip
                    else:
                        backward_complex(
                            num, rate, h_first, dt, x, B, b_first, step * B_t, C, c_first, step * C_t, g_out,
                            a, h, sums, out, g_x, g_dt, g_B, g_C, g_h, g_rate,
                        )  # fmt: skip
                    for q in range(num):
                        i = (((part * batch + b) * length + t + step * q) * groups + g) * state_dim * parts
                        for n in range(state_dim):
                            for k in range(parts):
                                dB[i + n * parts + k] += g_B[k, n, q]
                                dC[i + n * parts + k] += g_C[k, n, q]
                    sums[:] = f32(0)
                    for q in range(num):
                        for j in range(WIDTH):
                            sums[0, j] += g_out[q, j] * v[q, j]
                            gate[q, j] *= out[q, j]
                            d = (g_dt[q, j] * LN_2 + g_x[q, j] * v[q, j]) * slope[q, j]
                            g_dt[q, j] = d
                            sums[1, j] += d
                            g_x[q, j] = g_x[q, j] * dt[q, j] + g_out[q, j] * skip[0, 0, j]
                    g_skip += sums[0]
                    g_bias += sums[1]
                    i = (b * length + t) * dim + d0
                    _store(g_x, num, width, du, i, step * dim)
                    _store(g_dt, num, width, ddelta, i, step * dim)
                    if len(z):
                        _store(gate, num, width, dz, i, step * dim)
                if len(dinitial_state):
                    _write(g_h, dinitial_state, s * dim + d0, width)
            _write(g_skip, dD, seq_part * dim + d0, width)
            _write(g_bias, ddelta_bias, seq_part * dim + d0, width)
            _write(g_rate, dA, seq_part * dim + d0, width)
    restore_denormals(denormals)
