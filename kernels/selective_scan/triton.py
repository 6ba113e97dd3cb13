"""Selective scan on the GPU: launches the kernels of `triton_forward` and `triton_backward`.

Same equations, arguments and results as `reference`, for a real A. Why it is done so: docs/gpu_selective_scan.md.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.backend import BackendError
from mambaverse.kernels.checks import num_sequences
from mambaverse.kernels.selective_scan.shapes import TRITON_CHUNK, chunk_state_dtype, num_chunk_states
from mambaverse.kernels.selective_scan.triton_around import combine, pack
from mambaverse.kernels.selective_scan.triton_backward import gradient, reduce_BC, reduce_params
from mambaverse.kernels.selective_scan.triton_forward import scan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WARP = 8 if INTERPRETED else 32  # threads
MOST_WARPS = 1 if INTERPRETED else 4  # of a program: 64 channels of 16 bits are a line of the cache
STEPS = 4 if INTERPRETED else 16  # a tile's
ROUND = 8 if INTERPRETED else 32  # steps between two sums over the warps of a program; segments are multiples
TOGETHER = 2  # states that backward walks through a tile together
# Registers of a thread of `scan`, where there are more than 8 warps a multiprocessor and where there are not. Told
# nothing, the compiler takes about 100, and the kernel waits for each exponential.
REGISTERS, MANY_REGISTERS = 128, 255
TAIL = 2 if INTERPRETED else 4  # steps of a tile at the end of a sequence
UNROLL = 8  # states whose steps the compiler may interleave
MAX_STATES = 256
COMBINED = 128  # channels of a program of `combine`
_PAIRS = {torch.bfloat16: 16, torch.float16: -16}  # how B and C of these are packed: see `unpack`
SCAN, SUMMARY, GRADIENT = 0, 1, 2  # the modes of `scan`
# The length is split until there are so many warps a multiprocessor, if that takes at least so many segments: each of
# them costs its exponentials twice.
WARPS_PER_SM, LEAST_SEGMENTS = 16, 4


# u, delta, A, B, C, D, z, delta_bias and initial_state of a direction.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype, the final state (S, D, N), and chunk states in the kernels' own order.

    The arguments are those of `reference.forward`.
    """
    *inputs, cu_seqlens, delta_softplus, reverse, save = arguments
    return _forward((tuple(inputs),), 1.0, cu_seqlens, delta_softplus, reverse, save)


