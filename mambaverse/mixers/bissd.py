"""Bidirectional SSD: the mixer of Mamba-2 in both directions at once, between one input and one output projection.

    [z, x, B, C, δ] = u W_in;   y = merge(SSD_f(x, B, C, δ), R SSD_b(R x, R B, R C, R δ));   out = norm(y silu(z)) W_out

R reverses the sequence; each direction has its own convolution over [x, B, C], bias of δ, A and D. Built like the mixer
of Vision Mamba (Zhu et al. 2024, arXiv 2401.09417, algorithm 1) out of that of Mamba-2 (Dao and Gu 2024, arXiv
2405.21060, section 7). What the forward direction owns has the names of Mamba-2, what the backward one owns those of
Vim (`A_b_log`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mambaverse.errors import UserError, suggest
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
from mambaverse.mixers._ops import bidirectional_ssd, causal_conv1d
from mambaverse.mixers._projection import Projected
from mambaverse.mixers.ssd import GatedRMSNorm

MERGES = ("mean", "add")


@register_mixer("bissd")
class BiSSD(Projected):
    """Bidirectional SSD with shared projections and gate; a state dict of `ssd` holds all but `*_b`.

    Args:
        dim: Channels D.
        d_state: N, the state's size per channel.
        d_conv: Width of the convolutions.
        expand: E / D.
        headdim: P; None: the largest divisor of E up to 64 (64 wherever it divides E).
        ngroups: G: B and C are shared by the H / G heads of a group.
        merge: "mean" or "add" of the two directions.
        shared: Whether the directions share convolution, δ's bias and D, and each owns only its A; the backward scan
            then reads what the (forward) convolution wrote.
        A_init_range: -A is uniform in it at initialisation, in either direction.
        dt_min: Smallest Δ at initialisation,
        dt_max: and largest: Δ is log-uniform between them.
        dt_init_floor: Least Δ at initialisation.
        dt_limit: Δ is clamped to this range.
        rmsnorm: Whether y is normalised, group by group, as well as gated.
        norm_before_gate: Whether y is normalised before it is gated.
        norm_eps: Added to the mean square.
        bias: Whether `in_proj` and `out_proj` have biases.
        conv_bias: Whether the convolutions have biases.
        chunk_size: Tokens that are worked on as one matrix; None: the kernel's choice. Changes no result.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: if `headdim` does not divide E, or `ngroups` the number of heads; unknown `merge`; sizes below 1.
    """

    causal = False
    supports_cu_seqlens = True
    uncalled = frozenset({"conv1d", "conv1d_b"})

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        merge: str = "mean",
        shared: bool = False,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
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
        check_sizes("bissd", d_state=d_state, d_conv=d_conv, expand=expand, headdim=headdim, ngroups=ngroups)
        check_sizes("bissd", chunk_size=chunk_size)
        check_range("bissd", "[dt_min, dt_max]", (dt_min, dt_max), above=0)
        check_numbers("bissd", dt_init_floor=dt_init_floor, norm_eps=norm_eps)
        if merge not in MERGES:
            raise UserError(f"bissd: unknown merge {merge!r}{suggest(merge, MERGES)}")
        inner = expand * dim
        heads, headdim = resolve_inner_heads("bissd", inner, headdim, ngroups)
        self.d_inner, self.d_state, self.headdim, self.ngroups = inner, d_state, headdim, ngroups
        self.merge, self.dt_range, self.chunk_size = merge, (dt_min, dt_max, dt_init_floor), chunk_size
        self.A_init_range = check_range("bissd", "A_init_range", A_init_range, above=0)
        self.dt_limit = check_range("bissd", "dt_limit", dt_limit, above=-1, finite=False)
        self.sizes = [inner, inner + 2 * ngroups * d_state, heads]  # of z, [x, B, C] and δ

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=bias, **factory)
        make = partial(_direction, self.sizes[1], d_conv, conv_bias, heads, **factory)
        self.conv1d, self.dt_bias, self.D = make()
        self.conv1d_b: nn.Conv1d | None = None
        self.dt_bias_b: nn.Parameter | None = None
        self.D_b: nn.Parameter | None = None
        if not shared:
            self.conv1d_b, self.dt_bias_b, self.D_b = make()
        self.A_log = nn.Parameter(torch.empty(heads, **factory))
        self.A_b_log = nn.Parameter(torch.empty(heads, **factory))
        self.norm = GatedRMSNorm(inner, inner // ngroups, norm_before_gate, norm_eps, **factory) if rmsnorm else None
        self.out_proj = nn.Linear(inner, dim, bias=bias, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as `ssd` does."""
        if self.D.is_meta:
            return
        for layer in (self.in_proj, self.conv1d, self.conv1d_b, self.out_proj):
            if layer is not None:
                layer.reset_parameters()
        for dt_bias in (self.dt_bias, self.dt_bias_b):
            if dt_bias is not None:
                init_dt_bias_(dt_bias, *self.dt_range)
        for A_log in (self.A_log, self.A_b_log):
            init_uniform_A_(A_log, self.A_init_range)
        for ones in (self.D, self.D_b, None if self.norm is None else self.norm.weight):
            if ones is not None:
                ones.fill_(1)

    def mix(self, x: Tensor) -> Tensor:
        """See `Mixer.mix`."""
        return self._run(x, None)

    @torch.jit.ignore
    def mix_sequence(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Any]:
        """See `Mixer.mix_sequence`."""
        return self._run(x, cu_seqlens), None

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """See `Mixer.no_weight_decay`."""
        names = {"A_log", "A_b_log", "D", "D_b", "dt_bias", "dt_bias_b"}
        return names & {name for name, _ in self.named_parameters()}

    @torch.jit.ignore
    def step_sizes(self, x: Tensor, spatial_shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See `Mixer.step_sizes`."""
        _, _, dt = torch.split(self.in_proj(x), self.sizes, dim=-1)
        biases = {"forward": self.dt_bias, "backward": self.dt_bias if self.dt_bias_b is None else self.dt_bias_b}
        return {name: positive_dt(dt, bias).clamp(*self.dt_limit) for name, bias in biases.items()}

    def _run(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        z, u, dt = self._parts(x, self.sizes)
        v, B, C = self._scan_inputs(u, self.conv1d.weight, self.conv1d.bias, cu_seqlens, False)
        D, dt_bias = self.D, self.dt_bias
        v_b, B_b, C_b, D_2, bias_2 = v, B, C, D, dt_bias
        conv_b, dt_bias_b, D_b = self.conv1d_b, self.dt_bias_b, self.D_b
        if conv_b is not None and dt_bias_b is not None and D_b is not None:
            v_b, B_b, C_b = self._scan_inputs(u, conv_b.weight, conv_b.bias, cu_seqlens, True)
            D_2, bias_2 = D_b, dt_bias_b
        A, A_b = -torch.exp(at_least_fp32(self.A_log)), -torch.exp(at_least_fp32(self.A_b_log))
        gate = z.unflatten(-1, (-1, self.headdim)) if self.norm is None else None
        y = bidirectional_ssd(
            (v, v_b), dt, (A, A_b), (B, B_b), (C, C_b), (D, D_2), gate, (dt_bias, bias_2), self.dt_limit, cu_seqlens,
            self.chunk_size,
        ).flatten(-2)  # fmt: skip
        norm = self.norm
        if norm is not None:
            y = norm(y, z, 1.0 if self.merge == "add" else 0.5)
        elif self.merge == "mean":
            y = y / 2
        return self.out_proj(y)

    def _scan_inputs(
        self, u: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x (B, L, H, P), B and C (B, L, G, N) of one direction."""
        v, _ = causal_conv1d(u, weight, bias, None, cu_seqlens, reverse)
        return heads_and_groups(v, self.headdim, self.ngroups, self.d_state)


def _direction(
    channels: int, d_conv: int, conv_bias: bool, heads: int, **factory: Any
) -> tuple[nn.Conv1d, nn.Parameter, nn.Parameter]:
    """Return what a direction owns beside its A: convolution (a holder of parameters), bias of δ, and D."""
    return (
        nn.Conv1d(channels, channels, d_conv, groups=channels, bias=conv_bias, **factory),
        nn.Parameter(torch.empty(heads, **factory)),
        nn.Parameter(torch.empty(heads, **factory)),
    )
