"""lti_conv on the CPU with numba: the recurrence itself, 16 channels in SIMD.

Forward holds h of 16 channels in cache and takes four steps for each time that a state and its system are loaded.
Backward does two such runs. One forwards, where q = ∂h/∂A_bar follows h:

    q[t] = A_bar q[t-1] + h[t-1],   dA_bar = conj(C Σ_t dy[t] q[t]) + dfinal conj(q[L-1]),   dC = conj(Σ_t dy[t] h[t])

and one backwards, with m the gradient that reaches h[t] from later steps:

    g = m + conj(C) dy[t],   du[t] = Re(Σ_n conj(B_bar) g),   dB_bar = Σ_t u[t] g,   m = conj(A_bar) g

Up to 128 steps in float32; beyond in float64, because a rounding of A_bar acts at every step: in float32 a constant
input over a memory of 1000 steps would come out with a relative error of 3e-5.
Same signatures and results as reference.py.

There is no FFT here. Measured on one thread of a Xeon with AVX-512, torch 2.15, in ns per element of u, B, L, D =
2, 1024, 512 and in brackets 64, 65, 192; the FFTs without the making of K and the gradients of what made it:

    states N          8           16          32          64          128       FFTs alone, any N
    forward        6 (5)       9 (7)      13 (10)     24 (17)      43 (28)        16 (10)
    backward     12 (9)      21 (13)      38 (23)     71 (43)     179 (80)        31 (20)

The usual N is 32, where both cost the same. From N = 64 a convolution by FFT would be faster by half and more.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from mambaverse.kernels.jit import cached_kernel
from mambaverse.kernels.lti_conv.reference import no_state, state_dtype
from mambaverse.kernels.rows import as_array, dense, flat_rows, sum_rows
from mambaverse.kernels.threads import parallel_for

_LANES = 16  # channels of a work item; 32 states of them and their system fill 32 kB
_STEPS = 4
_WORTH_A_CALL = 2**19  # states that forward advances in about 100 µs, where handing a call to a thread takes 10 µs
_SHORT = 128  # the longest sequence that float32 carries through
_ITEMS = 32  # work items of backward at least, where the batch gives them: each holds its own sums over t
_fastmath = {"contract", "nsz"}
_compiled = cached_kernel(fastmath=_fastmath)
_inlined = numba.njit(fastmath=_fastmath, error_model="numpy", boundscheck=False, forceinline=True)


def forward(
    u: Tensor,
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    wants_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return y and the final state, as `reference.forward`."""
    batch, length, dim = u.shape
    y, final_state = torch.empty(u.shape), torch.empty((batch, *A_bar.shape), dtype=torch.complex64)
    arguments = _arguments(u, A_bar, B_bar, C, D, initial_state, reverse)
    num_items, grain = batch * -(-dim // _LANES), 1 + _WORTH_A_CALL // max(1, _LANES * length * A_bar.shape[1])
    outputs = as_array(y.view(-1)), _parts(final_state)
    parallel_for(_forward, num_items, length, dim, batch, *arguments, *outputs, grain=grain)
    return y.to(u.dtype), final_state.to(state_dtype(u)) if wants_state else no_state(u)


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    u: Tensor,
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, A_bar, B_bar, C, D and initial_state, as `reference.backward`."""
    batch, length, dim = u.shape
    du = torch.empty(u.shape)
    dstate = torch.empty((0 if initial_state is None else batch, *A_bar.shape), dtype=torch.complex64)
    num_blocks = -(-dim // _LANES)
    groups = min(batch, -(-_ITEMS // num_blocks))
    sums = torch.empty((groups, *A_bar.shape, 4, 2), dtype=torch.float64)
    skip_sums = torch.empty((groups, dim), dtype=torch.float64)
    arguments = _arguments(u, A_bar, B_bar, C, D, initial_state, reverse)
    dy = torch.zeros(u.shape) if dy is None else dy
    outputs = as_array(du.view(-1)), _parts(dstate), as_array(sums.flatten(1)), as_array(skip_sums)
    parallel_for(
        _backward, groups * num_blocks, length, dim, batch, *arguments, *flat_rows(dy), _parts(dfinal_state), *outputs
    )
    h_dy, q_dy, dA_final, dB = torch.view_as_complex(sum_rows(sums)).unbind(-1)
    return (
        du.to(u.dtype),
        (C * q_dy).conj() + dA_final,
        dB.clone(memory_format=torch.contiguous_format),
        h_dy.conj().resolve_conj().contiguous(),
        u.new_empty(0) if D is None else sum_rows(skip_sums).to(D.dtype),
        u.new_empty(0) if initial_state is None else dstate.to(initial_state.dtype),
    )


def _arguments(
    u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None, reverse: bool
) -> tuple[Any, ...]:
    """Return what both kernels are given, behind the sizes."""
    wide = torch.complex64 if u.shape[1] <= _SHORT else torch.complex128
    skip = torch.zeros(u.shape[2]) if D is None else D
    system = (_parts(t, wide) for t in (A_bar, B_bar, C))
    return -1 if reverse else 1, *flat_rows(u), *system, dense(skip), _parts(initial_state)


def _parts(x: Tensor | None, dtype: torch.dtype = torch.complex64) -> Any:
    """Return complex x (..., D, N) as a flat array of real and imaginary parts, an empty one for None."""
    x = torch.empty(0, dtype=dtype) if x is None else x.detach().to(dtype).resolve_conj().contiguous()
    return as_array(torch.view_as_real(x).view(-1))


@_inlined
def _transpose(source, offset, num_states, valid, target, column):
    """Copy complex (valid, N) at `offset` to columns of target (N, ...): the real parts, then the imaginary ones."""
    for j in range(valid):
        for n in range(num_states):
            i = offset + (j * num_states + n) * 2
            target[n, column + j] = source[i]
            target[n, column + _LANES + j] = source[i + 1]


@_inlined
def _transpose_back(source, column, target, offset, num_states, stride, valid):
    """Do the reverse of `_transpose`; in target the complex numbers lie `stride` real ones apart."""
    for j in range(valid):
        for n in range(num_states):
            i = offset + (j * num_states + n) * stride
            target[i] = source[n, column + j]
            target[i + 1] = source[n, column + _LANES + j]


@_inlined
def _copy(source, offset, valid, target):
    for j in range(valid):
        target[j] = source[offset + j]


@_inlined
def _clear(x):
    for n in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[n, j] = 0


@_inlined
def _load(x, offset, stride, valid, buffer, num_steps):
    for s in range(num_steps):
        row = x[offset + s * stride : offset + s * stride + valid]
        for j in range(valid):
            buffer[s * _LANES + j] = row[j]


@_inlined
def _store(buffer, x, offset, stride, valid, num_steps):
    for s in range(num_steps):
        row = x[offset + s * stride : offset + s * stride + valid]
        for j in range(valid):
            row[j] = buffer[s * _LANES + j]


@_inlined
def _weigh(skip, x, y, num_steps):
    """Set y to D x."""
    for s in range(num_steps):
        for j in range(_LANES):
            y[s * _LANES + j] = skip[j] * x[s * _LANES + j]


@_inlined
def _advance(system, states, u, y, num_steps):
    """Take steps of h and add Re(C h) to y; the order of the terms makes each one multiply-add, h last."""
    for n in range(states.shape[0]):
        p, h = system[n], states[n]
        for j in range(_LANES):
            ar, ai, br = p[j], p[_LANES + j], p[2 * _LANES + j]
            bi, cr, ci = p[3 * _LANES + j], p[4 * _LANES + j], p[5 * _LANES + j]
            hr, hi = h[j], h[_LANES + j]
            for s in range(num_steps):
                i = s * _LANES + j
                hr, hi = br * u[i] + ar * hr - ai * hi, bi * u[i] + ar * hi + ai * hr
                y[i] = y[i] + cr * hr - ci * hi
            h[j], h[_LANES + j] = hr, hi


@_inlined
def _advance_derivative(system, states, derivatives, sums, u, dy, num_steps):
    """Take steps of h and q = ∂h/∂A_bar and add dy h and dy q to the first four rows of sums."""
    for n in range(states.shape[0]):
        p, h, q, w = system[n], states[n], derivatives[n], sums[n]
        for j in range(_LANES):
            ar, ai, br, bi = p[j], p[_LANES + j], p[2 * _LANES + j], p[3 * _LANES + j]
            hr, hi, qr, qi = h[j], h[_LANES + j], q[j], q[_LANES + j]
            wr, wi, vr, vi = w[j], w[_LANES + j], w[2 * _LANES + j], w[3 * _LANES + j]
            for s in range(num_steps):
                i = s * _LANES + j
                qr, qi = hr + ar * qr - ai * qi, hi + ar * qi + ai * qr
                hr, hi = br * u[i] + ar * hr - ai * hi, bi * u[i] + ar * hi + ai * hr
                wr, wi, vr, vi = wr + dy[i] * hr, wi + dy[i] * hi, vr + dy[i] * qr, vi + dy[i] * qi
            h[j], h[_LANES + j], q[j], q[_LANES + j] = hr, hi, qr, qi
            w[j], w[_LANES + j], w[2 * _LANES + j], w[3 * _LANES + j] = wr, wi, vr, vi


@_inlined
def _retreat(system, grads, sums, u, dy, du, num_steps):
    """Take steps of m, add Re(conj(B_bar) g) to du and u g to the last two rows of sums."""
    for n in range(grads.shape[0]):
        p, m, w = system[n], grads[n], sums[n]
        for j in range(_LANES):
            ar, ai, br = p[j], p[_LANES + j], p[2 * _LANES + j]
            bi, cr, ci = p[3 * _LANES + j], p[4 * _LANES + j], p[5 * _LANES + j]
            mr, mi, wr, wi = m[j], m[_LANES + j], w[6 * _LANES + j], w[7 * _LANES + j]
            for s in range(num_steps):
                i = s * _LANES + j
                gr, gi = mr + cr * dy[i], mi - ci * dy[i]
                du[i] = du[i] + br * gr + bi * gi
                wr, wi = wr + gr * u[i], wi + gi * u[i]
                mr, mi = ar * gr + ai * gi, ar * gi - ai * gr
            m[j], m[_LANES + j], w[6 * _LANES + j], w[7 * _LANES + j] = mr, mi, wr, wi


@_compiled
def _forward(start, stop, length, dim, batch, sign, u, u_batch, u_row, A_bar, B_bar, C, skip, initial, y, final):
    num_states = A_bar.size // (2 * dim)
    system, h = np.zeros((num_states, 6 * _LANES), A_bar.dtype), np.zeros((num_states, 2 * _LANES), A_bar.dtype)
    rows, d = np.zeros((2, _STEPS * _LANES), A_bar.dtype), np.zeros(_LANES, A_bar.dtype)
    us, ys = rows[0], rows[1]
    first, loaded = 0 if sign > 0 else length - 1, -1
    for item in range(start, stop):
        b, c = item % batch, item // batch * _LANES
        valid = min(_LANES, dim - c)  # the lanes beyond hold what they held before; nothing of them is stored
        if c != loaded:
            for k, part in enumerate((A_bar, B_bar, C)):
                _transpose(part, 2 * c * num_states, num_states, valid, system, 2 * k * _LANES)
            _copy(skip, c, valid, d)
            loaded = c
        state = 2 * (b * dim + c) * num_states
        _clear(h)
        if initial.size > 0:
            _transpose(initial, state, num_states, valid, h, 0)
        t = 0
        while t < length:
            num_steps = _STEPS if t + _STEPS <= length else 1
            row = first + sign * t
            _load(u, b * u_batch + row * u_row + c, sign * u_row, valid, us, num_steps)
            _weigh(d, us, ys, num_steps)
            if num_steps == _STEPS:
                _advance(system, h, us, ys, _STEPS)  # the constant lets LLVM unroll the steps
            else:
                _advance(system, h, us, ys, 1)
            _store(ys, y, (b * length + row) * dim + c, sign * dim, valid, num_steps)
            t += num_steps
        _transpose_back(h, 0, final, state, num_states, 2, valid)


@_compiled
def _backward(
    start, stop, length, dim, batch, sign, u, u_batch, u_row, A_bar, B_bar, C, skip, initial,
    dy, dy_batch, dy_row, dfinal, du, dinitial, sums, skip_sums,
):  # fmt: skip
    num_blocks, num_states, num_groups = (dim + _LANES - 1) // _LANES, A_bar.size // (2 * dim), sums.shape[0]
    system, w = np.zeros((num_states, 6 * _LANES), A_bar.dtype), np.zeros((num_states, 8 * _LANES), A_bar.dtype)
    states, rows = np.zeros((3, num_states, 2 * _LANES), A_bar.dtype), np.zeros((3, _STEPS * _LANES), A_bar.dtype)
    h, q, m = states[0], states[1], states[2]
    us, dys, dus = rows[0], rows[1], rows[2]
    d, dd, total = np.zeros(_LANES, A_bar.dtype), np.zeros(_LANES), np.zeros((num_states, 8 * _LANES))
    first = 0 if sign > 0 else length - 1
    for item in range(start, stop):
        group, c = item // num_blocks, item % num_blocks * _LANES
        valid = min(_LANES, dim - c)
        for k, part in enumerate((A_bar, B_bar, C)):
            _transpose(part, 2 * c * num_states, num_states, valid, system, 2 * k * _LANES)
        _copy(skip, c, valid, d)
        for j in range(_LANES):
            dd[j] = 0
        _clear(total)
        for b in range(group * batch // num_groups, (group + 1) * batch // num_groups):
            state = 2 * (b * dim + c) * num_states
            _clear(h)
            _clear(q)
            _clear(m)
            _clear(w)
            if initial.size > 0:
                _transpose(initial, state, num_states, valid, h, 0)
            if dfinal.size > 0:
                _transpose(dfinal, state, num_states, valid, m, 0)
            t = 0
            while t < length:
                num_steps = _STEPS if t + _STEPS <= length else 1
                row = first + sign * t
                _load(u, b * u_batch + row * u_row + c, sign * u_row, valid, us, num_steps)
                _load(dy, b * dy_batch + row * dy_row + c, sign * dy_row, valid, dys, num_steps)
                if num_steps == _STEPS:
                    _advance_derivative(system, h, q, w, us, dys, _STEPS)
                else:
                    _advance_derivative(system, h, q, w, us, dys, 1)
                for s in range(num_steps):
                    for j in range(_LANES):
                        dd[j] += us[s * _LANES + j] * dys[s * _LANES + j]
                t += num_steps
            for n in range(num_states):
                for j in range(_LANES):
                    mr, mi, qr, qi = m[n, j], m[n, _LANES + j], q[n, j], q[n, _LANES + j]
                    w[n, 4 * _LANES + j] += mr * qr + mi * qi
                    w[n, 5 * _LANES + j] += mi * qr - mr * qi
            while t > 0:
                num_steps = _STEPS if t >= _STEPS else 1
                row = first + sign * (t - 1)
                _load(u, b * u_batch + row * u_row + c, -sign * u_row, valid, us, num_steps)
                _load(dy, b * dy_batch + row * dy_row + c, -sign * dy_row, valid, dys, num_steps)
                _weigh(d, dys, dus, num_steps)
                if num_steps == _STEPS:
                    _retreat(system, m, w, us, dys, dus, _STEPS)
                else:
                    _retreat(system, m, w, us, dys, dus, 1)
                _store(dus, du, (b * length + row) * dim + c, -sign * dim, valid, num_steps)
                t -= num_steps
            if dinitial.size > 0:
                _transpose_back(m, 0, dinitial, state, num_states, 2, valid)
            for n in range(num_states):
                for j in range(8 * _LANES):
                    total[n, j] += w[n, j]
        for k in range(4):
            _transpose_back(total, 2 * k * _LANES, sums[group], 8 * c * num_states + 2 * k, num_states, 8, valid)
        for j in range(valid):
            skip_sums[group, c + j] = dd[j]
