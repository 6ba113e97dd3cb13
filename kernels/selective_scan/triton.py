"""Selective scan on the GPU: launches the kernels of `triton_forward` and `triton_backward`.

Same equations, arguments and results as `reference`, for a real A. Why it is done so: docs/gpu_selective_scan.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.launch import Spec, launch, memo_of, on_device, power_of_2
from mambaverse.kernels.selective_scan import triton_forward as walk
from mambaverse.kernels.selective_scan.shapes import chunk_state_dtype, num_chunk_states
from mambaverse.kernels.selective_scan.triton_around import combine, gate, gate_gradient, pack
from mambaverse.kernels.selective_scan.triton_backward import gradient, reduce_BC, reduce_params
from mambaverse.kernels.selective_scan.triton_common import CHAINED, JOINED
from mambaverse.kernels.selective_scan.triton_plan import (
    INTERPRETED,
    MOST_WARPS,
    ROUND,
    STEPS,
    TOGETHER,
    WARP,
    Plan,
    divisor,
    plan,
)

COMBINED = 128  # channels of a program of `combine`
GATED = 16, 128  # rows and channels of a program of `gate`
SCAN, SUMMARY, GRADIENT = (mode.value for mode in (walk.SCAN, walk.SUMMARY, walk.GRADIENT))

# u, delta, A, B, C, D, z, delta_bias and initial_state of a direction.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype, the final state (S, D, N), and chunk states in the kernels' own order.

    The arguments are those of `reference.forward`.
    """
    *inputs, cu_seqlens, delta_softplus, reverse, save = arguments
    return _forward((tuple(inputs),), 1.0, cu_seqlens, delta_softplus, reverse, save)


