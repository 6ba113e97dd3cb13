"""SSD on the GPU: launches its kernels.

Same equations, arguments and results as `reference`. Why it is done so: docs/gpu_ssd.md.

Products run in bfloat16 if x is bfloat16. Else they run on float32 tiles: in tf32 if x, B or C has 16 bits, in three
tf32 products for each if all are float32, and in `gradient_x`, whose sums of many signs make dA. Sums, decays and
states are float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mambaverse.kernels import columns
from mambaverse.kernels.launch import launch, on_device
from mambaverse.kernels.ssd.layout import TRITON_FAR, TRITON_KEEP, boundary_dtype, boundary_states, ceil_div
from mambaverse.kernels.ssd.triton_backward import reduce_params, reduce_parts
from mambaverse.kernels.ssd.triton_plan import MAX_HEAD_DIM, plan_of
from mambaverse.kernels.ssd.triton_routes import Apart, Buffers, Gradients, Piece, Walked
from mambaverse.kernels.ssd.triton_run import Run

GRADIENTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "weight", "own_weight")


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float,
    reverse: bool, chunk_size: int, save: bool, weight: Tensor | None = None, own_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, the final state, and the states that backward needs (0 rows unless `save`); see `layout`."""
    if x.shape[3] > MAX_HEAD_DIM:
        return columns.forward(
            forward, MAX_HEAD_DIM, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state,
            cu_seqlens=cu_seqlens, dt_softplus=dt_softplus, dt_min=dt_min, dt_max=dt_max, reverse=reverse,
            chunk_size=chunk_size, save=save, weight=weight, own_weight=own_weight,
        )  # fmt: skip
    p = plan_of(x, B, C, cu_seqlens)
    y = _outputs(x, x.dtype, cu_seqlens)
    final = torch.empty((p.sequences, p.heads, p.head_dim, p.state_dim), dtype=torch.float32, device=x.device)
    rows, *shape = boundary_states(x, B, cu_seqlens, 0, "triton")
    states = torch.empty((rows if save else 0, *shape), dtype=boundary_dtype(x, "triton"), device=x.device)
    if p.programs:
        with on_device(x):
            run = Run(
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
    if x.shape[3] > MAX_HEAD_DIM:
        return columns.backward(
            backward, MAX_HEAD_DIM, GRADIENTS, dy=dy, dfinal=dfinal, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z,
            dt_bias=dt_bias, initial_state=initial_state, cu_seqlens=cu_seqlens, chunk_states=chunk_states,
            dt_softplus=dt_softplus, dt_min=dt_min, dt_max=dt_max, reverse=reverse, chunk_size=chunk_size,
            weight=weight, own_weight=own_weight,
        )  # fmt: skip
    chunk_states = chunk_states.contiguous()  # of a part of the columns they are not
    p = plan_of(x, B, C, cu_seqlens).backward()
    absent = x.new_empty(0)
    if dy is None:
        dy = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)

    def of_rows(t: Tensor | None) -> Tensor:
        return absent if t is None else _outputs(t, t.dtype, cu_seqlens)

    def of_all(t: Tensor | None) -> Tensor:
        return absent if t is None else torch.empty(t.shape, dtype=t.dtype, device=x.device)

    to = Gradients(
        *(of_rows(t) for t in (x, dt, B, C, z, weight, own_weight)),
        *(of_all(t) for t in (A, D, dt_bias, initial_state)),
    )  # fmt: skip
    if p.programs:
        with on_device(x):
            run = Run(
                p, x, dt, A, B, C, D, z, dt_bias, initial_state, weight, own_weight, cu_seqlens, dt_softplus, dt_min,
                dt_max, reverse, dy, dfinal, chunk_states,
            )  # fmt: skip
            _gradients(run, dy, dfinal, chunk_states, to)
    if not p.slots or not p.programs:  # no positions, or no sequences
        for t in (to.dt, to.weight, to.own, to.B, to.C, to.A, to.D, to.bias):
            t.zero_()
    return to.x, to.dt, to.A, to.B, to.C, to.D, to.z, to.bias, to.initial, to.weight, to.own


def _outputs(like: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None) -> Tensor:
    """Return a tensor of a shape; zeros beside cu_seqlens, which may leave positions out (unread on a GPU)."""
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(like.shape, dtype=dtype, device=like.device)


def _gradients(run: Run, dy: Tensor, dfinal: Tensor | None, states: Tensor, to: Gradients) -> None:
    """Write all gradients."""
    p, slots, width = run.p, run.p.slots, run.D_width
    params = torch.empty((slots, p.heads, 2 + width), dtype=torch.float32, device=dy.device)
    parts_B, parts_C = to.B, to.C
    if p.parts > 1:
        make = torch.zeros if p.packed else torch.empty
        parts_B, parts_C = (make((p.parts, to.B.numel()), dtype=torch.float32, device=dy.device) for _ in range(2))
    buffers = Buffers(run.steps(), parts_B, parts_C, params)
    route = (Walked if Walked.goes(run, dfinal) else Apart)(run, dy, dfinal, to, buffers)
    for piece in _pieces(run, route, dy, dfinal, states):
        if slots and piece.num_chunks:
            route.take(piece)
    if not slots:
        return
    route.finish()
    columns = 16
    launch(
        run.memo, "reduce_params", reduce_params, (p.heads, ceil_div(2 + width, columns)),
        (params, to.A, to.bias, to.D, slots, p.heads),
        lambda: {
            "D_WIDTH": width, "HAS_BIAS": run.bias is not None, "ROWS": 128, "COLUMNS": columns, "num_warps": 4
        },
    )  # fmt: skip
    if p.parts > 1:
        block = 1024
        launch(
            run.memo, "reduce_parts", reduce_parts, (ceil_div(to.B.numel(), block),),
            (parts_B, parts_C, to.B, to.C, to.B.numel(), p.parts), lambda: {"BLOCK": block},
        )  # fmt: skip


def _pieces(run: Run, route: Apart | Walked, dy: Tensor, dfinal: Tensor | None, states: Tensor) -> Iterator[Piece]:
    """Work out the gradients of states, and of a long sequence the states that `scan` did not keep, by pieces."""
    p = run.p
    starts = None
    if p.segments > 1:
        starts = run.segment_starts(dy, run.C, run.z, dfinal, gradient=True)
    if p.piece == 0:
        gradients = torch.empty_like(states)
        route.enter(gradients, starts, range(p.segments), 0)
        yield Piece(0, p.chunks, p.kept, 1, 0, states, gradients)
        return
    each = TRITON_FAR // TRITON_KEEP
    shape = p.batch * p.piece * each, *states.shape[1:]
    inner, gradients = (torch.empty(shape, dtype=states.dtype, device=states.device) for _ in range(2))
    for first in range(0, p.segments, p.piece):
        segments, first_chunk = range(first, min(first + p.piece, p.segments)), first * each
        run.carry(
            run.x, run.B, None, run.initial, gradient=False, starts=states, states=inner, segments=segments,
            first_chunk=first_chunk,
        )  # fmt: skip
        route.enter(gradients, starts, segments, first_chunk)
        chunks = min(segments.stop * each, p.chunks) - first_chunk
        yield Piece(first_chunk, chunks, len(segments) * each, first_chunk, first_chunk, inner, gradients)
