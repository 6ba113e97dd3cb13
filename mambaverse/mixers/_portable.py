"""The operators in standard operations alone, for programs that leave PyTorch: each recurrence is one `scan`.

    causal_conv1d    a depthwise convolution of the padded sequence; depthwise_conv2d: one of the grid
    selective_scan   h[t] = exp(Δ[t] A) h[t-1] + Δ[t] u[t] B[t],     y[t] = C[t]·h[t]         one ONNX Scan a direction
    ssd              h[t] = exp(Δ[t] A) h[t-1] + w[t] x[t] B[t]ᵀ,    y[t] = h[t] C[t]        w is Δ unless given

Each function here calls the operator of its name in `mambaverse.kernels`, unless `exporting()`: while
`torch.onnx.export` runs, or inside `with timm.layers.set_exportable(True)`, in which `torch.export` writes programs
without our operators. (ONNX's older exporter, `dynamo=False`, knows no `scan`.) Arguments are the operators' own.
Packed sequences and complex states, which only eager mode has, are refused with a UserError.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.errors import UserError
from mambaverse.kernels import causal_conv1d as _conv
from mambaverse.kernels import depthwise_conv2d as _grid
from mambaverse.kernels import nc_ssd as _sum
from mambaverse.kernels import norm as _norm
from mambaverse.kernels import rotary as _rotary
from mambaverse.kernels import selective_scan as _scan
from mambaverse.kernels import ssd as _ssd
from mambaverse.kernels import summed_angles as _angles
from mambaverse.kernels import trapezoid_weights as _weights
from mambaverse.kernels import turned_qk as _turned
from mambaverse.kernels.nc_ssd import reference as _sum_in_plain
from mambaverse.kernels.rotary import reference as _rotary_in_plain
from mambaverse.kernels.summed_angles import reference as _angles_in_plain
from mambaverse.kernels.trapezoid_weights import reference as _weights_in_plain
from mambaverse.kernels.turned_qk import reference as _turned_in_plain


def exporting() -> bool:
    """Return whether the program being traced must run without our operators: under ONNX export, or as timm was told.

    timm's switch is read when forward runs, not when a model is built. If timm was never imported, it is off.
    """
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():  # the first is the cheaper one
        return True
    layers = sys.modules.get("timm.layers")
    return layers is not None and bool(layers.is_exportable())


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `mambaverse.kernels.causal_conv1d.causal_conv1d` with the final state."""
    if not exporting():
        return _conv.causal_conv1d(
            x, weight, bias, activation=activation, initial_state=initial_state, cu_seqlens=cu_seqlens,
            reverse=reverse, return_final_state=True,
        )  # fmt: skip
    _refuse_packed("causal_conv1d", cu_seqlens)
    before = weight.shape[1] - 1
    inputs = x.transpose(1, 2)  # (B, D, L)
    if initial_state is None:
        inputs = F.pad(inputs, (0, before) if reverse else (before, 0))
    else:
        state = initial_state.transpose(1, 2).to(x.dtype)
        inputs = torch.cat([inputs, state.flip(2)] if reverse else [state, inputs], dim=2)
    filters = (weight.flip(1) if reverse else weight).unsqueeze(1).to(x.dtype)
    y = F.conv1d(inputs, filters, None if bias is None else bias.to(x.dtype), groups=weight.shape[0]).transpose(1, 2)
    y = F.silu(y) if activation is not None else y
    last = inputs[:, :, :before].flip(2) if reverse else inputs[:, :, inputs.shape[2] - before :]
    return y, last.transpose(1, 2)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """As `mambaverse.kernels.depthwise_conv2d.depthwise_conv2d`."""
    if not exporting():
        return _grid.depthwise_conv2d(x, weight, bias, activation=activation)
    padding = [weight.shape[1] // 2, weight.shape[2] // 2]
    filters, bias = weight.unsqueeze(1).to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x.permute(0, 3, 1, 2), filters, bias, padding=padding, groups=weight.shape[0]).permute(0, 2, 3, 1)
    return F.silu(y) if activation is not None else y


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `mambaverse.kernels.selective_scan.selective_scan` with the final state."""
    if not exporting():
        return _scan.selective_scan(
            u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
            initial_state=initial_state, cu_seqlens=cu_seqlens, reverse=reverse, return_final_state=True,
        )  # fmt: skip
    _refuse_packed("selective_scan", cu_seqlens)
    if A.is_complex() or B.is_complex() or C.is_complex():
        raise UserError("selective_scan: a complex A has no portable form, since ONNX has no complex numbers")
    wide = torch.promote_types(u.dtype, torch.float32)
    x, A = u.to(wide), A.to(wide)
    dt = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)
    dt = F.softplus(dt) if delta_softplus else dt
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(wide)

    def step(h: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        dt_t, dtx_t, B_t, C_t = inputs  # (B, D), (B, D), then (B, N), or (B, D, N)
        B_t, C_t = (v if v.ndim == 3 else v[:, None] for v in (B_t, C_t))
        h = torch.exp(dt_t[..., None] * A) * h + dtx_t[..., None] * B_t
        return h, (C_t * h).sum(-1)

    B, C = (_rows(v.to(wide), x.shape[2]) for v in (B, C))
    y, h = _run(step, h, (dt, dt * x, B, C), reverse)
    y = y if D is None else y + D.to(wide) * x
    y = y if z is None else y * F.silu(z.to(wide))
    return y.to(u.dtype), h


def bidirectional_selective_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    *,
    merge: str = "add",
    z: Tensor | None = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """As `mambaverse.kernels.selective_scan.bidirectional_selective_scan`; arguments shared, or in pairs as tuples."""
    if not exporting():
        return _scan.bidirectional_selective_scan(
            u, delta, A, B, C, D, merge=merge, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
    ys = []
    for direction in range(2):
        one = [v[direction] if isinstance(v, tuple) else v for v in (u, delta, A, B, C, D, delta_bias)]
        y, _ = selective_scan(
            *one[:6], z=z, delta_bias=one[6], delta_softplus=delta_softplus, cu_seqlens=cu_seqlens,
            reverse=direction == 1,
        )  # fmt: skip
        ys.append(y)
    y = ys[0] + ys[1]
    return y / 2 if merge == "mean" else y


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    weight: Tensor | None = None,
    own_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `mambaverse.kernels.ssd.ssd` with the final state; `chunk_size` changes no number."""
    if not exporting():
        return _ssd.ssd(
            x, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
            initial_state=initial_state, cu_seqlens=cu_seqlens, reverse=reverse,
            return_final_state=True, chunk_size=chunk_size, weight=weight, own_weight=own_weight,
        )  # fmt: skip
    _refuse_packed("ssd", cu_seqlens)
    wide = torch.promote_types(x.dtype, torch.float32)
    x_, A = x.to(wide), A.to(wide)
    Δ = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    Δ = F.softplus(Δ) if dt_softplus else Δ
    if not dt_softplus or dt_limit != (0.0, float("inf")):
        Δ = Δ.clamp(*dt_limit)
    num_heads, head_dim = x.shape[2:]
    B, C = (_rows(v.to(wide), num_heads) for v in (B, C))
    h = x_.new_zeros(x.shape[0], num_heads, head_dim, B.shape[-1]) if initial_state is None else initial_state.to(wide)

    def step(h: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        Δ_t, wx_t, B_t, C_t = inputs  # (B, H), (B, H, P), then (B, N), or (B, H, N)
        B_t, C_t = (v if v.ndim == 3 else v[:, None] for v in (B_t, C_t))
        carried = torch.exp(Δ_t * A)[..., None, None] * h
        h = carried + wx_t[..., None] * B_t[:, :, None]
        return h, ((h if own_weight is None else carried) * C_t[:, :, None]).sum(-1)

    w = Δ if weight is None else weight.to(wide)
    y, h = _run(step, h, (Δ, w[..., None] * x_, B, C), reverse)
    if own_weight is not None:
        own = [v if v.ndim == 4 else v.unsqueeze(2) for v in (B, C)]
        y = y + (own_weight.to(wide) * (own[0] * own[1]).sum(-1))[..., None] * x_
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).to(wide) * x_
    y = y if z is None else y * F.silu(z.to(wide))
    return y.to(x.dtype), h


