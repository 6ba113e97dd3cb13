"""Rotary positions on the GPU with Triton, in one pass; in Triton's interpreter also on the CPU.

Same arguments and results as `reference.forward`, with everything inside in float32. A program has some tokens: it
loads their cosines and sines once and turns one head after the other. Strides are read as they are, and offsets are
64-bit.
"""

# What Triton compiles has its own types.
# mypy: ignore-errors

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambaverse.kernels.launch import Spec, launch, memo_of, on_device, power_of_2

_TILE = 64 if os.environ.get("TRITON_INTERPRET") == "1" else 1024  # pairs of channels: 8 a thread of four warps
_HEADS = 8  # of a program


def forward(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Return x (B, L, H, P) turned, or with `back` turned back."""
    batch, length, heads, size = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        pairs = power_of_2(size // 2)
        columns = min(pairs, _TILE)
        rows = _TILE // columns
        cos, sin = (table.expand(batch, -1, -1) for table in (cos, sin))
        tensors = x, cos, sin
        with on_device(x):
            launch(
                memo_of("rotary", x.device, *map(Spec.of, tensors), back), "turn", _turn,
                (-(-batch * length // rows), -(-heads // _HEADS), pairs // columns),
                (*tensors, y, batch * length, length, heads, *(s for t in tensors for s in t.stride())),
                lambda: {
                    "HALF": size // 2, "BT": rows, "BP": columns, "HEADS": _HEADS, "BACK": back, "num_warps": 4
                },
            )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["tokens", "L"])
def _turn(
    x, cos, sin, y, tokens, L, H, sx_b, sx_l, sx_h, sx_p, sc_b, sc_l, sc_p, ss_b, ss_l, ss_p,
    HALF: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Write y (tokens, H, 2 HALF) of up to HEADS heads. Grid: (blocks of tokens, of heads, of pairs)."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    row, at = token // L, token % L
    o = (tl.program_id(2) * BP + tl.arange(0, BP))[None, :].to(tl.int64)
    mask = (token < tokens)[:, None] & (o < HALF)
    c = tl.load(cos + (row * sc_b + at * sc_l)[:, None] + o * sc_p, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + (row * ss_b + at * ss_l)[:, None] + o * ss_p, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    first = tl.program_id(1).to(tl.int64) * HEADS
    p_x = x + (row * sx_b + at * sx_l)[:, None] + o * sx_p + first * sx_h
    p_y = y + ((token * H + first) * (2 * HALF))[:, None] + o
    for _head in range(tl.minimum(HEADS, H - first)):
        a = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(p_x + HALF * sx_p, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_y, (a * c - b * s).to(y.dtype.element_ty), mask=mask)
        tl.store(p_y + HALF, (a * s + b * c).to(y.dtype.element_ty), mask=mask)
        p_x += sx_h
        p_y += 2 * HALF
