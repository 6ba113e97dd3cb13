"""Linear attention: softmax's kernel replaced by a product of features, so that a sum over the past is all the memory.

    φ(x) = elu(x) + 1;   S[t] = S[t-1] + v[t] φ(k[t])ᵀ;   s[t] = s[t-1] + φ(k[t])
    y[t] = W_o (S[t] φ(q[t]) / (s[t]·φ(q[t]) + ε)),   [q, k, v] = x W

This is SSD with A = 0 and Δ = 1, and s is one more channel of v, which is always 1. Source: Katharopoulos et al. 2020,
"Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (arXiv 2006.16236), section 3.4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.mixers import register_mixer
from mambaverse.mixers._common import at_least_fp32, check_numbers, check_state, resolve_heads
from mambaverse.mixers._ops import linear_recurrence, linear_recurrence_step
from mambaverse.mixers.base import Mixer


@register_mixer("linear_attention")
class LinearAttention(Mixer):
    """Causal linear attention.

    State: h (B, H, P + 1, P) fp32: S, and below it s. It forgets nothing, and knows no order of the tokens before.

    Args:
        dim: Channels D.
        num_heads: H; None: D / headdim.
        headdim: P; None: D / num_heads, or where that is not given either, the largest divisor of D up to 64.
        eps: Added to what y is divided by.
        qkv_bias: Whether `qkv` has a bias.
        bias: Whether `out_proj` has a bias.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: if H · P is not D; sizes below 1.
    """

    supports_state = True
    supports_cu_seqlens = True

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        headdim: int | None = None,
        eps: float = 1e-6,
        qkv_bias: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.headdim = resolve_heads("linear_attention", dim, num_heads, headdim)
        check_numbers("linear_attention", eps=eps)
        self.eps = eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.qkv.reset_parameters()
        self.out_proj.reset_parameters()

    def mix(self, x: Tensor) -> Tensor:
        """See `Mixer.mix`."""
        q, k, v = self._project(x)
        return self._output(x, linear_recurrence(v, self._rates(v), k, q, None, None)[0])

    @torch.jit.ignore
    def mix_sequence(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Any]:
        """See `Mixer.mix_sequence`."""
        q, k, v = self._project(x)
        h = None if state is None else check_state("linear_attention", state, "h")
        y, h = linear_recurrence(v, self._rates(v), k, q, h, cu_seqlens)
        return self._output(x, y), h

    @torch.jit.ignore
    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """See `Mixer.init_state`."""
        weight = self.qkv.weight
        shape = (batch_size, self.num_heads, self.headdim + 1, self.headdim)
        wide = torch.promote_types(dtype or weight.dtype, torch.float32)
        return torch.zeros(shape, device=device or weight.device, dtype=wide)

    @torch.jit.ignore
    def _step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """See `Mixer._step`; the state is updated in place."""
        q, k, v = self._project(x_t)
        y = linear_recurrence_step(check_state("linear_attention", state, "h"), v, self._rates(v), k, q)
        return self._output(x_t, y), state

    def _rates(self, v: Tensor) -> Tensor:
        """Return A (H,): nothing decays."""
        return torch.zeros(self.num_heads, device=v.device, dtype=torch.float32)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return φ(q) and φ(k) (..., H, P) and [v, 1] (..., H, P + 1) of x (..., D).

        They are in bfloat16 if the projection is, else in fp32 at least: sums over the past outgrow float16.
        """
        qkv = self.qkv(x)
        if qkv.dtype != torch.bfloat16:
            qkv = at_least_fp32(qkv)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.headdim)).unbind(-3)
        return _features(q), _features(k), F.pad(v, (0, 1), value=1.0)

    def _output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mixer's output, of the sums y (..., H, P + 1), in x's dtype before the last projection."""
        y = y[..., :-1] / (y[..., -1:] + self.eps)
        return self.out_proj(y.flatten(-2).to(x.dtype))


def _features(x: Tensor) -> Tensor:
    """Return elu(x) + 1 in the dtype of x, rounded once: in bfloat16 exp(x) - 1 is -1 below -6.2, and 1 more is 0.

    Autocast takes `exp` to float32, but in eager mode not where it is told to work in place.
    """
    above = F.relu(x)
    return (above + (x - above).exp_()).to(x.dtype)
