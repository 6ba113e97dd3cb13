"""Any causal mixer run in both directions, with parameters of its own in each, and merged.

    y = merge(fwd(x), R bwd(R x)),        R reverses each sequence

Source: the merges are those of Caduceus (Schiff et al. 2024, section 3.1) and Vision Mamba (Zhu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mambaverse.errors import DirectionError, UserError, suggest
from mambaverse.mixers import create_mixer, register_mixer
from mambaverse.mixers._common import reset_parameters
from mambaverse.mixers.base import Mixer

MERGES = ("add", "mean", "concat", "ew_multiply")


@register_mixer("bidirectional")
class Bidirectional(Mixer):
    """Two mixers of one kind, one of them reading from the end; packed sequences are reversed each in its place.

    Args:
        dim: Channels D.
        mixer: Name of a causal mixer, or "package.module:Class".
        mixer_args: Its arguments.
        merge: How the two directions become one: "add", "mean", "ew_multiply" (elementwise product), or "concat"
            (of their channels, then a linear projection 2 D -> D).
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: if the mixer is not causal, or the merge unknown.
    """

    causal = False

    def __init__(
        self,
        dim: int,
        mixer: str = "s6",
        mixer_args: Mapping[str, Any] | None = None,
        merge: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if merge not in MERGES:
            raise UserError(f"bidirectional: unknown merge {merge!r}{suggest(merge, MERGES)}")
        arguments = {**(mixer_args or {}), "device": device, "dtype": dtype}
        self.fwd, self.bwd = create_mixer(mixer, dim, **arguments), create_mixer(mixer, dim, **arguments)
        if not self.fwd.causal:
            raise DirectionError(
                f"bidirectional: expected a causal mixer, got {mixer!r}, which sees both ends by itself"
            )
        self.needs_spatial_shape = self.fwd.needs_spatial_shape
        self.supports_cu_seqlens = self.fwd.supports_cu_seqlens
        self.merge = merge
        concat = merge == "concat"
        self.merge_proj = nn.Linear(2 * dim, dim, bias=False, device=device, dtype=dtype) if concat else nn.Identity()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for part in (self.fwd, self.bwd, self.merge_proj):
            reset_parameters(part)

    def mix(self, x: Tensor) -> Tensor:
        """See `Mixer.mix`."""
        return self._merge(self.fwd(x), self.bwd(x.flip(1)).flip(1))

    @torch.jit.ignore
    def mix_sequence(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Any]:
        """See `Mixer.mix_sequence`."""
        y = self.fwd(x=x, cu_seqlens=cu_seqlens, spatial_shape=spatial_shape)
        if cu_seqlens is None:
            y_b = self.bwd(x=x.flip(1), spatial_shape=spatial_shape).flip(1)
        else:
            order = reversed_order(cu_seqlens, x.shape[1])
            y_b = self.bwd(x=x[:, order], cu_seqlens=cu_seqlens)[:, order]
        return self._merge(y, y_b), None

    @torch.jit.ignore
    def _split_and_join(self, x: Tensor, state: Any, cu_seqlens: Tensor, return_state: bool) -> Any:
        """Leave the splitting to each direction, which is causal and so may pad where this class may not."""
        return self.mix_sequence(x, cu_seqlens=cu_seqlens)[0]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """See `Mixer.no_weight_decay`."""
        return {f"fwd.{n}" for n in self.fwd.no_weight_decay()} | {f"bwd.{n}" for n in self.bwd.no_weight_decay()}

    @torch.jit.ignore
    def step_sizes(self, x: Tensor, spatial_shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """See `Mixer.step_sizes`."""
        found = {}
        for name, part, tokens in (("forward", self.fwd, x), ("backward", self.bwd, x.flip(1))):
            for scan, dt in part.step_sizes(tokens, spatial_shape).items():
                key = name if scan == "forward" else f"{scan}, {name}"
                found[key] = dt if part is self.fwd else dt.flip(1)
        return found

    def _merge(self, y_f: Tensor, y_b: Tensor) -> Tensor:
        if self.merge == "add":
            return y_f + y_b
        if self.merge == "mean":
            return (y_f + y_b) / 2
        if self.merge == "ew_multiply":
            return y_f * y_b
        return self.merge_proj(torch.cat([y_f, y_b], dim=-1))


def reversed_order(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return the places (L,) that packed tokens come from when each sequence is reversed; its own inverse."""
    at = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, at, right=True) - 1  # of each token; empty sequences have none
    return cu_seqlens[sequence] + cu_seqlens[sequence + 1] - 1 - at
