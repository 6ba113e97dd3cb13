"""SS2D, the mixer of VMamba: S6 over a grid of tokens in four orders, after one 3 x 3 convolution.

    u = silu(conv2d(x W_in));   y = Σ_k R_k⁻¹ S6_k(R_k u);   out = norm(y) [silu(z)] W_out

R_k reads the grid by rows, by columns, by rows backwards and by columns backwards (k = 0 .. 3); S6_k has its own
projections, A, D and Δ. Rows and rows backwards are one scan in both directions of the tokens as they lie; so are both
orders of columns, of one transposed copy. What the authors' code does with four copies is thus done with one: the
projections of a pair read the tokens once, and its second direction is added to the first where it is computed.

Source: Liu et al. 2024, "VMamba: Visual State Space Model" (arXiv 2401.10166), section 4; parameter names are those of
the authors' code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.errors import UserError, suggest
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
from mambaverse.mixers._ops import scan_both_ways, silu_conv2d
from mambaverse.mixers.base import Mixer

GATES = ("none", "silu", "linear")
ORDERS = 4
ORDER_NAMES = ("by rows", "by columns", "by rows, backwards", "by columns, backwards")


@register_mixer("ss2d")
class SS2D(Mixer):
    """Selective scans of a grid in four orders; the grid (H, W) comes as `spatial_shape`.

    The authors name variants by a `forward_type`; here what it changes are arguments:

    - "v05_noz" (released as VMamba v2, also "v2_noz", "v3_noz", ...): the defaults;
    - "v0" (the paper's first version): `d_state=16, expand=2, gate="silu", conv_bias=True`;
    - without "_noz": `gate="silu"`; "_nozact": `gate="linear"`; "_oact": `out_act=True`; "_onnone": `out_norm=False`.

    Args:
        dim: Channels D.
        d_state: N, the state's size per channel and order.
        d_conv: Side of the depthwise convolution, odd; 1: none.
        expand: E / D, where E is rounded down.
        dt_rank: R, the rank of Δ's projection; "auto": ceil(D / 16).
        dt_min: Smallest Δ at initialisation,
        dt_max: and largest: Δ is log-uniform between them.
        dt_init: Initialisation of `dt_projs_weight`: "random" (uniform in ± dt_scale · R^-1/2) or "constant".
        dt_scale: Its scale.
        dt_init_floor: Least Δ at initialisation.
        gate: "none", or the second half of a wider `in_proj` that multiplies the output: "silu" of it, or "linear".
        out_norm: Whether a LayerNorm follows the sum of the four scans.
        out_act: Whether GELU follows that.
        conv_bias: Whether the convolution has a bias.
        bias: Whether `in_proj` and `out_proj` have biases.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: unknown `gate` or `dt_init`, an even `d_conv`, or sizes below 1.
    """

    causal = False
    needs_spatial_shape = True

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        d_conv: int = 3,
        expand: float = 1.0,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        gate: str = "none",
        out_norm: bool = True,
        out_act: bool = False,
        conv_bias: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_numbers("ss2d", expand=expand)
        inner = int(expand * dim)
        check_sizes("ss2d", d_state=d_state, d_conv=d_conv)
        check_range("ss2d", "[dt_min, dt_max]", (dt_min, dt_max), above=0)
        check_numbers("ss2d", dt_scale=dt_scale, dt_init_floor=dt_init_floor)
        if inner < 1:
            raise UserError(f"ss2d: expand · dim must be at least 1, got {expand} · {dim}")
        if d_conv % 2 == 0:
            raise UserError(f"ss2d: d_conv must be odd, so that the convolution has a middle, got {d_conv}")
        if gate not in GATES:
            raise UserError(f"ss2d: unknown gate {gate!r}{suggest(gate, GATES)}")
        if dt_init not in ("random", "constant"):
            raise UserError(f"ss2d: expected dt_init 'random' or 'constant', got {dt_init!r}")
        self.d_inner, self.d_state, self.gate, self.out_act = inner, d_state, gate, out_act
        self.dt_rank = resolve_dt_rank("ss2d", dt_rank, dim)
        self.dt_range, self.dt_init, self.dt_scale = (dt_min, dt_max, dt_init_floor), dt_init, dt_scale
        self.sizes = 2 * [self.dt_rank, d_state, d_state]  # of δ, B and C, of two directions

        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, inner if gate == "none" else 2 * inner, bias=bias, **dd)
        self.conv2d: nn.Conv2d | None = None
        if d_conv > 1:
            self.conv2d = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias, **dd)
        self.x_proj_weight = nn.Parameter(torch.empty(ORDERS, self.dt_rank + 2 * d_state, inner, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(ORDERS, inner, self.dt_rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(ORDERS, inner, **dd))
        self.A_logs = nn.Parameter(torch.empty(ORDERS * inner, d_state, **dd))
        self.Ds = nn.Parameter(torch.empty(ORDERS * inner, **dd))
        self.out_norm: nn.Module = nn.LayerNorm(inner, **dd) if out_norm else nn.Identity()
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew: S6's as in Mamba, `in_proj` and `out_proj` as the authors' models do."""
        if self.Ds.is_meta:
            return
        for linear in (self.in_proj, self.out_proj):
            linear.weight.normal_(std=0.02)
            if linear.bias is not None:
                linear.bias.zero_()
        for layer in (self.conv2d, self.out_norm):
            if isinstance(layer, (nn.Conv2d, nn.LayerNorm)):
                layer.reset_parameters()
        bound = 1 / math.sqrt(self.d_inner)
        self.x_proj_weight.uniform_(-bound, bound)
        for weight, bias in zip(self.dt_projs_weight, self.dt_projs_bias, strict=True):
            init_dt_proj_(weight, self.dt_init, self.dt_scale)
            init_dt_bias_(bias, *self.dt_range)
        init_s4d_real_(self.A_logs)
        self.Ds.fill_(1)

    def mix_grid(self, x: Tensor, spatial_shape: tuple[int, int]) -> Tensor:
        """See `Mixer.mix_grid`."""
        height, width = spatial_shape
        grid, z = self._grid_and_gate(x, height, width)
        A = -torch.exp(at_least_fp32(self.A_logs)).view(4, self.d_inner, self.d_state)
        D = self.Ds.view(4, self.d_inner)
        y = self._scan_pair(grid.reshape(x.shape[0], height * width, self.d_inner), A, D, 0)
        by_columns = grid.transpose(1, 2).reshape(x.shape[0], width * height, self.d_inner)
        y_columns = self._scan_pair(by_columns, A, D, 1).unflatten(1, [width, height]).transpose(1, 2)
        y = self.out_norm((y.unflatten(1, [height, width]) + y_columns).flatten(1, 2))
        if self.out_act:
            y = F.gelu(y)
        if self.gate != "none":
            y = y * (F.silu(z) if self.gate == "silu" else z)
        return self.out_proj(y)

    @torch.jit.ignore
    def mix_sequence(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Any]:
        """See `Mixer.mix_sequence`."""
        assert spatial_shape is not None
        return self.mix_grid(x, spatial_shape), None

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """See `Mixer.no_weight_decay`."""
        return {"A_logs", "Ds", "dt_projs_bias"}

    @torch.jit.ignore
    def step_sizes(self, x: Tensor, spatial_shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See `Mixer.step_sizes`."""
        assert spatial_shape is not None
        u = self._grid_and_gate(x, spatial_shape[0], spatial_shape[1])[0].flatten(1, 2)
        found = {}
        for k, name in enumerate(ORDER_NAMES):  # Δ is a token's own, so the order of reading changes nothing
            delta = F.linear(u, self.x_proj_weight[k, : self.dt_rank])
            found[name] = positive_dt(F.linear(delta, self.dt_projs_weight[k]), self.dt_projs_bias[k])
        return found

    def _grid_and_gate(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return what is scanned (B, H, W, E), and what gates it (B, L, E), which is unused if there is no gate."""
        u = self.in_proj(x)
        z = u
        if self.gate != "none":
            u, z = u.chunk(2, dim=-1)  # (B, L, E) each
        grid = u.unflatten(1, [height, width])
        if self.conv2d is None:
            return F.silu(grid), z
        elif torch.jit.is_scripting():
            return F.silu(self.conv2d(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)), z
        else:
            return silu_conv2d(self.conv2d, grid), z

    def _scan_pair(self, u: Tensor, A: Tensor, D: Tensor, k: int) -> Tensor:
        """Return the sum of the scans of u (B, L, E) forwards with the parameters k and backwards with those k + 2."""
        x_weight = torch.cat([self.x_proj_weight[k], self.x_proj_weight[k + 2]])
        delta, B, C, delta_b, B_b, C_b = torch.split(F.linear(u, x_weight), self.sizes, dim=-1)
        deltas = F.linear(delta, self.dt_projs_weight[k]), F.linear(delta_b, self.dt_projs_weight[k + 2])
        biases = self.dt_projs_bias[k], self.dt_projs_bias[k + 2]
        return scan_both_ways(u, deltas, (A[k], A[k + 2]), (B, B_b), (C, C_b), (D[k], D[k + 2]), biases)
