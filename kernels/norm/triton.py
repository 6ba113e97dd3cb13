"""rms_norm, layer_norm and gated_rms_norm on the GPU with Triton; in Triton's interpreter also on the CPU.

Same signatures and results as reference.py, with sums in float32. Deterministic: a program's sums over its rows are
partial and added in a fixed order. Channels must lie side by side: another layout is copied once. Tiles follow from the
width by `tiling`; docs/gpu_conv_norm.md has the measurements behind it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.launch import Spec, launch, memo_of, on_device, power_of_2
from mambaverse.kernels.norm import triton_kernels as kernels
from mambaverse.kernels.norm import triton_wide as wide
from mambaverse.kernels.norm.triton_kernels import GATE_FIRST, NO_GATE, NORM_FIRST

MAX_IN_REGISTERS = 16384  # channels; 16 warps then hold 32 of them a thread
_WIDE_BLOCK = 2048
_WARPS = 4
_PROGRAMS = 264  # of backward, each with a row of partial sums: two for each of 132 SMs


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """Return y and new_residual, as `reference.forward`."""
    t = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    return _forward(x, weight, bias, residual, t, x.shape[-1], NO_GATE, center, eps), t


def gated_forward(x: Tensor, weight: Tensor, z: Tensor, group_size: int, norm_before_gate: bool, eps: float) -> Tensor:
    """Return y, as `reference.gated_forward`."""
    return _forward(x, weight, None, z, None, group_size, NORM_FIRST if norm_before_gate else GATE_FIRST, False, eps)


def backward(
    dy: Tensor, dt: Tensor | None, t: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of t, weight and bias, as `reference.backward`."""
    grad, _, dweight, dbias = backward_in_two_dtypes(dy, dt, t, weight, bias, eps, center, t.dtype)
    return grad, dweight, dbias


