"""The mixer of Vision Mamba: S6 in both directions at once, between one input and one output projection.

    [u, z] = x W_in;   y = merge(S6_f(u), R S6_b(R u)) W_out,       S6 gated by silu(z), R reverses the sequence

Source: Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model"
(arXiv 2401.09417), algorithm 1; parameter names are those of the authors' code ("v2"). Caduceus (Schiff et al. 2024,
section 3.1) ties its projections into the same form; Audio Mamba's "Fo-Bi" (Erol et al. 2024) shares more of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.errors import UserError
from mambaverse.mixers import register_mixer
from mambaverse.mixers._common import (
    at_least_fp32,
    check_numbers,
    check_range,
    check_sizes,
    init_dt_bias_,
    init_dt_proj_,
    init_s4d_real_,
    positive_dt,
    resolve_dt_rank,
)
from mambaverse.mixers._ops import bidirectional_selective_scan, causal_conv1d
from mambaverse.mixers._projection import Projected


@register_mixer("vim")
class Vim(Projected):
    """Bidirectional S6 with shared projections; what the backward direction owns is called `*_b` (`A_b_log`).

    - Vision Mamba: the defaults.
    - Caduceus with tied weights: `merge="add"` (its `mamba_rev.<name>` is `<name>_b` here).
    - Audio Mamba Fo-Bi: `merge="add", shared=True`.

    Args:
        dim: Channels D.
        d_state: N, the state's size per channel.
        d_conv: Width of the convolutions.
        expand: E / D.
        dt_rank: Rank of Δ's projection; "auto": ceil(D / 16).
        dt_min: Smallest Δ at initialisation,
        dt_max: and largest: Δ is log-uniform between them.
        dt_init: Initialisation of `dt_proj.weight`: "random" (uniform in ± dt_scale · dt_rank^-1/2) or "constant".
        dt_scale: Its scale.
        dt_init_floor: Least Δ at initialisation.
        merge: "mean" or "add" of the two directions.
        shared: Whether the directions share convolution, projections and D, and each owns only its A; the backward
            scan then reads what the (forward) convolution wrote.
        init: "default" starts both directions alike; "official" leaves the backward Δ's bias at 0, as Vision Mamba's
            code does. (That it also divides `out_proj.weight` by √depth is the backbone's business.)
        conv_bias: Whether the convolutions have biases.
        bias: Whether `in_proj` and `out_proj` have biases.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: unknown `merge`, `init` or `dt_init`, or sizes below 1.
    """

    causal = False
    supports_cu_seqlens = True
    uncalled = frozenset({"conv1d", "conv1d_b", "dt_proj", "dt_proj_b"})

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
        merge: str = "mean",
        shared: bool = False,
        init: str = "default",
        conv_bias: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("vim", d_state=d_state, d_conv=d_conv, expand=expand)
        check_range("vim", "[dt_min, dt_max]", (dt_min, dt_max), above=0)
        check_numbers("vim", dt_scale=dt_scale, dt_init_floor=dt_init_floor)
        for name, value, known in (
            ("merge", merge, ("mean", "add")),
            ("init", init, ("default", "official")),
            ("dt_init", dt_init, ("random", "constant")),
        ):
            if value not in known:
                raise UserError(f"vim: expected {name} {known[0]!r} or {known[1]!r}, got {value!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = expand * dim
        rank = resolve_dt_rank("vim", dt_rank, dim)
        self.sizes = [rank, d_state, d_state]  # of δ, B and C
        self.dt_range, self.dt_init, self.dt_scale = (dt_min, dt_max, dt_init_floor), dt_init, dt_scale
        self.merge, self.shared, self.init = merge, shared, init

        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias, **factory)
        self.out_proj = nn.Linear(inner, dim, bias=bias, **factory)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **factory))
        self.A_b_log = nn.Parameter(torch.empty(inner, d_state, **factory))
        make = partial(_direction, inner, rank, d_state, d_conv, conv_bias, **factory)
        self.conv1d, self.x_proj, self.dt_proj, self.D = make()
        self.conv1d_b: nn.Conv1d | None = None
        self.x_proj_b: nn.Linear | None = None
        self.dt_proj_b: nn.Linear | None = None
        self.D_b: nn.Parameter | None = None
        if not shared:
            self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.D_b = make()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        if self.D.is_meta:
            return
        for layer in (self.in_proj, self.out_proj, self.conv1d, self.conv1d_b, self.x_proj, self.x_proj_b):
            if layer is not None:
                layer.reset_parameters()
        for dt_proj in (self.dt_proj, self.dt_proj_b):
            if dt_proj is not None:
                init_dt_proj_(dt_proj.weight, self.dt_init, self.dt_scale)
                init_dt_bias_(dt_proj.bias, *self.dt_range)
        if self.init == "official" and self.dt_proj_b is not None:
            self.dt_proj_b.bias.zero_()
        for A_log in (self.A_log, self.A_b_log):
            init_s4d_real_(A_log)
        for D in (self.D, self.D_b):
            if D is not None:
                D.fill_(1)

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
        names = {"A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias"}
        return names & {name for name, _ in self.named_parameters()}

    @torch.jit.ignore
    def step_sizes(self, x: Tensor, spatial_shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See `Mixer.step_sizes`."""
        u, _ = self.in_proj(x).chunk(2, dim=-1)
        owned = {"forward": (self.conv1d, self.x_proj, self.dt_proj)}
        if self.conv1d_b is not None and self.x_proj_b is not None and self.dt_proj_b is not None:
            owned["backward"] = (self.conv1d_b, self.x_proj_b, self.dt_proj_b)
        found = {}
        for name, (conv, x_proj, dt_proj) in owned.items():
            v, _ = causal_conv1d(u, conv.weight, conv.bias, None, None, name == "backward")
            delta, _, _ = self._scan_inputs(x_proj(v), dt_proj.weight)
            found[name] = positive_dt(delta, dt_proj.bias)
        return found if len(found) == 2 else {"both directions": found["forward"]}

    def _run(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        u, z = self._parts(x, [len(self.D), len(self.D)])
        conv, dt_proj = self.conv1d, self.dt_proj
        v, _ = causal_conv1d(u, conv.weight, conv.bias, None, cu_seqlens, False)
        delta, B, C = self._scan_inputs(self.x_proj(v), dt_proj.weight)
        D, bias = self.D, dt_proj.bias
        v_b, delta_b, B_b, C_b, D_2, bias_2 = v, delta, B, C, D, bias
        conv_b, dt_proj_b, D_b = self.conv1d_b, self.dt_proj_b, self.D_b
        if conv_b is not None and self.x_proj_b is not None and dt_proj_b is not None and D_b is not None:
            v_b, _ = causal_conv1d(u, conv_b.weight, conv_b.bias, None, cu_seqlens, True)
            delta_b, B_b, C_b = self._scan_inputs(self.x_proj_b(v_b), dt_proj_b.weight)
            D_2, bias_2 = D_b, dt_proj_b.bias
        A, A_b = -torch.exp(at_least_fp32(self.A_log)), -torch.exp(at_least_fp32(self.A_b_log))
        y = bidirectional_selective_scan(
            (v, v_b), (delta, delta_b), (A, A_b), (B, B_b), (C, C_b), (D, D_2), z, (bias, bias_2), cu_seqlens,
            self.shared, self.merge == "mean",
        )  # fmt: skip
        return self.out_proj(y)

    def _scan_inputs(self, projected: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return δ (B, L, E), B and C (B, L, N) of what one direction's `x_proj` returned."""
        delta, B, C = torch.split(projected, self.sizes, dim=-1)
        return F.linear(delta, dt_weight), B, C


def _direction(
    inner: int, rank: int, d_state: int, d_conv: int, conv_bias: bool, **factory: Any
) -> tuple[nn.Conv1d, nn.Linear, nn.Linear, nn.Parameter]:
    """Return what a direction owns beside its A: convolution (a holder of parameters), x_proj, dt_proj and D."""
    return (
        nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias, **factory),
        nn.Linear(inner, rank + 2 * d_state, bias=False, **factory),
        nn.Linear(rank, inner, **factory),
        nn.Parameter(torch.empty(inner, **factory)),
    )
