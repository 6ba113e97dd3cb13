"""The operators as mixers call them, from Python and from TorchScript alike.

Python gets the public function, with its checks and its choice of backend, or under export its portable form.
TorchScript compiles neither keyword-only arguments nor context variables: it gets the registered op, and the device
chooses the backend.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.errors import UserError
from mambaverse.kernels import lti_conv as _lti
from mambaverse.kernels.lti_conv.discretize import discretize
from mambaverse.kernels.ssd import ssd_update
from mambaverse.mixers import _portable
from mambaverse.mixers._common import is_plain


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return silu(convolution) of x (B, L, D), its weight (D, 1, W) as in `nn.Conv1d`, and the final window."""
    weight = weight.squeeze(1)
    if torch.jit.is_scripting():
        return torch.ops.mambaverse.causal_conv1d(x, weight, bias, window, cu_seqlens, True, reverse, "auto")
    else:
        return _portable.causal_conv1d(
            x,
            weight,
            bias,
            activation="silu",
            initial_state=window,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
        )


def silu_conv2d(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return silu(layer(x)) of a grid x (B, H, W, D), from Python; the kernel runs if that is what the layer does."""
    if is_plain(layer, nn.Conv2d) and _is_depthwise(layer):
        return _portable.depthwise_conv2d(x, layer.weight.squeeze(1), layer.bias, activation="silu")
    return F.silu(layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def _is_depthwise(layer: nn.Conv2d) -> bool:
    """Return whether a layer has a filter a channel, of odd sides, with zeros beside a grid whose size it keeps."""
    rows, columns = layer.kernel_size
    return (
        layer.groups == layer.in_channels == layer.out_channels
        and layer.stride == layer.dilation == (1, 1)
        and rows % 2 == columns % 2 == 1
        and layer.padding in ("same", (rows // 2, columns // 2))
        and layer.padding_mode == "zeros"
    )


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor | None,
    h: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gated scan of u (B, L, D), with Δ = softplus(delta + delta_bias), and the final state."""
    if torch.jit.is_scripting():
        save = torch.is_grad_enabled()
        y, h, _ = torch.ops.mambaverse.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, h, cu_seqlens, True, reverse, "auto", save
        )
        return y, h
    else:
        return _portable.selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z=z,
            delta_bias=delta_bias,
            delta_softplus=True,
            initial_state=h,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
        )


def bidirectional_selective_scan(
    u: tuple[Tensor, Tensor],
    delta: tuple[Tensor, Tensor],
    A: tuple[Tensor, Tensor],
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    D: tuple[Tensor, Tensor],
    z: Tensor,
    delta_bias: tuple[Tensor, Tensor],
    cu_seqlens: Tensor | None,
    shared: bool,
    mean: bool,
) -> Tensor:
    """Return the sum, or mean, of the gated scans of u (B, L, D) in both directions, Δ = softplus(delta + delta_bias).

    If `shared`, of each pair but A the first is that of both directions.
    """
    if torch.jit.is_scripting():
        save = torch.is_grad_enabled()
        if shared:
            y, _, _, _ = torch.ops.mambaverse.bidirectional_selective_scan(
                u[0], delta[0], A[0], B[0], C[0], D[0], z, delta_bias[0], None,
                None, None, A[1], None, None, None, None, None, None, cu_seqlens, True, mean, "auto", save,
            )  # fmt: skip
        else:
            y, _, _, _ = torch.ops.mambaverse.bidirectional_selective_scan(
                u[0], delta[0], A[0], B[0], C[0], D[0], z, delta_bias[0], None,
                u[1], delta[1], A[1], B[1], C[1], D[1], None, delta_bias[1], None, cu_seqlens, True, mean, "auto", save,
            )  # fmt: skip
        return y
    else:
        return _portable.bidirectional_selective_scan(
            u[0] if shared else u,
            delta[0] if shared else delta,
            A,
            B[0] if shared else B,
            C[0] if shared else C,
            D[0] if shared else D,
            merge="mean" if mean else "add",
            z=z,
            delta_bias=delta_bias[0] if shared else delta_bias,
            delta_softplus=True,
            cu_seqlens=cu_seqlens,
        )


