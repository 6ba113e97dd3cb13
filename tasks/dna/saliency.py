"""How much each base speaks for the class that a model chose: gradient times input, at the embedding.

    s[t] = Σ_d e[t, d] ∂ score / ∂ e[t, d],      e the vector that stands for base t (one-hot, learnt, or of a k-mer)

With one-hot vectors this is the change of the score, to first order, if the base were taken out. What a k-mer says is
shared out to its k bases; what the other strand says (in models that read both) is added in its place.

Source: Shrikumar et al. 2016, "Not just a black box" (arXiv 1605.01713).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambaverse.tasks.dna.backbone import DnaClassifier, reverse


def saliency(model: nn.Module, ids: Tensor, lengths: Tensor | None = None, target: Tensor | None = None) -> Tensor:
    """Return the contributions of the bases, float32 (B, L), 0 on padding.

    Args:
        model: A `DnaClassifier`, in eval mode.
        ids: Bases (B, L).
        lengths: Of the sequences (B,); None: all are L long.
        target: The classes (B,) whose scores are explained; None: the predicted ones.
    """
    assert isinstance(model, DnaClassifier)
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = model.embeddings.word_embeddings.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            scores = model(ids, lengths=lengths)
            chosen = scores.argmax(-1) if target is None else target
            (gradient,) = torch.autograd.grad(scores.gather(1, chosen[:, None]).sum(), kept)
    finally:
        handle.remove()
    at = (gradient * kept[0].detach()).sum(-1).float()  # (B, L), or (B, L, number of k)
    shares = _shared_out(at.view(*at.shape[:2], -1), model.embeddings.spans)
    if model.wide is not None:
        with torch.no_grad():
            shares = shares + _shared_out(model.scores_at_places(ids, lengths, chosen), model.wide.spans)
    if model.both_strands:
        one, other = shares.unflatten(0, (2, -1))
        shares = one + reverse(other, lengths)
    if lengths is not None:
        shares = shares * (torch.arange(shares.shape[1], device=shares.device) < lengths[:, None])
    return shares


def _shared_out(at: Tensor, spans: tuple[int, ...]) -> Tensor:
    """Share out what k-mers say, (B, L, number of k) where those of each of `spans` begin, to their bases: (B, L)."""
    return torch.stack([_spread(part, k) for part, k in zip(at.unbind(-1), spans, strict=True)]).sum(0)


def _spread(shares: Tensor, span: int) -> Tensor:
    """Share out what stands at the first of `span` bases to all of them: (B, L) -> (B, L)."""
    parts = [nn.functional.pad(shares, (i, 0))[:, : shares.shape[1]] for i in range(span)]
    return torch.stack(parts).sum(0) / span
