"""SSD, the mixer of Mamba-2: heads of P channels share one scalar decay, so that the scan is made of matrix products.

    [z, x, B, C, δ] = x W_in;   [x, B, C] = silu(conv([x, B, C]));   Δ = softplus(δ + b_Δ)
    h[t] = exp(Δ[t] A) h[t-1] + Δ[t] x[t] B[t]ᵀ;   y[t] = h[t] C[t] + D x[t];   y = norm(y silu(z)) W_out

Source: Dao and Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
Space Duality" (arXiv 2405.21060), sections 6 and 7; parameter names are those of the authors' code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambaverse.kernels.causal_conv1d import causal_conv1d_update
from mambaverse.kernels.ssd import ssd_update
from mambaverse.mixers import register_mixer
from mambaverse.mixers._common import (
    at_least_fp32,
    check_numbers,
    check_range,
    check_sizes,
    check_state,
    heads_and_groups,
    init_dt_bias_,
    init_uniform_A_,
    positive_dt,
    resolve_inner_heads,
)
from mambaverse.mixers._ops import causal_conv1d, gated_rms_norm, ssd
from mambaverse.mixers._projection import Projected

STATE = ("window", "h")


@register_mixer("ssd")
class SSD(Projected):
    """State-space dual mixer of Mamba-2; its state dict is that of mamba_ssm's `Mamba2` and transformers' mixer.

    State: (the last inputs of the convolution (B, d_conv - 1, E + 2 G N), h (B, H, P, N) fp32), E = expand · D = H · P.

    Args:
        dim: Channels D.
        d_state: N, the state's size per channel.
        d_conv: Width of the convolution.
        expand: E / D.
        headdim: P; None: the largest divisor of E up to 64 (64 wherever it divides E).
        ngroups: G: B and C are shared by the H / G heads of a group.
        A_init_range: -A is uniform in it at initialisation.
        dt_min: Smallest Δ at initialisation,
        dt_max: and largest: Δ is log-uniform between them.
        dt_init_floor: Least Δ at initialisation.
        dt_limit: Δ is clamped to this range.
        D_has_hdim: Whether D is a channel's own (E,), rather than a head's (H,).
        rmsnorm: Whether y is normalised, group by group, as well as gated.
        norm_before_gate: Whether y is normalised before it is gated.
        norm_eps: Added to the mean square.
        bias: Whether `in_proj` and `out_proj` have biases.
        conv_bias: Whether the convolution has a bias.
        chunk_size: Tokens that are worked on as one matrix; None: the kernel's choice. Changes no result.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: if `headdim` does not divide E, or `ngroups` the number of heads; sizes below 1.
    """

    supports_state = True
    supports_cu_seqlens = True
    uncalled = frozenset({"conv1d"})

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        check_sizes("ssd", d_state=d_state, d_conv=d_conv, expand=expand, headdim=headdim, ngroups=ngroups)
        check_sizes("ssd", chunk_size=chunk_size)
        check_range("ssd", "[dt_min, dt_max]", (dt_min, dt_max), above=0)
        check_numbers("ssd", dt_init_floor=dt_init_floor, norm_eps=norm_eps)
        inner = expand * dim
        heads, headdim = resolve_inner_heads("ssd", inner, headdim, ngroups)
        self.d_inner, self.d_state, self.headdim, self.ngroups = inner, d_state, headdim, ngroups
        self.dt_range, self.chunk_size = (dt_min, dt_max, dt_init_floor), chunk_size
        self.A_init_range = check_range("ssd", "A_init_range", A_init_range, above=0)
        self.dt_limit = check_range("ssd", "dt_limit", dt_limit, above=-1, finite=False)
        self.sizes = [inner, inner + 2 * ngroups * d_state, heads]  # of z, [x, B, C] and δ

        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=bias, **factory)
        channels = self.sizes[1]
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, bias=conv_bias, **factory)
        self.dt_bias = nn.Parameter(torch.empty(heads, **factory))
        self.A_log = nn.Parameter(torch.empty(heads, **factory))
        self.D = nn.Parameter(torch.empty(inner if D_has_hdim else heads, **factory))
        norm = GatedRMSNorm(inner, inner // ngroups, norm_before_gate, norm_eps, **factory) if rmsnorm else None
        self.norm = norm
        self.out_proj = nn.Linear(inner, dim, bias=bias, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the authors' code does."""
        if self.D.is_meta:
            return
        self.in_proj.reset_parameters()
        self.conv1d.reset_parameters()
        self.out_proj.reset_parameters()
        init_dt_bias_(self.dt_bias, *self.dt_range)
        init_uniform_A_(self.A_log, self.A_init_range)
        self.D.fill_(1)
        if self.norm is not None:
            self.norm.weight.fill_(1)

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
        window, h = (None, None) if state is None else check_state("ssd", state, *STATE)
        y, window, h = self._run(x, window, h, cu_seqlens)
        return y, (window, h)

    @torch.jit.ignore
    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """See `Mixer.init_state`."""
        weight = self.conv1d.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        window = torch.zeros(batch_size, weight.shape[-1] - 1, weight.shape[0], device=device, dtype=dtype)
        shape = (batch_size, self.A_log.shape[0], self.headdim, self.d_state)
        return window, torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """See `Mixer.no_weight_decay`."""
        return {"A_log", "D", "dt_bias"}

    @torch.jit.ignore
    def _step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """See `Mixer._step`; the state is updated in place."""
        window, h = check_state("ssd", state, *STATE)
        z, u, dt = torch.split(self.in_proj(x_t), self.sizes, dim=-1)
        u = causal_conv1d_update(u, window, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        u, A, B, C, D, gate = self._scan_inputs(u, z)
        y = ssd_update(h, u, dt, A, B, C, D, z=gate, dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit)
        return self._output(y, z), state

    @torch.jit.ignore
    def step_sizes(self, x: Tensor, spatial_shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See `Mixer.step_sizes`."""
        _, _, dt = torch.split(self.in_proj(x), self.sizes, dim=-1)
        return {"forward": positive_dt(dt, self.dt_bias).clamp(*self.dt_limit)}

    def _run(
        self, x: Tensor, window: Tensor | None, h: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, u, dt = self._parts(x, self.sizes)
        u, window = causal_conv1d(u, self.conv1d.weight, self.conv1d.bias, window, cu_seqlens, False)
        u, A, B, C, D, gate = self._scan_inputs(u, z)
        y, h = ssd(u, dt, A, B, C, D, gate, self.dt_bias, self.dt_limit, h, cu_seqlens, self.chunk_size)
        return self._output(y, z), window, h

    def _scan_inputs(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return u (..., H, P), A (H,), B and C (..., G, N), D (H,) or (H, P), and the gate of the scan."""
        u, B, C = heads_and_groups(u, self.headdim, self.ngroups, self.d_state)
        D: Tensor = self.D
        if D.shape != self.dt_bias.shape:
            D = D.unflatten(0, (-1, self.headdim))
        A = -torch.exp(at_least_fp32(self.A_log))
        gate = z.unflatten(-1, (-1, self.headdim)) if self.norm is None else None
        return u, A, B, C, D, gate

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the mixer's output, of the scan's y (..., H, P) and z (..., E)."""
        y = y.flatten(-2)
        if self.norm is not None:
            y = self.norm(y, z)
        return self.out_proj(y)


class GatedRMSNorm(nn.Module):
    """RMSNorm of y silu(z), group by group, with one weight a channel; or of y, gated afterwards.

    Args:
        dim: Channels.
        group_size: Channels that share a mean square.
        norm_before_gate: Whether the gate comes after the norm.
        eps: Added to the mean square.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(
        self,
        dim: int,
        group_size: int,
        norm_before_gate: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group_size, self.norm_before_gate, self.eps = group_size, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, y: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
        """Normalise scale · y (..., dim), gated by z (..., dim)."""
        eps = self.eps / scale**2  # which is all that the norm keeps of a scale
        return gated_rms_norm(y, self.weight, z, self.group_size, self.norm_before_gate, eps)
