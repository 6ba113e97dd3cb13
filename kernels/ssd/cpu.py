"""SSD on the CPU: chunks of matrix products in cache, by the numba kernels of `cpu_kernels.py`.

Forward carries the state through the chunks (`carry_states`), then works out all chunks independently
(`chunk_forward`). Backward carries the gradient of the state the other way, then works out the gradients of all chunks
(`chunk_backward`), each from its two boundary states. Inputs are read in place whatever their strides, as long as the
last dimension is contiguous and the dtype float32; else they are copied first. What a sum is added up from depends on
the shapes alone, so results do not depend on the number of threads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambaverse.kernels.rows import as_array, dense, flat_rows
from mambaverse.kernels.ssd import cpu_kernels as kernels
from mambaverse.kernels.ssd.layout import PAD, boundary_states, ceil_div, cpu_chunk_size
from mambaverse.kernels.threads import parallel_for

_GRAIN_FLOPS = 2e6  # least work in a call of a kernel: about 10 µs, ten times what the call itself costs
Flat = tuple[np.ndarray, tuple[int, ...]]  # the memory of a tensor, and its strides but the last, which is 1


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float,
    reverse: bool, chunk_size: int, save: bool, weight: Tensor | None = None, own_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, the final state, and the states at the boundaries between chunks (0 rows unless `save`).

    Shapes: see `ssd` and `layout.boundary_states`. `chunk_size` 0 stands for the rule.
    """
    shape = boundary_states(x, B, cu_seqlens, chunk_size, "cpu")
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    final = torch.empty((rows, x.shape[2], x.shape[3], B.shape[3]), dtype=torch.float32)
    states = torch.empty(shape, dtype=torch.float32)
    if x.numel() == 0:
        final = final.zero_() if initial_state is None else final.copy_(initial_state)
        return torch.empty(x.shape, dtype=x.dtype), final, states.zero_() if save else states.new_empty((0, *shape[1:]))
    limits = dt_softplus, dt_min, dt_max
    run = _Run(
        x, dt, A, B, C, D, z, dt_bias, initial_state, weight, own_weight, cu_seqlens, limits, reverse, chunk_size
    )
    states[run.num_boundaries :].zero_()
    run.carry(run.B, run.x, initial_state, states, gradient=False)
    y = torch.empty(x.shape, dtype=torch.float32)
    run.chunks(kernels.chunk_forward, 3, (), states, _memory(y), _memory(final))
    run.fill_empty(final, initial_state)
    return y.to(x.dtype), final, states if save else states.new_empty((0, *shape[1:]))


