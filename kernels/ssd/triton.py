"""SSD on the GPU: launches the kernels of `triton_forward` and `triton_backward`.

Same equations, arguments and results as `reference`. Why it is done so: docs/gpu_ssd.md.

Products run in bfloat16 if x is bfloat16. Else they run on float32 tiles: in tf32 if x, B or C has 16 bits, in three
tf32 products for each if all are float32, and in `gradient_x`, whose sums of many signs make dA. Sums, decays and
states are float32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mambaverse.kernels.backend import BackendError
from mambaverse.kernels.checks import num_sequences
from mambaverse.kernels.launch import Spec, launch, memo_of, num_multiprocessors, on_device
from mambaverse.kernels.ssd.layout import (
    TRITON_KEEP,
    boundary_dtype,
    boundary_states,
    ceil_div,
    triton_boundaries,
    triton_tile,
)
from mambaverse.kernels.ssd.triton_backward import (
    gradient_BC,
    gradient_x,
    reduce_params,
    reduce_parts,
    steps,
)
from mambaverse.kernels.ssd.triton_forward import carry, combine, scan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_HEAD_DIM, MAX_STATES = 128, 256
# The length is split until there are so many programs a multiprocessor, if that takes at least so many segments: each
# of them costs a pass over x and B more.
PROGRAMS_PER_SM, LEAST_SEGMENTS = 2, 2
# A group's heads are split among programs of `gradient_BC` until there are so many a multiprocessor. The parts of dB
# and dC are written and read.
GRADIENTS_PER_SM = 1
# (chunk, warps, stages) of each kernel, for up to 128 and up to 256 states: the longest chunks whose tiles registers
# nearly hold. A chunk divides TRITON_KEEP, and is that in backward. Float32 tiles take twice the room, and the parts of
# them as much again.
TUNING = {
    ("scan", torch.bfloat16): ((64, 4, 2), (64, 8, 1)),
    ("scan", torch.float32): ((32, 8, 1), (32, 8, 1)),
    ("carry", torch.bfloat16): ((64, 4, 2), (64, 8, 1)),
    ("carry", torch.float32): ((32, 4, 1), (32, 8, 1)),
    ("gradient_x", torch.bfloat16): ((TRITON_KEEP, 4, 1), (TRITON_KEEP, 8, 1)),
    ("gradient_x", torch.float32): ((TRITON_KEEP, 8, 1), (TRITON_KEEP, 8, 1)),
    ("gradient_BC", torch.bfloat16): ((TRITON_KEEP, 4, 1), (TRITON_KEEP, 8, 1)),
    ("gradient_BC", torch.float32): ((TRITON_KEEP, 8, 1), (TRITON_KEEP, 8, 1)),
}


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float,
    reverse: bool, chunk_size: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, the final state, and the states that backward needs (0 rows unless `save`); see `layout`."""
    p = _plan_of(x, B, C, cu_seqlens)
    y = _outputs(x, x.dtype, cu_seqlens)
    final = torch.empty((p.sequences, p.heads, p.head_dim, p.state_dim), dtype=torch.float32, device=x.device)
    rows, *shape = boundary_states(x, B, cu_seqlens, 0, "triton")
    states = torch.empty((rows if save else 0, *shape), dtype=boundary_dtype(x, "triton"), device=x.device)
    if p.programs:
        with on_device(x):
            run = _Run(
                p, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_min, dt_max, reverse
            )
            starts = None if p.segments == 1 else run.segment_starts(x, B, None, initial_state, gradient=False)
            run.scan(y, final, states, starts, save)
    return y, final, states


