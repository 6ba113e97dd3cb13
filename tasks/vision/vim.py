"""Vim: patches of an image as one sequence, read in both directions by an isotropic stack of mixers.

    image (B, C, H, W) -> patches (B, M, D) + position -> cls token inserted at M // 2 -> blocks -> norm -> head

Source: Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
sections 3.2 to 3.4. Names in the state dict are those of hustvl/Vim, except that `pos_embed` is stored cls-first.
"""

# No `from __future__ import annotations`: torch.fx copies forward's annotations, and TorchScript reads the copy.
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models import register_notrace_module
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from mambaverse.backbones.isotropic import Isotropic
from mambaverse.blocks import Block, Norm, Sum, check_counts, check_rates
from mambaverse.errors import UserError
from mambaverse.kernels.backend import recomputed
from mambaverse.tasks.vision.factory import check_indices
from mambaverse.tasks.vision.patches import PatchEmbed, check_images
from mambaverse.tasks.vision.vim_checkpoints import load_vim

for _module in (Block, Norm, Sum):  # torch.fx takes each of them for one node of its graph
    register_notrace_module(_module)


class Vim(Isotropic):
    """An isotropic image classifier; any mixer by name.

    Args:
        img_size: Height and width of the images in pixels, or one number for both.
        patch_size: Side of a square patch in pixels.
        stride: Pixels from one patch to the next; None: patch_size, so that none overlap.
        in_chans: Image channels C.
        num_classes: Outputs of the head; 0: no head.
        global_pool: "token" (the cls token), "avg" (mean of the patches), or "" (no pooling).
        embed_dim: Channels D of a token.
        depth: Number of blocks.
        mixer: A mixer's name, or a pattern of names repeated over the layers.
        mixer_args: Arguments keyed by mixer: {"vim": {"d_state": 16}}.
        directions: 1 leaves a causal mixer in one direction; else it is wrapped to read both.
        cls_position: Where the cls token stands among the patches: "middle", "first", "last" or "none" (no cls token).
        norm: "rms" or "layer".
        mlp_ratio: Width of an MLP in each block, in units of D; 0: none, as in Vim.
        layer_scale: First value of a learnt factor on the branches; None: no factor.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout of the tokens before the first block.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        dynamic_img_size: Take any image size, resampling the position embedding as it comes.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: sizes or options that do not fit each other, named with the nearest that would.
    """

    _version = 2  # torch keeps it beside a state dict's weights: the original's is 1, see `vim_checkpoints`

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        mixer: str | Sequence[str] = "vim",
        mixer_args: Mapping[str, Mapping[str, Any]] | None = None,
        directions: int | None = None,
        cls_position: str | None = None,
        norm: str = "rms",
        mlp_ratio: float = 0.0,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
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
        check_counts(0, num_classes=num_classes)
        check_counts(1, in_chans=in_chans)
        check_rates(drop_rate=drop_rate, pos_drop_rate=pos_drop_rate)
        self.cls_position = self._check_cls_position(cls_position)
        has_cls = self.cls_position != "none"
        self.num_prefix_tokens = int(has_cls)
        self.has_class_token = has_cls
        self.global_pool = self._check_pool(("token" if has_cls else "avg") if global_pool is None else global_pool)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.dynamic_img_size = dynamic_img_size
        self.patch_embed = PatchEmbed(
            img_size, patch_size, stride, in_chans, embed_dim, strict_img_size=not dynamic_img_size, **dd
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd)) if has_cls else None
        num_tokens = self.num_prefix_tokens + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self._init_stem_and_head()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised tokens (B, [cls +] M, D), cls first, of images x (B, C, H, W)."""
        if self.needs_spatial_shape:
            tokens, height, width = self._embed(x)
            return self._cls_first(self.forward_layers(tokens, (height, width)))
        return self._cls_first(self.forward_layers(self._embed(x)[0]))  # without a name that holds the first tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, [cls +] M, D) and classify: (B, num_classes), or (B, D) with `pre_logits`."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Classify images x (B, C, H, W): logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the tokens after chosen blocks, as feature maps; arguments and returns as timm's vision transformers.

        Args:
            x: Images (B, C, H, W).
            indices: Blocks to take: the last n, or a list; None: all.
            return_prefix_tokens: Return (map, cls tokens) pairs; not in TorchScript.
            norm: Apply the last norm to each.
            stop_early: Do not run the blocks behind the last one taken; TorchScript runs all.
            output_fmt: "NCHW" (B, D, H', W') or "NLC" (B, M, D).
            intermediates_only: Leave out the final tokens.

        Raises:
            UserError: another `output_fmt`; indices of no blocks.
        """
        if not torch.jit.is_scripting():
            self._check_format(output_fmt)
            check_indices(indices, len(self.layers))
        take, last = feature_take_indices(len(self.layers), indices)
        hidden, height, width = self._embed(x)
        grid: tuple[int, int] | None = None
        if self.needs_spatial_shape:
            grid = (height, width)
        residual: Tensor | None = None
        maps: list[Tensor] = []
        prefixes: list[Tensor] = []
        if torch.jit.is_scripting() or not stop_early:
            layers = self.layers
        else:
            layers = self.layers[: last + 1]
        for i, layer in enumerate(layers):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                hidden, residual = recomputed(layer, hidden, residual, grid)
            else:
                hidden, residual = layer(hidden, residual, grid)
            if i in take:
                tokens = self.norm_f(hidden, residual)[0] if norm else hidden + residual
                tokens = self._cls_first(tokens)
                prefixes.append(tokens[:, : self.num_prefix_tokens])
                tokens = tokens[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    tokens = tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)
                maps.append(tokens.contiguous())
        if not torch.jit.is_scripting() and return_prefix_tokens:
            maps = list(zip(maps, prefixes, strict=True))  # type: ignore[arg-type]
        if intermediates_only:
            return maps
        return self._cls_first(self.norm_f(hidden, residual)[0]), maps

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last of `indices` (and the last norm, and the head); return the indices kept."""
        check_indices(indices, len(self.layers))
        take, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = Sum()
        if prune_head:
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
            self.global_pool = self._check_pool(global_pool)
        self.num_classes = num_classes
        if num_classes > 0:
            like = self.pos_embed
            self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        else:
            self.head = nn.Identity()
        self.head.train(self.training)

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the image or patch size; the position embedding and the patch filters are resampled.

        Raises:
            UserError: images that the patches do not cover exactly, or patches that are not square.
        """
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        resampled = resample_abs_pos_embed(
            self.pos_embed, list(self.patch_embed.grid_size), list(old), num_prefix_tokens=self.num_prefix_tokens
        )
        self.pos_embed = nn.Parameter(resampled.detach(), requires_grad=self.pos_embed.requires_grad)
        patch, stride = self.patch_embed.patch_size[0], self.patch_embed.stride[0]
        self.feature_info = [{**info, "reduction": stride} for info in self.feature_info]
        changed = {} if patch_size is None else {"patch_size": patch, "stride": None if stride == patch else stride}
        update_model_input_size(self, self.patch_embed.img_size, **changed)  # so that an export rebuilds this model

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights anew, as a model built on the meta device needs after `to_empty`; a timm name.

        Args:
            needs_reset: Also those of the blocks; False: only those of the stem and the head.
        """
        if needs_reset:
            super().reset_parameters()
        self._init_stem_and_head()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """See `Isotropic.reset_parameters`."""
        self.init_weights()

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a weights file, ours or the original's (see `load_vim`); a timm name, whose `prefix` must be empty."""
        if prefix:
            raise UserError(f"prefix: a Vim's file has none, got {prefix!r}")
        load_vim(self, checkpoint_path)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would harm."""
        own = {"cls_token", "pos_embed"} if self.cls_token is not None else {"pos_embed"}
        return own | super().no_weight_decay()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm groups parameters into layers (layer-wise learning rates)."""
        blocks = [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": blocks}

    def _embed(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Turn images into tokens in the order in which the blocks read them; also the grid's height and width."""
        if not torch.jit.is_scripting():
            stem = self.patch_embed
            check_images(
                x, self.in_chans, None if self.dynamic_img_size else stem.img_size, stem.patch_size, stem.stride
            )
        x = self.patch_embed(x)
        height, width = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        position = self.pos_embed
        if self.dynamic_img_size:
            position = resample_abs_pos_embed(
                position, [height, width], self.patch_embed.grid_size, num_prefix_tokens=self.num_prefix_tokens
            )
        cls_token: Tensor | None = self.cls_token
        if cls_token is not None:
            cls = (cls_token + position[:, :1]).expand(x.shape[0], -1, -1)
            x = x + position[:, 1:]
            at = self._cls_index(x.shape[1])
            x = torch.cat([x[:, :at], cls, x[:, at:]], dim=1)
        else:
            x = x + position
        return self.pos_drop(x), height, width

    def _cls_index(self, num_patches: int) -> int:
        if self.cls_position == "first":
            return 0
        return num_patches if self.cls_position == "last" else num_patches // 2

    def _cls_first(self, x: Tensor) -> Tensor:
        """Move the cls token from where it was read to the front."""
        if self.num_prefix_tokens == 0:
            return x
        at = self._cls_index(x.shape[1] - 1)
        return torch.cat([x[:, at : at + 1], x[:, :at], x[:, at + 1 :]], dim=1)

    @torch.jit.ignore
    def _check_format(self, output_fmt: str) -> None:
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")

    @torch.jit.ignore
    def _check_cls_position(self, position: str | None) -> str:
        if position is None:
            return "none" if self.needs_spatial_shape else "middle"
        if position not in ("middle", "first", "last", "none"):
            raise UserError(f"cls_position: expected 'middle', 'first', 'last' or 'none', got {position!r}")
        if position != "none" and self.needs_spatial_shape:
            raise UserError(f"cls_position={position!r}: a mixer here needs the tokens to be a grid; use 'none'")
        return position

    @torch.jit.ignore
    def _check_pool(self, pool: str) -> str:
        if pool not in ("token", "avg", ""):
            raise UserError(f"global_pool: expected 'token', 'avg' or '', got {pool!r}")
        if pool == "token" and self.num_prefix_tokens == 0:
            raise UserError("global_pool='token' needs a cls token, but cls_position is 'none'; use 'avg'")
        return pool

    @torch.jit.ignore
    def _init_stem_and_head(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        fan_in = self.patch_embed.proj.weight[0].numel()
        trunc_normal_(self.patch_embed.proj.weight, std=fan_in**-0.5)  # LeCun
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
