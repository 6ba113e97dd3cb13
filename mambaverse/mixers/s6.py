"""S6, the mixer of Mamba-1: a state-space model whose step Δ, input B and output C are functions of the token.

    [u, z] = x W_in;   u = silu(conv(u));   [δ, B, C] = u W_x;   Δ = softplus(δ W_Δ + b_Δ)
    h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] u[t];   y[t] = (C[t]·h[t] + D u[t]) silu(z[t]) W_out

Source: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752),
sections 3.2 to 3.6; parameter names are those of the authors' code. The switches are its ablations (section 4.6).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.errors import UserError, suggest
from mambaverse.kernels.causal_conv1d import causal_conv1d_update
from mambaverse.kernels.selective_scan import selective_scan_update
from mambaverse.mixers import register_mixer
from mambaverse.mixers._common import (
    at_least_fp32,
    check_numbers,
    check_range,
    check_sizes,
    check_state,
    init_dt_bias_,
    init_dt_proj_,
    init_s4d_real_,
    positive_dt,
    resolve_dt_rank,
)
from mambaverse.mixers._ops import causal_conv1d, selective_scan
from mambaverse.mixers._projection import Projected

A_INITS = ("s4d_real", "s4d_lin", "random")
STATE = ("window", "h")


@register_mixer("s6")
class S6(Projected):
    """Selective state-space mixer of Mamba-1; with default arguments its state dict is that of mamba_ssm's `Mamba`.

    State: (the last inputs of the convolution (B, d_conv - 1, E), h (B, E, N) fp32), E = expand · D.

    Args:
        dim: Channels D.
        d_state: N, real numbers in a channel's state; N / 2 complex ones with a complex A.
        d_conv: Width of the convolution.
        expand: E / D.
        dt_rank: Rank of Δ's projection; "auto": ceil(D / 16).
        dt_min: Smallest Δ at initialisation,
        dt_max: and largest: Δ is log-uniform between them.
        dt_init: Initialisation of `dt_proj.weight`: "random" (uniform in ± dt_scale · dt_rank^-1/2) or "constant".
        dt_scale: Its scale.
        dt_init_floor: Least Δ at initialisation.
        selective_dt: Whether Δ depends on the token; otherwise it is a parameter (E,), `dt_bias`.
        selective_B: Whether B does; otherwise it is a parameter (E, N).
        selective_C: Whether C does; otherwise it is a parameter (E, N).
        A_init: "s4d_real": A[n] = -(n + 1); "s4d_lin": -1/2 + iπn, complex; "random": -exp(a), a normal.
        conv_bias: Whether the convolution has a bias.
        bias: Whether `in_proj` and `out_proj` have biases.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: unknown `A_init` or `dt_init`, sizes below 1, or an odd `d_state` with a complex A.
    """

    supports_state = True
    supports_cu_seqlens = True
    uncalled = frozenset({"conv1d", "dt_proj"})

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        selective_dt: bool = True,
        selective_B: bool = True,
        selective_C: bool = True,
        A_init: str = "s4d_real",
        conv_bias: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("s6", d_state=d_state, d_conv=d_conv, expand=expand)
        check_range("s6", "[dt_min, dt_max]", (dt_min, dt_max), above=0)
        check_numbers("s6", dt_scale=dt_scale, dt_init_floor=dt_init_floor)
        if A_init not in A_INITS:
            raise UserError(f"s6: unknown A_init {A_init!r}{suggest(A_init, A_INITS)}")
        if dt_init not in ("random", "constant"):
            raise UserError(f"s6: expected dt_init 'random' or 'constant', got {dt_init!r}")
        self.is_complex = A_init == "s4d_lin"
        if self.is_complex and d_state % 2:
            raise UserError(
                f"s6: A_init='s4d_lin' holds d_state / 2 complex numbers, so d_state must be even: {d_state}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = expand * dim
        self.d_inner, self.d_state = inner, d_state
        self.dt_rank = resolve_dt_rank("s6", dt_rank, dim)
        self.dt_range, self.dt_init, self.dt_scale = (dt_min, dt_max, dt_init_floor), dt_init, dt_scale
        self.A_init = A_init
        self.sizes = [self.dt_rank * selective_dt, d_state * selective_B, d_state * selective_C]  # of δ, B and C

        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias, **factory)  # holds the parameters
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False, **factory) if sum(self.sizes) else None
        self.dt_proj = nn.Linear(self.dt_rank, inner, **factory) if selective_dt else None
        self.dt_bias = None if selective_dt else nn.Parameter(torch.empty(inner, **factory))
        self.B = None if selective_B else nn.Parameter(torch.empty(inner, d_state, **factory))
        self.C = None if selective_C else nn.Parameter(torch.empty(inner, d_state, **factory))
        num_modes = d_state // 2 if self.is_complex else d_state
        self.A_log = nn.Parameter(torch.empty(inner, num_modes, **factory))
        self.A_imag = nn.Parameter(torch.empty(inner, num_modes, **factory)) if self.is_complex else None
        self.D = nn.Parameter(torch.empty(inner, **factory))
        self.out_proj = nn.Linear(inner, dim, bias=bias, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the paper does (section 3.6)."""
        if self.D.is_meta:
            return
        self.in_proj.reset_parameters()
        self.conv1d.reset_parameters()
        self.out_proj.reset_parameters()
        if self.x_proj is not None:
            self.x_proj.reset_parameters()
        if self.dt_proj is not None:
            init_dt_proj_(self.dt_proj.weight, self.dt_init, self.dt_scale)
            init_dt_bias_(self.dt_proj.bias, *self.dt_range)
        if self.dt_bias is not None:
            init_dt_bias_(self.dt_bias, *self.dt_range)
        if self.A_init == "random":
            self.A_log.normal_()
        elif self.A_imag is None:
            init_s4d_real_(self.A_log)
        else:
            n = torch.arange(self.A_imag.shape[1], device=self.A_imag.device, dtype=torch.float32)
            self.A_log.fill_(math.log(0.5))
            self.A_imag.copy_((math.pi * n).expand_as(self.A_imag))
        self.D.fill_(1)
        if self.B is not None:  # as in S4D: the input enters every mode alike, C chooses among them
            self.B.fill_(1)
            if self.is_complex:
                self.B[:, self.d_state // 2 :] = 0
        if self.C is not None:
            self.C.normal_()

    def mix(self, x: Tensor) -> Tensor:
        """See `Mixer.mix`."""
        return self._run(x, None, None, None)[0]

    @torch.jit.ignore
    def mix_sequence(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Any]:
        """See `Mixer.mix_sequence`."""
        window, h = (None, None) if state is None else check_state("s6", state, *STATE)
        y, window, h = self._run(x, window, h, cu_seqlens)
        return y, (window, h)

    @torch.jit.ignore
    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """See `Mixer.init_state`."""
        weight = self.conv1d.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        window = torch.zeros(batch_size, weight.shape[-1] - 1, self.d_inner, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        wide = wide.to_complex() if self.is_complex else wide
        return window, torch.zeros(batch_size, *self.A_log.shape, device=device, dtype=wide)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """See `Mixer.no_weight_decay`."""
        names = {"A_log", "A_imag", "D", "dt_bias", "dt_proj.bias"}
        return names & {name for name, _ in self.named_parameters()}

    @torch.jit.ignore
    def _step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """See `Mixer._step`; the state is updated in place."""
        window, h = check_state("s6", state, *STATE)
        u, z = self.in_proj(x_t).chunk(2, dim=-1)  # (B, E) each
        u = causal_conv1d_update(u, window, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        delta, delta_bias, A, B, C = self._scan_inputs(u[:, None])
        y = selective_scan_update(
            *(h, u, delta[:, 0], A, B[:, 0], C[:, 0], self.D), z=z, delta_bias=delta_bias, delta_softplus=True
        )
        return self.out_proj(y), state

    @torch.jit.ignore
    def step_sizes(self, x: Tensor, spatial_shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See `Mixer.step_sizes`."""
        if self.dt_proj is None:
            return {}
        u, _ = self.in_proj(x).chunk(2, dim=-1)
        u, _ = causal_conv1d(u, self.conv1d.weight, self.conv1d.bias, None, None, False)
        return {"forward": positive_dt(*self._scan_inputs(u)[:2])}

    def _run(
        self, x: Tensor, window: Tensor | None, h: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, z = self._parts(x, [self.d_inner, self.d_inner])
        u, window = causal_conv1d(u, self.conv1d.weight, self.conv1d.bias, window, cu_seqlens, False)
        delta, delta_bias, A, B, C = self._scan_inputs(u)
        y, h = selective_scan(u, delta, A, B, C, self.D, z, delta_bias, h, cu_seqlens, False)
        return self.out_proj(y), window, h

    def _scan_inputs(self, u: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """Return δ (B, L, E), its bias (E,), A (E, N), and B and C (B, L, N), or (B, L, E, N) if one is constant."""
        delta, B, C = u, u, u
        if self.x_proj is not None:
            delta, B, C = torch.split(self.x_proj(u), self.sizes, dim=-1)
        delta_bias: Tensor | None = self.dt_bias
        if self.dt_proj is not None:
            delta, delta_bias = F.linear(delta, self.dt_proj.weight), self.dt_proj.bias
        else:
            delta = torch.zeros_like(self.D).expand_as(u)
        B = self._modes(B if self.B is None else self.B)
        C = self._modes(C if self.C is None else self.C)
        if self.B is not None or self.C is not None:  # constants are a channel's own: every channel is a group
            B, C = _per_channel(B, u), _per_channel(C, u)
        A = -torch.exp(at_least_fp32(self.A_log))
        if self.A_imag is not None:
            A = torch.complex(A, self.A_imag.to(A.dtype))
        return delta, delta_bias, A, B, C

    def _modes(self, B: Tensor) -> Tensor:
        """Return the coefficients of the modes: B (..., N), or with a complex A its halves as one (..., N/2)."""
        if self.A_imag is None:
            return B
        real, imag = at_least_fp32(B).chunk(2, dim=-1)
        return torch.complex(real, imag)


def _per_channel(B: Tensor, u: Tensor) -> Tensor:
    """Return a view (B, L, E, N) of what all channels share, B (B, L, N), or of what all tokens share, B (E, N)."""
    return (B if B.ndim == 2 else B[:, :, None]).expand(u.shape[0], u.shape[1], u.shape[2], B.shape[-1])
