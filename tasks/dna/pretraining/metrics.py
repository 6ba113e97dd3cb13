"""Scores of a language model, as means over all scored bases of a set, whatever batches they came in.

    loss = Σ w nll / Σ w      perplexity = exp(Σ nll / n)      accuracy = #{argmax = target} / n

n counts the scored bases; w is 1 but for soft-masked bases (`task.soft_mask_weight`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from mambaverse.tasks.dna.pretraining.scoring import SUMS

LARGEST = 80.0  # nats: exp of more is no fp32 number


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
