"""S4D: a diagonal linear time-invariant state-space model per channel, a long convolution in training.

    h[t] = exp(Δ A) h[t-1] + (exp(Δ A) - 1) / A · x[t];   y[t] = 2 Re(C·h[t]) + D x[t];   out = GLU(gelu(y) W)

Source: Gu, Gupta, Goel and Ré 2022, "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv
2206.11893), sections 3 and 4, with the block of its experiments: S4D, GELU, a linear layer with a GLU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.errors import UserError, suggest
from mambaverse.kernels.lti_conv import lti_conv_update
from mambaverse.mixers import register_mixer
from mambaverse.mixers._common import at_least_fp32, check_range, check_sizes, check_state, init_log_uniform_
from mambaverse.mixers._ops import lti_conv
from mambaverse.mixers.base import Mixer

INITS = ("legs", "lin", "inv", "real")


@register_mixer("s4d")
class S4D(Mixer):
    """Diagonal state-space mixer (LTI), S4D-LegS by default.

    State: h (B, D, N / 2) complex64, one of each conjugate pair; with `init="real"` (B, D, N) fp32.

    Args:
        dim: Channels D.
        d_state: N, real numbers in a channel's state; N / 2 complex ones unless A is real.
        init: Where A starts: "legs" (the eigenvalues of HiPPO-LegS's normal part), "lin" (-1/2 + iπn),
            "inv" (-1/2 + i N/π (N / (2n + 1) - 1)) or "real" (-(n + 1), and A stays real).
        discretization: "zoh" (zero-order hold) or "bilinear".
        dt_min: Smallest Δ at initialisation,
        dt_max: and largest: Δ is log-uniform between them.
        bias: Whether `out_proj` has a bias.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: unknown `init` or `discretization`, or an odd `d_state` with a complex A.
    """

    supports_state = True

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        init: str = "legs",
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("s4d", d_state=d_state)
        if init not in INITS:
            raise UserError(f"s4d: unknown init {init!r}{suggest(init, INITS)}")
        if discretization not in ("zoh", "bilinear"):
            raise UserError(f"s4d: expected discretization 'zoh' or 'bilinear', got {discretization!r}")
        if init != "real" and d_state % 2:
            raise UserError(f"s4d: init={init!r} holds d_state / 2 complex numbers, so d_state must be even: {d_state}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.init, self.discretization = init, discretization
        self.dt_range = check_range("s4d", "[dt_min, dt_max]", (dt_min, dt_max), above=0)
        num_modes = d_state if init == "real" else d_state // 2
        self.log_dt = nn.Parameter(torch.empty(dim, **factory))
        self.A_log = nn.Parameter(torch.empty(dim, num_modes, **factory))
        self.A_imag = None if init == "real" else nn.Parameter(torch.empty(dim, num_modes, **factory))
        self.C = nn.Parameter(torch.empty(dim, d_state, **factory))  # real parts, then imaginary ones
        self.D = nn.Parameter(torch.empty(dim, **factory))
        self.out_proj = nn.Linear(dim, 2 * dim, bias=bias, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        if self.D.is_meta:
            return
        init_log_uniform_(self.log_dt, *self.dt_range)
        A = initial_poles(self.C.shape[1], self.init)
        self.A_log.copy_(torch.log(-A.real).expand_as(self.A_log))
        if self.A_imag is not None:
            self.A_imag.copy_(A.imag.expand_as(self.A_imag))
        self.C.normal_(std=1.0 if self.A_imag is None else math.sqrt(0.5))  # |C| has mean square 1
        self.D.normal_()
        self.out_proj.reset_parameters()

    def mix(self, x: Tensor) -> Tensor:
        """See `Mixer.mix`."""
        return self._run(x, None, False)[0]

    @torch.jit.ignore
    def mix_sequence(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Any]:
        """See `Mixer.mix_sequence`."""
        return self._run(x, None if state is None else check_state("s4d", state, "h"), True)

    @torch.jit.ignore
    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """See `Mixer.init_state`."""
        wide = torch.promote_types(dtype or self.D.dtype, torch.float32)
        wide = wide if self.A_imag is None else wide.to_complex()
        return torch.zeros(batch_size, *self.A_log.shape, device=device or self.D.device, dtype=wide)

    @torch.jit.ignore
    def _step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """See `Mixer._step`; the state is updated in place."""
        A, C, dt = self._system()
        B = torch.ones_like(A)
        y = lti_conv_update(
            check_state("s4d", state, "h"), x_t, A, B, C, dt, self.D, discretization=self.discretization
        )
        return self._output(y), state

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """See `Mixer.no_weight_decay`."""
        return {"log_dt", "A_log", "D"} | (set() if self.A_imag is None else {"A_imag"})

    def _run(self, x: Tensor, h: Tensor | None, wants_state: bool) -> tuple[Tensor, Tensor | None]:
        A, C, dt = self._system()
        y, h = lti_conv(x, A, torch.ones_like(A), C, dt, self.D, self.discretization, h, wants_state)
        return self._output(y), h

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A and C (D, N), complex or real, and Δ (D,). B is 1: only its product with C matters."""
        A, C = -torch.exp(at_least_fp32(self.A_log)), at_least_fp32(self.C)
        if self.A_imag is not None:
            real, imag = C.chunk(2, dim=-1)
            A, C = torch.complex(A, self.A_imag.to(A.dtype)), torch.complex(real, imag)
        return A, C, torch.exp(at_least_fp32(self.log_dt))

    def _output(self, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(y)), dim=-1)


def initial_poles(d_state: int, init: str) -> Tensor:
    """Return where A starts, the same in every channel: (N / 2,) complex128, or (N,) float64 for "real"."""
    n = torch.arange(d_state // 2, device="cpu", dtype=torch.float64)
    if init == "real":
        return -torch.arange(1, d_state + 1, device="cpu", dtype=torch.float64)
    if init == "lin":
        imag = math.pi * n
    elif init == "inv":
        imag = d_state / math.pi * (d_state / (2 * n + 1) - 1)
    else:
        # HiPPO-LegS plus its rank-1 correction is -1/2 plus a skew-symmetric matrix: eigenvalues -1/2 ± i s.
        root = torch.sqrt(torch.arange(d_state, device="cpu", dtype=torch.float64) + 0.5)
        lower = torch.tril(torch.outer(root, root), -1)
        imag = torch.linalg.eigvalsh(1j * (lower - lower.T))[d_state // 2 :]  # ascending, in pairs ± s
    return torch.complex(torch.full_like(imag, -0.5), imag)