def gated_rms_norm(
    x: Tensor, weight: Tensor, z: Tensor, *, group_size: int, norm_before_gate: bool, eps: float
) -> Tensor:
    """As `mambaverse.kernels.norm.gated_rms_norm`."""
    if not exporting():
        return _norm.gated_rms_norm(x, weight, z, group_size=group_size, norm_before_gate=norm_before_gate, eps=eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = F.silu(z.to(wide))
    y = x.to(wide) if norm_before_gate else x.to(wide) * gate
    groups = y.unflatten(-1, (-1, group_size))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(wide)
    return (y * gate if norm_before_gate else y).to(x.dtype)


def nc_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, dt_bias: Tensor, dt_softplus: bool
) -> Tensor:
    """As `mambaverse.kernels.nc_ssd.nc_ssd`, whose reference is in standard operations."""
    if not exporting():
        return _sum.nc_ssd(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus)
    return _sum_in_plain.forward(x, dt, A, B, C, D, dt_bias, dt_softplus)[0]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `mambaverse.kernels.rotary.rotary`; its reference is in standard operations, and serves torch.func too."""
    if exporting() or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()):
        return _rotary_in_plain.forward(x, cos, sin, False)
    return _rotary.rotary(x, cos, sin)


def turned_qk(
    B: Tensor,
    C: Tensor,
    B_weight: Tensor,
    C_weight: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    angles: Tensor,
    *,
    pairing: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `mambaverse.kernels.turned_qk.turned_qk`, whose reference is in standard operations."""
    inputs = B, C, B_weight, C_weight, B_bias, C_bias, angles
    if not exporting():
        return _turned.turned_qk(*inputs, pairing=pairing, eps=eps)
    return _turned_in_plain.forward(*inputs, pairing == "interleaved", eps)


