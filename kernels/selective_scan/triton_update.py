"""One step of the selective scan as one Triton kernel, for real A: the state is read and written once, in place."""

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
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool,
) -> Tensor:  # fmt: skip
    """Return y (B, D) in the dtype of u and advance state (B, D, N); arguments as `selective_scan_update`."""
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if u.numel() == 0:
        return y
    (batch, dim), size = u.shape, A.shape[1]
    B, C = (m.unsqueeze(1) if m.ndim == 2 else m for m in (B, C))
    block = triton.next_power_of_2(size)
    channels = max(1, min(64, 1024 // block))
    with on_device(u):
        _update[(batch * triton.cdiv(dim, channels),)](
            state, u, delta, A, B, C, D, z, delta_bias, y, dim, size, dim // B.shape[1],
            *state.stride(), *u.stride(), *delta.stride(), *A.stride(), *B.stride(), *C.stride(),
            0 if D is None else D.stride(0), *((0, 0) if z is None else z.stride()),
            0 if delta_bias is None else delta_bias.stride(0),
            SOFTPLUS=delta_softplus, HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
            BD=channels, BN=block, num_warps=4 if block * channels >= 512 else 1,
        )  # fmt: skip
    return y


@triton.jit
def _update(
    state, u, delta, A, B, C, D, z, delta_bias, y, dim, size, per_group,
    s_row, s_chan, s_n, u_row, u_chan, dt_row, dt_chan, a_chan, a_n, b_row, b_group, b_n, c_row, c_group, c_n,
    d_chan, z_row, z_chan, bias_chan,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(dim, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks * BD + tl.arange(0, BD)).to(tl.int64)
    n = tl.arange(0, BN).to(tl.int64)
    d_ok = d < dim
    ok = d_ok[:, None] & (n < size)[None, :]
    group = d // per_group
    x = tl.load(u + row * u_row + d * u_chan, mask=d_ok, other=0.0).to(tl.float32)
    dt = tl.load(delta + row * dt_row + d * dt_chan, mask=d_ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(delta_bias + d * bias_chan, mask=d_ok, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    a = tl.load(A + d[:, None] * a_chan + n[None, :] * a_n, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(B + row * b_row + group[:, None] * b_group + n[None, :] * b_n, mask=ok, other=0.0).to(tl.float32)
    c = tl.load(C + row * c_row + group[:, None] * c_group + n[None, :] * c_n, mask=ok, other=0.0).to(tl.float32)
    place = state + row * s_row + d[:, None] * s_chan + n[None, :] * s_n
    h = tl.load(place, mask=ok, other=0.0)
    h = tl.exp(dt[:, None] * a) * h + (dt * x)[:, None] * b
    tl.store(place, h, mask=ok)
    out = tl.sum(h * c, 1)
    if HAS_D:
        out += tl.load(D + d * d_chan, mask=d_ok, other=0.0).to(tl.float32) * x
    if HAS_Z:
        gate = tl.load(z + row * z_row + d * z_chan, mask=d_ok, other=0.0).to(tl.float32)
        out *= gate / (1.0 + tl.exp(-gate))
    tl.store(y + row * dim + d, out.to(y.dtype.element_ty), mask=d_ok)
