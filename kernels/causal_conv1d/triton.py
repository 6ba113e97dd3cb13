"""causal_conv1d on the GPU with Triton, forward and backward; in Triton's interpreter also on the CPU.

Same signatures and results as reference.py, with sums in float32. Deterministic; memory beside the outputs is a few
rows of partial sums. Channels must lie side by side: another layout of x or dy is copied once. How many positions a
chunk has follows from the shape by `chunking`; docs/gpu_conv_norm.md has the measurements behind it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.backend import BackendError
from mambaverse.kernels.causal_conv1d import triton_kernels as kernels
from mambaverse.kernels.causal_conv1d import triton_packed as packed
from mambaverse.kernels.checks import check_bounds, num_sequences
from mambaverse.kernels.launch import Spec, launch, memo_of, on_device, power_of_2

MAX_WIDTH = 32  # the window is in registers and its loops are unrolled
_WARPS = 4
_AHEAD = 4  # rows loaded before they are worked on; fewer of packed sequences, whose kernels take long to compile
_TARGET = 1024  # programs that fill a large GPU twice: 132 SMs of four


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and the final state, as `reference.forward`."""
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    num_states = _check(x, weight, cu_seqlens)
    (batch, length, dim), width = x.shape, weight.shape[1]
    x = _side_by_side(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty((num_states, width - 1, dim), dtype=x.dtype, device=x.device)
    if batch == 0 or dim == 0:
        return y, final
    tile, rows, chunks = chunking(batch, length, dim, width, x.element_size(), False)
    blocks = -(-dim // tile[1])
    groups = batch * chunks
    steps = (0, 0, 0) if initial_state is None else initial_state.stride()
    with on_device(x):
        spans = _spans(x, cu_seqlens, num_states, reverse)
        if cu_seqlens is not None and num_states and width > 1:
            packed.final_states[(num_states * -(-dim // 128),)](
                x, cu_seqlens, initial_state, final, length, dim, x.stride(1), *steps,
                W=width, REVERSE=reverse, HAS_STATE=initial_state is not None, BD=128, num_warps=4,
            )  # fmt: skip
        if cu_seqlens is None or length:
            specs = (Spec.of(t) for t in (x, weight, bias, initial_state))
            launch(
                memo_of("conv", x.device, *specs, cu_seqlens is None, spans is None, silu, reverse), "forward",
                kernels.forward, (-(-groups // tile[0]) * blocks,),
                (x, weight, bias, initial_state, spans, y, final, groups, chunks, rows, length, dim,
                 *x.stride()[:2], *weight.stride(), 0 if bias is None else bias.stride(0), *steps),
                lambda: {
                    "W": width, "SILU": silu, "REVERSE": reverse, "HAS_BIAS": bias is not None,
                    "HAS_STATE": initial_state is not None, "PACKED": cu_seqlens is not None, "TB": tile[0],
                    "BD": tile[1], "U": _AHEAD if cu_seqlens is None else 2, "num_warps": _WARPS, "num_stages": 1,
                },
            )  # fmt: skip
    return y, final


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and dinitial_state, as `reference.backward`."""
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    num_states = _check(x, weight, cu_seqlens)
    (batch, length, dim), width = x.shape, weight.shape[1]
    x = _side_by_side(x)
    dy = torch.zeros_like(x, memory_format=torch.contiguous_format) if dy is None else _side_by_side(dy)
    dfinal = None if dfinal_state is None else dfinal_state.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = x.new_empty(0) if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
    dstate = x.new_empty(0)
    if initial_state is not None:
        dstate = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device)
    if batch == 0 or dim == 0:
        return dx, dweight.zero_(), dbias.zero_(), dstate
    tile, rows, chunks = chunking(batch, length, dim, width, x.element_size(), True)
    blocks = -(-dim // tile[1])
    groups = batch * chunks
    programs = -(-groups // tile[0])
    partial = torch.empty((programs, width + 1, dim), dtype=torch.float32, device=x.device)
    steps = (0, 0, 0) if initial_state is None else initial_state.stride()
    strides = *weight.stride(), 0 if bias is None else bias.stride(0), *steps
    plain = width <= 4 and cu_seqlens is None and initial_state is None and dfinal is None
    flags: dict[str, Any] = {
        "W": width, "SILU": silu, "REVERSE": reverse, "HAS_BIAS": bias is not None, "HAS_DFINAL": dfinal is not None
    }  # fmt: skip
    with on_device(x):
        spans = _spans(x, cu_seqlens, num_states, reverse)
        if cu_seqlens is not None and initial_state is not None and num_states and width > 1:
            packed.state_gradient[(num_states * -(-dim // 128),)](
                dy, dfinal, x, weight, bias, initial_state, cu_seqlens, dstate, length, dim,
                dy.stride(1), x.stride(1), *strides, **flags, BD=128, num_warps=4,
            )  # fmt: skip
        specs = (Spec.of(t) for t in (dy, dfinal, x, weight, bias, initial_state))
        memo = memo_of("conv", x.device, *specs, cu_seqlens is None, spans is None, silu, reverse)
        launch(
            memo, "backward", kernels.backward, (programs * blocks,),
            (dy, dfinal, x, weight, bias, initial_state, spans, dx, dstate, partial, groups, chunks, rows, length, dim,
             *dy.stride()[:2], *x.stride()[:2], *strides),
            lambda: flags | {
                "HAS_STATE": initial_state is not None, "PACKED": cu_seqlens is not None, "TB": tile[0],
                "BD": tile[1], "U": _AHEAD if cu_seqlens is None else 1, "num_warps": _WARPS, "num_stages": 1,
                "maxnreg": 128 if plain else None,  # four programs on an SM instead of three
            },
        )  # fmt: skip
        launch(
            memo, "reduce", packed.reduce, (-(-(width + 1) * dim // 16),), (partial, dweight, dbias, programs, dim),
            lambda: {"W": width, "HAS_BIAS": bias is not None, "BP": 256, "BC": 16, "num_warps": 8},
        )  # fmt: skip
    return dx, dweight, dbias, dstate


@lru_cache(maxsize=1024)
def chunking(
    batch: int, length: int, dim: int, width: int, element_size: int, backward: bool
) -> tuple[tuple[int, int], int, int]:
    """Return the tile (chunks, channels), the positions of a chunk and the chunks of a sequence.

    A thread holds 8 bytes of a row. Chunks are as long as pays, shorter where they would not fill the GPU: at their
    ends W-1 rows are loaded, and backward computed, twice.
    """
    each = max(1, 8 // element_size)
    while each > 1 and each * width > 32:
        each //= 2
    channels = min(128, max(16, power_of_2(dim)))
    if channels == 128 and -dim % 128 >= 64:
        channels = 64
    tile = 32 * _WARPS * each // channels, channels
    rows = 64 if backward else 16
    while rows > 2 * _AHEAD and batch * -(-length // rows) * -(-dim // channels) < _TARGET * tile[0]:
        rows //= 2
    chunks = max(1, -(-length // rows))
    rows = -(-max(1, -(-length // chunks)) // _AHEAD) * _AHEAD  # whole steps
    return tile, rows, max(1, -(-length // rows))


def _check(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return the number of rows of the states; raise for what the kernels cannot do."""
    num_states = num_sequences("causal_conv1d", cu_seqlens, x.shape[0])
    if weight.shape[1] > MAX_WIDTH:
        raise BackendError(
            f"causal_conv1d: the filter has {weight.shape[1]} columns; backend 'triton' takes up to {MAX_WIDTH}; "
            'use_backend("reference") takes any number'
        )
    if x.shape[1] >= 2**31:
        raise BackendError(f"causal_conv1d: length {x.shape[1]}; backend 'triton' takes less than 2^31")
    if cu_seqlens is not None:
        if num_states == 0 and x.shape[1]:
            raise ValueError(f"causal_conv1d: cu_seqlens holds no sequence; expected to end at the length {x.shape[1]}")
        check_bounds("causal_conv1d", cu_seqlens, x.shape[1])
    return num_states


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _spans(x: Tensor, cu_seqlens: Tensor | None, num_states: int, reverse: bool) -> Tensor | None:
    length = x.shape[1]
    if cu_seqlens is None or length == 0:
        return None
    spans = torch.empty((3, length), dtype=torch.int32, device=x.device)
    packed.find_spans[(-(-length // 256),)](
        cu_seqlens, spans, length, num_states, num_states.bit_length(), REVERSE=reverse, BLOCK=256, num_warps=4
    )
    return spans
