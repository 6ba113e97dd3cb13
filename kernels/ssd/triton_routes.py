"""The two ways to the gradients of `ssd`, once the states before its chunks are there, and their launches.

`Apart`: `carry` walks the length for the gradients of states, and the kernels of `triton_backward` do the rest.
`Walked`: the kernels of `triton_walk`, where they apply.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaverse.kernels.launch import launch
from mambaverse.kernels.ssd.layout import TRITON_KEEP, boundary_dtype
from mambaverse.kernels.ssd.triton_backward import gradient_BC, gradient_BC_of_one, gradient_x
from mambaverse.kernels.ssd.triton_run import Run, strides
from mambaverse.kernels.ssd.triton_walk import ROWS, rest_of_one, sum_up, through_states, walk, within


class Piece(NamedTuple):
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


class Gradients(NamedTuple):
    """Where the gradients go."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    z: Tensor
    weight: Tensor
    own: Tensor
    A: Tensor
    D: Tensor
    bias: Tensor
    initial: Tensor


class Buffers(NamedTuple):
    """What kernels of both routes leave for others."""

    steps: Tensor  # see `steps`
    B: Tensor  # parts of dB, by the programs of a group; dB itself if there is one
    C: Tensor
    params: Tensor  # dA, d dt_bias and dD of every chunk