def forward_both(
    first: Inputs, second: Inputs, z: Tensor | None, scale: float, cu_seqlens: Tensor | None, delta_softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Scan in two directions, the second reverse.

    Returns:
        `scale` times the sum of both outputs, gated by z, if there is one beside the gates that the directions have;
        their final states, stacked; chunk states, joined; and what z gates (with no elements where that is not needed).
    """
    inner = scale if z is None else 1.0
    ys, final_state, states = _forward(_alike(first, second), inner, cu_seqlens, delta_softplus, False, save)
    if z is None:
        return torch.add(ys[0], ys[1]), final_state, states, ys.new_empty(0)
    y = torch.empty(z.shape, dtype=ys.dtype, device=ys.device)
    total = torch.empty(z.shape if save else (0,), dtype=ys.dtype, device=ys.device)
    if y.numel():
        (batch, length, dim), (rows, columns) = z.shape, GATED
        with on_device(z):
            launch(
                memo_of("gate", z.device, ys.dtype, Spec.of(z), scale, save), "forward", gate,
                (-(-batch * length // rows), -(-dim // columns)),
                (ys, z, y, total, batch * length, length, dim, *z.stride()),
                lambda: {"SCALE": scale, "SAVE": save, "FAST": not INTERPRETED, "ROWS": rows, "BD": columns},
            )  # fmt: skip
    return y, final_state, states, total


def backward(dy: Tensor, dfinal_state: Tensor | None, *arguments: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, None for what is None.

    The arguments are those of `reference.backward`.
    """
    *inputs, cu_seqlens, chunk_states, delta_softplus, reverse = arguments
    return _backward(dy, 1.0, dfinal_state, (tuple(inputs),), cu_seqlens, chunk_states, delta_softplus, reverse)


def backward_both(
    dy: Tensor, dfinal_state: Tensor | None, first: Inputs, second: Inputs, z: Tensor | None, scale: float,
    cu_seqlens: Tensor | None, chunk_states: Tensor, total: Tensor, delta_softplus: bool,
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:  # fmt: skip
    """Return the gradients of both directions, stacked, and that of z: see `forward_both`, which returned `total`."""
    dz = None
    if z is not None:
        dtotal = torch.empty(z.shape, dtype=dy.dtype, device=z.device)
        dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        if dz.numel():
            (batch, length, dim), (rows, columns) = z.shape, GATED
            key = Spec.of(dy), Spec.of(z), total.dtype, total.data_ptr() % 16
            with on_device(z):
                launch(
                    memo_of("gate", z.device, *key, scale), "backward", gate_gradient,
                    (-(-batch * length // rows), -(-dim // columns)),
                    (dy, z, total, dtotal, dz, batch * length, length, dim, *dy.stride(), *z.stride()),
                    lambda: {"SCALE": scale, "FAST": not INTERPRETED, "ROWS": rows, "BD": columns},
                )  # fmt: skip
        dy, scale = dtotal, 1.0
    pair = _alike(first, second)
    return _backward(dy, scale, dfinal_state, pair, cu_seqlens, chunk_states, delta_softplus, False), dz


def _alike(first: Inputs, second: Inputs) -> tuple[Inputs, Inputs]:
    """Return the inputs of both directions with the same strides, copied where they differ."""
    pairs = [
        (a, b) if a is None or b is None or a.stride() == b.stride() else (a.contiguous(), b.contiguous())
        for a, b in zip(first, second, strict=True)
    ]
    one, two = zip(*pairs, strict=True)
    return one, two


def _forward(
    inputs: tuple[Inputs, ...], scale: float, cu_seqlens: Tensor | None, delta_softplus: bool, reverse: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    u, _, A, *_ = inputs[0]
    call = _Call.of(False, inputs, cu_seqlens, scale, delta_softplus, reverse)
    p = call.plan
    y = call.outputs(u.dtype)
    final_state = call.empty(*p.lead, p.sequences, p.dim, p.state_dim)
    kept = p.directions * num_chunk_states(u, "triton", save)
    chunk_states = call.empty(kept, p.dim, p.state_dim, dtype=chunk_state_dtype(u, A, "triton"))
    if p.sequences and p.dim:
        with on_device(u):
            call.pack()
            starts = None
            if p.split == JOINED.value:
                starts = _segment_starts(call, SUMMARY, None, [i[8] for i in inputs])
            _scan(call, SCAN, None, (y, final_state, chunk_states, None, None), starts, save)
    return y, final_state, chunk_states


def _backward(
    dy: Tensor, scale: float, dfinal_state: Tensor | None, inputs: tuple[Inputs, ...], cu_seqlens: Tensor | None,
    chunk_states: Tensor, delta_softplus: bool, reverse: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs[0]
    dfinal = None if dfinal_state is None else dfinal_state.contiguous()
    others = Spec.of(dy), Spec.of(dfinal), chunk_states.data_ptr() % 16
    call = _Call.of(True, inputs, cu_seqlens, scale, delta_softplus, reverse, *others)
    p = call.plan
    du, ddelta = call.outputs(u.dtype), call.outputs(delta.dtype)
    dz = None if z is None else call.outputs(z.dtype)
    dA, dB, dC, dD, dbias = (
        None if t is None else call.empty(*p.lead, *t.shape, dtype=t.dtype) for t in (A, B, C, D, delta_bias)
    )
    dh0 = None if initial_state is None else call.empty(*p.lead, p.sequences, p.dim, p.state_dim)
    if p.sequences and p.dim:
        with on_device(u):
            call.pack()
            starts = None
            if p.split == JOINED.value:
                of_each = [dfinal] if dfinal is None or p.directions == 1 else list(dfinal)
                starts = _segment_starts(call, GRADIENT, dy, of_each)
            _gradient(call, dy, dfinal, chunk_states, starts, (du, ddelta, dz, dB, dC, dA, dD, dbias, dh0))
    else:
        for t in (dB, dC, dA, dD, dbias):
            if t is not None:
                t.zero_()
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dh0


@dataclass(frozen=True)
class _Call:
    """What all launches of a call have in common."""

    plan: Plan
    inputs: tuple[tuple[Tensor, ...], ...]  # of each direction: u, delta, z, B, C, D, bias, h0; u for what is None
    rates: tuple[Tensor, ...]  # A of each
    BC: Tensor  # what `pack` writes: B and C side by side,
    A2: Tensor  # A log2(e)
    cu_seqlens: Tensor | None
    flags: dict[str, Any]

    @staticmethod
    def of(
        backward: bool, inputs: tuple[Inputs, ...], cu_seqlens: Tensor | None, scale: float, delta_softplus: bool,
        reverse: bool, *others: Any,
    ) -> _Call:  # fmt: skip
        """Find the plan of a call; `others` are what backward's launches depend on beside."""
        inputs = tuple(_dense_params(i) for i in inputs)
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        u = inputs[0][0]
        specs = [Spec.of(t) for one in inputs for t in one]
        packed = None if cu_seqlens is None else cu_seqlens.numel() - 1
        cu = None if cu_seqlens is None else (cu_seqlens.dtype, cu_seqlens.data_ptr() % 16)
        p = plan(len(inputs), backward, packed, u.device, *specs, cu, scale, delta_softplus, reverse, *others)
        A2 = torch.empty(p.directions, p.state_dim, p.dim, dtype=torch.float32, device=u.device)
        size = 0 if p.own_BC else p.directions * p.batch * p.length * p.groups * p.state_dim
        BC = torch.empty(size, dtype=torch.int64 if p.pair == 32 else torch.int32, device=u.device)
        flags = {"REVERSE": reverse, "SOFTPLUS": delta_softplus, "SCALE": scale}
        rates = tuple(i[2] for i in inputs)
        return _Call(p, tuple(_in_order(*i) for i in inputs), rates, BC, A2, cu_seqlens, flags)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return memory on the device."""
        return torch.empty(shape, dtype=dtype, device=self.BC.device)

    def outputs(self, dtype: torch.dtype) -> Tensor:
        """Return a tensor of u's shape a direction; zeros beside cu_seqlens, which may leave positions out."""
        make = torch.empty if self.cu_seqlens is None else torch.zeros
        return make((*self.plan.lead, *self.inputs[0][0].shape), dtype=dtype, device=self.BC.device)

    def shared(self) -> tuple[Tensor, ...]:
        """Return what both directions of a kernel read beside their inputs."""
        return self.BC, self.A2, self.BC if self.cu_seqlens is None else self.cu_seqlens

    def pack(self) -> None:
        """Launch `pack`."""
        p, (one, two) = self.plan, (self.inputs[0], self.inputs[-1])
        A = self.rates[0]
        rows, columns = 0 if p.own_BC else p.batch * p.length, min(128, power_of_2(p.groups * p.state_dim))
        rows_each, block = max(1, 2048 // columns), 1024
        programs_of_A = -(-p.state_dim * p.dim // block)
        launch(
            p.memo, "pack", pack, (programs_of_A + -(-rows // rows_each), p.directions),
            (A, *one[3:5], self.rates[-1], *two[3:5], self.A2, self.BC, rows, p.length, p.dim, p.state_dim, p.groups,
             *A.stride(), *p.strides[4:12]),
            lambda: {"num_A": programs_of_A, "PAIR": p.pair, "ROWS": rows_each, "GN": columns, "BLOCK": block},
        )  # fmt: skip


def _dense_params(inputs: Inputs) -> Inputs:
    """Return the inputs with D and delta_bias as the kernels read them: without strides."""
    u, delta, A, B, C, D, z, bias, h0 = inputs
    return u, delta, A, B, C, None if D is None else D.contiguous(), z, None if bias is None else bias.contiguous(), h0


def _in_order(
    u: Tensor, delta: Tensor, _: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    h0: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the inputs as the kernels take them, u for what is None."""
    return u, delta, u if z is None else z, B, C, *(u if t is None else t for t in (D, bias, h0))


def _scan(
    call: _Call, mode: int, dy: Tensor | None, outputs: tuple[Tensor | None, ...], starts: Tensor | None,
    save: bool = False,
) -> None:  # fmt: skip
    """Launch `scan` in a mode; `outputs` are y, final, states, ends and sums, as far as the mode writes them."""
    p, one, two = call.plan, call.inputs[0], call.inputs[-1]
    if dy is not None:
        one, two = (dy, *one[1:]), (dy, *two[1:])
    u = one[0]
    carry = call.empty(max(p.resting, WARP * MOST_WARPS))
    y, final, states, ends, sums = (carry if t is None else t for t in outputs)
    launch(
        p.memo, ("scan", mode, save), walk.scan, p.grid,
        (*one, *two, *call.shared(), y, final, states, carry, carry if starts is None else starts, ends, sums,
         u.stride(0), u.stride(2), *p.strides, p.batch, p.length, p.group_dim, p.segment),
        lambda: p.constants() | call.flags | {
            "su_l": u.stride(1), "MODE": mode, "SAVE": save, "T": STEPS, "TAIL": p.tail, "maxnreg": p.registers(save),
        },
    )  # fmt: skip


def _segment_starts(call: _Call, mode: int, dy: Tensor | None, firsts: list[Tensor | None]) -> Tensor:
    """Return the states (SUMMARY) or gradients (GRADIENT) that enter the segments, (sequences, segments, N, D)."""
    p = call.plan
    sequences = p.directions * p.sequences
    starts, ends = (call.empty(sequences, p.segments, p.state_dim, p.dim) for _ in range(2))
    sums = call.empty(sequences, p.segments, p.dim)
    _scan(call, mode, dy, (None, None, None, ends, sums), None)
    one, two = (ends if t is None else t for t in (firsts[0], firsts[-1]))
    launch(
        p.memo, ("combine", mode), combine, (-(-p.dim // COMBINED), p.state_dim, sequences),
        (call.A2, ends, sums, one, two, starts, p.dim, p.state_dim, p.sequences, p.segments,
         *(one.stride() if firsts[0] is not None else (0, 0, 0))),
        lambda: {
            "HAS_H0": firsts[0] is not None, "BACKWARD": mode == GRADIENT, "BD": COMBINED, "UNROLL": 8, "num_warps": 1
        },
    )  # fmt: skip
    return starts


def _gradient(
    call: _Call, dy: Tensor, dfinal: Tensor | None, states: Tensor, starts: Tensor | None,
    outputs: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    """Launch `gradient`, and add up what its programs leave."""
    p, u = call.plan, call.inputs[0][0]
    _, _, _, dB, dC, dA, dD, dbias, _ = outputs
    assert dB is not None and dC is not None and dA is not None
    rows = p.sequences * p.apart
    params = call.empty(p.directions * rows, p.state_dim + 2, p.dim)
    parts = call.empty(0 if p.own_BC or INTERPRETED else 4 * p.state_dim * ROUND * p.threads // WARP)
    carry = call.empty(max(p.resting, WARP * MOST_WARPS))
    flags = carry
    if p.split == CHAINED.value:
        starts = call.empty(p.directions * p.sequences, p.state_dim, p.dim)  # what programs hand on
        flags = torch.zeros(p.threads // WARP, dtype=torch.int32, device=u.device)
    slice_size = 2 * p.batch * p.groups * p.state_dim * p.length
    dBC = call.empty(p.directions * p.slices * slice_size)
    if p.packed:  # the kernel leaves out what no sequence covers
        dBC.zero_()
    du, ddelta, dz, _, _, _, _, _, dh0 = (carry if t is None else t for t in outputs)
    launch(
        p.memo, "gradient", gradient, p.grid,
        (dy, dy if dfinal is None else dfinal, *call.inputs[0], *call.inputs[-1], *call.shared(), states, parts, carry,
         carry if starts is None else starts, flags, du, ddelta, dz, dB, dC, dBC, params, dh0,
         dy.stride(0), dy.stride(2), u.stride(0), u.stride(2), *p.strides, p.batch, p.length, p.group_dim, p.segment),
        lambda: p.constants() | call.flags | {
            "sy_l": dy.stride(1), "su_l": u.stride(1), "HAS_FINAL": dfinal is not None, "ROUND": ROUND,
            "EXACT": torch.float32 in (dB.dtype, dC.dtype), "TAIL": p.backward_tail,
            "NU": divisor(p.unroll, TOGETHER),
        },
    )  # fmt: skip
    launch(
        p.memo, "reduce_params", reduce_params, (-(-p.dim // 32), p.state_dim + 2, p.directions),
        (params, dA, params if dD is None else dD, params if dbias is None else dbias, rows, p.dim, p.state_dim),
        lambda: {
            "HAS_D": dD is not None, "HAS_BIAS": dbias is not None, "ROWS": min(128, power_of_2(rows)), "BD": 32
        },
    )  # fmt: skip
    if not p.own_BC and p.batch * p.length:
        steps, each = 32, min(4, power_of_2(p.state_dim))
        launch(
            p.memo, "reduce_BC", reduce_BC,
            (p.directions * p.batch * p.groups * -(-p.length // steps), -(-p.state_dim // each)),
            (dBC, dB, dC, slice_size, p.length, p.state_dim, p.groups, p.batch * p.groups, p.slices),
            lambda: {"NB": each, "LB": steps, "TOGETHER": min(16, power_of_2(p.slices)), "num_warps": 2},
        )  # fmt: skip
