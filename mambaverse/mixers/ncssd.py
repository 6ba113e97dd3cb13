"""Non-causal SSD: the mixer of Mamba-2 with one state of the whole sequence, which every token writes to and reads.

    [z, x, B, C, δ] = u W_in;   [x, B, C] = silu(conv([x, B, C]));   w = -A softplus(δ + b_Δ)
    S = Σ_t w[t] x[t] B[t]ᵀ;   y[t] = S C[t] + D x[t];   out = norm(y silu(z)) W_out

No token comes before another, so images need no second scan, nor the first. What is near is the convolution's part,
along the sequence or, as in VSSD, on the grid of the tokens.

Source: Shi et al. 2024, "VSSD: Vision Mamba with Non-Causal State Space Duality" (arXiv 2407.18559), section 3.2, in
the mixer of Dao and Gu 2024 (arXiv 2405.21060), whose gated norm stands where VSSD's authors multiply y by z after a
layer norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.errors import UserError, suggest
from mambaverse.kernels.backend import recomputed
from mambaverse.mixers import register_mixer
from mambaverse.mixers._common import (
    at_least_fp32,
    check_numbers,
    check_range,
    check_sizes,
    heads_and_groups,
    init_dt_bias_,
    init_uniform_A_,
    positive_dt,
    resolve_inner_heads,
)
from mambaverse.mixers._ops import causal_conv1d, nc_ssd, silu_conv2d
from mambaverse.mixers._projection import Projected
from mambaverse.mixers.ssd import GatedRMSNorm

WIDTHS = {"sequence": 4, "grid": 3}


@register_mixer("ncssd")
class NCSSD(Projected):
    """Non-causal SSD; with `conv="sequence"` its state dict is that of `ssd`.

    What is summed grows with the length, and nothing divides it before the norm: long sequences want bfloat16, since
    float16 holds no more than 65,504.

    Args:
        dim: Channels D.
        d_state: N, the state's size per channel.
        conv: "sequence": a causal convolution along it, as in Mamba-2; "grid": one around each token of the grid (H, W)
            that comes as `spatial_shape`, as in VSSD.
        d_conv: Width of the convolution, on a grid its side, odd; None: 4, on a grid 3.
        expand: E / D.
        headdim: P; None: the largest divisor of E up to 64 (64 wherever it divides E).
        ngroups: G: B and C are shared by the H / G heads of a group.
        A_init_range: -A is uniform in it at initialisation.
        dt_min: Smallest Δ at initialisation,
        dt_max: and largest: Δ is log-uniform between them.
        dt_init_floor: Least Δ at initialisation.
        norm_before_gate: Whether y is normalised before it is gated.
        norm_eps: Added to the mean square.
        bias: Whether `in_proj` and `out_proj` have biases.
        conv_bias: Whether the convolution has a bias.
        recompute: Whether training keeps nothing behind `in_proj`, and works it out again in backward.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: if `headdim` does not divide E, or `ngroups` the number of heads; unknown `conv`, an even `d_conv` on
            a grid, or sizes below 1.
    """

    causal = False
    uncalled = frozenset({"conv1d"})

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        conv: str = "sequence",
        d_conv: int | None = None,
        expand: int = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if conv not in WIDTHS:
            raise UserError(f"ncssd: unknown conv {conv!r}{suggest(conv, WIDTHS)}")
        width = WIDTHS[conv] if d_conv is None else d_conv
        check_sizes("ncssd", d_state=d_state, d_conv=width, expand=expand, headdim=headdim, ngroups=ngroups)
        check_range("ncssd", "[dt_min, dt_max]", (dt_min, dt_max), above=0)
        check_numbers("ncssd", dt_init_floor=dt_init_floor, norm_eps=norm_eps)
        if conv == "grid" and width % 2 == 0:
            raise UserError(f"ncssd: on a grid d_conv must be odd, so that it has a middle, got {width}")
        inner = expand * dim
        heads, headdim = resolve_inner_heads("ncssd", inner, headdim, ngroups)
        self.d_inner, self.d_state, self.headdim, self.ngroups = inner, d_state, headdim, ngroups
        self.recompute = recompute
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.A_init_range = check_range("ncssd", "A_init_range", A_init_range, above=0)
        self.sizes = [inner, inner + 2 * ngroups * d_state, heads]  # of z, [x, B, C] and δ
        self.needs_spatial_shape = conv == "grid"

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = self.sizes[1]
        options: dict[str, Any] = {"groups": channels, "bias": conv_bias, **factory}
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=bias, **factory)
        self.conv1d: nn.Conv1d | None = None
        self.conv2d: nn.Conv2d | None = None
        if conv == "grid":
            self.conv2d = nn.Conv2d(channels, channels, width, padding=width // 2, **options)
        else:
            self.conv1d = nn.Conv1d(channels, channels, width, **options)
        self.dt_bias = nn.Parameter(torch.empty(heads, **factory))
        self.A_log = nn.Parameter(torch.empty(heads, **factory))
        self.D = nn.Parameter(torch.empty(heads, **factory))
        self.norm = GatedRMSNorm(inner, inner // ngroups, norm_before_gate, norm_eps, **factory)
        self.out_proj = nn.Linear(inner, dim, bias=bias, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as `ssd` does."""
        if self.D.is_meta:
            return
        for layer in (self.in_proj, self.conv1d, self.conv2d, self.out_proj):
            if layer is not None:
                layer.reset_parameters()
        init_dt_bias_(self.dt_bias, *self.dt_range)
        init_uniform_A_(self.A_log, self.A_init_range)
        self.D.fill_(1)
        self.norm.weight.fill_(1)

    def mix(self, x: Tensor) -> Tensor:
        """See `Mixer.mix`."""
        return self._run(x, None)

    def mix_grid(self, x: Tensor, spatial_shape: tuple[int, int]) -> Tensor:
        """See `Mixer.mix_grid`."""
        return self._run(x, spatial_shape)

    @torch.jit.ignore
    def mix_sequence(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Any]:
        """See `Mixer.mix_sequence`."""
        return self._run(x, spatial_shape), None

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """See `Mixer.no_weight_decay`."""
        return {"A_log", "D", "dt_bias"}

    @torch.jit.ignore
    def step_sizes(self, x: Tensor, spatial_shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See `Mixer.step_sizes`."""
        _, _, dt = torch.split(self.in_proj(x), self.sizes, dim=-1)
        return {"sum": positive_dt(dt, self.dt_bias)}

    def _run(self, x: Tensor, spatial_shape: tuple[int, int] | None) -> Tensor:
        z, u, dt = self._parts(x, self.sizes)
        if self.recompute and not torch.jit.is_scripting():
            return self._recomputed(z, u, dt, spatial_shape)
        return self._output(z, u, dt, spatial_shape)

    @torch.jit.ignore
    def _recomputed(self, z: Tensor, u: Tensor, dt: Tensor, spatial_shape: tuple[int, int] | None) -> Tensor:
        """Return `_output`, of which backward keeps the arguments alone."""
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return self._output(z, u, dt, spatial_shape)
        output: Any = self._output if torch.compiler.is_compiling() else self._output_again()
        y: Tensor = recomputed(output, z, u, dt, spatial_shape, preserve_rng_state=False)
        return y

    @torch.jit.ignore
    def _output_again(self) -> Callable[..., Tensor]:
        """Return `_output`; it raises if the parameters of now were changed or replaced."""
        known = [(parameter, parameter._version) for parameter in self.parameters()]

        def output(*arguments: Any) -> Tensor:
            now = zip(self.parameters(), known, strict=True)
            if any(p is not parameter or p._version != version for p, (parameter, version) in now):
                raise RuntimeError("ncssd: parameters were changed or replaced between forward and backward, which "
                                   "recompute=True works out again")  # fmt: skip
            return self._output(*arguments)

        return output

    def _output(self, z: Tensor, u: Tensor, dt: Tensor, spatial_shape: tuple[int, int] | None) -> Tensor:
        """Return the mixer's output, of the parts of its projection."""
        y = self._sum(self._near(u, spatial_shape), dt)  # no name holds the convolution's output any longer
        return self.out_proj(self.norm(y, z))

    def _near(self, u: Tensor, spatial_shape: tuple[int, int] | None) -> Tensor:
        """Return the convolution of u (B, L, E + 2 G N)."""
        if self.conv2d is None:
            conv = self.conv1d
            assert conv is not None
            y, _ = causal_conv1d(u, conv.weight, conv.bias, None, None, False)
            return y
        else:
            assert spatial_shape is not None
            grid = u.unflatten(1, [spatial_shape[0], spatial_shape[1]])
            if torch.jit.is_scripting():
                return F.silu(self.conv2d(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).flatten(1, 2)
            else:
                return silu_conv2d(self.conv2d, grid).flatten(1, 2)

    def _sum(self, u: Tensor, dt: Tensor) -> Tensor:
        """Return y (B, L, E), of the convolution's output."""
        u, B, C = heads_and_groups(u, self.headdim, self.ngroups, self.d_state)
        A = -torch.exp(at_least_fp32(self.A_log))
        return nc_ssd(u, dt, A, B, C, self.D, self.dt_bias).flatten(-2)