def backward_in_two_dtypes(
    dy: Tensor,
    dt: Tensor | None,
    t: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of t, the same in `dtype` (empty if t has it), and the gradients of weight and bias."""
    narrow = t.new_empty(0 if dtype == t.dtype else t.shape, dtype=dtype)
    dbias = t.new_empty(0) if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=t.device)
    grad, dweight = _backward(dy, dt, t, weight, dbias, narrow, None, None, t.shape[-1], NO_GATE, center, eps)
    return grad, narrow, dweight, dbias


def gated_backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor, group_size: int, norm_before_gate: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and z, as `reference.gated_backward`."""
    dz, empty = torch.empty(z.shape, dtype=z.dtype, device=z.device), x.new_empty(0)
    gate = NORM_FIRST if norm_before_gate else GATE_FIRST
    grad, dweight = _backward(dy, None, x, weight, empty, empty, z, dz, group_size, gate, False, eps)
    return grad, dweight, dz


@lru_cache(maxsize=1024)
def tiling(num_rows: int, size: int, each: int) -> tuple[int, int, int, int, int]:
    """Return K, BR and V of the tile, the rows of a program of backward (a multiple of BR) and the warps.

    A warp has a row of up to 1024 channels, 32 in a thread; wider rows have up to 16 warps. Of narrow rows a warp has
    several, so that a thread holds about `each` elements.
    """
    per_row = min(16, max(1, power_of_2(-(-size // 1024))))
    v = min(power_of_2(size), 256 * per_row)
    k = power_of_2(-(-size // v))
    warps = max(_WARPS, per_row)
    rows = max(warps // per_row, min(128, each * 32 * warps // (k * v)))
    steps = max(1, -(-num_rows // (_PROGRAMS * rows)))
    return k, rows, v, steps * rows, warps


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    t: Tensor | None,
    size: int,
    gate: int,
    center: bool,
    eps: float,
) -> Tensor:
    """Return y and fill t; `other` is the residual, or z of the gate."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    dim = x.shape[-1]
    num_rows, groups = x.numel() // dim, dim // size
    x = _rows(x)
    other = None if other is None else _rows(other)
    row_strides = x.stride(0), 0 if other is None else other.stride(0)
    strides = *row_strides, weight.stride(0), 0 if bias is None else bias.stride(0)
    flags: dict[str, Any] = {
        "CENTER": center, "GATE": gate, "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": gate == NO_GATE and other is not None,
    }  # fmt: skip
    with on_device(x):
        if size > MAX_IN_REGISTERS:
            wide.forward[(num_rows * groups,)](
                x, weight, bias, other, y, t, size, groups, *strides, eps, **flags, V=_WIDE_BLOCK, num_warps=8
            )
        else:
            k, rows, v, _, warps = tiling(num_rows, size, 16)
            specs = (Spec.of(t) for t in (x, weight, bias, other, t))
            launch(
                memo_of("norm", x.device, *specs, size, gate, center), "forward", kernels.forward,
                (-(-num_rows // rows) * groups,),
                (x, weight, bias, other, y, t, num_rows, size, groups, *strides, eps),
                lambda: flags | {"K": k, "BR": rows, "V": v, "num_warps": warps, "num_stages": 1},
            )  # fmt: skip
    return y


def _backward(
    dy: Tensor,
    dt: Tensor | None,
    t: Tensor,
    weight: Tensor,
    dbias: Tensor,
    narrow: Tensor,
    z: Tensor | None,
    dz: Tensor | None,
    size: int,
    gate: int,
    center: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of t and weight; fill `dbias`, `narrow` and `dz` where they are not empty or None."""
    grad = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=t.device)
    if t.numel() == 0:
        dbias.zero_()
        return grad, dweight.zero_()
    dim = t.shape[-1]
    num_rows, groups = t.numel() // dim, dim // size
    dy, t = _rows(dy), _rows(t)
    dt, z = None if dt is None else _rows(dt), None if z is None else _rows(z)
    strides = dy.stride(0), 0 if dt is None else dt.stride(0), t.stride(0), 0 if z is None else z.stride(0)
    in_registers = size <= MAX_IN_REGISTERS
    k, rows, v, span, warps = tiling(num_rows, min(size, MAX_IN_REGISTERS), 32)
    programs = -(-num_rows // span)
    has_bias = dbias.numel() > 0
    partial = torch.empty((programs, 2 if has_bias else 1, dim), dtype=torch.float32, device=t.device)
    flags: dict[str, Any] = {"CENTER": center, "GATE": gate, "HAS_DT": dt is not None, "NARROW": narrow.numel() > 0}
    specs = (Spec.of(t) for t in (dy, dt, t, z, weight, dbias, narrow, dz))
    memo = memo_of("norm", t.device, *specs, size, gate, center)
    with on_device(t):
        if in_registers:
            launch(
                memo, "backward", kernels.backward, (programs * groups,),
                (dy, dt, t, z, weight, grad, narrow, dz, partial, num_rows, size, groups, span, *strides,
                 weight.stride(0), eps),
                lambda: flags | {
                    "HAS_BIAS": has_bias, "K": k, "BR": rows, "V": v, "num_warps": warps, "num_stages": 1
                },
            )  # fmt: skip
        else:
            stats = torch.empty((2, num_rows * groups), dtype=torch.float32, device=t.device)
            wide.backward[(num_rows * groups,)](
                dy, dt, t, z, weight, grad, narrow, dz, stats, size, groups, *strides, weight.stride(0), eps,
                **flags, V=_WIDE_BLOCK, num_warps=8,
            )  # fmt: skip
            wide.weights[(programs * -(-dim // 256),)](
                dy, t, z, stats, partial, num_rows, size, groups, span, strides[0], strides[2], strides[3],
                GATE=gate, HAS_BIAS=has_bias, V=256, num_warps=4,
            )  # fmt: skip
        launch(
            memo, "reduce", kernels.reduce, (-(-partial[0].numel() // 16),), (partial, dweight, dbias, programs, dim),
            lambda: {"HAS_BIAS": has_bias, "BP": 256, "BC": 16, "num_warps": 8},
        )  # fmt: skip
    return grad, dweight


def _rows(x: Tensor) -> Tensor:
    """Return x (..., D) as (rows, D) with its channels side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
