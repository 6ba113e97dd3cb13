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

from mambaverse.ensemble import Ensemble
from mambaverse.tasks.dna.backbone import DnaModel, reverse


def saliency(model: nn.Module, ids: Tensor, lengths: Tensor | None = None, target: Tensor | None = None) -> Tensor:
    """Return the contributions of the bases, float32 (B, L), 0 on padding.

    Args:
        model: A `DnaModel`, or an `Ensemble` of them (the mean of what they say), in eval mode.
        ids: Bases (B, L).
        lengths: Of the sequences (B,); None: all are L long.
        target: The classes (B,) whose scores are explained; None: the predicted ones.
    """
    if isinstance(model, Ensemble):
        if target is None:
            with torch.no_grad():
                target = model(ids, lengths=lengths).argmax(-1)
        return torch.stack([saliency(member, ids, lengths, target) for member in model.members]).mean(0)
    assert isinstance(model, DnaModel)
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    looked_at = [model.embeddings.word_embeddings, *([] if model.wide is None else [model.wide.terms])]
    handles = [module.register_forward_hook(keep) for module in looked_at]
    try:
        with torch.enable_grad():
            scores = model(ids, lengths=lengths)
            chosen = scores.argmax(-1) if target is None else target
            gradients = torch.autograd.grad(scores.gather(1, chosen[:, None]).sum(), kept)
    finally:
        for handle in handles:
            handle.remove()
    said = [(g * x.detach()).sum(-1).float() for g, x in zip(gradients, kept, strict=True)]  # (B, L[, number of k])
    shares = _shared_out(said[0].view(*said[0].shape[:2], -1), model.embeddings.spans)
    if model.wide is not None:
        shares = shares + _shared_out(said[1], model.wide.spans)
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
