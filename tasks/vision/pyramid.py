"""Image classifiers that are a pyramid of token grids; any mixer by name in each stage.

image (B, C, H, W) -> stem (B, H/4, W/4, D) -> stages, each half as high and wide -> norm -> mean -> head
"""

# No `from __future__ import annotations`: torch.fx copies those of `forward` into the code that it writes, and
# TorchScript, which may compile that, must find a type there and not a string.
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, register_notrace_function, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from mambaverse.backbones.hierarchical import Hierarchical, StageMixers, init_linear_
from mambaverse.blocks import Block, check_counts, check_rates
from mambaverse.engine.checkpoint import load_state, read_weights
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.vision.factory import (
    BUILDER_ARGUMENTS,
    check_indices,
    check_published,
    record_arguments,
    with_own_cfg,
)
from mambaverse.tasks.vision.fine_tune import adapted
from mambaverse.tasks.vision.stems import STEMS, ResidualStem

register_notrace_module(Block)


class Pyramid(Hierarchical):
    """A hierarchical image classifier; any mixer by name. Images of any size, not only square ones.

    Args:
        img_size: Height and width of the images in pixels, or one number for both. Nothing in the model depends on it.
        in_chans: Image channels C.
        num_classes: Outputs of the head; 0: no head.
        global_pool: "avg" (mean of the grid), or "" (no pooling).
        dims: Channels D of each stage; one number is doubled from stage to stage.
        depths: Number of blocks of each stage.
        mixer: A mixer's name for all stages; or a list with one entry a stage, each a name or a pattern of names that
            is repeated over the stage's blocks.
        mixer_args: Arguments keyed by mixer: {"ss2d": {"d_state": 1}}.
        directions: 1 leaves a causal mixer in one direction; else it is wrapped to read both.
        stem: "conv" (two convolutions), "patch" (one of each patch by itself) or "residual"; see stems.py.
        patch_size: Side of a token of the first stage in pixels: 4, or for small images 2 or 1.
        downsample: "conv" or "merge", see `Hierarchical`.
        local: Side of the residual depthwise convolution in front of each block, odd; 0: none.
        norm: "rms" or "layer".
        mlp_ratio: Width of an MLP in each block, in units of D; 0: none.
        layer_scale: First value of a learnt factor on the branches; None: no factor.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: options that do not fit each other, named with what would.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: int | Sequence[int] = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        mixer: StageMixers = "ss2d",
        mixer_args: Mapping[str, Mapping[str, Any]] | None = None,
        directions: int | None = None,
        stem: str = "conv",
        patch_size: int = 4,
        downsample: str = "conv",
        local: int = 0,
        norm: str = "layer",
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        check_depths(depths)
        if stem not in STEMS:
            raise UserError(f"stem: unknown stem {stem!r}{suggest(stem, STEMS)}")
        side = img_size if isinstance(img_size, int) else min(img_size)
        if stem == "patch" and side < patch_size:
            raise UserError(f"img_size: {side} is smaller than a patch of {patch_size}; the least is {patch_size}")
        super().__init__(
            dims,
            depths,
            mixer,
            mixer_args,
            directions=directions,
            norm=norm,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            layer_scale=layer_scale,
            downsample=downsample,
            local=local,
            **dd,
        )
        check_counts(0, num_classes=num_classes)
        check_counts(1, in_chans=in_chans)
        check_rates(drop_rate=drop_rate)
        self.global_pool = _check_pool(global_pool)
        self.num_classes, self.in_chans, self.output_fmt = num_classes, in_chans, "NHWC"
        self.num_features = self.head_hidden_size = dims[-1]
        self.patch_embed = STEMS[stem](in_chans, dims[0], patch_size, norm, 1e-5, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[-1], num_classes, **dd) if num_classes > 0 else nn.Identity()
        scales = self.patch_embed.scales if isinstance(self.patch_embed, ResidualStem) else []
        self.num_scales = len(scales)
        self.feature_info = [
            {"module": f"patch_embed.pairs.{i}", "num_chs": width, "reduction": side}
            for i, (width, side) in enumerate(scales)
        ] + [{"module": f"layers.{i}", "num_chs": dim, "reduction": patch_size * 2**i} for i, dim in enumerate(dims)]
        self._init_head()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised tokens (B, H', W', D) of images x (B, C, H, W)."""
        if not torch.jit.is_scripting():
            check_images(x, self.in_chans)
        return self.forward_stages(self.patch_embed(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, H', W', D) and classify: (B, num_classes), or (B, D) with `pre_logits`."""
        if self.global_pool == "avg":
            x = x.mean(dim=[1, 2])
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images x (B, C, H, W): logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the tokens after chosen stages, as feature maps; arguments and returns as timm's pyramids.

        The scales of a stem of residual convolutions count as stages, the first ones.

        Args:
            x: Images (B, C, H, W).
            indices: Stages to take: the last n, or a list; None: all.
            norm: Apply the last norm to the last stage's, the only one that it fits.
            stop_early: Do not run the stages behind the last one taken.
            output_fmt: "NCHW" (B, D, H', W') or "NHWC" (B, H', W', D).
            intermediates_only: Leave out the final tokens.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise UserError(f"output_fmt: expected 'NCHW' or 'NHWC', got {output_fmt!r}")
        check_images(x, self.in_chans)
        stages, scales = self.stages(), self.num_scales
        check_indices(indices, scales + len(stages))
        take, last = feature_take_indices(scales + len(stages), indices)
        maps: list[Tensor] = []
        if isinstance(self.patch_embed, ResidualStem):
            x, maps = self.patch_embed.forward_scales(x)
        else:
            x = self.patch_embed(x)
        is_last = False
        for i, stage in enumerate(stages[: max(last + 1 - scales, 0)] if stop_early else stages):
            x, is_last = stage(x), i == len(stages) - 1
            maps.append(self.norm_f(x) if norm and is_last else x)
        taken = [maps[i] for i in take]
        if output_fmt == "NCHW":
            taken = [features.permute(0, 3, 1, 2).contiguous() for features in taken]
        if intermediates_only:
            return taken
        return self.norm_f(x) if is_last else x, taken

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of `indices` (and the last norm, and the head); return the indices kept.

        Indices are those of `forward_intermediates`.
        Where stages are dropped, the norm and the head go with them: they have the width of the last stage.
        """
        scales = self.num_scales
        check_indices(indices, scales + len(self.layers))
        take, last = feature_take_indices(scales + len(self.layers), indices)
        shorter = last < scales + len(self.layers) - 1
        self.layers = self.layers[: max(last + 1 - scales, 0)]
        if prune_norm or shorter:
            self.norm_f = nn.Identity()
        if isinstance(self.patch_embed, ResidualStem) and last < scales:
            self.num_features = self.head_hidden_size = self.patch_embed.prune(last)
        elif shorter:
            self.num_features = self.head_hidden_size = self.dims[last - scales]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one of `num_classes` outputs (0: none); device, dtype and mode stay."""
        check_counts(0, num_classes=num_classes)
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes > 0
            else nn.Identity()
        )
        self._init_head()
        self.head.train(self.training)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """See `Hierarchical.init_weights`; the head's weights are drawn in the same way."""
        super().init_weights(needs_reset)
        self._init_head()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm groups parameters into layers (layer-wise learning rates)."""
        blocks = [
            (r"^layers\.(\d+)\.downsample", (0,)),
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm_f", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            init_linear_(self.head)


def build_pyramid(
    cls: type[Pyramid],
    variant: str,
    pretrained: bool,
    size: Mapping[str, Any],
    overrides: dict[str, Any],
    filter_weights: Callable[[Mapping[str, Any], nn.Module], dict[str, Any]] | None = None,
    fit: Callable[[Mapping[str, Tensor], nn.Module, str], dict[str, Tensor]] = adapted,
) -> nn.Module:
    """Build a registered size of a family, as timm does.

    Args:
        cls: The family's class.
        variant: The registered name.
        pretrained: Whether weights are asked for, which `pretrained_cfg` or its overlay must then name.
        size: Arguments that make the variant.
        overrides: Arguments given on top; mixers' are merged mixer by mixer.
        filter_weights: Renames the parameters of a file of weights, for timm.
        fit: Fits the weights of `checkpoint_path` to the model: (weights, model, where they are from).

    Raises:
        UserError: weights were asked for, and none are published.
        CheckpointError: a file that cannot be read, or of another model.
    """
    overrides = with_own_cfg(variant, overrides)
    path = overrides.pop("checkpoint_path", None)
    check_published(variant, pretrained, overrides)
    own, given = size.get("mixer_args") or {}, overrides.get("mixer_args") or {}
    merged = {name: {**own.get(name, {}), **given.get(name, {})} for name in {**own, **given}}
    arguments = {**size, **overrides, "mixer_args": merged}
    scales = getattr(STEMS.get(arguments.get("stem", "conv")), "SCALES", 0)
    check_depths(arguments["depths"])
    every = tuple(range(scales + len(arguments["depths"])))
    out_indices = arguments.pop("out_indices", every)
    if arguments.get("features_only"):
        check_indices(out_indices, len(every), "out_indices")
    feature_cfg = {"out_indices": out_indices, "feature_cls": "getter"}
    model = build_model_with_cfg(
        cls, variant, pretrained, pretrained_filter_fn=filter_weights, feature_cfg=feature_cfg, **arguments
    )
    record_arguments(model, overrides, BUILDER_ARGUMENTS)
    if path is not None:
        inner = getattr(model, "model", model)  # of features_only, which has no head and may end early
        weights = fit(read_weights(Path(path)), inner, str(path))
        own = weights if inner is model else inner.state_dict()
        load_state(inner, {name: value for name, value in weights.items() if name in own}, str(path))
    return model


def check_depths(depths: Any) -> None:
    """Raise UserError unless `depths` is a list of numbers."""
    if isinstance(depths, str) or not isinstance(depths, Sequence):
        raise UserError(f"depths: expected a list with the number of blocks of each stage, got {depths!r}")


def _check_pool(pool: str) -> str:
    if pool not in ("avg", ""):
        raise UserError(f"global_pool: expected 'avg' or '', got {pool!r}")
    return pool


@register_notrace_function
def check_images(x: Tensor, in_chans: int) -> None:  # torch.fx wraps no name that begins with an underscore
    """Raise UserError unless x is (B, in_chans, H, W)."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise UserError(
            f"expected images of shape (B, {in_chans}, H, W), got {tuple(x.shape)}; in_chans= changes what the model "
            "takes"
        )
