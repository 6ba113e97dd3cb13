"""A classifier of raw waveforms: a strided convolutional stem makes tokens of 10 ms, a stack of mixers reads them.

    x (B, L) -> [convolution (width w, stride s), norm over channels, GELU] x 5 -> blocks -> mean -> head

No convolution is padded, so that a token depends on its own samples alone: L samples give floor((L - w) / s) + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mambaverse.backbones.isotropic import Isotropic, check_floats, padded_lengths
from mambaverse.blocks import check_counts, check_rates, reset_parameters
from mambaverse.errors import UserError
from mambaverse.registry import is_a

STEM = ((10, 5), (8, 4), (4, 2), (4, 2), (4, 2))  # (width, stride): 160 samples a token, 10 ms at 16 kHz


class Stem(nn.Module):
    """Convolutions without padding: (B, L) -> (B, T, D)."""

    def __init__(self, dim: int, layers: Sequence[tuple[int, int]], **factory: Any) -> None:
        super().__init__()
        self.layers = tuple(layers)
        widths = [max(dim >> max(2 - i, 0), 1) for i in range(len(self.layers) - 1)] + [dim]  # D/4, D/2, D, ..., D
        inputs = [1, *widths[:-1]]
        self.convs = nn.ModuleList(
            nn.Conv1d(before, after, width, stride, **factory)
            for before, after, (width, stride) in zip(inputs, widths, self.layers, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width, **factory) for width in widths)
        self.shortest = 1  # samples that make one token
        for width, stride in reversed(self.layers):
            self.shortest = (self.shortest - 1) * stride + width

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens; a clip shorter than the first of them is filled up with zeros."""
        x = F.pad(x, (0, max(self.shortest - x.shape[1], 0)))[:, None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x).transpose(1, 2))).transpose(1, 2)
        return x.transpose(1, 2)

    def num_tokens(self, lengths: Tensor) -> Tensor:
        """Return the numbers of tokens (B,) of clips of so many samples (B,)."""
        lengths = lengths.clamp(min=self.shortest)
        for width, stride in self.layers:
            lengths = (lengths - width) // stride + 1
        return lengths


class AudioRaw(Isotropic):
    """An isotropic classifier of waveforms of any length; any mixer by name.

    Args:
        num_classes: Outputs of the head; 0: no head.
        embed_dim: Channels D of a token.
        depth: Number of blocks.
        mixer: A mixer's name, or a pattern of names repeated over the layers.
        mixer_args: Arguments keyed by mixer: {"ssd": {"d_state": 64}}.
        directions: 1 leaves a causal mixer in one direction; else it is wrapped to read both.
        stem: (width, stride) in samples of each convolution.
        norm: "rms" or "layer".
        mlp_ratio: Width of an MLP in each block, in units of D; 0: none.
        layer_scale: First value of a learnt factor on the branches; None: no factor.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: options that do not fit.
    """

    input_kind = "waveform"

    def __init__(
        self,
        num_classes: int = 35,
        embed_dim: int = 96,
        depth: int = 4,
        mixer: str | Sequence[str] = "vim",
        mixer_args: Mapping[str, Mapping[str, Any]] | None = None,
        directions: int | None = None,
        stem: Sequence[Sequence[int]] = STEM,
        norm: str = "rms",
        mlp_ratio: float = 0.0,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim,
            depth,
            mixer,
            mixer_args,
            causal=False,
            directions=directions,
            norm=norm,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            layer_scale=layer_scale,
            **dd,
        )
        if self.needs_spatial_shape:
            raise UserError("a mixer here needs a grid of tokens; a waveform has none")
        check_counts(0, num_classes=num_classes)
        check_rates(drop_rate=drop_rate)
        if not stem or not all(map(_is_layer, stem)):
            raise UserError(f"stem: expected [width, stride] pairs, width >= stride >= 1, got {list(stem)}")
        self.num_classes = num_classes
        self.stem = Stem(embed_dim, [(layer[0], layer[1]) for layer in stem], **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self._init_head()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Classify waveforms: logits (B, num_classes).

        Args:
            x: Normalised samples (B, L).
            lengths: Samples of each clip in a padded batch, (B,): what is behind them changes nothing. None: all L.

        Raises:
            ValueError: x of another shape or dtype, or lengths that are none of its clips.
        """
        check_floats(x, expected := "waveforms of shape (B, L)", self)
        if x.ndim != 2 or not x.shape[1]:
            raise UserError(f"expected {expected}, got {tuple(x.shape)}")
        lengths = padded_lengths(lengths, x.shape[0], x.shape[1])
        if lengths is not None:  # a clip shorter than the stem's reach sees zeros behind it, whatever the batch holds
            x = x.masked_fill(torch.arange(x.shape[1], device=x.device) >= lengths.to(x.device)[:, None], 0)
        tokens = self.stem(x)
        if lengths is None:
            return self.head(self.head_drop(self.forward_layers(tokens).mean(1)))
        counts = self.stem.num_tokens(lengths.to(x.device))
        tokens = Isotropic.forward(self, tokens, counts)  # zeros behind each clip
        return self.head(self.head_drop(tokens.sum(1) / counts[:, None]))

    def reset_parameters(self) -> None:
        """See `Isotropic.reset_parameters`."""
        super().reset_parameters()
        reset_parameters(self.stem)
        self._init_head()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm groups parameters into layers (layer-wise learning rates)."""
        return {"stem": r"^stem", "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]}

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)


def _is_layer(layer: Any) -> bool:
    return is_a(layer, Sequence[int]) and len(layer) == 2 and layer[0] >= layer[1] >= 1
