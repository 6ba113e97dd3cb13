"""Audio Mamba: patches of a log-mel spectrogram as one sequence, read by an isotropic stack of mixers.

    x (B, T, F) -> (B, 1, F, T) -> patches (B, M, D), band by band, + position -> cls token at M // 2 -> blocks -> head

Source: Erol et al. 2024, "Audio Mamba: Bidirectional State Space Model for Audio Representation Learning"
(arXiv 2406.03344). Names in the state dict are those of the authors' code, and so is the order of `pos_embed`: the row
of the cls token comes first, wherever the token stands in the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mambaverse.backbones.isotropic import Isotropic, check_floats, padded_lengths
from mambaverse.blocks import check_counts, check_rates, reset_parameters
from mambaverse.ensemble import joined
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.audio.wide import TimeScores

FO_BI = {"vim": {"merge": "add", "shared": True}}
DIRECTION_TYPES: dict[str, dict[str, Any]] = {  # the paper's names: convolution, then scan, Forward only or Both ways
    "Fo-Fo": {"mixer": "s6", "directions": 1},
    "Fo-Bi": {"mixer": "vim", "mixer_args": FO_BI},
    "Bi-Bi": {"mixer": "vim"},
}


class PatchEmbed(nn.Module):
    """Patches of a spectrogram, each through one linear map: (B, 1, F, T) -> (B, D, F / p, T / q)."""

    def __init__(self, patch_size: tuple[int, int], embed_dim: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, embed_dim, patch_size, patch_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embedded patches."""
        return self.proj(x)


class PosEmbed(nn.Module):
    """A learnt embedding of each place in a grid of patches, its first `prefix` rows those of the cls token.

    A grid with fewer columns takes the first ones; for more columns, those that are there are stretched over time.
    """

    def __init__(self, grid: tuple[int, int], embed_dim: int, prefix: int, **factory: Any) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix
        self.pos_embed = nn.Parameter(torch.zeros(1, prefix + grid[0] * grid[1], embed_dim, **factory))

    def cls(self) -> Tensor:
        """Return the cls token's row (1, 1, D)."""
        return self.pos_embed[:, : self.prefix]

    def places(self, columns: int) -> Tensor:
        """Return (1, rows, columns, D)."""
        rows, there = self.grid
        table = rearrange(self.pos_embed[:, self.prefix :], "1 (r c) d -> 1 r c d", r=rows)
        return table[:, :, :columns] if columns <= there else stretch(table, columns)


