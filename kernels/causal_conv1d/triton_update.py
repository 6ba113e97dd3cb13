"""One step of causal_conv1d as one Triton kernel: the window is read, shifted and written in place."""

# In what Triton compiles, constexpr parameters alone have a type.
# mypy: allow-incomplete-defs, disable-error-code="assignment"
# ruff: noqa: RUF005  (Triton knows no unpacking into a tuple)
from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambaverse.kernels.causal_conv1d.triton_kernels import _sigmoid


def update(x_t: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Return y_t (B, D) in the dtype of x_t and shift conv_state (B, W-1, D); arguments as `causal_conv1d_update`."""
    y_t = torch.empty(x_t.shape, dtype=x_t.dtype, device=x_t.device)
    batch, dim = x_t.shape
    if x_t.numel() == 0:
        return y_t
    with torch.cuda.device(x_t.device) if x_t.is_cuda else nullcontext():
        _update[(batch * triton.cdiv(dim, 256),)](
            x_t, conv_state, weight, bias, y_t, dim, *x_t.stride(), *conv_state.stride(), *weight.stride(),
            0 if bias is None else bias.stride(0),
            W=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None, BD=256, num_warps=4,
        )  # fmt: skip
    return y_t


@triton.jit
def _update(
    x, state, weight, bias, y, dim, x_row, x_chan, s_row, s_tap, s_chan, w_chan, w_tap, b_chan,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(dim, BD)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks * BD + tl.arange(0, BD)).to(tl.int64)
    ok = d < dim
    now = tl.load(x + b * x_row + d * x_chan, mask=ok, other=0.0)
    old = state + b * s_row + d * s_chan
    w = weight + d * w_chan
    total = now.to(tl.float32) * tl.load(w + (W - 1) * w_tap, mask=ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + d * b_chan, mask=ok, other=0.0).to(tl.float32)
    rows = ()
    for k in tl.static_range(W - 1):
        rows = rows + (tl.load(old + k * s_tap, mask=ok, other=0.0),)
        total += rows[k].to(tl.float32) * tl.load(w + k * w_tap, mask=ok, other=0.0).to(tl.float32)
    if SILU:
        total = total * _sigmoid(total)
    tl.store(y + b * dim + d, total.to(y.dtype.element_ty), mask=ok)
    for k in tl.static_range(1, W - 1):
        tl.store(old + (k - 1) * s_tap, rows[k], mask=ok)
    if W > 1:
        tl.store(old + (W - 2) * s_tap, now.to(state.dtype.element_ty), mask=ok)
