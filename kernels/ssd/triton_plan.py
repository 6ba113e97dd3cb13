"""How `ssd` cuts its work on a GPU: what of it depends on shapes and on the number of multiprocessors."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from mambaverse.kernels.backend import BackendError
from mambaverse.kernels.checks import num_sequences
from mambaverse.kernels.launch import AHEAD_BYTES, num_multiprocessors, shared_memory
from mambaverse.kernels.ssd.layout import (
    TRITON_FAR,
    TRITON_KEEP,
    ceil_div,
    triton_boundaries,
    triton_keep,
    triton_tile,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_HEAD_DIM, MAX_STATES = 48 if INTERPRETED else 128, 256  # heads of more columns are cut: `kernels.columns`
# The length is split until there are so many programs a multiprocessor, if that takes at least so many segments: each
# of them costs a pass over x and B more.
PROGRAMS_PER_SM, LEAST_SEGMENTS = 2, 2
# A group's heads are split among programs of `gradient_BC` until there are so many a multiprocessor. The parts of dB
# and dC are written and read.
GRADIENTS_PER_SM = 1
# Backward of a long sequence takes pieces of it whose states and their gradients fit into so many bytes.
PIECE_BYTES = 2**15 if INTERPRETED else 640 * 2**20
# (chunk, warps, stages) of each kernel, for up to 128 and up to 256 states: the longest chunks whose tiles registers
# nearly hold. A chunk divides TRITON_KEEP, and is that in backward; but `carry` keeps no states where it looks for the
# ends of segments. Float32 tiles take twice the room, and the parts of them as much again.
TUNING = {
    ("scan", torch.bfloat16): ((64, 4, 2), (64, 8, 1)),
    ("scan", torch.float32): ((32, 8, 1), (32, 8, 1)),
    ("carry", torch.bfloat16): ((64, 4, 2), (64, 8, 1)),
    ("carry", torch.float32): ((32, 4, 1), (32, 8, 1)),
    ("carry_to_ends", torch.bfloat16): ((2 * TRITON_KEEP, 4, 2), (TRITON_KEEP, 8, 1)),
    ("carry_to_ends", torch.float32): ((32, 4, 1), (32, 8, 1)),
    ("gradient_x", torch.bfloat16): ((TRITON_KEEP, 4, 1), (TRITON_KEEP, 8, 1)),
    ("gradient_x", torch.float32): ((TRITON_KEEP, 8, 1), (TRITON_KEEP, 8, 1)),
    ("gradient_BC", torch.bfloat16): ((TRITON_KEEP, 4, 1), (TRITON_KEEP, 8, 1)),
    ("gradient_BC", torch.float32): ((TRITON_KEEP, 8, 1), (TRITON_KEEP, 8, 1)),
}
# By states, of kernels that load ahead what they read of a head or two: `gradient_BC`, where that fits into so much
# shared memory, which not every GPU has, and those of `triton_walk`, which are for GPUs with WALK_BYTES alone (but
# `rest_of_one` has no loop).
AHEAD = {
    "gradient_BC": {64: (TRITON_KEEP, 4, 3), 128: (TRITON_KEEP, 8, 3), 256: (TRITON_KEEP, 8, 2)},
    "walk": {64: (TRITON_KEEP, 4, 3), 128: (TRITON_KEEP, 4, 2)},
    "within": {128: (TRITON_KEEP, 4, 3)},
    "through_states": {64: (TRITON_KEEP, 4, 3), 128: (TRITON_KEEP, 8, 3)},
    "rest_of_one": {128: (TRITON_KEEP, 4, 1)},
}
WALK_BYTES = 184 * 2**10
# Of `scan` where no other head reads a head's B and C again, and they are most of what it reads; and of more than 128
# states in bfloat16 on GPUs with less shared memory than AHEAD_BYTES.
SCAN_OF_OWN, SCAN_OF_LESS = (32, 4, 3), (32, 8, 1)


@dataclass(frozen=True)
class Plan:
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
    ahead: bool = False  # whether a program may have AHEAD_BYTES of shared memory
    walks: bool = False  # whether the kernels of `triton_walk` take such sizes
    piece: int = 0  # segments that backward takes at a time; 0: all chunks at once, from states that forward kept

    @property
    def tile(self) -> tuple[int, int]:
        """Columns of x and states that a program holds."""
        return triton_tile(self.state_dim)

    @property
    def programs(self) -> int:
        """Number of programs that carry a state through a sequence."""
        return self.sequences * self.heads * ceil_div(self.head_dim, self.tile[0])

    @property
    def keep(self) -> int:
        """Positions from one state that forward keeps to the next."""
        return TRITON_KEEP if self.packed else triton_keep(self.length)

    @property
    def kept(self) -> int:
        """States that forward keeps of each sequence; 0 with packed sequences, whose places offsets tell."""
        return 0 if self.packed else int(triton_boundaries(self.length))

    @property
    def one(self) -> bool:
        """Whether a program of dB and dC has one head, and at least 128 states: it has a kernel of its own then.

        On a GPU narrower tiles came out wrong in `gradient_BC_of_one` in bfloat16, as elsewhere (`layout.triton_tile`).
        """
        return self.parts == self.heads // self.groups and (INTERPRETED or self.tile[1] >= 128)

    @property
    def chunks(self) -> int:
        """Chunks of backward of a sequence that is not packed."""
        return ceil_div(self.length, TRITON_KEEP)

    @property
    def slots(self) -> int:
        """Number of chunks of backward; with packed sequences the most that there may be."""
        if self.packed:
            return (self.length - 1) // TRITON_KEEP + self.sequences if self.length else 0
        return self.batch * self.chunks

    def backward(self) -> Plan:
        """Return the plan of backward: that of a long sequence is cut where states were kept, and taken in pieces."""
        if self.keep == TRITON_KEEP:
            return self
        segments = ceil_div(self.length, TRITON_FAR)
        size = 2 if self.dtype == torch.bfloat16 else 4
        a_segment = self.programs * self.tile[0] * self.tile[1] * size * (TRITON_FAR // TRITON_KEEP)
        piece = min(segments, max(1, PIECE_BYTES // (2 * a_segment)))
        return replace(self, segments=segments, segment=TRITON_FAR, piece=ceil_div(segments, ceil_div(segments, piece)))


def plan_of(x: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None) -> Plan:
    """Return the plan of a call's forward.

    Raises:
        BackendError: if there are more states than the kernels take.
    """
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    if {x.dtype, B.dtype, C.dtype} == {torch.float32}:
        dtype = torch.float32
    sequences = num_sequences("ssd", cu_seqlens, x.shape[0])
    return _plan(x.device, x.shape, B.shape[2], B.shape[3], sequences, cu_seqlens is not None, dtype)


@lru_cache(maxsize=4096)
def _plan(
    device: torch.device, shape: torch.Size, groups: int, state_dim: int, sequences: int, packed: bool,
    dtype: torch.dtype,
) -> Plan:  # fmt: skip
    """Cut the work: see `PROGRAMS_PER_SM` and `GRADIENTS_PER_SM`."""
    batch, length, heads, head_dim = shape
    if state_dim > MAX_STATES:
        raise BackendError(
            f"ssd: backend 'triton' takes up to {MAX_STATES} states, not {state_dim}; use_backend(\"reference\") runs "
            "anywhere"
        )
    p = Plan(batch, length, heads, groups, head_dim, state_dim, sequences, packed, dtype, segment=max(length, 1))
    if not p.programs or not length:
        return p
    multiprocessors = 4 if device.type == "cpu" else num_multiprocessors(device)
    room = 0 if device.type == "cpu" else shared_memory(device)
    p = replace(p, ahead=room >= AHEAD_BYTES)
    fits = INTERPRETED or (dtype == torch.bfloat16 and room >= WALK_BYTES)
    fits = fits and head_dim <= p.tile[0] and p.tile[1] <= max(AHEAD["walk"])
    p = replace(p, walks=fits and (not packed or p.programs >= multiprocessors))  # packed ones are not split
    per_group = heads // groups
    wanted = GRADIENTS_PER_SM * multiprocessors
    slots = p.backward().piece * batch * (TRITON_FAR // TRITON_KEEP) or p.slots  # of one launch
    parts = next(
        k for k in range(1, per_group + 1) if per_group % k == 0 and (k * groups * slots >= wanted or k == per_group)
    )
    p = replace(p, parts=parts)
    wanted = PROGRAMS_PER_SM * multiprocessors // p.programs
    if p.packed or wanted < LEAST_SEGMENTS:
        return p
    segment = TRITON_KEEP * ceil_div(length, wanted * TRITON_KEEP)
    segments = ceil_div(length, segment)
    return replace(p, segments=segments, segment=segment) if segments > 1 else p


def tuning(kernel: str, p: Plan, ends: bool = False) -> tuple[int, int, int]:
    """Return the length of a chunk, the warps of a program and the stages of its loop.

    `ends`: states, or gradients of them, are given at the sequence's ends, which `gradient_BC` loads for each head.
    """
    if INTERPRETED:
        return TRITON_KEEP, 4, 1
    if kernel == "scan" and p.dtype == torch.bfloat16 and p.groups == p.heads and p.head_dim <= 64 < p.state_dim <= 128:
        return SCAN_OF_OWN
    if kernel == "scan" and p.dtype == torch.bfloat16 and p.state_dim > 128 and not p.ahead:
        return SCAN_OF_LESS
    dtype = torch.bfloat16 if p.dtype == torch.bfloat16 else torch.float32
    fits = dtype == torch.bfloat16 and p.ahead and not (p.one or ends) and p.head_dim <= p.tile[0]
    if kernel in AHEAD and (kernel != "gradient_BC" or fits):
        return next(value for states, value in AHEAD[kernel].items() if p.tile[1] <= states)
    chunk, warps, stages = TUNING[kernel, dtype][p.tile[1] > 128]
    return chunk, warps, stages