class Apart:
    """Gradients of states first, then of all else."""

    def __init__(self, run: Run, dy: Tensor, dfinal: Tensor | None, to: Gradients, buffers: Buffers) -> None:
        self.run, self.dy, self.dfinal, self.to, self.buffers = run, dy, dfinal, to, buffers

    def enter(self, gradients: Tensor, starts: Tensor | None, segments: range, first_chunk: int) -> None:
        """Write the gradients of states to `gradients`."""
        run, to = self.run, self.to
        gated: dict[str, Any] = {"gated": to.x, "rest": to.z} if run.gates else {}
        run.carry(
            self.dy, run.C, run.z, self.dfinal, gradient=True, starts=starts, outgoing=to.initial, states=gradients,
            segments=segments, first_chunk=first_chunk, **gated,
        )  # fmt: skip

    def take(self, piece: Piece) -> None:
        """Write all gradients of a piece."""
        run, p, to, dfinal = self.run, self.run.p, self.to, self.dfinal
        chunk_steps, parts_B, parts_C, params = self.buffers
        *place, states, dstates = piece
        programs = run.programs(piece.num_chunks)
        of_y, of_x = (*self.dy.stride(), *strides(dfinal, 4)), run.x.stride()
        of_BC = *run.B.stride(), *run.C.stride()
        flags = {
            "HAS_INITIAL": run.initial is not None, "HAS_FINAL": dfinal is not None, "HAS_OWN": run.own is not None,
        }  # fmt: skip
        ends = run.initial is not None or dfinal is not None
        gated, gate = (to.x, None) if run.gates else (self.dy, run.z)  # `gradient_x` overwrites dx, so it comes last
        launch(
            run.memo, "gradient_BC", gradient_BC_of_one if p.one else gradient_BC, (programs * p.groups * p.parts,),
            (*(gated, *run.or_x(dfinal), run.x, run.B, run.C, *run.or_x(gate, run.initial, run.own, run.cu)),
            *(states, dstates, chunk_steps, parts_B, parts_C, *run.bounds, *place, *run.sizes),
            *(p.heads // p.groups // p.parts, to.B.numel()),
            *(*gated.stride(), *strides(dfinal, 4), *of_x, *of_BC, *strides(gate, 4)),
            *(*strides(run.initial, 4), *strides(run.own, 3)),),
            lambda: run.tuned("gradient_BC", ends) | flags | {"HAS_Z": gate is not None},
        )  # fmt: skip
        launch(
            run.memo, "gradient_x", gradient_x, (programs * p.heads,),
            (*(self.dy, *run.or_x(dfinal), run.x, run.dt, run.A, run.B, run.C),
            *run.or_x(run.D, run.z, run.bias, run.initial, run.own, run.cu),
            *(states, dstates, chunk_steps, to.x, to.dt, to.z, to.weight, to.own, params),
            *(*run.bounds, *place, *run.sizes, *run.limits, *of_y, *of_x),
            *(*run.dt.stride(), *run.A.stride(), *of_BC, *run.strides_of_D(), *strides(run.z, 4)),
            *(*strides(run.bias, 1), *strides(run.initial, 4), *strides(run.own, 3)),),
            lambda: run.tuned("gradient_x") | flags | run.step_flags | {
                "D_WIDTH": run.D_width, "HAS_Z": run.z is not None, "HAS_WEIGHT": run.weight is not None,
                "GATED": run.gates, "PRECISION": "tf32x3",
            },
        )  # fmt: skip

    def finish(self) -> None:
        """Nothing is left to do."""


class Walked:
    """dx on the way of the gradients of states."""

    def __init__(self, run: Run, dy: Tensor, dfinal: Tensor | None, to: Gradients, buffers: Buffers) -> None:
        self.run, self.dy, self.to, self.buffers = run, dy, to, buffers
        p = run.p
        rows = p.slots, p.heads, ROWS.value, TRITON_KEEP
        self.left_over = torch.empty(rows, dtype=torch.float32, device=dy.device)
        self.flags = {"HAS_D": run.D is not None, "HAS_Z": run.z is not None, "HAS_OWN": run.own is not None}
        if not p.one:
            square = p.slots, p.groups * p.parts, TRITON_KEEP, TRITON_KEEP
            self.dK = torch.empty(square, dtype=boundary_dtype(run.x, "triton"), device=dy.device)

    @staticmethod
    def goes(run: Run, dfinal: Tensor | None) -> bool:
        """Whether this route takes a call."""
        p, ends = run.p, run.initial is not None or dfinal is not None
        several = p.heads // p.groups // p.parts > 1 and run.z is None and run.own is None
        return p.walks and not ends and run.D_width < 2 and (p.one or several)

    def enter(self, gradients: Tensor, starts: Tensor | None, segments: range, first_chunk: int) -> None:
        """Write the gradients of states to `gradients`, and dx."""
        run, p, dy = self.run, self.run.p, self.dy
        launch(
            run.memo, "walk", walk, (p.programs, len(segments)),
            (*(dy, run.B, run.C, *run.or_x(run.D, run.z, run.own, run.cu, starts)),
            *(self.buffers.steps, gradients, self.to.x),
            *(p.length, p.segment, p.segments, segments.start, *run.sizes, run.kept(segments), first_chunk),
            *(*dy.stride(), *run.B.stride(), *run.C.stride(), run.strides_of_D()[0], *strides(run.z, 4)),
            *strides(run.own, 3),),
            lambda: run.tuned("walk") | self.flags | {"SPLIT": starts is not None},
        )  # fmt: skip

    def take(self, piece: Piece) -> None:
        """Write all gradients of a piece but dx, and those that `finish` writes."""
        run, p, to = self.run, self.run.p, self.to
        chunk_steps, parts_B, parts_C, _ = self.buffers
        *place, states, dstates = piece
        programs = run.programs(piece.num_chunks)
        tiles = self.dy, run.x, run.B, run.C
        of_tiles = *self.dy.stride(), *run.x.stride(), *run.B.stride(), *run.C.stride()
        if p.one:
            launch(
                run.memo, "rest_of_one", rest_of_one, (programs * p.heads,),
                (*(*tiles, *run.or_x(run.D, run.z, run.own, run.cu), states, dstates, chunk_steps),
                *(parts_B, parts_C, to.z, to.own, self.left_over, *run.bounds, *place, *run.sizes, to.B.numel()),
                *(*of_tiles, run.strides_of_D()[0], *strides(run.z, 4), *strides(run.own, 3)),),
                lambda: run.tuned("rest_of_one") | self.flags,
            )  # fmt: skip
            return
        heads = p.heads // p.groups // p.parts
        launch(
            run.memo, "within", within, (programs * p.groups * p.parts,),
            (*(*tiles, *run.or_x(run.cu), chunk_steps, self.left_over, self.dK),
            *(*run.bounds, *place[:2], *run.sizes, heads, *of_tiles),),
            lambda: run.tuned("within"),
        )  # fmt: skip
        launch(
            run.memo, "through_states", through_states, (programs * p.groups * p.parts,),
            (*(*tiles, *run.or_x(run.cu), states, dstates, chunk_steps, self.dK, parts_B, parts_C, self.left_over),
            *(*run.bounds, *place, *run.sizes, heads, to.B.numel(), *of_tiles),),
            lambda: run.tuned("through_states"),
        )  # fmt: skip

    def finish(self) -> None:
        """Write the gradients of dt and weights, and of what has a number a head."""
        run, to = self.run, self.to
        left = self.buffers.steps, self.left_over
        tensors = *run.or_x(run.bias, run.cu), *left, to.dt, to.weight, self.buffers.params
        run.over_steps(sum_up, tensors, HAS_D=run.D is not None)
