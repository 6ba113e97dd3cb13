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
are (.., D, N), complex ones in pairs: `parts` is then 2 and `pairs` True, else 1 and None. numba compiles only the
branches that a None allows, and so each kind when it is first used.
"""

import numpy as np
from numba import njit

from mambaverse.kernels import fastmath, simd
from mambaverse.kernels.jit import cached_kernel
from mambaverse.kernels.selective_scan import cpu_chunk, cpu_layout, cpu_rows, shapes
from mambaverse.kernels.selective_scan.cpu_chunk import (
    backward_complex,
    backward_real,
    forward_complex,
    forward_real,
    forward_real_bounded,
    sum_lanes,
)
from mambaverse.kernels.selective_scan.cpu_layout import BOUND, STEPS, STRIP, WIDTH
from mambaverse.kernels.selective_scan.cpu_rows import (
    finish_backward,
    gated,
    prepare,
    prepare_backward,
    product,
    ungated,
)
from mambaverse.kernels.selective_scan.shapes import CHUNK
from mambaverse.kernels.simd import LANES, flush_denormals, restore_denormals

f32 = np.float32
LOG2_E = f32(1.44269504)

_FLAGS = {"contract", "reassoc", "nsz"}
_part = njit(fastmath=_FLAGS, error_model="numpy", boundscheck=False)
_kernel = cached_kernel(fastmath, simd, cpu_layout, cpu_chunk, cpu_rows, shapes, fastmath=_FLAGS)


@_part
def _load(source, first, stride, num, width, full_width, rows):
    """Copy `num` rows of `width` elements, `stride` apart, to rows of `full_width`, filled up with zeros."""
    for q in range(num):
        row = source[first + q * stride : first + q * stride + width]
        for j in range(width):
            rows[q * full_width + j] = row[j]
        for j in range(width, full_width):
            rows[q * full_width + j] = f32(0)


@_part
def _store(rows, full_width, num, width, target, first, stride):
    """Copy `width` elements of each of `num` rows of `full_width` to rows that are `stride` apart."""
    for q in range(num):
        row = target[first + q * stride : first + q * stride + width]
        for j in range(width):
            row[j] = rows[q * full_width + j]


@_part
def _read(source, first, width, states):
    """Transpose `width` channels of (D, N, parts), from `first` on, to (parts, N, W); zeros beyond, or if empty."""
    parts, state_dim, full_width = states.shape
    for part in range(parts):
        for n in range(state_dim):
            for j in range(full_width):
                inside = j < width and len(source) > 0
                states[part, n, j] = source[((first + j) * state_dim + n) * parts + part] if inside else f32(0)


@_part
def _write(states, target, first, width):
    """Transpose (parts, N, W) to `width` channels of (D, N, parts), from `first` on."""
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
    strides, length, dim, groups, state_dim, parts, delta_softplus, reverse, num_parts, pairs,
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
            rate = rates[k]
            rate *= LOG2_E
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
                    _load(u, u_first, u_stride, num, width, WIDTH, padded_u)
                    _load(delta, d_first, d_stride, num, width, WIDTH, padded)
                    u_, u_first, u_stride = padded_u, 0, WIDTH
                    d_, d_first, d_stride = padded, 0, WIDTH
                prepare(
                    num, u_, u_first, u_stride, d_, d_first, d_stride, bias, skip, delta_softplus, dt, x, out, peak,
                )  # fmt: skip
                if pairs is not None:
                    forward_complex(num, rate, h, dt, x, B, b_first, step * B_t, C, c_first, step * C_t, out)
                elif largest(peak) * fastest[k] <= BOUND:
                    forward_real_bounded(num, rate, h, dt, x, B, b_first, step * B_t, C, c_first, step * C_t, out)
                else:
                    forward_real(num, rate, h, dt, x, B, b_first, step * B_t, C, c_first, step * C_t, out)
                y_first = (b * length + t) * dim + d0
                if not len(z):
                    _store(out.reshape(-1), WIDTH, num, width, y, y_first, step * dim)
                elif width < WIDTH:
                    _load(z, b * z_b + t * z_t + d0, step * z_t, num, width, WIDTH, padded)
                    gated(num, out, padded, 0, WIDTH, padded_u, 0, WIDTH)
                    _store(padded_u, WIDTH, num, width, y, y_first, step * dim)
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
    pairs, du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state,
):  # fmt: skip
    """Differentiate work items start .. stop - 1; an item is some sequences of some blocks of channels of one group.

    dA, dD and ddelta_bias have a leading axis of `seq_parts`, dB and dC, which must be zeros, one of `num_parts`. The
    strips of the blocks take turns, a chunk each.
    """
    group_dim = dim // groups
    num_blocks = -(-group_dim // WIDTH)
    most_strips = -(-num_blocks // num_parts) * (WIDTH // STRIP)
    step = -1 if reverse else 1
    (dy_b, dy_t), (u_b, u_t), (d_b, d_t), (z_b, z_t), (B_b, B_t, B_g), (C_b, C_t, C_g) = strides
    dt = np.zeros((CHUNK, STRIP), f32)
    x = np.zeros((CHUNK, STRIP), f32)  # Δ u
    slope = np.zeros((CHUNK, STRIP), f32)  # dΔ / ddelta
    gate = np.zeros((CHUNK, STRIP), f32)  # dz / out
    out = np.zeros((CHUNK, STRIP), f32)  # y before the gate
    g_out = np.zeros((CHUNK, STRIP), f32)
    g_x = np.zeros((CHUNK, STRIP), f32)
    g_dt = np.zeros((CHUNK, STRIP), f32)
    padded_u, padded_delta, padded_dy, padded_z = np.zeros((4, CHUNK * STRIP), f32)
    a = np.zeros((parts, CHUNK, STRIP), f32)
    h = np.zeros((parts, CHUNK + 1, STRIP), f32)
    h_first = np.zeros((parts, state_dim, STRIP), f32)
    g_B = np.zeros((parts, state_dim, CHUNK), f32)
    g_C = np.zeros((parts, state_dim, CHUNK), f32)
    g_b = np.zeros((state_dim, CHUNK, LANES), f32)
    g_c = np.zeros((state_dim, CHUNK, LANES), f32)
    g_rate_sum = np.zeros((2, STRIP), f32)
    rates, g_rates, g_states = np.zeros((3, most_strips, parts, state_dim, STRIP), f32)
    biases, skips, g_biases, g_skips = np.zeros((4, most_strips, 1, 1, STRIP), f32)
    denormals = flush_denormals()
    for item in range(start, stop):
        seq_part, rest = divmod(item, groups * num_parts)
        g, part = divmod(rest, num_parts)
        first_channel = g * group_dim + part * num_blocks // num_parts * WIDTH
        end_channel = min(g * group_dim + (part + 1) * num_blocks // num_parts * WIDTH, (g + 1) * group_dim)
        num_strips = -(-(end_channel - first_channel) // STRIP)
        for k in range(num_strips):
            d0 = first_channel + k * STRIP
            width = min(STRIP, end_channel - d0)
            _read(delta_bias, d0, width, biases[k])
            _read(D, d0, width, skips[k])
            _read(A, d0, width, rates[k])
            rate = rates[k]
            rate *= LOG2_E
        g_rates[:] = f32(0)
        g_biases[:] = f32(0)
        g_skips[:] = f32(0)
        for s in range(seq_part * sequences // seq_parts, (seq_part + 1) * sequences // seq_parts):
            b, first, end = _sequence(s, length, cu_seqlens)
            for k in range(num_strips):
                d0 = first_channel + k * STRIP
                _read(dfinal_state, s * dim + d0, min(STRIP, end_channel - d0), g_states[k])
            for c in range((end - first + CHUNK - 1) // CHUNK - 1, -1, -1):
                num = min(CHUNK, end - first - c * CHUNK)
                t = end - 1 - c * CHUNK if reverse else first + c * CHUNK
                b_first, c_first = b * B_b + t * B_t + g * B_g, b * C_b + t * C_t + g * C_g
                g_B[:] = f32(0)
                g_C[:] = f32(0)
                g_b[:] = f32(0)
                g_c[:] = f32(0)
                for k in range(num_strips):
                    d0 = first_channel + k * STRIP
                    width = min(STRIP, end_channel - d0)
                    full = width == STRIP
                    rate, bias, skip = rates[k], biases[k], skips[k]
                    i = (b * length + t) * dim + d0
                    u_, u_first, u_stride = u, b * u_b + t * u_t + d0, step * u_t
                    d_, d_first, d_stride = delta, b * d_b + t * d_t + d0, step * d_t
                    dy_, dy_first, dy_stride = dy, b * dy_b + t * dy_t + d0, step * dy_t
                    z_, z_first, z_stride = z, b * z_b + t * z_t + d0, step * z_t
                    if not full:
                        _load(u, u_first, u_stride, num, width, STRIP, padded_u)
                        _load(delta, d_first, d_stride, num, width, STRIP, padded_delta)
                        _load(dy, dy_first, dy_stride, num, width, STRIP, padded_dy)
                        u_, u_first, u_stride = padded_u, 0, STRIP
                        d_, d_first, d_stride = padded_delta, 0, STRIP
                        dy_, dy_first, dy_stride = padded_dy, 0, STRIP
                        if len(z):
                            _load(z, z_first, z_stride, num, width, STRIP, padded_z)
                            z_, z_first, z_stride = padded_z, 0, STRIP
                    prepare_backward(
                        num, u_, u_first, u_stride, d_, d_first, d_stride, dy_, dy_first, dy_stride, bias, skip,
                        delta_softplus, du, ddelta, dz, i, step * dim, dt, slope, x, out, g_out, g_x, g_dt,
                    )  # fmt: skip
                    if len(z):
                        ungated(num, z_, z_first, z_stride, g_out, gate)
                    if c > 0:
                        _read(chunk_states, (b * (length // CHUNK) + first // CHUNK + c - 1) * dim + d0, width, h_first)
                    else:
                        _read(initial_state, s * dim + d0, width, h_first)
                    if pairs is not None:
                        backward_complex(
                            num, rate, h_first, dt, x, B, b_first, step * B_t, C, c_first, step * C_t, g_out,
                            a, h, g_rate_sum, out, g_x, g_dt, g_B, g_C, g_states[k], g_rates[k],
                        )  # fmt: skip
                    else:
                        backward_real(
                            num, rate, h_first, dt, x, B, b_first, step * B_t, C, c_first, step * C_t, g_out,
                            a, h, out, g_x, g_dt, g_b, g_c, g_states[k], g_rates[k],
                        )  # fmt: skip
                    du_, ddelta_, dz_, to_first, to_stride = du, ddelta, dz, i, step * dim
                    if not full:
                        du_, ddelta_, dz_, to_first, to_stride = padded_delta, padded_dy, padded_z, 0, STRIP
                    finish_backward(
                        num, u_, u_first, u_stride, skip, dt, slope, g_out, g_x, g_dt, g_skips[k], g_biases[k],
                        du_, ddelta_, to_first, to_stride,
                    )  # fmt: skip
                    if len(z):
                        product(num, gate, out, dz_, to_first, to_stride)
                    if not full:
                        _store(padded_delta, STRIP, num, width, du, i, step * dim)
                        _store(padded_dy, STRIP, num, width, ddelta, i, step * dim)
                        if len(z):
                            _store(padded_z, STRIP, num, width, dz, i, step * dim)
                if pairs is None:
                    sum_lanes(g_b, g_c, num, g_B, g_C)
                for q in range(num):
                    i = (((part * batch + b) * length + t + step * q) * groups + g) * state_dim * parts
                    for n in range(state_dim):
                        for k in range(parts):
                            dB[i + n * parts + k] += g_B[k, n, q]
                            dC[i + n * parts + k] += g_C[k, n, q]
            if len(dinitial_state):
                for k in range(num_strips):
                    d0 = first_channel + k * STRIP
                    _write(g_states[k], dinitial_state, s * dim + d0, min(STRIP, end_channel - d0))
        for k in range(num_strips):
            d0 = first_channel + k * STRIP
            width = min(STRIP, end_channel - d0)
            _write(g_skips[k], dD, seq_part * dim + d0, width)
            _write(g_biases[k], ddelta_bias, seq_part * dim + d0, width)
            _write(g_rates[k], dA, seq_part * dim + d0, width)
    restore_denormals(denormals)