def summed_angles(dt: Tensor, rate: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """As `mambaverse.kernels.summed_angles.summed_angles`, whose reference is in standard operations."""
    if not exporting():
        return _angles.summed_angles(dt, rate, initial=initial, cu_seqlens=cu_seqlens)
    _refuse_packed("summed_angles", cu_seqlens)
    return _angles_in_plain.forward(dt, rate, initial, None)


def trapezoid_weights(
    dt: Tensor,
    a: Tensor,
    trap: Tensor,
    dt_bias: Tensor,
    *,
    A_form: str,
    A_floor: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `mambaverse.kernels.trapezoid_weights.trapezoid_weights`, whose reference is in standard operations."""
    if not exporting():
        return _weights.trapezoid_weights(dt, a, trap, dt_bias, A_form=A_form, A_floor=A_floor, cu_seqlens=cu_seqlens)
    _refuse_packed("trapezoid_weights", cu_seqlens)
    return _weights_in_plain.forward(dt, a, trap, dt_bias, None, A_floor, A_form == "heavy_tail")


def _run(step: Any, h: Tensor, inputs: tuple[Tensor, ...], reverse: bool) -> tuple[Tensor, Tensor]:
    """Return the outputs of `step` (B, L, ...) on inputs (B, L, ...) each, and the last state."""
    from torch._higher_order_ops import scan  # loads the compiler

    time_first = tuple(v.transpose(0, 1) for v in inputs)
    final, y = scan(step, h, time_first, dim=0, reverse=reverse)
    return y.transpose(0, 1), final


def _rows(B: Tensor, num_rows: int) -> Tensor:
    """Return B (B, L, N) as it is, of (B, L, G, N) the one row that there is, or a row for each of `num_rows`.

    One row comes without an axis of size 1: the exporter takes it for a size of its own, which it does not broadcast.
    """
    if B.ndim == 3:
        return B
    num_groups = B.shape[2]
    if num_groups == 1:
        return B.squeeze(2)
    if num_groups == num_rows:
        return B
    return B.unsqueeze(3).expand(-1, -1, -1, num_rows // num_groups, -1).flatten(2, 3)


def _refuse_packed(op: str, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise UserError(
            f"{op}: packed sequences (cu_seqlens) have no portable form; export with sequences of one length"
        )
