"""Mamba-3: a state that turns as well as decays, inputs by the trapezoidal rule, and several of them at once if asked.

    [z, x, B, C, δ, a, μ, φ] = u W_in;   Δ = softplus(δ + b_Δ);   A = -f(a);   λ = sigmoid(μ)
    θ[t] = θ[t-1] + Δ[t] π tanh(φ[t]);   k = turn(norm(B) + b_B, θ);   q = turn(norm(C) + b_C, θ)
    h[t] = e^{Δ[t] A[t]} (h[t-1] + (1 - λ[t]) Δ[t] Σ_r v[t-1,r] k[t-1,r]ᵀ) + λ[t] Δ[t] Σ_r v[t,r] k[t,r]ᵀ
    y[t,r] = h[t] q[t,r] + D v[t,r];   out = W_out Σ_r o[r] y[t,r] silu(z[t] g[r]),   v[t,r] = x[t] p[r]

Turning k and q by θ is what a complex A does to the state. R = 1 input ("SISO") has no p, g and o. λ = 1 is the rule of
Mamba-2. There is no convolution: the term of the token before takes its place.

Source: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles" (arXiv 2603.15569),
section 3; parameter names, their order in `in_proj` and their first values are those of the authors' code.
`_trapezoid.py` says how the recurrence becomes a call of SSD.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.errors import UserError, suggest
from mambaverse.kernels.checks import num_sequences, sequence_bounds
from mambaverse.kernels.trapezoid_weights import FORMS
from mambaverse.mixers import register_mixer
from mambaverse.mixers._common import (
    at_least_fp32,
    check_numbers,
    check_range,
    check_sizes,
    check_state,
    init_dt_bias_,
    resolve_inner_heads,
)
from mambaverse.mixers._projection import Projected
from mambaverse.mixers._trapezoid import (
    keys_and_queries,
    last,
    summed_angles,
    trapezoid_scan,
    trapezoid_step,
    trapezoid_weights,
)
from mambaverse.mixers.ssd import GatedRMSNorm

PAIRINGS = ("interleaved", "half_split")
NORM_EPS = 1e-5
STATE = ("θ", "h", "k", "x")


@register_mixer("mamba3")
class Mamba3(Projected):
    """Mamba-3 mixer, SISO or MIMO; its state dict is that of mamba_ssm's `Mamba3`.

    State: (θ (B, H, S) fp32 in [0, 2π], h (B, H, P, N) fp32, k (B, R, H, N), x (B, H, P)), the last two of the last
    token; E = expand · D = H · P, and S channel pairs turn.

    Args:
        dim: Channels D.
        d_state: N, the state's size per channel.
        expand: E / D.
        headdim: P; None: the largest divisor of E up to 64 (64 wherever it divides E).
        ngroups: G: B and C are shared by the H / G heads of a group, up to their biases and angles.
        rope_fraction: Share of B's and C's channels that turn; S is half of that, rounded down.
        rope_pairing: "interleaved" turns channels (2 i, 2 i + 1), "half_split" (i, i + N / 2), i < S. None: what the
            authors' kernels do, the first for SISO and the second for MIMO. A checkpoint fits one of them.
        dt_min: Smallest Δ at initialisation,
        dt_max: and largest: Δ is log-uniform between them.
        dt_init_floor: Least Δ at initialisation.
        A_floor: Least -A.
        A_form: f: "heavy_tail" is 1 + a for a >= 0 and 1 / (1 - a) below, "softplus" what the authors' code had until
            June 2026.
        is_outproj_norm: Whether y is normalised, head by head, before it is gated.
        is_mimo: Whether a token has `mimo_rank` inputs and outputs a head.
        mimo_rank: R, if so.
        chunk_size: Places that are worked on as one matrix; None: the kernel's choice. Changes no result.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: if `headdim` does not divide E, or `ngroups` the number of heads; if no channel pair turns; unknown
            `rope_pairing` or `A_form`; sizes below 1.
    """

    supports_state = True
    supports_cu_seqlens = True
    uncalled = frozenset({"B_norm", "C_norm"})

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        expand: int = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        rope_pairing: str | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        A_form: str = "heavy_tail",
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("mamba3", d_state=d_state, expand=expand, headdim=headdim, ngroups=ngroups, mimo_rank=mimo_rank)
        check_sizes("mamba3", chunk_size=chunk_size)
        check_range("mamba3", "[dt_min, dt_max]", (dt_min, dt_max), above=0)
        if rope_pairing is None:
            rope_pairing = "half_split" if is_mimo else "interleaved"
        for name, value, known in (("rope_pairing", rope_pairing, PAIRINGS), ("A_form", A_form, FORMS)):
            if value not in known:
                raise UserError(f"mamba3: unknown {name} {value!r}{suggest(value, known)}")
        check_numbers("mamba3", dt_init_floor=dt_init_floor, rope_fraction=rope_fraction)
        check_numbers("mamba3", positive=True, A_floor=A_floor)
        inner = expand * dim
        heads, headdim = resolve_inner_heads("mamba3", inner, headdim, ngroups)
        rank = mimo_rank if is_mimo else 1
        angles = int(d_state * rope_fraction) // 2
        if not 0 < angles <= d_state // 2:
            raise UserError(
                f"mamba3: rope_fraction must be at most 1, and turn a pair of channels: 2 / d_state = {2 / d_state:g} "
                f"or more; got {rope_fraction:g}"
            )
        if rope_pairing == "half_split" and d_state % 2:
            raise UserError(
                f"mamba3: rope_pairing='half_split' pairs two halves, so d_state must be even, got {d_state}"
            )
        self.d_inner, self.d_state, self.headdim, self.ngroups, self.rank = inner, d_state, headdim, ngroups, rank
        self.dt_range, self.A_floor, self.A_form = (dt_min, dt_max, dt_init_floor), A_floor, A_form
        self.rope_pairing, self.chunk_size, self.norm_eps = rope_pairing, chunk_size, NORM_EPS
        width = ngroups * rank * d_state
        self.sizes = [inner, inner, width, width, heads, heads, heads, angles]  # of z, x, B, C, δ, a, μ and φ

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False, **factory)
        self.dt_bias = nn.Parameter(torch.empty(heads, **factory))
        self.B_bias = nn.Parameter(torch.empty(heads, rank, d_state, **factory))
        self.C_bias = nn.Parameter(torch.empty(heads, rank, d_state, **factory))
        self.B_norm = nn.RMSNorm(d_state, NORM_EPS, **factory)  # a holder of the weight, like `C_norm`
        self.C_norm = nn.RMSNorm(d_state, NORM_EPS, **factory)
        self.mimo_x: nn.Parameter | None = None
        self.mimo_z: nn.Parameter | None = None
        self.mimo_o: nn.Parameter | None = None
        if is_mimo:
            self.mimo_x = nn.Parameter(torch.empty(heads, rank, headdim, **factory))
            self.mimo_z = nn.Parameter(torch.empty(heads, rank, headdim, **factory))
            self.mimo_o = nn.Parameter(torch.empty(heads, rank, headdim, **factory))
        self.D = nn.Parameter(torch.empty(heads, **factory))
        self.norm = GatedRMSNorm(inner, headdim, True, NORM_EPS, **factory) if is_outproj_norm else None
        self.out_proj = nn.Linear(inner, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the authors' code does."""
        if self.D.is_meta:
            return
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        init_dt_bias_(self.dt_bias, *self.dt_range)
        for ones in (self.B_bias, self.C_bias, self.B_norm.weight, self.C_norm.weight, self.mimo_z, self.D):
            if ones is not None:
                ones.fill_(1)
        for mean in (self.mimo_x, self.mimo_o):
            if mean is not None:
                mean.fill_(1 / self.rank)
        if self.norm is not None:
            self.norm.weight.fill_(1)

    def mix(self, x: Tensor) -> Tensor:
        """See `Mixer.mix`."""
        return self._run(x, None, None, None, None, None, False)[0]

    @torch.jit.ignore
    def mix_sequence(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Any]:
        """See `Mixer.mix_sequence`."""
        self._check(x, state, cu_seqlens)
        theta, h, k, x_before = (None, None, None, None) if state is None else state
        y, *after = self._run(x, theta, h, k, x_before, cu_seqlens, True)
        return y, tuple(after)

    @torch.jit.ignore
    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """See `Mixer.init_state`."""
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        kinds = (wide, wide, dtype, dtype)
        shapes = self._state_shapes(batch_size)
        return tuple(torch.zeros(shape, device=device, dtype=kind) for shape, kind in zip(shapes, kinds, strict=True))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """See `Mixer.no_weight_decay`."""
        return {"D", "dt_bias"}

    @torch.jit.ignore
    def _step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """See `Mixer._step`; h is updated in place."""
        theta, h, k_before, x_before = check_state("mamba3", state, *STATE)
        z, x, B, C, dt, rate, _, gamma, turning = self._project(x_t[:, None], None)
        angles = summed_angles(dt, turning, theta, None)
        k, q = self._keys_and_queries(B, C, angles)
        x, k = x[:, 0], k[:, 0]
        v, v_before = self._inputs(x), self._inputs(x_before)
        y = trapezoid_step(h, q[:, 0], k, v, k_before, v_before, dt[:, 0], rate[:, 0], gamma[:, 0])
        y = self._output(y + at_least_fp32(self.D)[:, None] * v, z[:, 0])
        return y, (angles[:, 0], h, k, x)

    @torch.jit.ignore
    def step_sizes(self, x: Tensor, spatial_shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See `Mixer.step_sizes`."""
        return {"forward": self._project(x, None)[4]}

    @torch.jit.ignore
    def _state_shapes(self, sequences: int) -> list[tuple[int, ...]]:
        """Return the shapes of θ, h, k and x."""
        S, H, P, N = sequences, len(self.dt_bias), self.headdim, self.d_state
        return [(S, H, self.sizes[-1]), (S, H, P, N), (S, self.rank, H, N), (S, H, P)]

    @torch.jit.ignore
    def _check(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> None:
        """Raise ValueError for a state or boundaries that do not fit x; without a look at boundaries on a GPU."""
        shapes = self._state_shapes(num_sequences("mamba3", cu_seqlens, x.shape[0]))
        if cu_seqlens is not None and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            sequence_bounds("mamba3", cu_seqlens, x.shape[1])
        if state is not None:
            got = [tuple(part.shape) for part in check_state("mamba3", state, *STATE)]
            if got != shapes:
                raise ValueError(f"mamba3: expected a state (θ, h, k, x) of shapes {shapes}, got {got}")

    def _run(
        self,
        x: Tensor,
        theta: Tensor | None,
        h: Tensor | None,
        k_before: Tensor | None,
        x_before: Tensor | None,
        cu_seqlens: Tensor | None,
        wants_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the output, and θ, h, k and x of the last tokens, or what else comes without `wants_state`."""
        z, x, B, C, dt, rate, weight, gamma, turning = self._project(x, cu_seqlens)
        angles = summed_angles(dt, turning, theta, cu_seqlens)  # (B, L, H, S)
        k, q = self._keys_and_queries(B, C, angles)
        v_before = None if x_before is None else self._inputs(x_before)
        gate = z if self.norm is None and self.mimo_z is None else None  # else y is normalised or z scaled first
        y, h = trapezoid_scan(
            q, k, self._inputs(x), dt, rate, weight, gamma, self.D, gate, h, k_before, v_before, cu_seqlens,
            self.chunk_size,
        )  # fmt: skip
        y = self._output(y, None if gate is not None else z)
        if not wants_state:
            return y, angles, h, k, x
        theta, k, x = last(angles, theta, cu_seqlens), last(k, k_before, cu_seqlens), last(x, x_before, cu_seqlens)
        return y, theta, h, k, x

    def _project(
        self, x: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return z and x (B, L, H, P), B and C (B, L, R, G, N) as projected, Δ, -Δ A, weights (B, L, H), tanh φ."""
        z, x, B, C, dt, a, trap, angles = self._parts(x, self.sizes)
        z, x = z.unflatten(-1, (-1, self.headdim)), x.unflatten(-1, (-1, self.headdim))
        groups = [self.rank, self.ngroups, self.d_state]
        B, C = B.unflatten(-1, groups), C.unflatten(-1, groups)
        dt, rate, weight, gamma = trapezoid_weights(dt, a, trap, self.dt_bias, self.A_form, self.A_floor, cu_seqlens)
        return z, x, B, C, dt, rate, weight, gamma, torch.tanh(at_least_fp32(angles))

    def _keys_and_queries(self, B: Tensor, C: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Return k and q (B, L, R, H, N) of B and C (B, L, R, G, N), turned by angles (B, L, H, S)."""
        return keys_and_queries(
            B, C, self.B_norm.weight, self.C_norm.weight, self.B_bias, self.C_bias, angles, self.rope_pairing,
            self.norm_eps,
        )  # fmt: skip

    def _inputs(self, x: Tensor) -> Tensor:
        """Return the R inputs (..., R, H, P) of x (..., H, P)."""
        x = x.unsqueeze(-3)
        mimo_x = self.mimo_x
        return x if mimo_x is None else x * mimo_x.transpose(0, 1).to(x.dtype)

    def _output(self, y: Tensor, z: Tensor | None) -> Tensor:
        """Return the mixer's output, of y (..., R, H, P) and z (..., H, P); without z, y is gated already."""
        mimo_z, mimo_o = self.mimo_z, self.mimo_o
        dtype = y.dtype
        if z is not None:
            dtype = z.dtype
            gate = z.unsqueeze(-3)
            if mimo_z is not None:
                gate = at_least_fp32(gate) * mimo_z.transpose(0, 1)
            if self.norm is not None:
                y = self.norm(y.flatten(-2), gate.flatten(-2)).unflatten(-1, (-1, self.headdim))
            else:
                y = y * F.silu(at_least_fp32(gate))
        y = y.squeeze(-3) if mimo_o is None else (y * mimo_o.transpose(0, 1)).sum(-3)
        return self.out_proj(y.flatten(-2).to(dtype))
