"""One step of SSD, for decoding: plain PyTorch, and on a GPU one kernel.

h <- exp(Δ A) h + w x Bᵀ,    y = (h C + D x) · silu(z),    Δ = clamp(softplus(dt + dt_bias), dt_limit)

w is Δ unless given; with a weight of its own, x enters y with that: exp(Δ A) h + o x Bᵀ in the place of the new h.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels.backend import current_backend, resolve
from mambaverse.kernels.checks import check_real_tensor, unshared
from mambaverse.kernels.library import define_op
from mambaverse.kernels.ssd.checks import check_inputs, check_weights
from mambaverse.kernels.ssd.layout import state_dtype
from mambaverse.kernels.ssd.reference import step_sizes


@torch.no_grad()
def ssd_update(
    state: Tensor,
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
    weight: Tensor | None = None,
    own_weight: Tensor | None = None,
) -> Tensor:
    """Take one step of `ssd`, in place. No gradients.

    Args:
        state: (B, H, P, N) float32 (float64 where x is), what `ssd` returns as the final state; changed in place,
            after the other inputs, which may be views of it (not under torch.compile), are read.
        x: (B, H, P).
        dt: (B, H).
        A: (H,).
        B: (B, G, N); (B, N) stands for G = 1.
        C: Likewise.
        D: (H,) or (H, P).
        z: (B, H, P).
        dt_bias: (H,).
        dt_softplus: Take softplus of dt + dt_bias.
        dt_limit: Least and greatest Δ.
        weight: (B, H), as in `ssd`.
        own_weight: (B, H).

    Returns:
        y (B, H, P) in the dtype of x.

    Raises:
        ValueError: for a wrong shape, dtype, device or limit.
        BackendError: where no backend runs on the device of x.
    """
    B, C, low, high = check_inputs("ssd_update", x, dt, A, B, C, D, z, dt_bias, dt_limit, "B")
    wide = state_dtype(x)
    check_real_tensor("ssd_update", "state", state, (*x.shape, B.shape[-1]), "(B, H, P, N)", x)
    if state.dtype != wide:
        raise ValueError(f"ssd_update: state has dtype {state.dtype}; expected {wide} beside x of {x.dtype}")
    check_weights("ssd_update", x, weight, own_weight, "(B, H)")
    x, dt, A, B, C, D, z, dt_bias, weight, own_weight = unshared(
        state, x, dt, A, B, C, D, z, dt_bias, weight, own_weight
    )
    backend = current_backend()
    if x.is_cuda or backend == "triton":
        return ssd_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, backend, weight, own_weight)
    return _step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, weight, own_weight)


def _step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, low: float, high: float, weight: Tensor | None = None,
    own_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return y and advance `state`: one step in plain PyTorch, on any device."""
    wide, repeats = state.dtype, x.shape[1] // B.shape[1]
    b, c = (m.to(wide).repeat_interleave(repeats, dim=1) for m in (B, C))  # (B, H, N)
    Δ = step_sizes(dt, dt_bias, dt_softplus, low, high, wide)  # (B, H)
    v = x.to(wide)
    w = Δ if weight is None else weight.to(wide)
    state.mul_((Δ * A.to(wide)).exp()[..., None, None])
    if own_weight is None:
        state.add_((w[..., None] * v)[..., None] * b[:, :, None])
        y = (state * c[:, :, None]).sum(-1)
    else:
        y = (state * c[:, :, None]).sum(-1) + (own_weight.to(wide) * (b * c).sum(-1))[..., None] * v
        state.add_((w[..., None] * v)[..., None] * b[:, :, None])
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).to(wide) * v
    return (y if z is None else y * F.silu(z.to(wide))).to(x.dtype)


def _update(state: Tensor, x: Tensor, *others: Any) -> Tensor:
    *arguments, backend = others[:11]
    if resolve("ssd", backend, x, "_update") == "reference":
        return _step(state, x, *arguments, *others[11:])
    from mambaverse.kernels.ssd.triton_update import update

    return update(state, x, *arguments, *others[11:])


define_op(
    "ssd_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, float dt_min, float dt_max, str backend, Tensor? weight=None, Tensor? own_weight=None) -> "
    "Tensor",
    _update,
    lambda state, x, *others: x.new_empty(x.shape),
)
ssd_step = torch.ops.mambaverse.ssd_update.default
