"""The scores of classifiers, by torchmetrics; a file of its own because what only predicts does without them.

Importing torchmetrics takes seconds: it loads scipy.signal and torchvision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

TOP = 5  # the accuracy of so many guesses is reported too, where there are more classes


class PositiveF1(MulticlassF1Score):
    """F1 of the second of two classes."""

    def compute(self) -> Tensor:
        """Return it, 0-dim."""
        return super().compute()[1]


def classifier_scores(names: Iterable[str], num_classes: int) -> MetricCollection:
    """Return the scores among `names` that there are of so many classes, to be updated with logits and classes."""
    n = num_classes
    known: dict[str, Callable[[], Metric]] = {
        "accuracy": lambda: MulticlassAccuracy(n, average="micro", validate_args=False),
        "macro_f1": lambda: MulticlassF1Score(n, average="macro", validate_args=False),
        "mcc": lambda: MulticlassMatthewsCorrCoef(n, validate_args=False),
    }
    if n == 2:
        known["f1"] = lambda: PositiveF1(n, average="none", validate_args=False)
    if n > TOP:
        known["top5"] = lambda: MulticlassAccuracy(n, top_k=TOP, average="micro", validate_args=False)
    return MetricCollection({name: known[name]() for name in names if name in known})
