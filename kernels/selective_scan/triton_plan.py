"""How the GPU's selective scan cuts its work, and what follows from the shapes, strides and dtypes of its inputs."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from mambaverse.kernels.backend import BackendError
from mambaverse.kernels.launch import Memo, Spec, num_multiprocessors, power_of_2
from mambaverse.kernels.selective_scan.shapes import TRITON_CHUNK
from mambaverse.kernels.selective_scan.triton_common import CHAINED, JOINED

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WARP = 8 if INTERPRETED else 32  # threads
MOST_WARPS = 1 if INTERPRETED else 4  # of a program: 64 channels of 16 bits are a line of the cache
STEPS = 4 if INTERPRETED else 16  # a tile's
ROUND = 8 if INTERPRETED else 32  # steps between two sums over the warps of a program; segments are multiples
TOGETHER = 2  # states that backward walks through a tile together
# Registers of a thread of `scan`, where B and C are packed in 16 bits and where they are not; the second of each where
# there are at most 8 warps a multiprocessor and no states are kept. Told nothing, the compiler takes others, and the
# kernel is up to 15 % slower: docs/gpu_selective_scan.md.
REGISTERS = {16: (128, 136), 32: (168, 200)}
TAIL = 2 if INTERPRETED else 4  # steps of a tile at the end of a sequence
UNROLL = 8  # states whose steps the compiler may interleave
MAX_STATES = 256
PAIRS = {torch.bfloat16: 16, torch.float16: -16}  # how B and C of these are packed: see `unpack`
# The length is split until there are so many warps a multiprocessor, if that takes at least so many segments: each of
# them costs its exponentials twice.
WARPS_PER_SM, LEAST_SEGMENTS = 16, 5
# Else, in backward, if programs take more than one round and fill at most FILLED of two, it is cut into pieces of a
# chain, at most MOST_PIECES, each of at least LEAST_PIECE steps: a place that is free takes up any chain. With one or
# two states threads have fewer registers, and a multiprocessor holds more programs.
FILLED, MOST_PIECES, LEAST_PIECE = (1.0, 4, 8) if INTERPRETED else (0.87, 16, 256)
BACKWARD_WARPS = 3 if INTERPRETED else 8  # that a multiprocessor holds at once, of 255 registers a thread
LEAST_STATES = 1 if INTERPRETED else 3


@dataclass(frozen=True)
class Plan:
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
    processors: int  # multiprocessors of the GPU
    pair: int  # how B and C are packed
    strides: tuple[int, ...]  # of delta and z (all but the length's: those are flags), B, C, h0
    length_strides: tuple[int, int]  # of delta and z
    has: tuple[bool, bool, bool, bool]  # D, z, delta_bias, initial state
    segments: int = 1
    segment: int = 1  # steps, a multiple of ROUND
    split: int = 0  # how: see `triton_common`
    memo: Memo = field(default_factory=dict, compare=False)

    @cached_property
    def lead(self) -> tuple[int, ...]:
        """Leading axis of what is written: one of both directions, or none."""
        return () if self.directions == 1 else (self.directions,)

    @cached_property
    def group_dim(self) -> int:
        """Channels of a group, as the kernels see it: with `own_BC` they are all in one."""
        return self.dim if self.own_BC else self.dim // self.groups

    @cached_property
    def share(self) -> int:
        """Threads that share a channel."""
        return 2 if self.state_dim % 2 == 0 else 1

    @cached_property
    def unroll(self) -> int:
        """States of a thread that take their steps together."""
        return divisor(self.state_dim // self.share, UNROLL)

    @cached_property
    def tail(self) -> int:
        """Steps of the tiles at the end of a sequence; 0: all of them are whole."""
        return TAIL if self.packed or self.length % STEPS else 0

    @cached_property
    def backward_tail(self) -> int:
        """Steps of backward's last tile, a power of 2 of which TOGETHER states make whole products; 0: none is left."""
        left = TRITON_CHUNK - 1 if self.packed else self.length % TRITON_CHUNK
        return max(power_of_2(left), 4 // divisor(self.unroll, TOGETHER)) if left else 0

    @cached_property
    def warps(self) -> int:
        """Number of warps that a group's channels take: no warp has channels of two groups."""
        return -(-self.group_dim * self.share // WARP)

    @cached_property
    def program(self) -> int:
        """Number of warps of a program."""
        return math.gcd(self.warps, MOST_WARPS)

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        """Grid of the kernels that walk sequences. Segments come last: programs of a chain must begin in its order."""
        blocks = self.dim // self.group_dim * self.warps // self.program
        return blocks * self.sequences, self.directions, self.segments

    @cached_property
    def apart(self) -> int:
        """Segments that have memory of their own: one of a chain follows the other."""
        return 1 if self.split == CHAINED.value else self.segments

    @cached_property
    def threads(self) -> int:
        """Number of threads of all programs that may run beside each other."""
        return self.grid[0] * self.directions * self.apart * self.program * WARP

    @cached_property
    def resting(self) -> int:
        """Number of states of all programs, which rest in memory between tiles; 0 where they stay in registers."""
        held = self.state_dim == self.share * self.unroll
        return 0 if held else self.threads * self.state_dim // self.share

    @cached_property
    def slices(self) -> int:
        """Slices of a direction in which backward's programs leave dB and dC."""
        return 0 if self.own_BC else self.warps // self.program

    def registers(self, save: bool) -> int:
        """Return the registers of a thread of `scan`, at most; `save`: whether it keeps states."""
        few_warps = self.threads <= 8 * WARP * self.processors
        return REGISTERS[abs(self.pair)][few_warps and not save]

    def constants(self) -> dict[str, Any]:
        """Return the constants that `scan` and `gradient` have in common."""
        has_D, has_z, has_bias, has_h0 = self.has
        return {
            "HAS_D": has_D, "HAS_Z": has_z, "HAS_BIAS": has_bias, "HAS_H0": has_h0, "PACKED": self.packed,
            "OWN_BC": self.own_BC, "BC_STEP": self.groups * self.state_dim, "dim": self.dim,
            "sd_l": self.length_strides[0], "sz_l": self.length_strides[1], "BOTH": self.directions == 2,
            "SPLIT": self.split, "N": self.state_dim, "PAIR": self.pair, "CHUNK": TRITON_CHUNK,
            "SHARE": self.share, "UNROLL": self.unroll, "EVEN": self.group_dim * self.share % WARP == 0,
            "BD": self.program * WARP, "WARP": WARP, "FAST": not INTERPRETED, "num_warps": self.program,
        }  # fmt: skip


@lru_cache(maxsize=4096)
def plan(
    directions: int, backward: bool, packed: int | None, device: torch.device, u: Spec, delta: Spec, A: Spec, B: Spec,
    C: Spec, D: Spec | None, z: Spec | None, bias: Spec | None, h0: Spec | None, *_others: Any,
) -> Plan:  # fmt: skip
    """Cut the work: see `WARPS_PER_SM`.

    Args:
        directions: 1 or 2.
        backward: Whether it is backward that runs.
        packed: The number of sequences that are packed, or None.
        device: Where the inputs are.
        u: That of the first direction, as all that follow.
        delta: ...
        A: ...
        B: ...
        C: ...
        D: ...
        z: ...
        bias: ...
        h0: ...
        _others: What else the kernels depend on: who differs in it gets a plan, and a memo, of its own.
    """
    if A.dtype.is_complex or B.dtype.is_complex:
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
    groups = B.shape[2] if len(B.shape) == 4 else 1
    B_strides, C_strides = (s if len(s) == 4 else (*s[:2], 0, s[2]) for s in (B.stride, C.stride))
    z_strides, h0_strides = ((0, 0, 0) if t is None else t.stride for t in (z, h0))
    whole = Plan(
        directions=directions, batch=batch, length=length, dim=dim, groups=groups, state_dim=A.shape[1],
        sequences=batch if packed is None else packed, packed=packed is not None, own_BC=groups == dim,
        processors=1 if device.type == "cpu" else num_multiprocessors(device),
        pair=PAIRS.get(B.dtype, 32) if B.dtype == C.dtype else 32,
        strides=(*delta.stride[::2], *z_strides[::2], *B_strides, *C_strides, *h0_strides),
        length_strides=(delta.stride[1], z_strides[1]),
        has=(D is not None, z is not None, bias is not None, h0 is not None), segment=max(length, 1),
    )  # fmt: skip
    if packed is not None or not whole.sequences or not dim:
        return whole
    wanted = WARPS_PER_SM * whole.processors // (whole.threads // WARP)
    split = JOINED.value
    if wanted < LEAST_SEGMENTS:
        programs, at_once = math.prod(whole.grid), whole.processors * max(1, BACKWARD_WARPS // whole.program)
        if not backward or whole.state_dim < LEAST_STATES or not at_once < programs <= 2 * FILLED * at_once:
            return whole
        wanted, split = min(MOST_PIECES, max(1, length // LEAST_PIECE)), CHAINED.value
    segment = ROUND * max(2, -(-length // (wanted * ROUND)))
    segments = -(-length // segment)
    return replace(whole, segments=segments, segment=segment, split=split, memo={}) if segments > 1 else whole


def divisor(n: int, limit: int) -> int:
    """Return the largest divisor of n up to `limit`."""
    return next(k for k in range(limit, 0, -1) if n % k == 0)
