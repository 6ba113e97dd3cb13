"""The hierarchical backbone: stages of blocks on a grid of tokens, which halves its sides between the stages.

    tokens (B, H, W, D0) -> stage 0 -> downsample -> stage 1 -> ... -> norm -> (B, H/8, W/8, D3)

VMamba is this backbone with one mixer; hybrids name one for each stage, or a pattern inside a stage. Any mixer will do:
blocks read a grid by rows, and a mixer that needs its shape gets it. The pyramid is that of Liu et al. 2021, "Swin
Transformer", section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.blocks import Block, build_mixer, check_stack, layer_pattern, reset_parameters
from mambaverse.errors import UserError
from mambaverse.kernels.backend import recomputed

DOWNSAMPLES = ("conv", "merge")
StageMixers = str | Sequence[str | Sequence[str]]  # one name for all, or for each stage a name or a pattern


class ConvDownsample(nn.Module):
    """A 3 x 3 convolution of stride 2 and a norm: (B, H, W, C) -> (B, ⌈H/2⌉, ⌈W/2⌉, D)."""

    def __init__(self, in_dim: int, dim: int, norm: nn.Module, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Halve the grid x (B, H, W, C)."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class MergeDownsample(nn.Module):
    """The tokens of 2 x 2 as one, normalised and projected: (B, H, W, C) -> (B, ⌈H/2⌉, ⌈W/2⌉, D).

    A grid with an odd side is filled up with one row or column of zeros.
    """

    def __init__(self, in_dim: int, dim: int, norm: nn.Module, **dd: Any) -> None:
        super().__init__()
        self.norm = norm
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the grid x (B, H, W, C)."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class LocalConv(nn.Module):
    """A depthwise convolution, which is added to its input: it tells a mixer where a token is, and what is beside it.

    Source: the conditional positional encoding of Chu et al. 2021 (arXiv 2102.10882), section 3.3.
    """

    def __init__(self, dim: int, size: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is to be added to the grid x (B, H, W, D)."""
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Blocks on one grid, after what brings the grid of the stage before to this size.

    Args:
        downsample: Takes and returns (B, H, W, D); nn.Identity() in a first stage.
        blocks: At least one.
        local: A `LocalConv` in front of each block, or none.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block], local: Sequence[LocalConv] = ()) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.has_local = len(local) > 0
        self.local = nn.ModuleList(local if self.has_local else [nn.Identity() for _ in blocks])
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Run x (B, H, W, D of the stage before) through the stage."""
        x = self.downsample(x)
        height, width = x.shape[1], x.shape[2]
        hidden = x.flatten(1, 2)
        residual: Tensor | None = None
        for block, local in zip(self.blocks, self.local):  # noqa: B905 (TorchScript knows no strict=)
            if self.has_local:
                total = hidden if residual is None else residual + hidden
                residual = total
                hidden = local(total.to(x.dtype).unflatten(1, [height, width])).flatten(1, 2)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                hidden, residual = recomputed(block, hidden, residual, (height, width))
            else:
                hidden, residual = block(hidden, residual, (height, width))
        total = hidden if residual is None else residual + hidden
        return total.to(x.dtype).unflatten(1, [height, width])


class Hierarchical(nn.Module):
    """Stages of blocks on grids of tokens, channels last.

    Args:
        dims: Channels D of each stage.
        depths: Number of blocks of each stage.
        mixer: A mixer's name for all stages; or a list with one entry a stage, each a name, or a pattern of names that
            is repeated over the stage's blocks: ["ss2d", "ss2d", ["ss2d", "attention"], "attention"].
        mixer_args: Arguments keyed by mixer: {"ss2d": {"d_state": 1}}.
        directions: 1 leaves a causal mixer in one direction; else it is wrapped to read both.
        norm: "rms" or "layer".
        eps: Of the norms.
        mlp_ratio: Width of an MLP in each block, in units of D; 0: none.
        drop_path_rate: Rate of the last block; it grows linearly from 0 at the first.
        layer_scale: First value of a learnt factor on the branches; None: no factor.
        downsample: "conv" (3 x 3, stride 2, then a norm) or "merge" (2 x 2 tokens joined, normalised, projected).
        local: Side of the residual depthwise convolution in front of each block, odd; 0: none.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: lists of different lengths, an empty stage, unknown names or arguments (see `build_mixer`).
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        mixer: StageMixers = "ss2d",
        mixer_args: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        directions: int | None = None,
        norm: str = "layer",
        eps: float = 1e-5,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        downsample: str = "conv",
        local: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(dims) != len(depths) or not depths or min(depths) < 1 or min(dims) < 1:
            raise UserError(
                f"dims and depths: expected as many of both, at least 1 each, got {list(dims)} and {list(depths)}"
            )
        check_stack(depths, mlp_ratio, drop_path_rate, eps)
        if norm not in ("rms", "layer"):
            raise UserError(f"norm: expected 'rms' or 'layer', got {norm!r}")
        if downsample not in DOWNSAMPLES:
            raise UserError(f"downsample: expected 'conv' or 'merge', got {downsample!r}")
        if local < 0 or (local > 0 and local % 2 == 0):
            raise UserError(f"local: expected an odd side of a convolution, or 0 for none, got {local}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dims, self.depths = list(dims), list(depths)
        last = max(sum(depths) - 1, 1)
        rates = iter([drop_path_rate * i / last for i in range(sum(depths))])
        stages = []
        for i, names in enumerate(stage_patterns(mixer, depths)):
            mixers = [
                build_mixer(name, dims[i], mixer_args, causal=False, directions=directions, **dd) for name in names
            ]
            blocks = [
                Block(dims[i], m, norm, eps, mlp_ratio, drop_path=next(rates), layer_scale=layer_scale, **dd)
                for m in mixers
            ]
            make = nn.Identity() if i == 0 else _downsample(downsample, dims[i - 1], dims[i], norm, eps, **dd)
            stages.append(Stage(make, blocks, [LocalConv(dims[i], local, **dd) for _ in blocks if local]))
        self.layers = nn.ModuleList(stages)
        self.norm_f: nn.Module = plain_norm(norm, dims[-1], eps, **dd)
        Hierarchical.init_weights(self, needs_reset=False)  # a subclass may not have all that its own draws yet

    @torch.jit.ignore
    def stages(self) -> list[Stage]:
        """Return `layers`, typed."""
        return [cast(Stage, stage) for stage in self.layers]

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised tokens (B, H', W', D of the last stage) of x (B, H, W, D of the first)."""
        return self.forward_stages(x)

    def forward_stages(self, x: Tensor) -> Tensor:
        """Run the stages and the last norm on tokens (B, H, W, D)."""
        for stage in self.layers:
            x = stage(x)
        return self.norm_f(x)

    @torch.jit.ignore
    @torch.no_grad()
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the weights of the MLPs from a normal of deviation 0.02, as the authors of VMamba do.

        Args:
            needs_reset: First draw all parameters anew, those of the mixers too: for a model that left the meta device.
        """
        if needs_reset:
            reset_parameters(self)
        for stage in self.stages():
            for mlp in (cast(Block, block).mlp for block in stage.blocks):
                if mlp is not None:
                    init_linear_(mlp.fc1)
                    init_linear_(mlp.fc2)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of keeping its activations."""
        for stage in self.stages():
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would harm: each mixer's own list."""
        return {
            f"layers.{i}.blocks.{j}.mixer.{name}"
            for i, stage in enumerate(self.stages())
            for j, block in enumerate(stage.blocks)
            for name in cast(Block, block).mixer.no_weight_decay()
        }


def stage_patterns(mixer: StageMixers, depths: Sequence[int]) -> list[list[str]]:
    """Return the names of each stage's mixers, one a block.

    Raises:
        UserError: if a list has another length than there are stages, or an entry is empty.
    """
    patterns = [mixer] * len(depths) if isinstance(mixer, str) else list(mixer)
    if not all(isinstance(pattern, str | Sequence) for pattern in patterns):
        raise UserError(f"mixer: expected a name or a pattern of names for each stage, got {patterns}")
    if len(patterns) != len(depths):
        raise UserError(
            f"mixer: expected a name, or a list with one entry (a name or a pattern) for each of the {len(depths)} "
            f"stages, got {len(patterns)} entries: {patterns}"
        )
    return [layer_pattern(pattern, depth) for pattern, depth in zip(patterns, depths, strict=True)]


def plain_norm(kind: str, dim: int, eps: float, **dd: Any) -> nn.Module:
    """Return torch's own norm over the last axis, of `kind` "rms" or "layer": where no residual is to be added."""
    return nn.RMSNorm(dim, eps=eps, **dd) if kind == "rms" else nn.LayerNorm(dim, eps=eps, **dd)


def init_linear_(layer: nn.Module) -> None:
    """Draw the weight of a linear layer from a normal of deviation 0.02; set the bias to 0."""
    assert isinstance(layer, nn.Linear)
    nn.init.normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _downsample(kind: str, in_dim: int, dim: int, norm: str, eps: float, **dd: Any) -> nn.Module:
    if kind == "conv":
        return ConvDownsample(in_dim, dim, plain_norm(norm, dim, eps, **dd), **dd)
    return MergeDownsample(in_dim, dim, plain_norm(norm, 4 * in_dim, eps, **dd), **dd)
