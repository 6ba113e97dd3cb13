"""The block that every backbone repeats: norm -> mixer -> residual, with an optional MLP behind it.

The sum is carried beside the branch, so that adding and normalising is one fused pass over the tokens:

    residual <- residual + hidden,   hidden <- drop_path(gamma * mixer(norm(residual)))

which is the pre-norm block x <- x + mixer(norm(x)), with the addition moved into the next norm.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from mambaverse.errors import DirectionError, UserError
from mambaverse.kernels.norm import layer_norm, rms_norm
from mambaverse.mixers import MIXERS, Mixer, create_mixer, mixer_class
from mambaverse.mixers._common import reset_parameters as reset_parameters
from mambaverse.mixers._portable import exporting
from mambaverse.registry import is_a


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, fused with the addition of a residual.

    Args:
        dim: Channels D.
        kind: "rms" (a weight) or "layer" (a weight and a bias).
        eps: Added to the variance.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        kind: str = "rms",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("rms", "layer"):
            raise UserError(f"norm: expected 'rms' or 'layer', got {kind!r}")
        self.eps = eps
        self.is_rms = kind == "rms"
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = None if self.is_rms else nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (norm(x + residual), x + residual) for x (..., D): in x's dtype, and in the residual's."""
        if torch.jit.is_scripting():
            return self._plain(x, residual)
        return self._fused(x, residual)

    def _plain(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        wide = total.float()
        if not self.is_rms:
            wide = wide - wide.mean(-1, keepdim=True)
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype), total

    @torch.jit.ignore
    def _fused(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if exporting():
            return self._plain(x, residual)
        if self.is_rms:
            return rms_norm(x, self.weight, residual=residual, eps=self.eps)
        return layer_norm(x, self.weight, self.bias, residual=residual, eps=self.eps)


class Sum(nn.Module):
    """What stands for a `Norm` that was pruned: the addition alone."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x + residual (..., D) twice: in x's dtype, and in the residual's."""
        total = x if residual is None else x + residual
        return total.to(x.dtype), total


class Block(nn.Module):
    """One layer: norm -> mixer (-> norm2 -> mlp), on (hidden, residual) pairs.

    Args:
        dim: Channels D.
        mixer: Mixes (B, L, D) along L.
        norm: "rms" or "layer".
        eps: Of the norms.
        mlp_ratio: Hidden width of an MLP behind the mixer, in units of D; 0: none.
        drop_path: Probability that a sample skips the layer's branches while training.
        layer_scale: First value of a learnt factor per channel on the branches; None: no factor.
        residual_in_fp32: Carry the sum in fp32 whatever the dtype of the tokens.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        mixer: Mixer,
        norm: str = "rms",
        eps: float = 1e-5,
        mlp_ratio: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        residual_in_fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual_in_fp32 = residual_in_fp32
        self.norm = Norm(dim, norm, eps, **dd)
        self.mixer = mixer
        if layer_scale is not None and not math.isfinite(layer_scale):
            raise UserError(f"layer_scale: expected a finite number, or None for no factor, got {layer_scale!r}")
        self.scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp: Mlp | None = None
        if mlp_ratio > 0:
            if dim * mlp_ratio < 1:
                raise UserError(f"mlp_ratio: {mlp_ratio!r} of {dim} channels is none; expected 0 for no MLP, or more")
            self.norm2 = Norm(dim, norm, eps, **dd)
            self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
            self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, spatial_shape: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take and return (hidden (B, L, D), residual (B, L, D) or None before the first layer).

        `spatial_shape` (H, W), H · W = L, is for a mixer that needs the grid of its tokens.
        """
        x, residual = self.norm(x, residual)
        if self.residual_in_fp32:
            residual = residual.float()
        x = self.drop_path(self.scale(self.mixer(x=x, spatial_shape=spatial_shape)))
        return self._mlp(x, residual)

    @torch.jit.ignore
    def forward_sequence(
        self,
        x: Tensor,
        residual: Tensor | None,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor, Any]:
        """As `forward`, with all that a mixer may take; returns (hidden, residual, state or None)."""
        x, residual = self.norm(x, residual)
        if self.residual_in_fp32:
            residual = residual.float()
        out: Any = self.mixer(
            x=x, state=state, cu_seqlens=cu_seqlens, spatial_shape=spatial_shape, return_state=return_state
        )
        y, final = out if return_state else (out, None)
        x, residual = self._mlp(self.drop_path(self.scale(y)), residual)
        return x, residual, final

    @torch.jit.ignore
    def step(self, x_t: Tensor, residual: Tensor | None, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Advance by one token: x_t (B, D); returns (hidden (B, D), residual (B, D), state)."""
        x_t, residual = self.norm(x_t, residual)
        if self.residual_in_fp32:
            residual = residual.float()
        x_t, state = self.mixer.step(x_t, state)
        x_t, residual = self._mlp(self.scale(x_t), residual)
        return x_t, residual, state

    def _mlp(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if self.mlp is not None:
            x, residual = self.norm2(x, residual)
            x = self.drop_path(self.scale2(self.mlp(x)))
        return x, residual


def check_counts(least: int, **counts: int) -> None:
    """Raise UserError unless every count is a whole number of at least `least`."""
    for name, count in counts.items():
        if not is_a(count, int):
            raise UserError(f"{name}: expected a whole number, got {count!r}")
        if count < least:
            raise UserError(f"{name}: expected at least {least}, got {count}")


def check_rates(**rates: float) -> None:
    """Raise UserError unless every rate is a probability."""
    for name, rate in rates.items():
        if not is_a(rate, float) or not 0 <= rate <= 1:
            raise UserError(f"{name}: expected a probability, from 0 to 1, got {rate!r}")


def check_stack(depths: Sequence[int], mlp_ratio: float, drop_path_rate: float, eps: float) -> None:
    """Raise UserError for a negative number of blocks or width of their MLPs, or a rate that is no probability.

    Likewise for an `eps` of the norms that is negative or not finite, and for what is no number.
    """
    for depth in depths:
        check_counts(0, depth=depth)
    if not is_a(mlp_ratio, float) or not 0 <= mlp_ratio < math.inf:
        raise UserError(f"mlp_ratio: expected 0 for no MLP, or more, got {mlp_ratio!r}")
    check_rates(drop_path_rate=drop_path_rate)
    if not is_a(eps, float) or not 0 <= eps < math.inf:
        raise UserError(f"eps: expected a finite number of at least 0, got {eps!r}")


def layer_pattern(mixer: str | Sequence[str], depth: int) -> list[str]:
    """Return one mixer's name a layer: a name is repeated, a pattern such as ["s6", "s6", "attention"] is cycled."""
    names = [mixer] if isinstance(mixer, str) else list(mixer)
    if not names:
        raise UserError("mixer: expected a name or a list of names, got an empty list")
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"mixer: expected a name or a list of names, as there are no stages here, got {names}")
    return [names[i % len(names)] for i in range(depth)]


def build_mixer(
    name: str,
    dim: int,
    mixer_args: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    causal: bool,
    directions: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Mixer:
    """Build the mixer `name` for a causal or a bidirectional backbone.

    In a bidirectional backbone a causal mixer is wrapped as `bidirectional(mixer, merge="mean")`, unless
    `directions=1`. A mixer with an argument `causal` (attention) is told the backbone's.

    Args:
        name: Registered, or "package.module:Class".
        dim: Channels D.
        mixer_args: Arguments keyed by mixer; only those of `name` (and of the wrapper) are used.
        causal: Whether the backbone is causal.
        directions: 1: never wrap; None or 2: wrap where it is needed.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: a mixer that looks ahead in a causal backbone; arguments of an unknown mixer.
    """
    if not is_a(mixer_args, Mapping[str, Mapping[str, Any]] | None):
        raise UserError(f"mixer_args: expected arguments by mixer, such as {{{name!r}: {{...}}}}, got {mixer_args!r}")
    arguments = {key: dict(value) for key, value in (mixer_args or {}).items()}
    for key in arguments:
        if not isinstance(key, str):
            raise UserError(f"mixer_args: expected the names of mixers as keys, got {key!r}")
        if key != name and ":" not in key and key not in MIXERS:
            raise UserError(f"mixer_args: no mixer is called {key!r}{MIXERS.suggest(key)}")
        for argument in ("dim", "device", "dtype"):
            if argument in arguments[key]:
                raise UserError(f"mixer_args: {argument!r} of {key!r} is the model's, and cannot be set for one mixer")
    if directions not in (None, 1, 2):
        raise UserError(f"directions: expected 1, 2, or None for as many as the mixer needs, got {directions!r}")
    cls = mixer_class(name)
    own = arguments.get(name, {})
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    told = "causal" in inspect.signature(cls).parameters
    if causal or told or not cls.causal or directions == 1:
        mixer = create_mixer(name, dim, **{"causal": causal, **own} if told else own, **dd)
        if causal and not mixer.causal:  # of its class, or as its arguments have it
            raise UserError(f"mixer {name!r} looks ahead (causal is False) and cannot be used in a causal backbone")
        return mixer
    wrapper = {"merge": "mean", **arguments.get("bidirectional", {})}
    if taken := {"mixer", "mixer_args"} & wrapper.keys():
        raise UserError(
            f"mixer_args: {min(taken)!r} of 'bidirectional' is {name!r} here, which it wraps; mixer='bidirectional' "
            "takes another"
        )
    try:
        return create_mixer("bidirectional", dim, mixer=name, mixer_args=own, **wrapper, **dd)
    except DirectionError:  # which only a mixer that was built tells, where __init__ sets it
        return create_mixer(name, dim, **own, **dd)
