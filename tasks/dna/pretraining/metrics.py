"""Scores of a language model, as means over all scored bases of a set, whatever batches they came in.

    loss = Σ w nll / Σ w      perplexity = exp(Σ nll / n)      accuracy = #{argmax = target} / n

n counts the scored bases; w is 1 but for soft-masked bases (`task.soft_mask_weight`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from mambaverse.tasks.dna.tokens import PAD

SUMS = 5  # Σ w nll, Σ w, Σ nll, right ones, n
LARGEST = 80.0  # nats: exp of more is no fp32 number


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


class _PerBase(Metric):
    full_state_update = False
    sums: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_state("sums", torch.zeros(SUMS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rows: Tensor) -> None:
        """Add what `score_bases` returned of a batch, (B, 5)."""
        self.sums += rows.double().sum(0)


class Loss(_PerBase):
    """Σ w nll / Σ w."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return it, 0-dim."""
        return self.sums[0] / self.sums[1]


class Perplexity(_PerBase):
    """exp of the mean nll."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return it, 0-dim."""
        return (self.sums[2] / self.sums[4]).clamp(max=LARGEST).exp()


class Accuracy(_PerBase):
    """Share of the scored bases of which the likeliest letter is right."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return it, 0-dim."""
        return self.sums[3] / self.sums[4]


def language_metrics() -> MetricCollection:
    """Return the three, by name."""
    return MetricCollection({"loss": Loss(), "perplexity": Perplexity(), "accuracy": Accuracy()})
