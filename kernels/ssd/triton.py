"""SSD on the GPU: launches the kernels of `triton_forward` and `triton_backward`.

Same equations, arguments and results as `reference`. Why it is done so: docs/gpu_ssd.md.

Products run in bfloat16 if x is bfloat16. Else they run on float32 tiles: in tf32 if x, B or C has 16 bits, in three
tf32 products for each if all are float32, and in `gradient_x`, whose sums of many signs make dA. Sums, decays and
states are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mambaverse.kernels.launch import Spec, launch, memo_of, on_device
from mambaverse.kernels.ssd.layout import TRITON_FAR, TRITON_KEEP, boundary_dtype, boundary_states, ceil_div
from mambaverse.kernels.ssd.triton_backward import (
    gradient_BC,
    gradient_BC_of_one,
    gradient_x,
    reduce_params,
    reduce_parts,
    steps,
)
from mambaverse.kernels.ssd.triton_forward import carry, combine, scan
from mambaverse.kernels.ssd.triton_plan import INTERPRETED, Plan, plan_of, tuning


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float,
    reverse: bool, chunk_size: int, save: bool, weight: Tensor | None = None, own_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, the final state, and the states that backward needs (0 rows unless `save`); see `layout`."""
    p = plan_of(x, B, C, cu_seqlens)
    y = _outputs(x, x.dtype, cu_seqlens)
    final = torch.empty((p.sequences, p.heads, p.head_dim, p.state_dim), dtype=torch.float32, device=x.device)
    rows, *shape = boundary_states(x, B, cu_seqlens, 0, "triton")
    states = torch.empty((rows if save else 0, *shape), dtype=boundary_dtype(x, "triton"), device=x.device)
    if p.programs:
        with on_device(x):
            run = _Run(
                p, x, dt, A, B, C, D, z, dt_bias, initial_state, weight, own_weight, cu_seqlens, dt_softplus, dt_min,
                dt_max, reverse,
            )  # fmt: skip
            starts = None if p.segments == 1 else run.segment_starts(x, B, None, initial_state, gradient=False)
            run.scan(y, final, states, starts, save)
    return y, final, states


