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
from mambaverse.kernels.selective_scan.triton_backward import gradient, reduce_BC, reduce_params
from mambaverse.kernels.selective_scan.triton_forward import combine, pack, scan

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


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype, the final state (S, D, N), and chunk states in the kernels' own order."""
    p = _plan(u, A, B, cu_seqlens)
    y = _outputs(u, u.dtype, cu_seqlens)
    final_state = torch.empty(p.sequences, p.dim, p.state_dim, dtype=torch.float32, device=u.device)
    kept = num_chunk_states(u, "triton", save)
    chunk_states = torch.empty(kept, p.dim, p.state_dim, dtype=chunk_state_dtype(u, A, "triton"), device=u.device)
    if p.sequences and p.dim:
        with _device(u):
            tensors = _Tensors.of(p, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
            flags = tensors.flags | {"REVERSE": reverse, "SOFTPLUS": delta_softplus}
            starts = _segment_starts(p, tensors, flags, SUMMARY, u, initial_state) if p.segments > 1 else None
            _scan(p, tensors, flags, SCAN, u, (y, final_state, chunk_states, None, None), starts, save)
    return y, final_state, chunk_states


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, None for what is None."""
    p = _plan(u, A, B, cu_seqlens)
    du, ddelta = _outputs(u, u.dtype, cu_seqlens), _outputs(u, delta.dtype, cu_seqlens)
    dz = None if z is None else _outputs(u, z.dtype, cu_seqlens)
    dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (B, C))
    dA = torch.empty(A.shape, dtype=A.dtype, device=A.device)
    dD, dbias = (None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (D, delta_bias))
    dh0 = None
    if initial_state is not None:
        dh0 = torch.empty(p.sequences, p.dim, p.state_dim, dtype=torch.float32, device=u.device)
    if p.sequences and p.dim:
        with _device(u):
            tensors = _Tensors.of(p, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
            flags = tensors.flags | {"REVERSE": reverse, "SOFTPLUS": delta_softplus}
            dfinal = None if dfinal_state is None else dfinal_state.contiguous()
            starts = _segment_starts(p, tensors, flags, GRADIENT, dy, dfinal) if p.segments > 1 else None
            _gradient(
                p, tensors, flags, dy, dfinal, u, chunk_states, starts, (du, ddelta, dz, dB, dC, dA, dD, dbias, dh0)
            )
    else:
        for t in (dB, dC, dA, dD, dbias):
            if t is not None:
                t.zero_()
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dh0


@dataclass(frozen=True)
class _Plan:
    """Sizes, and how the work is cut: channels into blocks within groups, the length into segments."""

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
    def grid(self) -> tuple[int, int]:
        """Grid of the kernels that walk sequences."""
        return self.dim // self.group_dim * self.warps // self.program * self.sequences, self.segments

    @property
    def threads(self) -> int:
        """Number of threads of all programs."""
        return self.grid[0] * self.grid[1] * self.program * WARP

    @property
    def resting(self) -> int:
        """Number of states of all programs, which rest in memory between tiles; 0 where they stay in registers."""
        held = self.state_dim == self.share * self.unroll
        return 0 if held else self.threads * self.state_dim // self.share


def _plan(u: Tensor, A: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> _Plan:
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
    whole = _Plan(batch, length, dim, groups, A.shape[1], sequences, cu_seqlens is not None, own_BC, 1, max(length, 1))
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


def _outputs(u: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None) -> Tensor:
    """Return a tensor of u's shape; zeros beside cu_seqlens, which may leave positions out (unread on a GPU)."""
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(u.shape, dtype=dtype, device=u.device)


@dataclass(frozen=True)
class _Tensors:
    """What all kernels read, and the flags that follow from what there is."""

    arguments: tuple[Any, ...]  # delta, z, B, C, BC, A2, D, bias, h0, cu
    strides: tuple[int, ...]  # of delta and z (all but the length's: those are flags), B, C, h0
    flags: dict[str, Any]

    @staticmethod
    def of(
        p: _Plan, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        bias: Tensor | None, h0: Tensor | None, cu_seqlens: Tensor | None,
    ) -> _Tensors:  # fmt: skip
        A2 = torch.empty(p.state_dim, p.dim, dtype=torch.float32, device=u.device)
        pair = _PAIRS.get(B.dtype, 32) if B.dtype == C.dtype else 32
        size = 0 if p.own_BC else p.batch * p.length * p.groups * p.state_dim
        BC = torch.empty(size, dtype=torch.int64 if pair == 32 else torch.int32, device=u.device)
        B, C = (t.unsqueeze(2) if t.ndim == 3 else t for t in (B, C))
        rows = 0 if p.own_BC else p.batch * p.length
        columns = min(128, _power_of_2(p.groups * p.state_dim))
        rows_each, block = max(1, 2048 // columns), 1024
        programs_of_A = -(-p.state_dim * p.dim // block)
        pack[(programs_of_A + -(-rows // rows_each),)](
            *(A, B, C, A2, BC, rows, p.length, p.dim, p.state_dim, p.groups),
            *(*A.stride(), *B.stride(), *C.stride()),
            num_A=programs_of_A, PAIR=pair, ROWS=rows_each, GN=columns, BLOCK=block,
        )  # fmt: skip
        D, bias = (None if t is None else t.contiguous() for t in (D, bias))
        delta_strides, z_strides = delta.stride(), (0, 0, 0) if z is None else z.stride()
        h0_strides = (0, 0, 0) if h0 is None else h0.stride()
        strides = (*delta_strides[::2], *z_strides[::2], *B.stride(), *C.stride(), *h0_strides)
        flags = {
            "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": bias is not None, "HAS_H0": h0 is not None,
            "PACKED": cu_seqlens is not None, "OWN_BC": p.own_BC, "BC_STEP": p.groups * p.state_dim,
            "dim": p.dim, "sd_l": delta_strides[1], "sz_l": z_strides[1],
            "N": p.state_dim, "PAIR": pair, "CHUNK": TRITON_CHUNK, "SHARE": p.share, "UNROLL": p.unroll,
            "EVEN": p.group_dim * p.share % WARP == 0, "BD": p.program * WARP, "WARP": WARP,
            "FAST": not INTERPRETED, "num_warps": p.program,
        }  # fmt: skip
        arguments = (delta, u if z is None else z, B, C, BC, A2, *(u if t is None else t for t in (D, bias, h0)))
        return _Tensors((*arguments, u if cu_seqlens is None else cu_seqlens), strides, flags)


def _scan(
    p: _Plan, tensors: _Tensors, flags: dict[str, Any], mode: int, u: Tensor, outputs: tuple[Tensor | None, ...],
    starts: Tensor | None, save: bool = False,
) -> None:  # fmt: skip
    """Launch `scan` in a mode; `outputs` are y, final, states, ends and sums, as far as the mode writes them."""
    carry = torch.empty(max(p.resting, WARP * MOST_WARPS), dtype=torch.float32, device=u.device)
    y, final, states, ends, sums = (carry if t is None else t for t in outputs)
    crowded = p.threads > 8 * WARP * _num_multiprocessors(u.device)
    scan[p.grid](
        *(u, *tensors.arguments, y, final, states, carry, carry if starts is None else starts, ends, sums),
        *(u.stride(0), u.stride(2), *tensors.strides, p.length, p.group_dim, p.segment),
        su_l=u.stride(1), MODE=mode, SPLIT=p.segments > 1, SAVE=save, T=STEPS, TAIL=p.tail,
        maxnreg=REGISTERS if crowded else MANY_REGISTERS, **flags,
    )  # fmt: skip


def _segment_starts(
    p: _Plan, tensors: _Tensors, flags: dict[str, Any], mode: int, u: Tensor, first: Tensor | None
) -> Tensor:
    """Return the states (SUMMARY) or gradients (GRADIENT) that enter the segments, (sequences, segments, N, D)."""
    shape = p.sequences, p.segments, p.state_dim, p.dim
    starts, ends = (torch.empty(shape, dtype=torch.float32, device=u.device) for _ in range(2))
    sums = torch.empty(p.sequences, p.segments, p.dim, dtype=torch.float32, device=u.device)
    _scan(p, tensors, flags, mode, u, (None, None, None, ends, sums), None)
    combine[(-(-p.dim // COMBINED), p.state_dim, p.sequences)](
        *(tensors.arguments[5], ends, sums, u if first is None else first, starts, p.dim, p.state_dim, p.segments),
        *((0, 0, 0) if first is None else first.stride()),
        HAS_H0=first is not None, BACKWARD=mode == GRADIENT, BD=COMBINED, UNROLL=8, num_warps=1,
    )  # fmt: skip
    return starts


def _gradient(
    p: _Plan, tensors: _Tensors, flags: dict[str, Any], dy: Tensor, dfinal: Tensor | None, u: Tensor, states: Tensor,
    starts: Tensor | None, outputs: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    """Launch `gradient`, and add up what its programs leave."""
    du, ddelta, dz, dB, dC, dA, dD, dbias, dh0 = outputs
    assert du is not None and dB is not None and dC is not None and dA is not None
    rows = p.sequences * p.segments
    params = torch.empty(rows, p.state_dim + 2, p.dim, dtype=torch.float32, device=u.device)
    kept_sums = 0 if p.own_BC or INTERPRETED else 4 * p.state_dim * ROUND * p.threads // WARP
    parts = torch.empty(kept_sums, dtype=torch.float32, device=u.device)
    carry = torch.empty(max(p.resting, WARP * MOST_WARPS), dtype=torch.float32, device=u.device)
    slices = 0 if p.own_BC else p.warps // p.program
    make = torch.zeros if flags["PACKED"] else torch.empty
    slice_size = 2 * p.batch * p.groups * p.state_dim * p.length
    dBC = make(slices * slice_size, dtype=torch.float32, device=u.device)
    exact = any(t.dtype == torch.float32 for t in (dB, dC))
    gradient[p.grid](
        *(dy, dy if dfinal is None else dfinal, u, *tensors.arguments, states, parts, carry),
        *(carry if t is None else t for t in (starts, du, ddelta, dz, dB, dC, dBC, params, dh0)),
        *(dy.stride(0), dy.stride(2), u.stride(0), u.stride(2), *tensors.strides),
        *(p.batch, p.length, p.group_dim, p.segment), sy_l=dy.stride(1), su_l=u.stride(1),
        HAS_FINAL=dfinal is not None, SPLIT=p.segments > 1, EXACT=exact, ROUND=ROUND, TAIL=p.backward_tail,
        NU=_divisor(p.unroll, TOGETHER), **flags,
    )  # fmt: skip
    reduce_params[(-(-p.dim // 32), p.state_dim + 2)](
        *(params, dA, params if dD is None else dD, params if dbias is None else dbias, rows, p.dim, p.state_dim),
        HAS_D=dD is not None, HAS_BIAS=dbias is not None, ROWS=min(128, _power_of_2(rows)), BD=32,
    )  # fmt: skip
    if not p.own_BC and p.batch * p.length:
        steps, states_each = 32, min(4, _power_of_2(p.state_dim))
        reduce_BC[(p.batch * p.groups, -(-p.length // steps), -(-p.state_dim // states_each))](
            *(dBC, dB, dC, slice_size, p.length, p.state_dim, p.groups, slices),
            NB=states_each, LB=steps, TOGETHER=min(16, _power_of_2(slices)), num_warps=2,
        )  # fmt: skip


def _divisor(n: int, limit: int) -> int:
    """Return the largest divisor of n up to `limit`."""
    return next(k for k in range(limit, 0, -1) if n % k == 0)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
