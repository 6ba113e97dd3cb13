"""What a batch adds to the scores of a language model: sums over its bases, for metrics.py to add up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.tasks.dna.tokens import PAD

SUMS = 5  # Σ w nll, Σ w, Σ nll, right ones, n


def score_bases(logits: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sums over each row, fp32 (B, 5), and those over all that the loss is made of, Σ w nll and Σ w, (2,).

    Args:
        logits: (B, L, 16).
        targets: Ids (B, L); `[PAD]` is not scored.
        weights: Of the bases (B, L); those of weight 0 are not scored either; None: all 1.
    """
    targets = targets.long()
    nll = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="none")
    nll = nll.view_as(targets)
    scored = targets != PAD
    if weights is not None:
        scored = scored & (weights > 0)
    counts = scored if weights is None else weights * scored
    loss = torch.stack([(nll * counts).sum(), counts.sum()])
    with torch.no_grad():
        right = (logits.argmax(-1) == targets) & scored
        columns = (nll * counts, counts, nll * scored, right, scored)
        return torch.stack([column.float().sum(1) for column in columns], dim=1), loss
