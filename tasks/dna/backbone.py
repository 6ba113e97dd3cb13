"""The classifier of DNA: bases -> stem -> isotropic stack -> pooled -> scores; both strands at once where asked.

    ids (B, L) -> tokens (B, M, D), M = ceil(L / stride) -> blocks -> norm -> pooled (B, D) -> scores (B, classes)

`both_strands` is Caduceus-PS in the form that costs least. There every tensor holds 2 D channels, those of the strand
and, turned over (R: reversed along L and along the channels), those of its reverse complement, and each layer is
applied to both. The turning over cancels between layers, so that the same function is: the stack f run on both strands
as one batch of 2 B,

    hidden(x) = [f(x), R f(rc(x))],     hidden(rc(x)) = R hidden(x),     scores = (head(f(x)) + head(f(rc(x)))) / 2

whatever f is: any mixer, stem or norm. The scores are the same for both strands.

Source: Schiff et al. 2024, "Caduceus: Bi-Directional Equivariant Long-Range DNA Sequence Modeling" (arXiv 2403.03234),
sections 3.2 and 4.2; names in the state dict are those of its code (`embeddings.word_embeddings`, `layers`, `norm_f`,
`score`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mambaverse.backbones.isotropic import Isotropic
from mambaverse.ensemble import joined
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.stems import ConvStem, Embedding, KmerStem
from mambaverse.tasks.dna.tokens import COMPLEMENT, A
from mambaverse.tasks.dna.wide import PlaceScores

POOLS = ("mean", "last", "cls", "place")
STEMS = ("embedding", "conv", "kmer")
MAX_KMER = 10  # a million vectors
MAX_WIDE = 5  # 1,364 weights a place and class


class DnaClassifier(Isotropic):
    """A sequence classifier of DNA; any mixer by name.

    Args:
        num_classes: Scores of the head; 0: no head, the pooled token is returned.
        dim: Channels D.
        depth: Number of blocks.
        causal: Whether a base sees only those before it.
        both_strands: Read the reverse complement too, with the same weights: the scores are then equal for both.
        pool: "mean" of all tokens, the "last" one, a learnt token "cls" behind the last, or "place": a sum with learnt
            weights for each place and channel.
        stem: "embedding" (one token a base), "conv" (motifs found by a convolution) or "kmer" (a vector a k-mer).
        stem_kernel: Width of the convolution in bases, odd; or k, or several k.
        stem_stride: Bases a token.
        stem_dim: Channels within the stem (see stems.py).
        wide: Largest k of a linear classifier of the k-mers at each place, which learns beside the deep one, and with
            which its probabilities are averaged (see wide.py); 0: none.
        wide_decay: Strength of the penalty on its weights, per sequence.
        position: Add a learnt vector for each place; as `wide` and pool="place", for sequences of one length where
            places count.
        max_length: Longest sequence in bases that there are places for.
        mixer: A mixer's name, or a pattern of names repeated over the layers.
        mixer_args: Arguments keyed by mixer: {"vim": {"d_state": 16}}.
        directions: 1 leaves a causal mixer of a bidirectional stack in one direction.
        norm: "rms" or "layer".
        mlp_ratio: Width of an MLP in each block, in units of D; 0: none, as in Caduceus.
        layer_scale: First value of a learnt factor on the branches; None: no factor.
        drop_rate: Dropout before the head.
        mutate_rate: Share of the bases of which the deep model sees another one, or the same, drawn at random, while
            training; unlike `data.mutate` each member of an ensemble has its own draws, and `wide` sees none of them.
        embed_drop_rate: Dropout of the tokens before the first block.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: options that do not fit each other.
    """

    def __init__(
        self,
        num_classes: int = 2,
        dim: int = 128,
        depth: int = 4,
        causal: bool = False,
        both_strands: bool = False,
        pool: str = "mean",
        stem: str = "embedding",
        stem_kernel: int | Sequence[int] = 11,
        stem_stride: int = 1,
        stem_dim: int | None = None,
        wide: int = 0,
        wide_decay: float = 0.01,
        position: bool = False,
        max_length: int | None = None,
        mixer: str | Sequence[str] = "vim",
        mixer_args: Mapping[str, Mapping[str, Any]] | None = None,
        directions: int | None = None,
        norm: str = "rms",
        mlp_ratio: float = 0.0,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        mutate_rate: float = 0.0,
        embed_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim,
            depth,
            mixer,
            mixer_args,
            causal=causal,
            directions=directions,
            norm=norm,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            layer_scale=layer_scale,
            **dd,
        )
        _check(pool, stem, stem_kernel, stem_stride, position or wide > 0, max_length)
        if not 0 <= wide <= MAX_WIDE:
            raise UserError(f"wide: expected k from 1 to {MAX_WIDE}, or 0 for none, got {wide}")
        if self.needs_spatial_shape:
            raise UserError("a mixer here needs its tokens to be a grid; DNA is a line")
        self.num_classes, self.pool, self.both_strands = num_classes, pool, both_strands
        self.stride, self.max_length, self.mutate_rate = stem_stride, max_length, mutate_rate
        self.places = -(-max_length // stem_stride) if max_length and (position or wide or pool == "place") else None
        self.embeddings: Embedding | ConvStem | KmerStem
        if stem == "embedding":
            self.embeddings = Embedding(dim, **dd)
        elif stem == "conv":
            assert isinstance(stem_kernel, int)
            self.embeddings = ConvStem(dim, stem_kernel, stem_stride, stem_dim, **dd)
        else:
            self.embeddings = KmerStem(dim, stem_kernel, stem_stride, stem_dim, **dd)
        places = self.places or 0
        self.pos_embed: nn.Parameter | None = None
        if position:
            self.pos_embed = nn.Parameter(torch.zeros(1, places, dim, **dd))
            trunc_normal_(self.pos_embed, std=0.02)
        self.cls_token: nn.Parameter | None = None
        if pool == "cls":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, **dd))
            trunc_normal_(self.cls_token, std=0.02)
        self.place_weight: nn.Parameter | None = None
        if pool == "place":
            self.place_weight = nn.Parameter(torch.full((places, dim), 1 / places, **dd))  # begins as the mean
        self.embed_drop, self.head_drop = nn.Dropout(embed_drop_rate), nn.Dropout(drop_rate)
        self.score = nn.Linear(dim, num_classes, bias=False, **dd) if num_classes else nn.Identity()
        if isinstance(self.score, nn.Linear):
            trunc_normal_(self.score.weight, std=0.02)
        self.wide: PlaceScores | None = None
        if wide and num_classes:
            self.wide = PlaceScores(max_length or 0, wide, num_classes, wide_decay, **dd)
        self.complement: Tensor
        self.register_buffer("complement", torch.from_numpy(COMPLEMENT.copy()).long(), persistent=False)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Classify ids (B, L) of any integer type: scores (B, classes), in training with `wide` (B, 2, classes).

        Args:
            ids: Bases; `[PAD]` from `lengths[b]` on.
            lengths: Of the sequences (B,), at least 1 each; None: all are L long.
        """
        ids, lengths = self._strands(ids, lengths)
        seen = mutated(ids, self.mutate_rate) if self.training and self.mutate_rate else ids
        hidden, counts = self._tokens(seen, lengths)
        scores = self.score(self.head_drop(self._pooled(hidden, counts)))
        if self.wide is not None:
            scores = joined([scores, self.wide(ids)], self.training)
        return scores if not self.both_strands else scores.unflatten(0, (2, -1)).mean(0)

    def forward_features(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the normalised tokens (B, M, D), zeros where there is padding; with `both_strands` (B, M, 2 D).

        The second half of the channels is that of the other strand, turned over; so is then the whole for rc(ids).
        """
        hidden, lengths = self._tokens(*self._strands(ids, lengths))
        if self.cls_token is not None:
            hidden = hidden[:, :-1]
            lengths = None if lengths is None else lengths - 1
            if lengths is not None:  # the cls token stands behind each last one
                hidden = hidden * _kept(hidden.shape[1], lengths)
        if not self.both_strands:
            return hidden
        a, b = hidden.unflatten(0, (2, -1))
        rest = None if lengths is None else lengths[: len(a)]
        return torch.cat([a, reverse(b, rest).flip(-1)], dim=-1)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would harm."""
        own = {"pos_embed", "cls_token", *([] if self.wide is None else ["wide.weight"])}
        return own | super().no_weight_decay()

    def _strands(self, ids: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ids = ids.long()
        if not self.both_strands:
            return ids, lengths
        other = reverse(self.complement[ids], lengths)
        return torch.cat([ids, other]), None if lengths is None else torch.cat([lengths, lengths])

    def _tokens(self, ids: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the tokens after the last norm, with the cls token, and how many there are in each row."""
        x = self.embeddings(ids)
        if lengths is not None:
            lengths = (lengths + self.stride - 1) // self.stride
        if self.places is not None and x.shape[1] > self.places:
            raise UserError(
                f"sequences of {ids.shape[1]:,} bases: the model has places for {self.max_length:,} only; "
                "set data.window, or take out position, wide and pool='place'"
            )
        if self.pos_embed is not None:
            x = x + self.pos_embed[:, : x.shape[1]]
        if self.cls_token is not None:
            cls = self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype)
            if lengths is None:
                x = torch.cat([x, cls], dim=1)
            else:
                x = torch.cat([x, torch.zeros_like(cls)], dim=1)
                at = torch.arange(x.shape[1], device=x.device) == lengths[:, None]
                x = torch.where(at[:, :, None], cls, x)
                lengths = lengths + 1
        return Isotropic.forward(self, self.embed_drop(x), lengths=lengths), lengths

    def _pooled(self, hidden: Tensor, lengths: Tensor | None) -> Tensor:
        """Return (B, D) of tokens (B, M, D), those from `lengths` on being zeros."""
        if self.place_weight is not None:
            return torch.einsum("bmd,md->bd", hidden, self.place_weight[: hidden.shape[1]])
        if self.pool == "mean":
            return hidden.mean(1) if lengths is None else hidden.sum(1) / lengths[:, None]
        if lengths is None:
            return hidden[:, -1]
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def mutated(ids: Tensor, rate: float) -> Tensor:
    """Return ids with a share `rate` of the bases (N and special tokens are none) drawn anew."""
    chosen = (torch.rand(ids.shape, device=ids.device) < rate) & (ids >= A) & (ids < A + 4)
    return torch.where(chosen, torch.randint_like(ids, A, A + 4), ids)


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse x (B, L, ...) along its length, or each row's first `lengths[b]` entries; padding stays where it is."""
    if lengths is None:
        return x.flip(1)
    at = torch.arange(x.shape[1], device=x.device)
    order = torch.where(at < lengths[:, None], lengths[:, None] - 1 - at, at)  # (B, L)
    return x[torch.arange(len(x), device=x.device)[:, None], order]


def _kept(length: int, lengths: Tensor) -> Tensor:
    return (torch.arange(length, device=lengths.device) < lengths[:, None])[:, :, None]


def _check(
    pool: str, stem: str, kernel: int | Sequence[int], stride: int, position: bool, max_length: int | None
) -> None:
    for name, value, known in (("pool", pool, POOLS), ("stem", stem, STEMS)):
        if value not in known:
            raise UserError(f"{name}: unknown {value!r}{suggest(value, known)}")
    if stem == "conv" and not (isinstance(kernel, int) and kernel > 0 and kernel % 2):
        raise UserError(f"stem_kernel: expected an odd number of bases, got {kernel}")
    sizes = [kernel] if isinstance(kernel, int) else list(kernel)
    if stem == "kmer" and not (sizes and len(set(sizes)) == len(sizes) and all(1 <= k <= MAX_KMER for k in sizes)):
        raise UserError(f"stem_kernel: expected k from 1 to {MAX_KMER}, or several, got {kernel}")
    if stride < 1:
        raise UserError(f"stem_stride: expected at least 1, got {stride}")
    if stem == "embedding" and stride > 1:
        raise UserError(f"stem_stride={stride} merges bases, which stem='embedding' does not; use conv or kmer")
    if (position or pool == "place") and max_length is None:
        raise UserError("position, wide and pool='place' need the longest sequence: max_length")
