"""One step of SSD as one Triton kernel: the state is read and written once, in place."""

# In what Triton compiles, constexpr parameters alone have a type.
# mypy: allow-incomplete-defs, disable-error-code="assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambaverse.kernels.launch import on_device
from mambaverse.kernels.triton_math import softplus


def update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, weight: Tensor | None = None,
    own_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return y (B, H, P) in the dtype of x and advance state (B, H, P, N); arguments as `ssd_update`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    (batch, heads, head_dim), size = x.shape, B.shape[-1]
    block = triton.next_power_of_2(size)
    rows = max(1, min(triton.next_power_of_2(head_dim), 2048 // block))
    D_strides = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.ndim == 2 else 0)
    with on_device(x):
        _update[(batch * heads * triton.cdiv(head_dim, rows),)](
            *(state, x, dt, A, B, C, *(x if t is None else t for t in (D, z, dt_bias, weight, own_weight)), y),
            *(heads, head_dim, size, heads // B.shape[1], dt_min, dt_max),
            *(*state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(), *D_strides),
            *((0, 0, 0) if z is None else z.stride()), 0 if dt_bias is None else dt_bias.stride(0),
            *((0, 0) if weight is None else weight.stride()), *((0, 0) if own_weight is None else own_weight.stride()),
            SOFTPLUS=dt_softplus, HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None,
            HAS_WEIGHT=weight is not None, HAS_OWN=own_weight is not None,
            BP=rows, BN=block, num_warps=4 if block * rows >= 512 else 1,
        )  # fmt: skip
    return y


@triton.jit
def _update(
    state, x, dt, A, B, C, D, z, bias, weight, own, y, heads, head_dim, size, per_group, low, high,
    s_b, s_h, s_p, s_n, x_b, x_h, x_p, dt_b, dt_h, a_h, b_b, b_g, b_n, c_b, c_g, c_n, d_h, d_p, z_b, z_h, z_p, bias_h,
    w_b, w_h, o_b, o_h,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_OWN: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(head_dim, BP)
    pid = tl.program_id(0)
    b, h = (pid // blocks // heads).to(tl.int64), (pid // blocks % heads).to(tl.int64)
    p = (pid % blocks * BP + tl.arange(0, BP)).to(tl.int64)
    n = tl.arange(0, BN).to(tl.int64)
    p_ok, n_ok = p < head_dim, n < size
    ok = p_ok[:, None] & n_ok[None, :]
    step = tl.load(dt + b * dt_b + h * dt_h).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias + h * bias_h).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(step < low, low, step)
    step = tl.where(step > high, high, step)
    v = tl.load(x + b * x_b + h * x_h + p * x_p, mask=p_ok, other=0.0).to(tl.float32)
    k = tl.load(B + b * b_b + h // per_group * b_g + n * b_n, mask=n_ok, other=0.0).to(tl.float32)
    q = tl.load(C + b * c_b + h // per_group * c_g + n * c_n, mask=n_ok, other=0.0).to(tl.float32)
    place = state + b * s_b + h * s_h + p[:, None] * s_p + n[None, :] * s_n
    decay = tl.exp(step * tl.load(A + h * a_h).to(tl.float32))
    S = tl.load(place, mask=ok, other=0.0)
    w = step
    if HAS_WEIGHT:
        w = tl.load(weight + b * w_b + h * w_h).to(tl.float32)
    if HAS_OWN:
        S = decay * S
        out = tl.sum(S * q[None, :], 1) + tl.load(own + b * o_b + h * o_h).to(tl.float32) * tl.sum(k * q) * v
        S += (w * v)[:, None] * k[None, :]
    else:
        S = decay * S + (w * v)[:, None] * k[None, :]
        out = tl.sum(S * q[None, :], 1)
    tl.store(place, S, mask=ok)
    if HAS_D:
        out += tl.load(D + h * d_h + p * d_p, mask=p_ok, other=0.0).to(tl.float32) * v
    if HAS_Z:
        gate = tl.load(z + b * z_b + h * z_h + p * z_p, mask=p_ok, other=0.0).to(tl.float32)
        out *= gate / (1.0 + tl.exp(-gate))
    tl.store(y + (b * heads + h) * head_dim + p, out.to(y.dtype.element_ty), mask=p_ok)