def backward(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    chunk_states: Tensor, dt_softplus: bool, dt_min: float, dt_max: float, reverse: bool, chunk_size: int,
    weight: Tensor | None = None, own_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C, D, z, dt_bias, initial_state, weight and own_weight.

    An absent one's is an empty tensor.
    """
    p = plan_of(x, B, C, cu_seqlens).backward()
    absent = x.new_empty(0)
    if dy is None:
        dy = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    dx, ddt = _outputs(x, x.dtype, cu_seqlens), _outputs(dt, dt.dtype, cu_seqlens)
    dB, dC = _outputs(B, B.dtype, cu_seqlens), _outputs(C, C.dtype, cu_seqlens)
    dz, dw, down = (absent if t is None else _outputs(t, t.dtype, cu_seqlens) for t in (z, weight, own_weight))
    dA, dD, dbias = (
        absent if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (A, D, dt_bias)
    )
    dinitial = absent
    if initial_state is not None:
        dinitial = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device)
    if p.programs:
        with on_device(x):
            run = _Run(
                p, x, dt, A, B, C, D, z, dt_bias, initial_state, weight, own_weight, cu_seqlens, dt_softplus, dt_min,
                dt_max, reverse, dy, dfinal, chunk_states,
            )  # fmt: skip
            pieces = run.pieces(dy, dfinal, chunk_states, dinitial, dx, dz)
            run.gradient(dy, dfinal, pieces, dx, ddt, dz, dw, down, dB, dC, dA, dbias, dD)
    if not p.slots or not p.programs:  # no positions, or no sequences
        for t in (ddt, dw, down, dB, dC, dA, dD, dbias):
            t.zero_()
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial, dw, down


def _outputs(like: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None) -> Tensor:
    """Return a tensor of a shape; zeros beside cu_seqlens, which may leave positions out (unread on a GPU)."""
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(like.shape, dtype=dtype, device=like.device)


def _strides(tensor: Tensor | None, ndim: int) -> tuple[int, ...]:
    return (0,) * ndim if tensor is None else tensor.stride()


class _Piece(NamedTuple):
    """A part of each sequence that backward takes, and where what enters its chunks from either side lies.

    Before chunk j of sequence s is state s kept + j - first_state, after it gradient s kept + j - first_gradient.
    """

    first_chunk: int
    num_chunks: int
    kept: int
    first_state: int
    first_gradient: int
    states: Tensor
    gradients: Tensor


class _Run:
    """The inputs of one call as the kernels take them."""

    def __init__(
        self, p: Plan, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        bias: Tensor | None, initial: Tensor | None, weight: Tensor | None, own: Tensor | None,
        cu_seqlens: Tensor | None, softplus: bool, low: float, high: float, reverse: bool, *others: Tensor | None,
    ) -> None:  # fmt: skip
        self.p = p
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        specs = (Spec.of(t) for t in (x, dt, A, B, C, D, z, bias, initial, weight, own, cu_seqlens, *others))
        self.memo = memo_of("ssd", x.device, *specs, softplus, reverse)
        self.x, self.dt, self.A, self.B, self.C, self.D, self.z = x, dt, A, B, C, D, z
        self.bias, self.initial, self.cu, self.weight, self.own = bias, initial, cu_seqlens, weight, own
        self.D_width = 0 if D is None else 1 if D.ndim == 1 else p.head_dim  # gradients of D a head
        self.sizes = (p.heads, p.heads // p.groups)
        self.limits = (low, high)
        # Whether backward gates dy once, in `carry`, and leaves it where dx will be, and in bfloat16 what rounding took
        # from it where dz will be. float16 has not the range.
        self.gates = z is not None and (x.dtype == torch.float32 or x.dtype == z.dtype == torch.bfloat16)
        self.flags: dict[str, Any] = {
            "P": p.head_dim, "N": p.state_dim, "BP": p.tile[0], "BN": p.tile[1],
            "DT": tl.bfloat16 if p.dtype == torch.bfloat16 else tl.float32,
            "PRECISION": "tf32x3" if p.dtype == torch.float32 else "tf32",
            "PACKED": p.packed, "REVERSE": reverse, "FAST": not INTERPRETED,
        }  # fmt: skip
        self.step_flags = {"HAS_BIAS": bias is not None, "SOFTPLUS": softplus}

    def _or_x(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Put x, which a flag tells the kernels not to read, in the place of what is not there."""
        return tuple(self.x if t is None else t for t in tensors)

    def _tuned(self, kernel: str, ends: bool = False) -> dict[str, Any]:
        chunk, warps, stages = tuning(kernel, self.p, ends)
        loop = {} if kernel == "gradient_x" else {"STAGES": stages}
        return self.flags | loop | {"Q": chunk, "num_warps": warps, "num_stages": stages}

    def _strides_of_D(self) -> tuple[int, int]:  # noqa: N802
        return (0, 0) if self.D is None else (self.D.stride(0), self.D.stride(1) if self.D.ndim == 2 else 0)

    def scan(self, y: Tensor, final: Tensor, states: Tensor, starts: Tensor | None, save: bool) -> None:
        """Write y, the final state and, with `save`, the states between."""
        p = self.p
        launch(
            self.memo, ("scan", save), scan, (p.programs, p.segments),
            (*(self.x, self.dt, self.A, self.B, self.C),
            *self._or_x(self.D, self.z, self.bias, self.initial, self.weight, self.own, self.cu, starts),
            *(y, final, states, p.length, p.segment, p.segments, *self.sizes, p.kept, *self.limits),
            *(*self.x.stride(), *self.dt.stride(), *self.A.stride(), *self.B.stride(), *self.C.stride()),
            *(*self._strides_of_D(), *_strides(self.z, 4), *_strides(self.bias, 1), *_strides(self.initial, 4)),
            *(*_strides(self.weight, 3), *_strides(self.own, 3)),),
            lambda: self._tuned("scan") | self.step_flags | {
                "D_WIDTH": self.D_width, "HAS_Z": self.z is not None, "HAS_INITIAL": self.initial is not None,
                "SPLIT": p.segments > 1, "SAVE": save, "KEEP": p.keep, "HAS_WEIGHT": self.weight is not None,
                "HAS_OWN": self.own is not None,
            },
        )  # fmt: skip

    def carry(
        self, x: Tensor, B: Tensor, z: Tensor | None, incoming: Tensor | None, *, gradient: bool,
        starts: Tensor | None = None, outgoing: Tensor | None = None, states: Tensor | None = None,
        ends: Tensor | None = None, sums: Tensor | None = None, segments: range | None = None, first_chunk: int = 0,
        gated: Tensor | None = None, rest: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Carry states, or with `gradient` their gradients; write `ends` and `sums` of segments, or the others."""
        p = self.p
        segments = range(p.segments) if segments is None else segments
        weight = None if gradient else self.weight
        kept = p.kept if p.piece == 0 else len(segments) * (TRITON_FAR // TRITON_KEEP)
        launch(
            self.memo, ("carry", gradient, ends is None), carry, (p.programs, len(segments)),
            (x, self.dt, self.A, B, *self._or_x(z, self.bias, incoming, weight, self.cu, starts, ends, sums, outgoing),
            *self._or_x(states, gated, rest),
            *(p.length, p.segment, p.segments, segments.start, *self.sizes, kept, first_chunk, *self.limits),
            *(*x.stride(), *self.dt.stride(), *self.A.stride(), *B.stride(), *_strides(z, 4), *_strides(self.bias, 1)),
            *(*_strides(incoming, 4), *_strides(weight, 3)),),
            lambda: self._tuned("carry") | self.step_flags | {
                "HAS_Z": z is not None, "HAS_INCOMING": incoming is not None,
                "HAS_OUTGOING": outgoing is not None and self.initial is not None,
                "SPLIT": starts is not None and gradient, "GRADIENT": gradient, "SUMMARY": ends is not None,
                "KEEP": TRITON_KEEP, "HAS_WEIGHT": weight is not None, "GATES": gated is not None,
            },
        )  # fmt: skip

    def pieces(
        self, dy: Tensor, dfinal: Tensor | None, states: Tensor, dinitial: Tensor, dx: Tensor, dz: Tensor
    ) -> Iterator[_Piece]:
        """Work out the gradients of states, and of a long sequence the states that `scan` did not keep, by pieces."""
        p = self.p
        starts = None
        gated: dict[str, Any] = {"gated": dx, "rest": dz} if self.gates else {}
        if p.segments > 1:
            starts = self.segment_starts(dy, self.C, self.z, dfinal, gradient=True)
        if p.piece == 0:
            gradients = torch.empty_like(states)
            self.carry(
                dy, self.C, self.z, dfinal, starts=starts, outgoing=dinitial, states=gradients, gradient=True, **gated
            )
            yield _Piece(0, p.chunks, p.kept, 1, 0, states, gradients)
            return
        each = TRITON_FAR // TRITON_KEEP
        shape = p.batch * p.piece * each, *states.shape[1:]
        inner, gradients = (torch.empty(shape, dtype=states.dtype, device=states.device) for _ in range(2))
        for first in range(0, p.segments, p.piece):
            segments = range(first, min(first + p.piece, p.segments))
            at: dict[str, Any] = {"segments": segments, "first_chunk": first * each}
            self.carry(self.x, self.B, None, self.initial, starts=states, states=inner, gradient=False, **at)
            self.carry(
                dy, self.C, self.z, dfinal, starts=starts, outgoing=dinitial, states=gradients, gradient=True,
                **at, **gated,
            )  # fmt: skip
            chunks = min(segments.stop * each, p.chunks) - first * each
            yield _Piece(first * each, chunks, len(segments) * each, first * each, first * each, inner, gradients)

    def segment_starts(
        self, x: Tensor, B: Tensor, z: Tensor | None, incoming: Tensor | None, *, gradient: bool
    ) -> Tensor:
        """Return what enters each segment, (sequences, H, segments, P, N) float32."""
        p = self.p
        shape = p.sequences, p.heads, p.segments, p.head_dim, p.state_dim
        ends, starts = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
        sums = torch.empty(shape[:3], dtype=torch.float32, device=x.device)
        self.carry(x, B, z, None, gradient=gradient, ends=ends, sums=sums)
        size, block = p.head_dim * p.state_dim, 512
        launch(
            self.memo, ("combine", gradient), combine, (p.sequences * p.heads, ceil_div(size, block)),
            (ends, sums, *self._or_x(incoming), starts, p.heads, p.segments, *_strides(incoming, 4)),
            lambda: {
                "SIZE": size, "N": p.state_dim, "HAS_INCOMING": incoming is not None, "GRADIENT": gradient,
                "BLOCK": block, "num_warps": 4,
            },
        )  # fmt: skip
        return starts

    def gradient(
        self, dy: Tensor, dfinal: Tensor | None, pieces: Iterator[_Piece], dx: Tensor, ddt: Tensor, dz: Tensor,
        dw: Tensor, down: Tensor, dB: Tensor, dC: Tensor, dA: Tensor, dbias: Tensor, dD: Tensor,
    ) -> None:  # fmt: skip
        """Write all gradients but that of the initial state, which `pieces` writes."""
        p, slots = self.p, self.p.slots
        width = self.D_width
        dparams = torch.empty((slots, p.heads, 2 + width), dtype=torch.float32, device=dy.device)
        to_B, to_C = dB, dC
        if p.parts > 1:
            make = torch.zeros if p.packed else torch.empty
            to_B, to_C = (make((p.parts, dB.numel()), dtype=torch.float32, device=dy.device) for _ in range(2))
        chunk_steps = torch.empty((slots, p.heads, 3, TRITON_KEEP), dtype=torch.float32, device=dy.device)
        bounds = p.length, p.sequences, p.sequences.bit_length()
        heads_each = 16
        if slots:
            launch(
                self.memo, "steps", steps, (slots, ceil_div(p.heads, heads_each)),
                (*(self.dt, self.A, *self._or_x(self.bias, self.weight, self.cu), chunk_steps, *bounds, p.heads),
                *(*self.limits, *self.dt.stride(), *self.A.stride(), *_strides(self.bias, 1)),
                *_strides(self.weight, 3),),
                lambda: self.step_flags | {
                    "Q": TRITON_KEEP, "HEADS": heads_each, "HAS_WEIGHT": self.weight is not None, "PACKED": p.packed,
                    "REVERSE": self.flags["REVERSE"], "num_warps": 4,
                },
            )  # fmt: skip
        of_y, of_x = (*dy.stride(), *_strides(dfinal, 4)), self.x.stride()
        of_BC = *self.B.stride(), *self.C.stride()
        flags = {
            "HAS_INITIAL": self.initial is not None, "HAS_FINAL": dfinal is not None, "HAS_OWN": self.own is not None,
        }  # fmt: skip
        ends = self.initial is not None or dfinal is not None
        gated, gate = (dx, None) if self.gates else (dy, self.z)  # `gradient_x` overwrites dx, so it comes last
        for piece in pieces:
            *place, states, dstates = piece
            programs = slots if p.packed else p.batch * piece.num_chunks
            if not programs:
                continue
            launch(
                self.memo, "gradient_BC", gradient_BC_of_one if p.one else gradient_BC,
                (programs * p.groups * p.parts,),
                (*(gated, *self._or_x(dfinal), self.x, self.B, self.C, *self._or_x(gate, self.initial)),
                *self._or_x(self.own, self.cu),
                *(states, dstates, chunk_steps, to_B, to_C, *bounds, *place, *self.sizes),
                *(p.heads // p.groups // p.parts, dB.numel()),
                *(*gated.stride(), *_strides(dfinal, 4), *of_x, *of_BC, *_strides(gate, 4)),
                *(*_strides(self.initial, 4), *_strides(self.own, 3)),),
                lambda: self._tuned("gradient_BC", ends) | flags | {"HAS_Z": gate is not None},
            )  # fmt: skip
            launch(
                self.memo, "gradient_x", gradient_x, (programs * p.heads,),
                (*(dy, *self._or_x(dfinal), self.x, self.dt, self.A, self.B, self.C),
                *self._or_x(self.D, self.z, self.bias, self.initial, self.own, self.cu),
                *(states, dstates, chunk_steps, dx, ddt, dz, dw, down, dparams, *bounds, *place, *self.sizes),
                *(*self.limits, *of_y, *of_x),
                *(*self.dt.stride(), *self.A.stride(), *of_BC, *self._strides_of_D(), *_strides(self.z, 4)),
                *(*_strides(self.bias, 1), *_strides(self.initial, 4), *_strides(self.own, 3)),),
                lambda: self._tuned("gradient_x") | flags | self.step_flags | {
                    "D_WIDTH": width, "HAS_Z": self.z is not None, "HAS_WEIGHT": self.weight is not None,
                    "GATED": self.gates, "PRECISION": "tf32x3",
                },
            )  # fmt: skip
        if not slots:
            return
        columns = 16
        launch(
            self.memo, "reduce_params", reduce_params, (p.heads, ceil_div(2 + width, columns)),
            (dparams, dA, dbias, dD, slots, p.heads),
            lambda: {
                "D_WIDTH": width, "HAS_BIAS": self.bias is not None, "ROWS": 128, "COLUMNS": columns, "num_warps": 4
            },
        )  # fmt: skip
        if p.parts > 1:
            block = 1024
            launch(
                self.memo, "reduce_parts", reduce_parts, (ceil_div(dB.numel(), block),),
                (to_B, to_C, dB, dC, dB.numel(), p.parts), lambda: {"BLOCK": block},
            )  # fmt: skip