def backward(
    grad_y: Tensor | None, grad_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    chunk_states: Tensor, dt_softplus: bool, dt_min: float, dt_max: float, reverse: bool, chunk_size: int,
    weight: Tensor | None = None, own_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C, D, z, dt_bias, initial_state, weight and own_weight.

    An absent one's is an empty tensor.
    """
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state, weight, own_weight)
    grads = [torch.empty(0 if t is None else t.shape, dtype=torch.float32) for t in inputs]
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial, dw, down = grads
    if x.numel() == 0:
        for grad in grads:
            grad.zero_()
        if initial_state is not None and grad_final is not None:
            dinitial.copy_(grad_final)
        return _like(grads, inputs)
    limits = dt_softplus, dt_min, dt_max
    run = _Run(
        x, dt, A, B, C, D, z, dt_bias, initial_state, weight, own_weight, cu_seqlens, limits, reverse, chunk_size
    )
    dy = _flat(torch.zeros(()).expand(x.shape) if grad_y is None else grad_y)
    dstates = torch.empty(chunk_states.shape, dtype=torch.float32)
    run.carry(run.C, dy, grad_final, dstates, gradient=True)
    per_head = torch.empty((2, len(run.table), run.heads))  # of A and dt_bias
    per_row = torch.empty((0 if D is None else len(run.table), *x.shape[2:]))
    outs = (dstates, dx, ddt, dB, dC, dz, dinitial, dw, down, per_head, per_row)
    ends = run.optional(grad_final)
    run.chunks(
        kernels.chunk_backward, 5, (grad_final is not None,), chunk_states, *dy, ends, *(_memory(out) for out in outs)
    )
    if initial_state is not None:
        run.fill_empty(dinitial, grad_final)
    dA.copy_(_sum(per_head[0]))
    if D is not None:
        dD.copy_(_sum(per_row) if D.ndim == 2 else _sum(per_row).sum(-1))
    if dt_bias is not None:
        dbias.copy_(_sum(per_head[1]))
    return _like(grads, inputs)


class _Run:
    """The inputs of one call as the kernels take them."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, initial_state: Tensor | None, weight: Tensor | None, own: Tensor | None,
        cu_seqlens: Tensor | None, limits: tuple[bool, float, float], reverse: bool,
        chunk_size: int,
    ) -> None:  # fmt: skip
        batch, length, self.heads, head_dim = x.shape
        self.groups, state_dim = B.shape[2:]
        size = chunk_size or cpu_chunk_size(state_dim)
        if cu_seqlens is None:
            self.table, self.offsets = _chunks_of_batch(batch, length, size, reverse)
        else:
            self.table, self.offsets = _chunks_of_packed(cu_seqlens, size, reverse)
        self.num_boundaries = int(self.table[:, 5].max(initial=-1)) + 1
        self.longest = int(self.table[:, 2].max())
        q = ceil_div(self.longest, PAD) * PAD
        self.sizes = (length, self.heads, self.groups, head_dim, state_dim, q, -1 if reverse else 1)
        self.x, self.B, self.C = _flat(x), _flat(B), _flat(C)
        self.z = _flat(z) if z is not None else self.x
        self.A = _memory(A)
        bias = np.zeros(self.heads, np.float32) if dt_bias is None else _memory(dt_bias)
        steps = _flat(dt)
        weights = (steps if w is None else _flat(w) for w in (weight, own))
        self.steps = (
            *steps,
            *(part for w in weights for part in w),
            bias,
            (*limits, weight is not None, own is not None),
        )
        rows = None if D is None else D if D.ndim == 2 else D[:, None].expand(self.heads, head_dim)
        self.D, self.first = self.optional(rows), self.optional(initial_state)
        self.flags = (z is not None, D is not None, initial_state is not None)

    def optional(self, tensor: Tensor | None) -> np.ndarray:
        """Return the memory of `tensor`, or, without one, of something that a flag tells the kernels not to read."""
        return self.A if tensor is None else _memory(tensor)

    def _grain(self, products: int) -> int:
        _, _, _, head_dim, state_dim, *_ = self.sizes
        return int(_GRAIN_FLOPS / (2 * self.longest * head_dim * state_dim * products)) + 1

    def fill_empty(self, end: Tensor, start: Tensor | None) -> None:
        """Copy to `end` the rows of `start` that belong to empty sequences, which no kernel visits."""
        if empty := np.flatnonzero(np.diff(self.offsets) == 0).tolist():
            end[empty] = torch.zeros(()) if start is None else start.detach()[empty].float()

    def carry(self, rows: Flat, columns: Flat, start: Tensor | None, states: Tensor, *, gradient: bool) -> None:
        """Carry the state, or its gradient, from `start` through the chunks; leave it at the boundaries in `states`."""
        if self.num_boundaries:
            flags = (gradient and self.flags[0], start is not None)
            parallel_for(
                kernels.carry_states, (len(self.offsets) - 1) * self.heads, gradient, (*self.sizes, *flags), self.table,
                self.offsets, *rows, *columns, *self.z, *self.steps, self.A, self.optional(start), _memory(states),
                grain=self._grain(1),
            )  # fmt: skip

    def chunks(self, kernel: Any, products: int, flags: tuple[bool, ...], states: Tensor, *arrays: Any) -> None:
        """Run `kernel`, which does about `products` matrix products per head, on every chunk and group."""
        parallel_for(
            kernel, len(self.table) * self.groups, (*self.sizes, *self.flags, *flags), self.table,
            *self.x, *self.z, *self.B, *self.C, *self.steps, self.A, self.D, self.first, _memory(states), *arrays,
            grain=self._grain(products * self.heads // self.groups),
        )  # fmt: skip


def _memory(tensor: Tensor) -> np.ndarray:
    """Return a flat float32 view of `tensor`, or of a copy if it is not contiguous float32."""
    array: np.ndarray = dense(tensor).reshape(-1)
    return array


def _flat(tensor: Tensor) -> Flat:
    """Return the memory of `tensor`, or of a copy if it is not float32 with a contiguous last axis, and its strides."""
    memory, *strides = flat_rows(tensor)
    return memory, tuple(strides)


@lru_cache(maxsize=64)
def _chunks_of_batch(batch: int, length: int, size: int, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
    starts = np.zeros(batch, np.int64)
    return _chunks(np.arange(batch), starts, starts + length, size, reverse)


def _chunks_of_packed(cu_seqlens: Tensor, size: int, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
    bounds = as_array(cu_seqlens.to(torch.int64).contiguous())
    return _chunks(np.zeros(len(bounds) - 1, np.int64), bounds[:-1], bounds[1:], size, reverse)


def _chunks(
    rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, size: int, reverse: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the sequences into chunks, in the order of the recurrence.

    Args:
        rows: (S,) row of the batch that a sequence is in.
        starts: (S,) its first position.
        stops: (S,) the position after its last.
        size: Longest chunk.
        reverse: Whether the recurrence runs from the last position to the first.

    Returns:
        The table of chunks that `cpu_kernels` describes, (chunks, 6), and the first chunk of each sequence, (S+1,).
    """
    counts = -(-(stops - starts) // size)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    sequence = np.repeat(np.arange(len(rows)), counts)
    rank = np.arange(offsets[-1]) - offsets[sequence]
    first_boundary = np.concatenate([[0], np.cumsum(np.maximum(counts - 1, 0))])[sequence]
    longest = -(-(stops - starts)[sequence] // counts[sequence])
    begin = rank * longest
    length = np.minimum(longest, (stops - starts)[sequence] - begin)
    position = stops[sequence] - 1 - begin if reverse else starts[sequence] + begin
    before = np.where(rank > 0, first_boundary + rank - 1, -1)
    after = np.where(rank < counts[sequence] - 1, first_boundary + rank, -1)
    return np.stack([rows[sequence], position, length, sequence, before, after], axis=1), offsets


def _sum(parts: Tensor) -> Tensor:
    """Return the sum over the first dimension, in float64 and in a fixed order."""
    return torch.from_numpy(np.asarray(as_array(parts).sum(axis=0, dtype=np.float64)))


def _like(grads: list[Tensor], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(grad if t is None else grad.to(t.dtype) for grad, t in zip(grads, inputs, strict=True))
