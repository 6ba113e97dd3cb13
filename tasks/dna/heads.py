"""What a DNA model can be asked: the names of its heads and pools, what fits what, and how tokens are pooled.

    head          output                what it is trained for
    classifier    (B, classes)          classes of sequences: a linear map of the pooled token, without a bias
    regression    (B, K)                K quantities of a sequence: the same with a bias
    tokens        (B, L, classes)       classes, or quantities, of bases: a linear map of each, without a bias
    mlm           (B, L, 16)            masked bases (masked language model): logits over the vocabulary
    causal_lm     (B, L, 16)            the next base: logits of base t + 1 at place t, by a causal model

The last two use the embedding's vectors as their weights, `tie_embeddings=False` gives them some of their own,
`lm_head.weight`. At places of padding what is said of bases is 0.

Logits of fp32 for a million bases are 64 MB beside 1 GB for one layer of 256 channels, so they are never cut in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mambaverse.errors import UserError, suggest

HEADS = ("classifier", "regression", "tokens", "mlm", "causal_lm")
POOLED = ("classifier", "regression")  # one answer a sequence; the others give one a base
LANGUAGE = ("mlm", "causal_lm")
POOLS = ("mean", "last", "cls", "place", "attention")


class AttentionPool(nn.Module):
    """A mean of tokens with weights softmax(w · token); w is learnt and begins as zeros, the plain mean.

    Args:
        dim: Channels D.
        device: Of the parameter.
        dtype: Of the parameter.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin as the plain mean."""
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return (B, D) of tokens (B, M, D), those before `lengths` (B,)."""
        weights = (hidden @ self.weight.to(hidden.dtype)).float()  # (B, M)
        if lengths is not None:
            weights = weights.masked_fill(~token_mask(hidden.shape[1], lengths)[:, :, 0], -torch.inf)
        return torch.einsum("bm,bmd->bd", weights.softmax(-1).to(hidden.dtype), hidden)


def token_mask(length: int, lengths: Tensor) -> Tensor:
    """Return which tokens are no padding, bool (B, length, 1)."""
    return (torch.arange(length, device=lengths.device) < lengths[:, None])[:, :, None]


def check_head(head: str, pool: str, stem: str, stride: int, causal: bool, both_strands: bool, wide: int) -> None:
    """Raise UserError if the options of a model do not fit its head."""
    for name, value, known in (("head", head, HEADS), ("pool", pool, POOLS)):
        if value not in known:
            raise UserError(f"{name}: unknown {value!r}{suggest(value, known)}")
    if head not in POOLED and pool != "mean":
        raise UserError(
            f"pool={pool!r} joins the tokens of a sequence; head={head!r} speaks of each base: leave it out"
        )
    if wide and head != "classifier":
        raise UserError(f"wide={wide} scores classes of sequences; head={head!r} has none: leave it out")
    if head == "tokens" and stride > 1:
        raise UserError(f"head='tokens' speaks of each base, but stem_stride={stride} merges them; set it to 1")
    if head in LANGUAGE and stem != "embedding":
        raise UserError(f"head={head!r} predicts bases, of which stem={stem!r} shows the neighbours; use 'embedding'")
    if head == "causal_lm" and not causal:
        raise UserError(
            "head='causal_lm' predicts the next base, which this model sees; use dna_mamba_*, causal=True or head='mlm'"
        )
    if head == "causal_lm" and both_strands:
        raise UserError("head='causal_lm' predicts the next base, which the other strand begins with; use head='mlm'")


def check_class_complement(classes: Sequence[int], num_classes: int, head: str, both_strands: bool) -> None:
    """Raise UserError unless `classes` says for each class which one it is on the other strand."""
    if not both_strands or head in LANGUAGE:
        what = f"head={head!r} knows that of bases" if both_strands else "this model reads one (both_strands=False)"
        raise UserError(f"class_complement says what classes are on the other strand; {what}: leave it out")
    numbers = list(classes)
    if sorted(numbers) != list(range(num_classes)) or any(numbers[numbers[i]] != i for i in numbers):
        raise UserError(
            f"class_complement: expected the {num_classes} class numbers from 0, each paired with another or itself, "
            f"such as [1, 0] for two that are each other's; got {numbers}"
        )