def backward(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    chunk_states: Tensor, dt_softplus: bool, dt_min: float, dt_max: float, reverse: bool, chunk_size: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C, D, z, dt_bias, initial_state; an empty tensor for an absent one."""
    p = _plan_of(x, B, C, cu_seqlens)
    absent = x.new_empty(0)
    if dy is None:
        dy = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    dx, ddt = _outputs(x, x.dtype, cu_seqlens), _outputs(dt, dt.dtype, cu_seqlens)
    dB, dC = _outputs(B, B.dtype, cu_seqlens), _outputs(C, C.dtype, cu_seqlens)
    dz = absent if z is None else _outputs(z, z.dtype, cu_seqlens)
    dA, dD, dbias = (
        absent if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (A, D, dt_bias)
    )
    dinitial = absent
    if initial_state is not None:
        dinitial = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device)
    if p.programs:
        with on_device(x):
            run = _Run(
                p, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_min, dt_max, reverse, dy,
                dfinal, chunk_states,
            )  # fmt: skip
            starts = None if p.segments == 1 else run.segment_starts(dy, C, z, dfinal, gradient=True)
            before = torch.empty_like(chunk_states)
            run.carry(dy, C, z, dfinal, starts=starts, outgoing=dinitial, states=before, gradient=True)
            run.gradient(dy, dfinal, chunk_states, before, dx, ddt, dz, dB, dC, dA, dbias, dD)
    if not p.slots or not p.programs:  # no positions, or no sequences
        for t in (ddt, dB, dC, dA, dD, dbias):
            t.zero_()
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


@dataclass(frozen=True)
class _Plan:
    """Sizes, and how the work is cut."""

    batch: int
    length: int
    heads: int
    groups: int
    head_dim: int
    state_dim: int
    sequences: int
    packed: bool
    dtype: torch.dtype  # of products: bfloat16, float16 (which stands for tf32) or float32
    segments: int = 1
    segment: int = 1  # positions, a multiple of TRITON_KEEP
    parts: int = 1  # of a group's heads

    @property
    def tile(self) -> tuple[int, int]:
        return triton_tile(self.state_dim)

    @property
    def programs(self) -> int:
        """Number of programs that carry a state through a sequence."""
        return self.sequences * self.heads * ceil_div(self.head_dim, self.tile[0])

    @property
    def kept(self) -> int:
        return 0 if self.packed else int(triton_boundaries(self.length))

    @property
    def slots(self) -> int:
        """Number of chunks of backward; with packed sequences the most that there may be."""
        if self.packed:
            return (self.length - 1) // TRITON_KEEP + self.sequences if self.length else 0
        return self.batch * ceil_div(self.length, TRITON_KEEP)


def _plan_of(x: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None) -> _Plan:
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    if {x.dtype, B.dtype, C.dtype} == {torch.float32}:
        dtype = torch.float32
    sequences = num_sequences("ssd", cu_seqlens, x.shape[0])
    return _plan(x.device, x.shape, B.shape[2], B.shape[3], sequences, cu_seqlens is not None, dtype)


@lru_cache(maxsize=4096)
def _plan(
    device: torch.device, shape: torch.Size, groups: int, state_dim: int, sequences: int, packed: bool,
    dtype: torch.dtype,
) -> _Plan:  # fmt: skip
    """Cut the work: see `PROGRAMS_PER_SM` and `GRADIENTS_PER_SM`."""
    batch, length, heads, head_dim = shape
    for name, size, most in (("columns a head", head_dim, MAX_HEAD_DIM), ("states", state_dim, MAX_STATES)):
        if size > most:
            raise BackendError(
                f"ssd: backend 'triton' takes up to {most} {name}, not {size}; use_backend(\"reference\") runs anywhere"
            )
    p = _Plan(batch, length, heads, groups, head_dim, state_dim, sequences, packed, dtype, segment=max(length, 1))
    if not p.programs or not length:
        return p
    multiprocessors = 4 if device.type == "cpu" else num_multiprocessors(device)
    per_group = heads // groups
    wanted = GRADIENTS_PER_SM * multiprocessors
    parts = next(
        k for k in range(1, per_group + 1) if per_group % k == 0 and (k * groups * p.slots >= wanted or k == per_group)
    )
    p = replace(p, parts=parts)
    wanted = PROGRAMS_PER_SM * multiprocessors // p.programs
    if p.packed or wanted < LEAST_SEGMENTS:
        return p
    segment = TRITON_KEEP * ceil_div(length, wanted * TRITON_KEEP)
    segments = ceil_div(length, segment)
    return replace(p, segments=segments, segment=segment) if segments > 1 else p


def _tuning(kernel: str, p: _Plan) -> tuple[int, int, int]:
    """Return the length of a chunk, the warps of a program and the stages of its loop."""
    if INTERPRETED:
        return TRITON_KEEP, 4, 1
    dtype = torch.bfloat16 if p.dtype == torch.bfloat16 else torch.float32
    chunk, warps, stages = TUNING[kernel, dtype][p.tile[1] > 128]
    return chunk, warps, stages


def _outputs(like: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None) -> Tensor:
    """Return a tensor of a shape; zeros beside cu_seqlens, which may leave positions out (unread on a GPU)."""
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(like.shape, dtype=dtype, device=like.device)


def _strides(tensor: Tensor | None, ndim: int) -> tuple[int, ...]:
    return (0,) * ndim if tensor is None else tensor.stride()


class _Run:
    """The inputs of one call as the kernels take them."""

    def __init__(
        self, p: _Plan, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        bias: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None, softplus: bool, low: float, high: float,
        reverse: bool, *others: Tensor | None,
    ) -> None:  # fmt: skip
        self.p = p
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        specs = (Spec.of(t) for t in (x, dt, A, B, C, D, z, bias, initial, cu_seqlens, *others))
        self.memo = memo_of("ssd", x.device, *specs, softplus, reverse)
        self.x, self.dt, self.A, self.B, self.C, self.D, self.z = x, dt, A, B, C, D, z
        self.bias, self.initial, self.cu = bias, initial, cu_seqlens
        self.D_width = 0 if D is None else 1 if D.ndim == 1 else p.head_dim  # gradients of D a head
        self.sizes = (p.heads, p.heads // p.groups)
        self.limits = (p.kept, low, high)
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

    def _tuned(self, kernel: str) -> dict[str, Any]:
        chunk, warps, stages = _tuning(kernel, self.p)
        return self.flags | {"Q": chunk, "num_warps": warps, "num_stages": stages}

    def _strides_of_D(self) -> tuple[int, int]:  # noqa: N802
        return (0, 0) if self.D is None else (self.D.stride(0), self.D.stride(1) if self.D.ndim == 2 else 0)

    def scan(self, y: Tensor, final: Tensor, states: Tensor, starts: Tensor | None, save: bool) -> None:
        """Write y, the final state and, with `save`, the states between."""
        p = self.p
        launch(
            self.memo, ("scan", save), scan, (p.programs, p.segments),
            (*(self.x, self.dt, self.A, self.B, self.C),
            *self._or_x(self.D, self.z, self.bias, self.initial, self.cu, starts),
            *(y, final, states, p.length, p.segment, p.segments, *self.sizes, *self.limits),
            *(*self.x.stride(), *self.dt.stride(), *self.A.stride(), *self.B.stride(), *self.C.stride()),
            *(*self._strides_of_D(), *_strides(self.z, 4), *_strides(self.bias, 1), *_strides(self.initial, 4)),),
            lambda: self._tuned("scan") | self.step_flags | {
                "D_WIDTH": self.D_width, "HAS_Z": self.z is not None, "HAS_INITIAL": self.initial is not None,
                "SPLIT": p.segments > 1, "SAVE": save, "KEEP": TRITON_KEEP, "STAGES": _tuning("scan", p)[2],
            },
        )  # fmt: skip

    def carry(
        self, x: Tensor, B: Tensor, z: Tensor | None, incoming: Tensor | None, *, gradient: bool,
        starts: Tensor | None = None, outgoing: Tensor | None = None, states: Tensor | None = None,
        ends: Tensor | None = None, sums: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Carry states, or with `gradient` their gradients; write `ends` and `sums` of segments, or the others."""
        p = self.p
        launch(
            self.memo, ("carry", gradient, ends is None), carry, (p.programs, p.segments),
            (x, self.dt, self.A, B, *self._or_x(z, self.bias, incoming, self.cu, starts, ends, sums, outgoing, states),
            *(p.length, p.segment, p.segments, *self.sizes, *self.limits),
            *(*x.stride(), *self.dt.stride(), *self.A.stride(), *B.stride(), *_strides(z, 4), *_strides(self.bias, 1)),
            *_strides(incoming, 4),),
            lambda: self._tuned("carry") | self.step_flags | {
                "HAS_Z": z is not None, "HAS_INCOMING": incoming is not None,
                "HAS_OUTGOING": outgoing is not None and self.initial is not None, "SPLIT": starts is not None,
                "GRADIENT": gradient, "SUMMARY": ends is not None, "KEEP": TRITON_KEEP,
                "STAGES": _tuning("carry", p)[2],
            },
        )  # fmt: skip

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
        self, dy: Tensor, dfinal: Tensor | None, states: Tensor, dstates: Tensor, dx: Tensor, ddt: Tensor, dz: Tensor,
        dB: Tensor, dC: Tensor, dA: Tensor, dbias: Tensor, dD: Tensor,
    ) -> None:  # fmt: skip
        """Write all gradients but that of the initial state."""
        p, slots = self.p, self.p.slots
        if not slots:
            return
        width = self.D_width
        dparams = torch.empty((slots, p.heads, 2 + width), dtype=torch.float32, device=dy.device)
        to_B, to_C = dB, dC
        if p.parts > 1:
            make = torch.zeros if p.packed else torch.empty
            to_B, to_C = (make((p.parts, dB.numel()), dtype=torch.float32, device=dy.device) for _ in range(2))
        chunk_steps = torch.empty((slots, p.heads, 3, TRITON_KEEP), dtype=torch.float32, device=dy.device)
        bounds = p.length, p.sequences, p.sequences.bit_length(), *self.sizes
        kept, low, high = self.limits
        heads_each = 16
        launch(
            self.memo, "steps", steps, (slots, ceil_div(p.heads, heads_each)),
            (*(self.dt, self.A, *self._or_x(self.bias, self.cu), chunk_steps, *bounds[:4], low, high),
            *(*self.dt.stride(), *self.A.stride(), *_strides(self.bias, 1)),),
            lambda: self.step_flags | {
                "Q": TRITON_KEEP, "HEADS": heads_each, "PACKED": p.packed, "REVERSE": self.flags["REVERSE"],
                "num_warps": 4,
            },
        )  # fmt: skip
        of_y, of_x = (*dy.stride(), *_strides(dfinal, 4)), self.x.stride()
        of_BC = *self.B.stride(), *self.C.stride()
        flags = {
            "HAS_Z": self.z is not None, "HAS_INITIAL": self.initial is not None, "HAS_FINAL": dfinal is not None
        }  # fmt: skip
        launch(
            self.memo, "gradient_x", gradient_x, (slots * p.heads,),
            (*(dy, *self._or_x(dfinal), self.x, self.dt, self.A, self.B, self.C),
            *(*self._or_x(self.D, self.z, self.bias, self.initial, self.cu), states, dstates, chunk_steps),
            *(dx, ddt, dz, dparams, *bounds, *self.limits, *of_y, *of_x, *self.dt.stride(), *self.A.stride(), *of_BC),
            *(*self._strides_of_D(), *_strides(self.z, 4), *_strides(self.bias, 1), *_strides(self.initial, 4)),),
            lambda: self._tuned("gradient_x") | flags | self.step_flags | {"D_WIDTH": width, "PRECISION": "tf32x3"},
        )  # fmt: skip
        launch(
            self.memo, "gradient_BC", gradient_BC, (slots * p.groups * p.parts,),
            (*(dy, *self._or_x(dfinal), self.x, self.B, self.C, *self._or_x(self.z, self.initial, self.cu), states),
            *(dstates, chunk_steps, to_B, to_C, *bounds, p.heads // p.groups // p.parts, dB.numel(), kept),
            *(*of_y, *of_x, *of_BC, *_strides(self.z, 4), *_strides(self.initial, 4)),),
            lambda: self._tuned("gradient_BC") | flags | {"STAGES": _tuning("gradient_BC", p)[2]},
        )  # fmt: skip
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