class AuM(Isotropic):
    """An isotropic classifier of spectrograms of any length; any mixer by name.

    Args:
        bins: Mel bands F of the spectrograms.
        frames: Frames T that the position embedding has places for.
        patch_size: Bands and frames of a patch, or one number for both; bands must divide `bins`.
        num_classes: Outputs of the head; 0: no head.
        global_pool: "token" (the cls token) or "avg" (mean of the patches); None: the cls token if there is one.
        embed_dim: Channels D of a token.
        depth: Number of blocks.
        mixer: A mixer's name, or a pattern of names repeated over the layers; None: that of `direction_type`.
        mixer_args: Arguments keyed by mixer: {"vim": {"d_state": 16}}.
        directions: 1 leaves a causal mixer in one direction; else it is wrapped to read both.
        direction_type: In the paper's words "Fo-Fo", "Fo-Bi" (the scan alone goes both ways) or "Bi-Bi" (the
            convolution too); it chooses mixer, its arguments and directions, so it goes without `mixer`. None: "Bi-Bi".
        cls_position: Where the cls token stands: "middle", "first", "last" or "none"; None: the middle if it can.
        norm: "rms" or "layer".
        mlp_ratio: Width of an MLP in each block, in units of D; 0: none, as in AuM.
        layer_scale: First value of a learnt factor on the branches; None: no factor.
        wide: Times at which a linear classifier looks at the spectrogram, which learns beside the deep one, and with
            which its probabilities are averaged (see wide.py); 0: none.
        wide_decay: Strength of the penalty on its weights, per clip.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout of the tokens before the first block.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: sizes or options that do not fit each other.
    """

    input_kind = "fbank"

    def __init__(
        self,
        bins: int = 128,
        frames: int = 1024,
        patch_size: int | Sequence[int] = 16,
        num_classes: int = 527,
        global_pool: str | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        mixer: str | Sequence[str] | None = None,
        mixer_args: Mapping[str, Mapping[str, Any]] | None = None,
        directions: int | None = None,
        direction_type: str | None = None,
        cls_position: str | None = None,
        norm: str = "rms",
        mlp_ratio: float = 0.0,
        layer_scale: float | None = None,
        wide: int = 0,
        wide_decay: float = 0.3,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        chosen = _choose_mixer(mixer, mixer_args, directions, direction_type)
        super().__init__(
            embed_dim,
            depth,
            **chosen,
            causal=False,
            norm=norm,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            layer_scale=layer_scale,
            **dd,
        )
        check_counts(0, num_classes=num_classes, wide=wide)
        check_counts(1, bins=bins)
        check_rates(drop_rate=drop_rate, pos_drop_rate=pos_drop_rate)
        self.bins, self.num_classes = bins, num_classes
        self.patch_size = _check_patch(patch_size, bins, frames)
        self.cls_position = self._check_cls_position(cls_position)
        has_cls = self.cls_position != "none"
        self.global_pool = _check_pool(global_pool or ("token" if has_cls else "avg"), has_cls)
        self.patch_embed = PatchEmbed(self.patch_size, embed_dim, **dd)
        grid = bins // self.patch_size[0], -(-frames // self.patch_size[1])
        self.pos_embed = PosEmbed(grid, embed_dim, int(has_cls), **dd)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd)) if has_cls else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.wide: TimeScores | None = None
        if wide and num_classes:
            self.wide = TimeScores(bins, wide, num_classes, wide_decay, **dd)
        self._init_stem_and_head()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Classify spectrograms: logits (B, num_classes), in training with `wide` (B, 2, num_classes).

        Args:
            x: Normalised log-mel energies (B, T, F); 0 is their mean.
            lengths: Frames of each clip in a padded batch, (B,): what is behind them changes nothing. None: all T.

        Raises:
            ValueError: x of another shape or dtype, or lengths that are none of its clips.
        """
        tokens, counts = self.forward_features(x, lengths)
        if self.global_pool == "token":
            pooled = tokens[torch.arange(tokens.shape[0], device=x.device), self._cls_index(counts)]
        else:
            inside = torch.arange(tokens.shape[1], device=x.device) < (counts + self.pos_embed.prefix)[:, None]
            if self.pos_embed.prefix:
                inside = inside & (torch.arange(tokens.shape[1], device=x.device) != self._cls_index(counts)[:, None])
            pooled = (tokens * inside[..., None]).sum(1) / counts[:, None]
        scores = self.head(self.head_drop(pooled.to(tokens.dtype)))
        return scores if self.wide is None else joined([scores, self.wide(x, lengths)], self.training)

    def forward_features(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the normalised tokens (B, L, D) in the order in which they are read, and how many patches a clip has.

        A clip's patches, cls token among them, come first in its row; padding follows them.
        """
        check_floats(x, expected := f"spectrograms of shape (B, T, {self.bins})", self)
        if x.ndim != 3 or x.shape[2] != self.bins or not x.shape[1]:
            raise UserError(f"expected {expected}, got {tuple(x.shape)}; bins= sets it")
        width = self.patch_size[1]
        lengths = padded_lengths(lengths, x.shape[0], x.shape[1])
        if lengths is not None:
            inside = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]
            x = x.masked_fill(~inside[..., None], 0)
        # the last patch is filled up with the mean, and what is over gives none: compiled graphs choke on -T % width
        x = F.pad(x.transpose(1, 2), (0, width - 1))
        patches = rearrange(self.patch_embed(x[:, None]), "b d r c -> b r c d")
        _, rows, columns, _ = patches.shape
        if lengths is None:
            tokens = rearrange(patches + self.pos_embed.places(columns), "b r c d -> b (r c) d")
            counts = torch.full((x.shape[0],), rows * columns, device=x.device)
            return self._run_layers(self._insert_cls(tokens), (rows, columns)), counts
        if self.needs_spatial_shape:
            raise UserError("a mixer here needs the tokens to be one grid: give clips of one length (data.frames)")
        widths = -(-lengths.to(x.device) // width)  # columns of each clip
        patches = patches + self._positions(widths, columns)
        index, counts = self._order(widths, rows, columns)
        everything = patches.flatten(1, 2)
        if self.cls_token is not None:
            everything = torch.cat([everything, self._cls().expand(x.shape[0], -1, -1)], 1)
        tokens = everything.gather(1, index[..., None].expand(-1, -1, everything.shape[2]))
        return Isotropic.forward(self, self.pos_drop(tokens), counts + self.pos_embed.prefix), counts

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would harm."""
        own = {"cls_token", "pos_embed.pos_embed", *([] if self.wide is None else ["wide.weight"])}
        return own | super().no_weight_decay()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm groups parameters into layers (layer-wise learning rates)."""
        blocks = [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": blocks}

    def reset_parameters(self) -> None:
        """See `Isotropic.reset_parameters`."""
        super().reset_parameters()
        if self.wide is not None:
            reset_parameters(self.wide)
        self._init_stem_and_head()

    def _run_layers(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = self.pos_drop(tokens)
        return self.forward_layers(tokens, grid if self.needs_spatial_shape else None)

    def _insert_cls(self, tokens: Tensor) -> Tensor:
        if self.cls_token is None:
            return tokens
        at = self._cls_index(tokens.shape[1])
        return torch.cat([tokens[:, :at], self._cls().expand(tokens.shape[0], -1, -1), tokens[:, at:]], dim=1)

    def _cls(self) -> Tensor:
        assert self.cls_token is not None
        return self.cls_token + self.pos_embed.cls()

    def _cls_index(self, patches: Any) -> Any:
        """Return where the cls token stands among so many patches (a number, or a tensor of them)."""
        if self.cls_position == "first":
            return patches * 0
        return patches if self.cls_position == "last" else patches // 2

    def _positions(self, widths: Tensor, columns: int) -> Tensor:
        """Return the position embeddings (1 or B, rows, columns, D) of clips of so many columns each."""
        there = self.pos_embed.grid[1]
        if columns <= there:
            return self.pos_embed.places(columns)
        by_width = {w: F.pad(self.pos_embed.places(w), (0, 0, 0, columns - w)) for w in sorted(set(widths.tolist()))}
        return torch.cat([by_width[w] for w in widths.tolist()])

    def _order(self, widths: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return the token at each place, as an index (B, L) into [patches of the grid, cls], and the patches (B,)."""
        counts = widths * rows
        prefix = self.pos_embed.prefix
        place = torch.arange(int(counts.max()) + prefix, device=widths.device)[None]
        patch = place
        at = self._cls_index(counts)[:, None]
        if prefix:
            patch = place - (place > at).long()
        row, column = patch // widths[:, None], patch % widths[:, None]
        index = (row * columns + column).clamp(max=rows * columns - 1)  # what is behind a clip's end is never read
        return torch.where(place == at, rows * columns, index) if prefix else index, counts

    def _check_cls_position(self, position: str | None) -> str:
        if position is None:
            return "none" if self.needs_spatial_shape else "middle"
        if position not in ("middle", "first", "last", "none"):
            raise UserError(f"cls_position: expected 'middle', 'first', 'last' or 'none', got {position!r}")
        if position != "none" and self.needs_spatial_shape:
            raise UserError(f"cls_position={position!r}: a mixer here needs the tokens to be a grid; use 'none'")
        return position

    def _init_stem_and_head(self) -> None:
        trunc_normal_(self.pos_embed.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        proj = self.patch_embed.proj
        trunc_normal_(proj.weight, std=proj.weight[0].numel() ** -0.5)  # LeCun
        assert proj.bias is not None
        nn.init.zeros_(proj.bias)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)


def stretch(table: Tensor, columns: int) -> Tensor:
    """Return a table of positions (1, r, c, D) stretched or squeezed to `columns`, linearly in time."""
    flat = rearrange(table, "1 r c d -> 1 (r d) c")
    flat = F.interpolate(flat.float(), size=columns, mode="linear", align_corners=False).to(table.dtype)
    return rearrange(flat, "1 (r d) c -> 1 r c d", r=table.shape[1])


def _choose_mixer(
    mixer: str | Sequence[str] | None,
    mixer_args: Mapping[str, Mapping[str, Any]] | None,
    directions: int | None,
    direction_type: str | None,
) -> dict[str, Any]:
    """Return `mixer`, `mixer_args` and `directions` as the backbone takes them."""
    if direction_type is not None and direction_type not in DIRECTION_TYPES:
        raise UserError(f"direction_type: unknown {direction_type!r}{suggest(direction_type, DIRECTION_TYPES)}")
    if mixer is not None:
        if direction_type is not None:
            raise UserError(f"direction_type={direction_type!r} chooses the mixer; leave out mixer={mixer!r}, or it")
        return {"mixer": mixer, "mixer_args": mixer_args, "directions": directions}
    named = DIRECTION_TYPES[direction_type or "Bi-Bi"]
    arguments = {key: dict(value) for key, value in (mixer_args or {}).items()}
    for key, value in named.get("mixer_args", {}).items():
        arguments[key] = {**value, **arguments.get(key, {})}
    return {"mixer": named["mixer"], "mixer_args": arguments, "directions": named.get("directions", directions)}


def _check_patch(patch_size: int | Sequence[int], bins: int, frames: int) -> tuple[int, int]:
    sides = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if len(sides) != 2 or min(sides) < 1:
        raise UserError(f"patch_size: expected one number, or [bands, frames], got {patch_size!r}")
    if bins % sides[0]:
        near = min((d for d in range(1, bins + 1) if bins % d == 0), key=lambda d: abs(d - sides[0]))
        raise UserError(
            f"patch_size: {sides[0]} bands do not divide bins={bins}; the nearest that does is {near} (in a config: "
            f"model.args.patch_size=[{near},{sides[1]}]; bins are data.bins, or data.coefficients)"
        )
    if frames < 1:
        raise UserError(f"frames: expected at least 1, got {frames}")
    return int(sides[0]), int(sides[1])


def _check_pool(pool: str, has_cls: bool) -> str:
    if pool not in ("token", "avg"):
        raise UserError(f"global_pool: expected 'token' or 'avg', got {pool!r}")
    if pool == "token" and not has_cls:
        raise UserError("global_pool='token' needs a cls token, but cls_position is 'none'; use 'avg'")
    return pool
