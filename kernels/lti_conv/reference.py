"""The diagonal LTI recurrence in plain PyTorch: the spec that every backend is held against.

    h[t] = A_bar h[t-1] + B_bar u[t],   y[t] = Re(Σ_n C h[t]) + D u[t]

Always in complex128. A factor of 2 for the conjugate half that is not kept is in C. Time runs backwards with `reverse`.
Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (2022), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    u: Tensor,
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    wants_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) in the dtype of u and the final state (B, D, N) complex, or an empty one; differentiable.

    Args:
        u: (B, L, D), real.
        A_bar: (D, N) complex128.
        B_bar: (D, N) complex128.
        C: (D, N) complex128.
        D: (D,) or None.
        initial_state: (B, D, N) complex or None.
        reverse: Whether time runs backwards.
        wants_state: Whether to return the final state.
    """
    states = _states(u, A_bar, B_bar, initial_state, reverse)
    y = torch.stack([(C * h).sum(-1).real for h in states[1:]], 1) if u.shape[1] else u.double()
    y = y.flip(1) if reverse else y
    y = y if D is None else y + D.double() * u.double()
    return y.to(u.dtype), states[-1].to(state_dtype(u), copy=True) if wants_state else no_state(u)


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    u: Tensor,
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, A_bar, B_bar, C, D and initial_state for those of y and the final state (None: zeros).

    The other arguments are those of `forward`. Gradients have their inputs' dtypes, those of absent inputs are empty;
    complex ones are PyTorch's: ∂/∂Re + i ∂/∂Im.
    """
    wide = u.double()
    dy = torch.zeros_like(wide) if dy is None else dy.double()
    us, dys = (wide.flip(1), dy.flip(1)) if reverse else (wide, dy)
    states = _states(u, A_bar, B_bar, initial_state, reverse)
    g = torch.zeros_like(states[0]) if dfinal_state is None else dfinal_state.to(torch.complex128)
    dA, dB, dC, du = torch.zeros_like(A_bar), torch.zeros_like(B_bar), torch.zeros_like(C), torch.zeros_like(wide)
    for t in reversed(range(u.shape[1])):
        dC += (dys[:, t, :, None] * states[t + 1].conj()).sum(0)
        g = g + C.conj() * dys[:, t, :, None]  # the gradient of h[t]
        dA += (g * states[t].conj()).sum(0)
        dB += (g * us[:, t, :, None]).sum(0)
        du[:, t] = (g * B_bar.conj()).sum(-1).real
        g = g * A_bar.conj()
    du = du.flip(1) if reverse else du
    du = du if D is None else du + D.double() * dy
    return (
        du.to(u.dtype),
        dA,
        dB,
        dC,
        u.new_empty(0) if D is None else (dy * wide).sum((0, 1)).to(D.dtype),
        u.new_empty(0) if initial_state is None else g.to(initial_state.dtype, copy=True),
    )


def state_dtype(u: Tensor) -> torch.dtype:
    """Return complex64, or complex128 where u is float64."""
    return torch.complex128 if u.dtype == torch.float64 else torch.complex64


def no_state(u: Tensor) -> Tensor:
    """Return what stands for a final state that nobody wants."""
    return u.new_empty(0, dtype=state_dtype(u))


def _states(u: Tensor, A_bar: Tensor, B_bar: Tensor, initial_state: Tensor | None, reverse: bool) -> list[Tensor]:
    """Return the initial state and those after each input, (B, D, N) complex128, in the order of processing."""
    us = (u.flip(1) if reverse else u).to(torch.complex128)
    states = [us.new_zeros((u.shape[0], *A_bar.shape))]
    states = states if initial_state is None else [initial_state.to(torch.complex128)]
    for t in range(u.shape[1]):
        states.append(A_bar * states[-1] + B_bar * us[:, t, :, None])
    return states
