"""From the continuous system h' = A h + B u to one step of Δ, by zero-order hold or the bilinear rule, in complex128.

    zoh        A_bar = exp(Δ A)                      B_bar = (exp(Δ A) - 1) / A · B
    bilinear   A_bar = (1 + Δ A / 2) / (1 - Δ A / 2)  B_bar = Δ / (1 - Δ A / 2) · B

A_bar is raised to the power of the sequence's length, so it keeps the digits of complex128: in complex64 the phase of
its 10000th power is wrong by 5e-3 where Δ Im A is 10. Source: Gu et al., "On the Parameterization and Initialization of
Diagonal State Space Models" (2022), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("zoh", "bilinear")


def discretize(A: Tensor, B: Tensor, dt: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Return A_bar and B_bar (D, N) complex128; plain differentiable PyTorch that TorchScript compiles.

    Args:
        A: (D, N), real or complex.
        B: (D, N), real or complex.
        dt: (D,), the step Δ of each channel, positive.
        method: "zoh" or "bilinear".

    Raises:
        ValueError: for another method.
    """
    step = dt.to(torch.float64).unsqueeze(-1)
    z = step * A.to(torch.complex128)
    if method == "zoh":
        return torch.exp(z), step * _expm1_over(z) * B.to(torch.complex128)
    if method != "bilinear":
        raise ValueError(f'lti_conv: unknown discretization "{method}"; expected "zoh" or "bilinear"')
    inverse = 1 / (1 - z / 2)
    return (1 + z / 2) * inverse, step * inverse * B.to(torch.complex128)


def _expm1_over(z: Tensor) -> Tensor:
    """Return (e^z - 1) / z, whose numerator loses digits near 0, where it is 1 + z/2 (1 + z/3 (1 + ...))."""
    near = z.abs() < 0.03
    small, large = torch.where(near, z, 0), torch.where(near, 1, z)
    one = torch.ones_like(z)
    series = one
    for i in range(8, 1, -1):
        series = torch.addcmul(one, small, series, value=1.0 / i)
    return torch.where(near, series, (torch.exp(large) - 1) / large)
