"""Multi-scale retention, the mixer of RetNet: linear attention that forgets at a fixed rate, another one in each head.

    q[t] = R(t) W_q x[t];   k[t] = R(t) W_k x[t] / √N;   v = W_v x;   R turns pairs of channels by their position
    h[t] = γ h[t-1] + v[t] k[t]ᵀ;   y[t] = W_o (silu(W_g x[t]) · norm(h[t] q[t])),   γ = 1 - 2^(-5 - head)

This is SSD with A = ln γ and Δ = 1. The norm takes the mean off each head's output, a mean that is 0 where v's is. So v
is centred, by its rows of W_v where the layers are plain ones, and what is left is an RMS norm, fused with the gate.

Source: Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language Models" (arXiv 2307.08621),
section 2, equations 5 to 8; parameter names are those of the authors' code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambaverse.mixers import register_mixer
from mambaverse.mixers._common import check_numbers, check_sizes, check_state, resolve_heads
from mambaverse.mixers._ops import gated_rms_norm, linear_recurrence, linear_recurrence_step, rotary, turns
from mambaverse.mixers._projection import joins, project_each
from mambaverse.mixers.base import Mixer

STATE = ("h", "tokens so far")


@register_mixer("retnet")
class RetNet(Mixer):
    """Multi-scale retention.

    State: (h (B, H, P, N) fp32 of v less its mean, tokens so far (B,) int64), N = D / H, P = expand · D / H.

    Args:
        dim: Channels D.
        num_heads: H; None: D / headdim.
        headdim: N, channels of a head's queries and keys; None: D / num_heads, or where that is not given either, the
            largest even divisor of D up to 64.
        expand: Channels of the values over D.
        rotary_base: Longest wavelength of the rotation, in tokens / 2π.
        norm_eps: Added to the variance of a head's outputs.
        bias: Whether the projections have biases.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: if H · N is not D, or N is odd; sizes below 1.
    """

    supports_state = True
    supports_cu_seqlens = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        headdim: int | None = None,
        expand: int = 2,
        rotary_base: float = 10000.0,
        norm_eps: float = 1e-5,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("retnet", expand=expand)
        check_numbers("retnet", norm_eps=norm_eps)
        check_numbers("retnet", positive=True, rotary_base=rotary_base)
        num_heads, headdim = resolve_heads("retnet", dim, num_heads, headdim, even=True)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.headdim, self.expand = num_heads, headdim, expand
        self.rotary_base, self.norm_eps = rotary_base, norm_eps
        self.q_proj = nn.Linear(dim, dim, bias=bias, **factory)
        self.k_proj = nn.Linear(dim, dim, bias=bias, **factory)
        self.v_proj = nn.Linear(dim, expand * dim, bias=bias, **factory)
        self.g_proj = nn.Linear(dim, expand * dim, bias=bias, **factory)
        self.out_proj = nn.Linear(expand * dim, dim, bias=bias, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew: Xavier, with a gain of 2^-2.5 for all but the last."""
        if self.out_proj.weight.is_meta:
            return
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight, gain=1.0 if layer is self.out_proj else 2**-2.5)
            if layer.bias is not None:
                layer.bias.zero_()

    def mix(self, x: Tensor) -> Tensor:
        """See `Mixer.mix`."""
        q, k, v, g = self._project(x, torch.arange(x.shape[1], device=x.device)[None])
        return self._output(linear_recurrence(v, self._rates(x), k, q, None, None)[0], g)

    @torch.jit.ignore
    def mix_sequence(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Any]:
        """See `Mixer.mix_sequence`."""
        at = torch.arange(x.shape[1], device=x.device)
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        h, before = (None, None) if state is None else check_state("retnet", state, *STATE, rows=rows)
        if cu_seqlens is None:
            lengths = torch.full((x.shape[0],), x.shape[1], device=x.device)
            at = at[None] if before is None else at + before[:, None]
        else:
            lengths = cu_seqlens.diff().long()
            sequence = torch.searchsorted(cu_seqlens, at, right=True) - 1
            at = (at - cu_seqlens[sequence] + (0 if before is None else before[sequence]))[None]
        q, k, v, g = self._project(x, at)
        y, h = linear_recurrence(v, self._rates(x), k, q, h, cu_seqlens)
        return self._output(y, g), (h, lengths if before is None else before + lengths)

    @torch.jit.ignore
    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """See `Mixer.init_state`."""
        weight = self.q_proj.weight
        device, wide = device or weight.device, torch.promote_types(dtype or weight.dtype, torch.float32)
        shape = (batch_size, self.num_heads, self.expand * self.headdim, self.headdim)
        return torch.zeros(shape, device=device, dtype=wide), torch.zeros(batch_size, device=device, dtype=torch.int64)

    @torch.jit.ignore
    def _step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """See `Mixer._step`; h is updated in place."""
        h, before = check_state("retnet", state, *STATE, rows=x_t.shape[0])
        q, k, v, g = (part[:, 0] for part in self._project(x_t[:, None], before[:, None]))
        y = linear_recurrence_step(h, v, self._rates(x_t), k, q)
        return self._output(y, g), (h, before + 1)

    def _rates(self, x: Tensor) -> Tensor:
        """Return ln γ (H,) on x's device."""
        head = torch.arange(self.num_heads, device=x.device, dtype=torch.float32)
        return torch.log1p(-torch.exp2(-5.0 - head))

    def _project(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q and k (B, L, H, N), v (B, L, H, P) less its mean and g (B, L, E), of x (B, L, D) at `at` (B, L)."""
        q, k, v, g = self._projections(x)
        q, k = q.unflatten(-1, (-1, self.headdim)), k.unflatten(-1, (-1, self.headdim))
        cos, sin = turns(at, self.headdim, self.rotary_base, q)
        scale = self.headdim**-0.5
        return rotary(q, cos, sin), rotary(k, cos * scale, sin * scale), v.unflatten(-1, (self.num_heads, -1)), g

    def _projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x (B, L, D) of the first four projections, the third less the mean of each head."""
        if not torch.jit.is_scripting():
            joined = self._joined(x)
            if joined is not None:
                return joined
        v = self.v_proj(x).unflatten(-1, (self.num_heads, -1))
        return self.q_proj(x), self.k_proj(x), (v - v.mean(-1, keepdim=True)).flatten(-2), self.g_proj(x)

    @torch.jit.unused
    def _joined(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return those by one product, where one may stand for them; the mean is taken off W_v, and its bias.

        Of fewer tokens than channels v itself is the smaller one: None, as where layers must be called.
        """
        layers = [self.q_proj, self.k_proj, self.v_proj, self.g_proj]
        if not joins(layers, x) or x.shape[0] * x.shape[1] < x.shape[2]:  # in this order: no program asks for sizes
            return None
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if len(biases) not in (0, 4):
            return None
        weights = [layer.weight for layer in layers]
        for of_layers in (weights, biases):
            if of_layers:
                rows = of_layers[2].unflatten(0, (self.num_heads, -1))
                of_layers[2] = (rows - rows.mean(1, keepdim=True)).flatten(0, 1)
        q, k, v, g = project_each(x, weights, biases or None)
        return q, k, v, g

    def _output(self, y: Tensor, g: Tensor) -> Tensor:
        """Return the mixer's output, of the heads' outputs y (..., H, P) and what gates them, g (..., E)."""
        ones = torch.ones([g.shape[-1]], device=g.device, dtype=torch.float32)
        return self.out_proj(gated_rms_norm(y.flatten(-2), ones, g, y.shape[-1], True, self.norm_eps))
