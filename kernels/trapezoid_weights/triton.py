"""The step sizes of Mamba-3 on the GPU: one Triton kernel forward, and one backward with a sum of its parts.

Same equations, arguments and results as `reference`, in float32. Deterministic: the bias's gradient is added up from a
row for each block of tokens, in a fixed order. Strides are read as they are, and offsets are 64-bit.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.launch import Spec, launch, memo_of, on_device, power_of_2
from mambaverse.kernels.trapezoid_weights import triton_kernels as kernels

_TILE = 256 if os.environ.get("TRITON_INTERPRET") == "1" else 1024  # elements: 8 a thread of four warps


def forward(
    dt: Tensor, a: Tensor, trap: Tensor, dt_bias: Tensor, cu_seqlens: Tensor | None, A_floor: float, heavy_tail: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Δ, rate, weight and γ, as `reference.forward`."""
    step, rate, weight, own = outputs = [torch.empty(dt.shape, dtype=torch.float32, device=dt.device) for _ in range(4)]
    if dt.numel():
        call = _Call((dt, a, trap, dt_bias), cu_seqlens, heavy_tail)
        with on_device(dt):
            launch(
                call.memo, "forward", kernels.forward, (call.blocks,),
                (*call.tensors, call.cu, *outputs, *call.sizes, A_floor, *call.strides), call.constants,
            )  # fmt: skip
    return step, rate, weight, own


def backward(
    dstep: Tensor | None, drate: Tensor | None, dweight: Tensor | None, down: Tensor | None, dt: Tensor, a: Tensor,
    trap: Tensor, dt_bias: Tensor, cu_seqlens: Tensor | None, A_floor: float, heavy_tail: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of δ, a, μ and the bias, as `reference.backward`."""
    ddt, da, dtrap = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (dt, a, trap))
    if not dt.numel():
        return ddt, da, dtrap, torch.zeros_like(dt_bias)
    gradients = [
        torch.zeros((), dtype=torch.float32, device=dt.device).expand(dt.shape) if d is None else d
        for d in (dstep, drate, dweight, down)
    ]
    call = _Call((*gradients, dt, a, trap, dt_bias), cu_seqlens, heavy_tail)
    parts = torch.empty((call.blocks, dt.shape[2]), dtype=torch.float32, device=dt.device)
    with on_device(dt):
        launch(
            call.memo, "backward", kernels.backward, (call.blocks,),
            (*call.tensors, call.cu, ddt, da, dtrap, parts, *call.sizes, A_floor, *call.strides), call.constants,
        )  # fmt: skip
    return ddt, da, dtrap, parts.sum(0).to(dt_bias.dtype)


class _Call:
    """What both launches take beside their outputs; the last tensors are δ, a, μ and the bias."""

    def __init__(self, tensors: tuple[Tensor, ...], cu_seqlens: Tensor | None, heavy_tail: bool) -> None:
        dt = tensors[-4]
        batch, length, heads = dt.shape
        columns = power_of_2(heads)
        rows = max(1, _TILE // columns)
        sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.tensors = tensors
        self.cu = dt if cu_seqlens is None else cu_seqlens.contiguous()
        self.blocks = -(-batch * length // rows)
        self.sizes = batch * length, length, sequences, sequences.bit_length()
        self.strides = [step for tensor in tensors for step in tensor.stride()]
        self.flags: dict[str, Any] = {"H": heads, "BH": columns, "BT": rows, "HEAVY": heavy_tail, "num_warps": 4}
        self.flags["PACKED"] = cu_seqlens is not None
        specs = (Spec.of(t) for t in (*tensors, cu_seqlens))
        self.memo = memo_of("trapezoid_weights", dt.device, *specs, heavy_tail)

    def constants(self) -> dict[str, Any]:
        """Return the constants of the kernels."""
        return self.flags
