"""The model of DNA: bases -> stem -> isotropic stack -> a head, of sequences or of bases; both strands where asked.

    ids (B, L) -> tokens (B, M, D), M = ceil(L / stride) -> blocks -> norm -> pooled (B, D) -> scores (B, classes)
                                                                   -> scores of bases (B, L, classes)

`both_strands` is Caduceus-PS in the form that costs least. There every tensor holds 2 D channels, those of the strand
and, turned over (R: reversed along L and along the channels), those of its reverse complement, and each layer is
applied to both. The turning over cancels between layers, so that the same function is: the stack f run on both strands
as one batch of 2 B,

    hidden(x) = [f(x), R f(rc(x))],     hidden(rc(x)) = R hidden(x),     scores = (head(f(x)) + head(f(rc(x)))) / 2

whatever f is: any mixer, stem or norm. The scores are the same for both strands. Those of bases are read from the other
end, and classes that differ from strand to strand exchanged by the permutation c (`class_complement`, or the complement
of the bases for language models, whose logits are added instead, as Caduceus does):

    scores(x) = (s(f(x)) + flip_L(s(f(rc(x))))[..., c]) / 2,     scores(rc(x)) = flip_L(scores(x))[..., c]

Source: Schiff et al. 2024, "Caduceus: Bi-Directional Equivariant Long-Range DNA Sequence Modeling" (arXiv 2403.03234),
sections 3.2 and 4.2; names in the state dict are those of its code (`embeddings.word_embeddings`, `layers`, `norm_f`,
`score`, `lm_head`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mambaverse.backbones.isotropic import Isotropic
from mambaverse.blocks import Block, check_counts, check_rates, reset_parameters
from mambaverse.ensemble import joined
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna import streaming
from mambaverse.tasks.dna.heads import LANGUAGE, POOLED, AttentionPool, check_class_complement, check_head, token_mask
from mambaverse.tasks.dna.stems import ConvStem, Embedding, KmerStem, as_ids
from mambaverse.tasks.dna.strands import SwappedBlock, complement, reverse
from mambaverse.tasks.dna.tokens import COMPLEMENT, VOCAB_SIZE, A, is_base
from mambaverse.tasks.dna.wide import PlaceScores

STEMS = ("embedding", "conv", "kmer")
MAX_KMER = 10  # a million vectors
MAX_WIDE = 5  # 1,364 weights a place and class


class DnaModel(Isotropic):
    """A model of DNA with one of several heads (see heads.py); any mixer by name.

    Args:
        num_classes: Scores of the head: classes, or quantities; 0: no head, what would enter it is returned. Of "mlm"
            and "causal_lm" it is always the vocabulary's 16.
        dim: Channels D.
        depth: Number of blocks.
        causal: Whether a base sees only those before it.
        both_strands: Read the reverse complement too, with the same weights: the scores are then equal for both.
        pool: "mean" of all tokens, the "last" one, a learnt token "cls" behind the last, or "place": a sum with learnt
            weights for each place and channel, or "attention": a mean with learnt weights of the tokens.
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
        head: "classifier", "regression", "tokens", "mlm" or "causal_lm".
        tie_embeddings: Whether the language models' heads share the embedding's vectors.
        class_complement: With `both_strands`, the class that each class is on the other strand, if not itself: [1, 0]
            for a gene on this strand or on the other.
        rcps_swap_halves: Exchange the strands before every block, as the published weights of Caduceus-PS need it (see
            strands.py); never in a new model. The state dict then has an entry of this name, so that such weights
            are not taken for others.
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
        head: str = "classifier",
        tie_embeddings: bool = True,
        class_complement: Sequence[int] | None = None,
        rcps_swap_halves: bool = False,
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
            block=SwappedBlock if rcps_swap_halves else Block,
            **dd,
        )
        check_counts(0, num_classes=num_classes)
        check_rates(drop_rate=drop_rate, mutate_rate=mutate_rate, embed_drop_rate=embed_drop_rate)
        check_head(head, pool, stem, stem_stride, causal, both_strands, wide)
        _check(stem, stem_kernel, stem_stride, position or wide > 0 or pool == "place", max_length)
        if rcps_swap_halves and (not both_strands or causal or pool == "cls"):
            raise UserError("rcps_swap_halves is for models of both strands that read both ways and pool no cls token")
        if not tie_embeddings and head not in LANGUAGE:
            raise UserError(f"tie_embeddings=False is for the heads {' and '.join(LANGUAGE)}; head={head!r} has no use")
        if not 0 <= wide <= MAX_WIDE:
            raise UserError(f"wide: expected k from 1 to {MAX_WIDE}, or 0 for none, got {wide}")
        if self.needs_spatial_shape:
            raise UserError("a mixer here needs its tokens to be a grid; DNA is a line")
        if class_complement is not None:
            check_class_complement(class_complement, num_classes, head, both_strands)
        num_classes = VOCAB_SIZE if head in LANGUAGE else num_classes
        self.num_classes, self.pool, self.both_strands = num_classes, pool, both_strands
        self.head, self.stem, self.pools = head, stem, head in POOLED
        self.chunk_size: int | None = None
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
            self.pos_embed = nn.Parameter(torch.empty(1, places, dim, **dd))
        self.cls_token: nn.Parameter | None = None
        if pool == "cls":
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.place_weight: nn.Parameter | None = None
        if pool == "place":
            self.place_weight = nn.Parameter(torch.empty(places, dim, **dd))
        self._init_places()
        self.embed_drop, self.head_drop = nn.Dropout(embed_drop_rate), nn.Dropout(drop_rate)
        self.attention_pool = AttentionPool(dim, **dd) if pool == "attention" else None
        self.score: nn.Module = nn.Identity()
        self.lm_head: nn.Linear | None = None
        if head in LANGUAGE and not tie_embeddings:
            self.lm_head = nn.Linear(dim, VOCAB_SIZE, bias=False, **dd)
        elif head not in LANGUAGE and num_classes:
            self.score = nn.Linear(dim, num_classes, bias=head == "regression", **dd)
        self._init_head()
        self.wide: PlaceScores | None = None
        if wide and num_classes:
            self.wide = PlaceScores(max_length or 0, wide, num_classes, wide_decay, **dd)
        other = COMPLEMENT.tolist() if head in LANGUAGE else class_complement
        self.class_complement = None if other is None else tuple(other)  # no buffer: `to_empty` would empty it
        mark = torch.ones((), dtype=torch.bool, device=device) if rcps_swap_halves else None
        self.rcps_swap_halves: Tensor | None
        self.register_buffer("rcps_swap_halves", mark)  # a mark in the state dict; nothing reads its value

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return what the head says of ids (B, L) of any integer type.

        It is (B, classes), in training with `wide` (B, 2, classes), or of bases (B, L, classes).

        Args:
            ids: Bases; `[PAD]` from `lengths[b]` on.
            lengths: Of the sequences (B,), at least 1 each; None: all are L long.

        Raises:
            ValueError: what are no ids, on a CPU also ids that the vocabulary has not; lengths that are none of theirs.
        """
        ids, lengths = self._strands(ids, lengths)
        seen = mutated(ids, self.mutate_rate) if self.training and self.mutate_rate else ids
        hidden, counts = self._tokens(seen, lengths)
        scores = self.token_scores(self._pooled(hidden, counts) if self.pools else hidden)
        if self.wide is not None:
            scores = joined([scores, self.wide(ids)], self.training)
        return self._of_both(scores, lengths) if self.both_strands else scores

    def forward_features(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the normalised tokens (B, M, D), zeros where there is padding; with `both_strands` (B, M, 2 D).

        The second half of the channels is that of the other strand, turned over; so is then the whole for rc(ids).
        """
        hidden, lengths = self._tokens(*self._strands(ids, lengths))
        if self.cls_token is not None:
            hidden, lengths = hidden[:, :-1], None if lengths is None else lengths - 1
            if lengths is not None:  # the cls token stands behind each last one
                hidden = hidden * token_mask(hidden.shape[1], lengths)
        if not self.both_strands:
            return hidden
        a, b = hidden.unflatten(0, (2, -1))
        rest = None if lengths is None else lengths[: len(a)]
        return torch.cat([a, reverse(b, rest).flip(-1)], dim=-1)

    def token_scores(self, hidden: Tensor) -> Tensor:
        """Return the head's scores (..., classes) of tokens, or pooled ones, (..., D), each strand by itself."""
        if self.head in LANGUAGE:
            if self.lm_head is not None:
                scores: Tensor = self.lm_head(hidden)
                return scores
            table = self.embeddings.word_embeddings.weight
            assert isinstance(table, Tensor)
            return F.linear(hidden, table)
        return self.score(self.head_drop(hidden))

    def init_state(self, batch_size: int) -> list[Any]:
        """Return the state before the first base, for `forward_chunk`: one a layer, batch first.

        Raises:
            UserError: a model that cannot stream: one that reads both ways or both strands, has a mixer without a
                state, a stem that reaches over bases, or places.
        """
        streaming.check_streams(self)
        return self.init_states(batch_size)

    def forward_chunk(self, ids: Tensor, state: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Read the next bases of each sequence: their outputs are those of the forward pass over the whole.

        Args:
            ids: (B, l), any l from 1 on.
            state: Of what came before; it is not changed, and may be gone on from again.

        Returns:
            What the head says of the bases (B, l, classes), or, of a head that pools, their normalised tokens
            (B, l, D); and the state behind them. Gradients flow through both.

        Raises:
            UserError: as `init_state`, or what are no ids.
        """
        return streaming.forward_chunk(self, ids, state)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, chunk_size: int | None = None) -> None:
        """Recompute activations in backward instead of keeping them: those of each block, or of each chunk.

        Args:
            enable: False keeps them again.
            chunk_size: Tokens that a causal model runs through all its blocks at a time, so that memory does not grow
                with length x depth (see streaming.py); None: block by block, the whole length at a time.

        Raises:
            UserError: a chunk size for a model that cannot be run on from a state.
        """
        if chunk_size is not None:
            streaming.check_carries_state(self, f"chunk_size={chunk_size}")
            if chunk_size < 1:
                raise UserError(f"chunk_size: expected at least 1 token, got {chunk_size}")
        self.chunk_size = chunk_size if enable else None
        super().set_grad_checkpointing(enable and chunk_size is None)

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """See `Isotropic.reset_parameters`."""
        super().reset_parameters()
        for module in (self.embeddings, self.attention_pool, self.wide):
            if module is not None:
                reset_parameters(module)
        self._init_places()
        self._init_head()

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would harm."""
        own = {"pos_embed", "cls_token", *([] if self.wide is None else ["wide.weight"])}
        return own | super().no_weight_decay()

    @torch.jit.ignore
    def _init_places(self) -> None:
        for parameter in (self.pos_embed, self.cls_token):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)
        if self.place_weight is not None:
            nn.init.constant_(self.place_weight, 1 / len(self.place_weight))  # begins as the mean

    @torch.jit.ignore
    def _init_head(self) -> None:
        for head in (self.lm_head, self.score):
            if isinstance(head, nn.Linear):
                trunc_normal_(head.weight, std=0.02)
                if head.bias is not None:
                    nn.init.zeros_(head.bias)

    def _strands(self, ids: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ids = as_ids(ids, lengths, least=int(self.pools))
        if not self.both_strands:
            return ids, lengths
        both = torch.cat([ids, reverse(complement(ids), lengths)])
        return both, None if lengths is None else torch.cat([lengths, lengths])

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
        x = self.embed_drop(x)
        if self.chunk_size is not None:
            return streaming.in_chunks(self, x, lengths, self.chunk_size), lengths
        return Isotropic.forward(self, x, lengths=lengths), lengths

    def _of_both(self, scores: Tensor, lengths: Tensor | None) -> Tensor:
        """Return (B, ...) of the scores (2 B, ...) of both strands."""
        here, there = scores.unflatten(0, (2, -1))
        if not self.pools:
            there = reverse(there, None if lengths is None else lengths[: len(there)])
        if self.class_complement is not None:
            classes = there.unbind(-1)
            there = torch.stack([classes[c] for c in self.class_complement], dim=-1)
        return here + there if self.head in LANGUAGE else (here + there) / 2

    def _pooled(self, hidden: Tensor, lengths: Tensor | None) -> Tensor:
        """Return (B, D) of tokens (B, M, D), those from `lengths` on being zeros."""
        if self.place_weight is not None:
            return torch.einsum("bmd,md->bd", hidden, self.place_weight[: hidden.shape[1]])
        if self.attention_pool is not None:
            return self.attention_pool(hidden, lengths)
        if self.pool == "mean":
            return hidden.mean(1) if lengths is None else hidden.sum(1) / lengths[:, None]
        if lengths is None:
            return hidden[:, -1]
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def mutated(ids: Tensor, rate: float) -> Tensor:
    """Return ids with a share `rate` of the bases (N and special tokens are none) drawn anew."""
    chosen = (torch.rand(ids.shape, device=ids.device) < rate) & is_base(ids)
    return torch.where(chosen, torch.randint_like(ids, A, A + 4), ids)


def _check(stem: str, kernel: int | Sequence[int], stride: int, places: bool, max_length: int | None) -> None:
    if stem not in STEMS:
        raise UserError(f"stem: unknown {stem!r}{suggest(stem, STEMS)}")
    if stem == "conv" and not (isinstance(kernel, int) and kernel > 0 and kernel % 2):
        raise UserError(f"stem_kernel: expected an odd number of bases, got {kernel}")
    sizes = [kernel] if isinstance(kernel, int) else list(kernel)
    if stem == "kmer" and not (sizes and len(set(sizes)) == len(sizes) and all(1 <= k <= MAX_KMER for k in sizes)):
        raise UserError(f"stem_kernel: expected k from 1 to {MAX_KMER}, or several, got {kernel}")
    if stride < 1:
        raise UserError(f"stem_stride: expected at least 1, got {stride}")
    if stem == "embedding" and stride > 1:
        raise UserError(f"stem_stride={stride} merges bases, which stem='embedding' does not; use conv or kmer")
    if places and max_length is None:
        raise UserError("position, wide and pool='place' need the longest sequence: max_length")