def scan_both_ways(
    u: Tensor,
    delta: tuple[Tensor, Tensor],
    A: tuple[Tensor, Tensor],
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    D: tuple[Tensor, Tensor],
    delta_bias: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the sum of the ungated scans of u (B, L, D), forward and backward; all but u are pairs of these."""
    if torch.jit.is_scripting():
        y, _, _, _ = torch.ops.mambaverse.bidirectional_selective_scan(
            u, delta[0], A[0], B[0], C[0], D[0], None, delta_bias[0], None,
            None, delta[1], A[1], B[1], C[1], D[1], None, delta_bias[1], None, None, True, False, "auto",
            torch.is_grad_enabled(),
        )  # fmt: skip
        return y
    else:
        return _portable.bidirectional_selective_scan(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    h: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the scan of x (B, L, H, P), with Δ = clamp(softplus(dt + dt_bias), dt_limit), and the final state."""
    if torch.jit.is_scripting():
        chunk = 0 if chunk_size is None else chunk_size
        low, high, save = dt_limit[0], dt_limit[1], torch.is_grad_enabled()
        y, h, _ = torch.ops.mambaverse.ssd(
            x, dt, A, B, C, D, z, dt_bias, h, cu_seqlens, True, low, high, reverse, chunk, "auto", save
        )
        return y, h
    else:
        return _portable.ssd(
            x,
            dt,
            A,
            B,
            C,
            D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=True,
            dt_limit=dt_limit,
            initial_state=h,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
            chunk_size=chunk_size,
        )


def bidirectional_ssd(
    x: tuple[Tensor, Tensor],
    dt: Tensor,
    A: tuple[Tensor, Tensor],
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    D: tuple[Tensor, Tensor],
    z: Tensor | None,
    dt_bias: tuple[Tensor, Tensor],
    dt_limit: tuple[float, float],
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> Tensor:
    """Return the sum (B, L, H, P) of `ssd` and of `ssd` with `reverse`, of pairs (forward, backward)."""
    y, _ = ssd(x[0], dt, A[0], B[0], C[0], D[0], z, dt_bias[0], dt_limit, None, cu_seqlens, chunk_size, False)
    y_b, _ = ssd(x[1], dt, A[1], B[1], C[1], D[1], z, dt_bias[1], dt_limit, None, cu_seqlens, chunk_size, True)
    return y + y_b


def nc_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Return what all tokens of x (B, L, H, P) sum up to, read at each of them, with Δ = softplus(dt + dt_bias)."""
    if torch.jit.is_scripting():
        y, _ = torch.ops.mambaverse.nc_ssd(x, dt, A, B, C, D, dt_bias, True, "auto")
        return y
    else:
        return _portable.nc_ssd(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True)


def linear_recurrence(
    v: Tensor, A: Tensor, k: Tensor, q: Tensor, h: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y[t] = h[t] q[t] of h[t] = exp(A) h[t-1] + v[t] k[t]ᵀ, and the final state: SSD with Δ = 1.

    v is (B, L, H, P), A (H,), k and q (B, L, H, N).
    """
    dt = torch.ones([1], dtype=v.dtype, device=v.device).expand(v.shape[:3])
    if torch.jit.is_scripting():
        y, h, _ = torch.ops.mambaverse.ssd(
            v, dt, A, k, q, None, None, None, h, cu_seqlens, False, 0.0, float("inf"), False, 0, "auto",
            torch.is_grad_enabled(),
        )  # fmt: skip
        return y, h
    else:
        return _portable.ssd(v, dt, A, k, q, initial_state=h, cu_seqlens=cu_seqlens)


def gated_recurrence(
    v: Tensor,
    rate: Tensor,
    weight: Tensor,
    k: Tensor,
    q: Tensor,
    h: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    own_weight: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y[t] = (h[t] q[t] + D v[t]) silu(z[t]) and the last h[t] = exp(-rate[t]) h[t-1] + weight[t] v[t] k[t]ᵀ.

    v and z are (B, L, H, P), rate ≥ 0 and the weights (B, L, H), k and q (B, L, H, N), D (H,); y has v's dtype. With
    `own_weight` token t enters y[t], not h[t], with that.
    """
    A = torch.full([1], -1.0, dtype=rate.dtype, device=v.device).expand(v.shape[2])
    if torch.jit.is_scripting():
        chunk = 0 if chunk_size is None else chunk_size
        y, h, _ = torch.ops.mambaverse.ssd(
            v, rate, A, k, q, D, z, None, h, cu_seqlens, False, 0.0, float("inf"), False, chunk, "auto",
            torch.is_grad_enabled(), weight, own_weight,
        )  # fmt: skip
        return y, h
    else:
        return _portable.ssd(
            v,
            rate,
            A,
            k,
            q,
            D,
            z=z,
            initial_state=h,
            cu_seqlens=cu_seqlens,
            chunk_size=chunk_size,
            weight=weight,
            own_weight=own_weight,
        )


def linear_recurrence_step(h: Tensor, v: Tensor, A: Tensor, k: Tensor, q: Tensor) -> Tensor:
    """Take one step of `linear_recurrence`, h (B, H, P, N) in place: v (B, H, P), k and q (B, H, N), y (B, H, P)."""
    return ssd_update(h, v, v.new_ones(()).expand(v.shape[:2]), A, k, q)


def lti_conv(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    D: Tensor,
    discretization: str,
    h: Tensor | None,
    wants_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the response (B, L, D) of the systems (A, B, C, D) to u, and their final state, if that is wanted."""
    if torch.jit.is_scripting():
        A_bar, B_bar = discretize(A, B, dt, discretization)
        C = C.to(torch.complex128) * (2 if A.is_complex() else 1)
        y, h = torch.ops.mambaverse.lti_conv(u, A_bar, B_bar, C, D, h, False, wants_state, "auto")
        return y, h
    else:
        if _portable.exporting():
            raise UserError("the mixer s4d computes in complex numbers, which ONNX and portable programs do not have")
        if not wants_state:
            return _lti.lti_conv(u, A, B, C, dt, D, discretization=discretization, initial_state=h), None
        return _lti.lti_conv(u, A, B, C, dt, D, discretization=discretization, initial_state=h, return_final_state=True)


def gated_rms_norm(x: Tensor, weight: Tensor, z: Tensor, group_size: int, norm_before_gate: bool, eps: float) -> Tensor:
    """Return the RMS norm of x (..., D), gated by silu(z), in groups of channels."""
    if torch.jit.is_scripting():
        return torch.ops.mambaverse.gated_rms_norm(x, weight, z, group_size, norm_before_gate, eps, "auto")
    else:
        return _portable.gated_rms_norm(x, weight, z, group_size=group_size, norm_before_gate=norm_before_gate, eps=eps)


def turns(at: Tensor, size: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (B, L, P/2) of the angles at · base^(-2i / P), at (B, L), P = `size`.

    The angles are float64: in float32 that of the first pair is off by 4e-3 after 131,072 tokens. What is returned is
    in float32, or in float64 if `like` is.
    """
    exact = torch.float32 if at.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    exponents = torch.arange(0, size, 2, device=at.device, dtype=exact) / size
    angles = at[..., None].to(exact) * torch.pow(base, -exponents)
    wide = torch.promote_types(like.dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of channels (i, i + P/2) of x (B, L, H, P) by angles whose cosines and sines are (B, L, P/2)."""
    if torch.jit.is_scripting():
        return torch.ops.mambaverse.rotary(x, cos, sin, False, "auto")
    else:
        return _portable.rotary(x, cos, sin)