def forward_both(
    first: Inputs, second: Inputs, scale: float, cu_seqlens: Tensor | None, delta_softplus: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `forward` returns of two directions, the second reverse, stacked, y times `scale`."""
    return _forward(_alike(first, second), scale, cu_seqlens, delta_softplus, False, save)


def backward(dy: Tensor, dfinal_state: Tensor | None, *arguments: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, None for what is None.

    The arguments are those of `reference.backward`.
    """
    *inputs, cu_seqlens, chunk_states, delta_softplus, reverse = arguments
    return _backward(dy, 1.0, dfinal_state, (tuple(inputs),), cu_seqlens, chunk_states, delta_softplus, reverse)


def backward_both(
    dy: Tensor, scale: float, dfinal_state: Tensor | None, first: Inputs, second: Inputs, cu_seqlens: Tensor | None,
    chunk_states: Tensor, delta_softplus: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of both directions, stacked; dy times `scale` is that of the output of each."""
    return _backward(dy, scale, dfinal_state, _alike(first, second), cu_seqlens, chunk_states, delta_softplus, False)


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
    u, _, A, B, *_ = inputs[0]
    p = _plan(u, A, B, cu_seqlens, len(inputs))
    y = _outputs(p, u, u.dtype, cu_seqlens)
    final_state = torch.empty((*p.lead, p.sequences, p.dim, p.state_dim), dtype=torch.float32, device=u.device)
    kept = p.directions * num_chunk_states(u, "triton", save)
    chunk_states = torch.empty(kept, p.dim, p.state_dim, dtype=chunk_state_dtype(u, A, "triton"), device=u.device)
    if p.sequences and p.dim:
        with _device(u):
            tensors = _Tensors.of(p, inputs, cu_seqlens)
            flags = tensors.flags | {"REVERSE": reverse, "SOFTPLUS": delta_softplus, "SCALE": scale}
            starts = None
            if p.segments > 1:
                starts = _segment_starts(p, tensors, flags, SUMMARY, None, [i[8] for i in inputs])
            _scan(p, tensors, flags, SCAN, None, (y, final_state, chunk_states, None, None), starts, save)
    return y, final_state, chunk_states


def _backward(
    dy: Tensor, scale: float, dfinal_state: Tensor | None, inputs: tuple[Inputs, ...], cu_seqlens: Tensor | None,
    chunk_states: Tensor, delta_softplus: bool, reverse: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs[0]
    p = _plan(u, A, B, cu_seqlens, len(inputs))
    du, ddelta = _outputs(p, u, u.dtype, cu_seqlens), _outputs(p, u, delta.dtype, cu_seqlens)
    dz = None if z is None else _outputs(p, u, z.dtype, cu_seqlens)
    dA, dB, dC, dD, dbias = (
        None if t is None else torch.empty((*p.lead, *t.shape), dtype=t.dtype, device=t.device)
        for t in (A, B, C, D, delta_bias)
    )
    dh0 = None
    if initial_state is not None:
        dh0 = torch.empty((*p.lead, p.sequences, p.dim, p.state_dim), dtype=torch.float32, device=u.device)
    if p.sequences and p.dim:
        with _device(u):
            tensors = _Tensors.of(p, inputs, cu_seqlens)
            flags = tensors.flags | {"REVERSE": reverse, "SOFTPLUS": delta_softplus, "SCALE": scale}
            dfinal = None if dfinal_state is None else dfinal_state.contiguous()
            starts = None
            if p.segments > 1:
                of_each = [dfinal] if dfinal is None or p.directions == 1 else list(dfinal)
                starts = _segment_starts(p, tensors, flags, GRADIENT, dy, of_each)
            _gradient(p, tensors, flags, dy, dfinal, chunk_states, starts, (du, ddelta, dz, dB, dC, dA, dD, dbias, dh0))
    else:
        for t in (dB, dC, dA, dD, dbias):
            if t is not None:
                t.zero_()
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dh0


@dataclass(frozen=True)
class _Plan:
    """Sizes, and how the work is cut: channels into blocks within groups, the length into segments."""

    directions: int
    batch: int
    length: int
    dim: int
    groups: int
    state_dim: int
    sequences: int
    packed: bool
    own_BC: bool  # noqa: N815  every channel is a group: nothing to share, nothing to sum
    segments: int
    segment: int  # steps, a multiple of ROUND

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axis of what is written: one of both directions, or none."""
        return () if self.directions == 1 else (self.directions,)

    @property
    def group_dim(self) -> int:
        """Channels of a group, as the kernels see it: with `own_BC` they are all in one."""
        return self.dim if self.own_BC else self.dim // self.groups

    @property
    def share(self) -> int:
        """Threads that share a channel."""
        return 2 if self.state_dim % 2 == 0 else 1

    @property
    def unroll(self) -> int:
        """States of a thread that take their steps together."""
        return _divisor(self.state_dim // self.share, UNROLL)

    @property
    def tail(self) -> int:
        """Steps of the tiles at the end of a sequence; 0: all of them are whole."""
        return TAIL if self.packed or self.length % STEPS else 0

    @property
    def backward_tail(self) -> int:
        """Steps of backward's last tile, a power of 2 of which TOGETHER states make whole products; 0: none is left."""
        left = TRITON_CHUNK - 1 if self.packed else self.length % TRITON_CHUNK
        return max(_power_of_2(left), 4 // _divisor(self.unroll, TOGETHER)) if left else 0

    @property
    def warps(self) -> int:
        """Number of warps that a group's channels take: no warp has channels of two groups."""
        return -(-self.group_dim * self.share // WARP)

    @property
    def program(self) -> int:
        """Number of warps of a program."""
        return math.gcd(self.warps, MOST_WARPS)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Grid of the kernels that walk sequences."""
        blocks = self.dim // self.group_dim * self.warps // self.program
        return blocks * self.sequences, self.segments, self.directions

    @property
    def threads(self) -> int:
        """Number of threads of all programs."""
        return math.prod(self.grid) * self.program * WARP

    @property
    def resting(self) -> int:
        """Number of states of all programs, which rest in memory between tiles; 0 where they stay in registers."""
        held = self.state_dim == self.share * self.unroll
        return 0 if held else self.threads * self.state_dim // self.share


def _plan(u: Tensor, A: Tensor, B: Tensor, cu_seqlens: Tensor | None, directions: int) -> _Plan:
    """Cut the work: see `WARPS_PER_SM`."""
    if A.is_complex() or B.is_complex():
        raise BackendError(
            "selective_scan: backend 'triton' has no kernel for a complex A; use_backend(\"reference\") runs anywhere, "
            'use_backend("cpu") on CPU tensors'
        )
    if A.shape[1] > MAX_STATES:
        raise BackendError(
            f"selective_scan: backend 'triton' takes up to {MAX_STATES} states, not {A.shape[1]}; "
            'use_backend("reference") runs anywhere'
        )
    batch, length, dim = u.shape
    groups = B.shape[2] if B.ndim == 4 else 1
    sequences = num_sequences("selective_scan", cu_seqlens, batch)
    own_BC = groups == dim
    sizes = directions, batch, length, dim, groups, A.shape[1], sequences
    whole = _Plan(*sizes, cu_seqlens is not None, own_BC, 1, max(length, 1))
    if cu_seqlens is not None or not sequences or not dim:
        return whole
    wanted = WARPS_PER_SM * _num_multiprocessors(u.device) // (whole.threads // WARP)
    if wanted < LEAST_SEGMENTS:
        return whole
    segment = ROUND * max(2, -(-length // (wanted * ROUND)))
    segments = -(-length // segment)
    return replace(whole, segments=segments, segment=segment) if segments > 1 else whole


@lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _device(u: Tensor) -> Any:
    """Launches go to the current device: make it that of u."""
    return torch.cuda.device(u.device) if u.is_cuda else torch.no_grad()


def _outputs(p: _Plan, u: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None) -> Tensor:
    """Return a tensor of u's shape a direction; zeros beside cu_seqlens, which may leave positions out."""
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make((*p.lead, *u.shape), dtype=dtype, device=u.device)


@dataclass(frozen=True)
class _Tensors:
    """What all kernels read, and the flags that follow from what there is."""

    inputs: tuple[tuple[Tensor, ...], ...]  # of each direction: u, delta, z, B, C, D, bias, h0; u for what is None
    arguments: tuple[Tensor, ...]  # BC, A2, cu
    strides: tuple[int, ...]  # of delta and z (all but the length's: those are flags), B, C, h0
    flags: dict[str, Any]

    @property
    def both(self) -> tuple[Tensor, ...]:
        """The inputs of both directions, of one twice where there is one."""
        return self.inputs[0] + self.inputs[-1]

    @staticmethod
    def of(p: _Plan, inputs: tuple[Inputs, ...], cu_seqlens: Tensor | None) -> _Tensors:
        u, delta, A, B, C, D, z, bias, h0 = inputs[0]
        A2 = torch.empty(p.directions, p.state_dim, p.dim, dtype=torch.float32, device=u.device)
        pair = _PAIRS.get(B.dtype, 32) if B.dtype == C.dtype else 32
        rows, columns = 0 if p.own_BC else p.batch * p.length, min(128, _power_of_2(p.groups * p.state_dim))
        size = p.directions * rows * p.groups * p.state_dim
        BC = torch.empty(size, dtype=torch.int64 if pair == 32 else torch.int32, device=u.device)
        B, C = (t.unsqueeze(2) if t.ndim == 3 else t for t in (B, C))
        rows_each, block = max(1, 2048 // columns), 1024
        programs_of_A = -(-p.state_dim * p.dim // block)
        pack[(programs_of_A + -(-rows // rows_each), p.directions)](
            *(inputs[0][2:5] + inputs[-1][2:5]), A2, BC, rows, p.length, p.dim, p.state_dim, p.groups,
            *(*A.stride(), *B.stride(), *C.stride()),
            num_A=programs_of_A, PAIR=pair, ROWS=rows_each, GN=columns, BLOCK=block,
        )  # fmt: skip
        delta_strides, z_strides = delta.stride(), (0, 0, 0) if z is None else z.stride()
        h0_strides = (0, 0, 0) if h0 is None else h0.stride()
        strides = (*delta_strides[::2], *z_strides[::2], *B.stride(), *C.stride(), *h0_strides)
        flags = {
            "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": bias is not None, "HAS_H0": h0 is not None,
            "PACKED": cu_seqlens is not None, "OWN_BC": p.own_BC, "BC_STEP": p.groups * p.state_dim,
            "dim": p.dim, "sd_l": delta_strides[1], "sz_l": z_strides[1], "BOTH": p.directions == 2,
            "N": p.state_dim, "PAIR": pair, "CHUNK": TRITON_CHUNK, "SHARE": p.share, "UNROLL": p.unroll,
            "EVEN": p.group_dim * p.share % WARP == 0, "BD": p.program * WARP, "WARP": WARP,
            "FAST": not INTERPRETED, "num_warps": p.program,
        }  # fmt: skip
        return _Tensors(
            tuple(_in_order(*i) for i in inputs), (BC, A2, u if cu_seqlens is None else cu_seqlens), strides, flags
        )


def _in_order(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    h0: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the inputs as the kernels take them, u for what is None. D and the bias are read without strides."""
    D, bias = (None if t is None else t.contiguous() for t in (D, bias))
    return u, delta, u if z is None else z, B, C, *(u if t is None else t for t in (D, bias, h0))


def _scan(
    p: _Plan, tensors: _Tensors, flags: dict[str, Any], mode: int, dy: Tensor | None,
    outputs: tuple[Tensor | None, ...], starts: Tensor | None, save: bool = False,
) -> None:  # fmt: skip
    """Launch `scan` in a mode; `outputs` are y, final, states, ends and sums, as far as the mode writes them."""
    one, two = tensors.inputs[0], tensors.inputs[-1]
    u = one[0] if dy is None else dy
    if dy is not None:
        one, two = (dy, *one[1:]), (dy, *two[1:])
    carry = torch.empty(max(p.resting, WARP * MOST_WARPS), dtype=torch.float32, device=u.device)
    y, final, states, ends, sums = (carry if t is None else t for t in outputs)
    crowded = p.threads > 8 * WARP * _num_multiprocessors(u.device)
    scan[p.grid](
        *(*one, *two, *tensors.arguments, y, final, states, carry, carry if starts is None else starts, ends, sums),
        *(u.stride(0), u.stride(2), *tensors.strides, p.batch, p.length, p.group_dim, p.segment),
        su_l=u.stride(1), MODE=mode, SPLIT=p.segments > 1, SAVE=save, T=STEPS, TAIL=p.tail,
        maxnreg=REGISTERS if crowded else MANY_REGISTERS, **flags,
    )  # fmt: skip


def _segment_starts(
    p: _Plan, tensors: _Tensors, flags: dict[str, Any], mode: int, dy: Tensor | None, firsts: list[Tensor | None]
) -> Tensor:
    """Return the states (SUMMARY) or gradients (GRADIENT) that enter the segments, (sequences, segments, N, D)."""
    sequences, u = p.directions * p.sequences, tensors.inputs[0][0]
    shape = sequences, p.segments, p.state_dim, p.dim
    starts, ends = (torch.empty(shape, dtype=torch.float32, device=u.device) for _ in range(2))
    sums = torch.empty(sequences, p.segments, p.dim, dtype=torch.float32, device=u.device)
    _scan(p, tensors, flags, mode, dy, (None, None, None, ends, sums), None)
    first, second = firsts[0], firsts[-1]
    combine[(-(-p.dim // COMBINED), p.state_dim, sequences)](
        *(tensors.arguments[1], ends, sums, u if first is None else first, u if second is None else second, starts),
        *(p.dim, p.state_dim, p.sequences, p.segments, *((0, 0, 0) if first is None else first.stride())),
        HAS_H0=first is not None, BACKWARD=mode == GRADIENT, BD=COMBINED, UNROLL=8, num_warps=1,
    )  # fmt: skip
    return starts


def _gradient(
    p: _Plan, tensors: _Tensors, flags: dict[str, Any], dy: Tensor, dfinal: Tensor | None, states: Tensor,
    starts: Tensor | None, outputs: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    """Launch `gradient`, and add up what its programs leave."""
    du, ddelta, dz, dB, dC, dA, dD, dbias, dh0 = outputs
    assert du is not None and dB is not None and dC is not None and dA is not None
    u = tensors.inputs[0][0]
    rows = p.sequences * p.segments
    params = torch.empty(p.directions * rows, p.state_dim + 2, p.dim, dtype=torch.float32, device=u.device)
    kept_sums = 0 if p.own_BC or INTERPRETED else 4 * p.state_dim * ROUND * p.threads // WARP
    parts = torch.empty(kept_sums, dtype=torch.float32, device=u.device)
    carry = torch.empty(max(p.resting, WARP * MOST_WARPS), dtype=torch.float32, device=u.device)
    slices = 0 if p.own_BC else p.warps // p.program
    make = torch.zeros if flags["PACKED"] else torch.empty
    slice_size = 2 * p.batch * p.groups * p.state_dim * p.length
    dBC = make(p.directions * slices * slice_size, dtype=torch.float32, device=u.device)
    exact = any(t.dtype == torch.float32 for t in (dB, dC))
    gradient[p.grid](
        *(dy, dy if dfinal is None else dfinal, *tensors.both, *tensors.arguments, states, parts, carry),
        *(carry if t is None else t for t in (starts, du, ddelta, dz, dB, dC, dBC, params, dh0)),
        *(dy.stride(0), dy.stride(2), u.stride(0), u.stride(2), *tensors.strides),
        *(p.batch, p.length, p.group_dim, p.segment), sy_l=dy.stride(1), su_l=u.stride(1),
        HAS_FINAL=dfinal is not None, SPLIT=p.segments > 1, EXACT=exact, ROUND=ROUND, TAIL=p.backward_tail,
        NU=_divisor(p.unroll, TOGETHER), **flags,
    )  # fmt: skip
    reduce_params[(-(-p.dim // 32), p.state_dim + 2, p.directions)](
        *(params, dA, params if dD is None else dD, params if dbias is None else dbias, rows, p.dim, p.state_dim),
        HAS_D=dD is not None, HAS_BIAS=dbias is not None, ROWS=min(128, _power_of_2(rows)), BD=32,
    )  # fmt: skip
    if not p.own_BC and p.batch * p.length:
        steps, states_each = 32, min(4, _power_of_2(p.state_dim))
        reduce_BC[(p.directions * p.batch * p.groups, -(-p.length // steps), -(-p.state_dim // states_each))](
            *(dBC, dB, dC, slice_size, p.length, p.state_dim, p.groups, slices),
            NB=states_each, LB=steps, TOGETHER=min(16, _power_of_2(slices)), num_warps=2,
        )  # fmt: skip


def _divisor(n: int, limit: int) -> int:
    """Return the largest divisor of n up to `limit`."""
    return next(k for k in range(limit, 0, -1) if n % k == 0)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
