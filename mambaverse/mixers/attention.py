"""Softmax attention over all tokens, or over those before: the baseline, and the other half of hybrids.

    y = softmax(q kᵀ / √P) v        per head of P channels;  [q, k, v] = x W

Source: Vaswani et al. 2017, "Attention is all you need"; rotary positions: Su et al. 2021, "RoFormer", section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mambaverse.mixers import register_mixer
from mambaverse.mixers._common import check_numbers, check_state, resolve_heads
from mambaverse.mixers._ops import rotary, turns
from mambaverse.mixers.base import Mixer


@register_mixer("attention")
class Attention(Mixer):
    """Multi-head self-attention (scaled dot product).

    State (causal only): keys and values so far and how many of them are real, (k (B, T, H, P), v (B, T, H, P),
    length (B,) int64); those of a shorter sequence fill the first `length` of T places.

    Args:
        dim: Channels D.
        causal: Whether a token sees only itself and those before it.
        num_heads: H; None: D / headdim.
        headdim: P; None: D / num_heads, or where that is not given either, the largest divisor of D up to 64.
        rotary: Whether queries and keys are turned by their position (causal models have no other sense of it).
        rotary_base: Longest wavelength of the rotation, in tokens / 2π.
        qkv_bias: Whether `qkv` has a bias.
        bias: Whether `out_proj` has a bias.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: if H · P is not D, or P is odd with `rotary`.
    """

    def __init__(
        self,
        dim: int,
        causal: bool = False,
        num_heads: int | None = None,
        headdim: int | None = None,
        rotary: bool = False,
        rotary_base: float = 10000.0,
        qkv_bias: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.causal = self.supports_state = causal
        self.num_heads, self.headdim = resolve_heads("attention", dim, num_heads, headdim, even=rotary)
        check_numbers("attention", positive=True, rotary_base=rotary_base)
        self.rotary, self.rotary_base = rotary, rotary_base
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.qkv.reset_parameters()
        self.out_proj.reset_parameters()

    def mix(self, x: Tensor) -> Tensor:
        """See `Mixer.mix`."""
        q, k, v = self._project(x, torch.arange(x.shape[1], device=x.device)[None])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if torch.jit.is_scripting():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            y = _attend(q, k, v, None, self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    @torch.jit.ignore
    def mix_sequence(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Any]:
        """See `Mixer.mix_sequence`."""
        state = self.init_state(x.shape[0], device=x.device) if state is None else state
        k_cache, v_cache, length = check_state("attention", state, "k", "v", "length", rows=x.shape[0])
        at = length[:, None] + torch.arange(x.shape[1], device=x.device)  # (B, L) places of the new tokens
        q, k, v = self._project(x, at)
        k, v = _append(k_cache, k, at), _append(v_cache, v, at)  # (B, T + L, H, P)
        seen = torch.arange(k.shape[1], device=x.device) <= at[:, None, :, None]  # (B, 1, L, T + L)
        y = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, False)
        return self.out_proj(y.transpose(1, 2).flatten(2)), (k, v, length + x.shape[1])

    @torch.jit.ignore
    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """See `Mixer.init_state`."""
        if not self.causal:
            return super().init_state(batch_size, device, dtype)
        weight = self.qkv.weight
        device = device or weight.device
        empty = torch.empty(batch_size, 0, self.num_heads, self.headdim, device=device, dtype=dtype or weight.dtype)
        return empty, empty.clone(), torch.zeros(batch_size, dtype=torch.int64, device=device)

    @torch.jit.ignore
    def stack_states(self, states: list[Any]) -> Any:
        """See `Mixer.stack_states`: caches of different lengths are filled up with zeros."""
        longest = max(k.shape[0] for k, _, _ in states)
        k, v = (torch.stack([F.pad(s[i], (0, 0, 0, 0, 0, longest - s[i].shape[0])) for s in states]) for i in (0, 1))
        return k, v, torch.stack([length for _, _, length in states])

    def _project(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v (B, L, H, P) of x (B, L, D) at the positions `at` (B, L)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.headdim)).unbind(2)
        if self.rotary:
            cos, sin = turns(at, self.headdim, self.rotary_base, q)
            q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        return q, k, v


@torch.jit.ignore
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return softmax(q k / sqrt(P)) v of q (B, H, L, P) and k, v (B, H, T, P), without cuDNN where gradients follow.

    cuDNN's backward pass on Hopper is wrong where T leaves 64 of a tile of 128 keys empty: those are scored 0 rather
    than -inf (torch 2.11, pytorch#196678; at 8 x 8 tokens, under torch.compile, gradients were off up to 1,000-fold).
    """
    if not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _append(cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """Return the cache (B, T, H, P), grown by L places, with new (B, L, H, P) written to the places `at` (B, L)."""
    grown = F.pad(cache.to(new.dtype), (0, 0, 0, 0, 0, new.shape[1]))
    return grown.scatter(1, at[..., None, None].expand_as(new), new)
