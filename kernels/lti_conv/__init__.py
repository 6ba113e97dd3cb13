"""Long convolution with the kernel of a diagonal linear time-invariant state space model: S4D.

    h[t] = A_bar h[t-1] + B_bar u[t],   y[t] = 2 Re(Σ_n C h[t]) + D u[t]

which is y = K * u + D u with K[l] = 2 Re(Σ_n C B_bar A_bar^l); for a real A without the factor 2, which stands for the
conjugate half of the states. Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space
Models" (2022), section 3.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.checks import check_dims, check_tensor, check_tensors
from mambaverse.kernels.lti_conv.discretize import METHODS, discretize
from mambaverse.kernels.lti_conv.op import lti_conv_forward


@overload
def lti_conv(
    u: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, D: Tensor | None = ..., *, discretization: str = ...,
    initial_state: Tensor | None = ..., reverse: bool = ..., return_final_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def lti_conv(
    u: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, D: Tensor | None = ..., *, discretization: str = ...,
    initial_state: Tensor | None = ..., reverse: bool = ..., return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def lti_conv(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    D: Tensor | None = None,
    *,
    discretization: str = "zoh",
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run every channel of u through its own diagonal LTI system.

    Args:
        u: (B, L, D), any strides. float32, bfloat16, float16 or float64.
        A: (D, N) complex, with negative real parts, one of each conjugate pair of poles; or real.
        B: (D, N), real or complex; real if A is.
        C: (D, N), real or complex; real if A is.
        dt: (D,), the step Δ of each channel, positive.
        D: (D,), the weight of u itself in y.
        discretization: "zoh" (zero-order hold) or "bilinear"; see `discretize`.
        initial_state: (B, D, N), h before the first input; zeros without it. Complex if A is.
        reverse: Run time backwards: flip(lti_conv(flip(u))) without the copies. The initial state then lies behind the
            last input.
        return_final_state: Also return h after the last input in the order of processing.

    Returns:
        y (B, L, D) in the dtype of u; with `return_final_state` also the final state (B, D, N), complex64 or for a real
        A float32, in double precision if u is float64. Both are differentiable.

    Raises:
        ValueError: for a wrong shape, dtype, device or discretization.
    """
    op = "lti_conv"
    check_dims(op, "u", u, "(B, L, D)")
    _check_system(op, u, A, B, C, dt, D, discretization)
    if initial_state is not None:
        _check_state(op, "initial_state", initial_state, u, A)
        initial_state = initial_state if initial_state.is_complex() else initial_state.to(torch.complex128)
    A_bar, B_bar, C = _system(A, B, C, dt, discretization)
    y, final_state = lti_conv_forward(
        u, A_bar, B_bar, C, D, initial_state, reverse, return_final_state, current_backend()
    )
    if not return_final_state:
        return y
    return y, final_state if A.is_complex() else final_state.real.contiguous()


def lti_conv_update(
    state: Tensor,
    u_t: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    D: Tensor | None = None,
    *,
    discretization: str = "zoh",
) -> Tensor:
    """Take one step of `lti_conv`, for decoding.

    Args:
        state: (B, D, N), h before this input, of at least 32 bits; complex if A is; updated in place,
            after the other inputs, which may be views of it, are read.
        u_t: (B, D).
        A: (D, N).
        B: (D, N).
        C: (D, N).
        dt: (D,).
        D: (D,).
        discretization: "zoh" or "bilinear".

    Returns:
        y_t (B, D) in the dtype of u_t.

    Raises:
        ValueError: for a wrong shape, dtype, device or discretization.
    """
    op = "lti_conv_update"
    check_dims(op, "u_t", u_t, "(B, D)")
    _check_system(op, u_t, A, B, C, dt, D, discretization)
    _check_state(op, "state", state, u_t, A)
    if state.element_size() < (8 if state.is_complex() else 4):
        raise ValueError(f"{op}: state has dtype {state.dtype}; expected one of at least 32 bits, as it adds up")
    A_bar, B_bar, C = _system(A, B, C, dt, discretization)
    h = A_bar * state + B_bar * u_t.double().unsqueeze(-1)
    y_t = (C * h).sum(-1).real
    y_t = (y_t if D is None else y_t + D.double() * u_t).to(u_t.dtype)  # before the state changes: u_t may be in it
    state.copy_(h if state.is_complex() else h.real)
    return y_t


def _system(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, discretization: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return A_bar, B_bar and C times the number of states that each one kept stands for, in complex128."""
    A_bar, B_bar = discretize(A, B, dt, discretization)
    return A_bar, B_bar, C.to(torch.complex128) * (2 if A.is_complex() else 1)


def _check_system(
    op: str, u: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, D: Tensor | None, discretization: str
) -> None:
    check_tensors(op, A=A, dt=dt)
    dim = u.shape[-1]
    if A.ndim != 2:
        raise ValueError(f"{op}: A has shape {tuple(A.shape)}; expected (D, N) with D = {dim}")
    for name, tensor in {"A": A, "B": B, "C": C}.items():
        check_tensor(op, name, tensor, (dim, A.shape[1]), "(D, N)", u)
        if tensor.is_complex() and not A.is_complex():
            raise ValueError(f"{op}: {name} is complex and A real; expected a real {name}")
    for name, vector in {"dt": dt, "D": D}.items():
        if vector is not None:
            check_tensor(op, name, vector, (dim,), "(D,)", u)
            if vector.is_complex():
                raise ValueError(f"{op}: {name} has dtype {vector.dtype}; expected a real one")
    if discretization not in METHODS:
        raise ValueError(f"{op}: unknown discretization {discretization!r}; expected one of {', '.join(METHODS)}")


def _check_state(op: str, name: str, state: Tensor, u: Tensor, A: Tensor) -> None:
    check_tensor(op, name, state, (u.shape[0], *A.shape), "(B, D, N)", u)
    if state.is_complex() != A.is_complex():
        kind = "complex" if A.is_complex() else "real"
        raise ValueError(f"{op}: {name} has dtype {state.dtype}; expected a {kind} one, as A is {A.dtype}")
