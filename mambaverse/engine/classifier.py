"""What classifiers of images, DNA and audio share: cross-entropy, their scores, the model from its config, a floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.config import ConfigError, TaskConfig
from mambaverse.engine.build import DECIDED, build_model
from mambaverse.engine.folder import RunFolder, read_facts
from mambaverse.engine.task import Batch, SampleSet, Task
from mambaverse.errors import UserError, warn

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


@dataclass
class ClassifierConfig(TaskConfig):
    """What is learnt: classes, softened if asked."""

    label_smoothing: float = 0.0  # share of a label's weight that is spread over all classes

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing: expected a number in [0, 1), got {self.label_smoothing}")


class Classifier(Task):
    """Base of the tasks that tell classes apart.

    A domain adds `setup`, `collate` and `forward`; batches hold "target": class numbers (B,) or, where labels are
    mixed, their weights (B, classes).

    Attributes:
        scores: What an evaluation reports: "accuracy", "top5" (where there are more than five classes), "macro_f1",
            "f1" (of the second class, where there are two), "mcc" (Matthews' correlation).
        decided: Arguments of a model that cannot be set in `model.args`, each with what to do instead.
    """

    task_config: ClassVar[type[TaskConfig]] = ClassifierConfig
    scores: ClassVar[tuple[str, ...]] = ("accuracy", "top5", "macro_f1")
    decided: ClassVar[Mapping[str, str]] = {
        **DECIDED,
        "num_classes": "it is the number of the data's classes",
    }

    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments of the model that follow from the data."""
        return {"num_classes": len(self.classes)}

    def build_model(self) -> nn.Module:
        """Return the model that the config names, for the data's classes; with model.members an `Ensemble` of them."""
        return build_model(self.config.model, self.model_arguments(), self.decided)

    def load_for_classes(
        self, model: nn.Module, path: Path, load: Callable[[nn.Module, Path], None], heads: Sequence[str]
    ) -> None:
        """Load the weights file `path`; if its run told as many other classes apart, the head starts anew.

        Args:
            model: As it is initialised.
            path: The file.
            load: Copies its weights into the model.
            heads: Modules of the model that speak of classes; one that has none of them keeps what is loaded.
        """
        own = model.state_dict()
        first = {name: value.clone() for name, value in own.items() if name.partition(".")[0] in heads}
        load(model, path)
        if self.knows_others(path, kept=not first):
            model.load_state_dict(first, strict=False)

    def knows_others(self, path: Path, *, kept: bool = False) -> bool:
        """Whether a weights file lies in a run with as many other classes, or in another order; if so, warn of it.

        Args:
            path: The file.
            kept: Whether the head is kept all the same, for the warning.
        """
        before = _classes_of(path)
        if before == [*self.classes] or len(before) != len(self.classes):
            return False
        other = [pair for pair in zip(before, self.classes, strict=True) if pair[0] != pair[1]][:3]
        theirs, ours = (f"({', '.join(map(str, names))}, ...)" for names in zip(*other, strict=True))
        what = "it is kept" if kept else "that for these starts anew"
        warn(f"{path}: its head knows other classes {theirs}, not {ours}; {what}")
        return True

    def check_output(self, output: Tensor, batch: Batch) -> None:
        """Raise UserError for what is not a score for each class and sample."""
        shape = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        if shape != (expected := (len(batch["target"]), len(self.classes))):
            raise UserError(
                f"the model {self.config.model.name} returns {shape} for a batch of {expected[0]}, "
                f"expected {expected}, a score for each class; what model.args sets may change that"
            )

    def step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy and the logits.

        While training labels are smoothed, and a model may return several scores for a sample, (B, ..., classes), as an
        `Ensemble` does: their mean cross-entropy is taken.
        """
        assert isinstance(self.config.task, ClassifierConfig)
        logits, targets = self.forward(model, batch), batch["target"]
        smooth = model.training and targets.ndim == 1  # mixed targets are smoothed by the mixing
        smoothing = self.config.task.label_smoothing if smooth else 0.0
        if logits.ndim > 2:
            logits = logits.flatten(0, -2)
            targets = targets.repeat_interleave(len(logits) // len(targets), dim=0)
        return {"loss": F.cross_entropy(logits.float(), targets, label_smoothing=smoothing), "output": logits}

    def metrics(self) -> MetricCollection:
        """Return the scores that this task reports, for its number of classes."""
        from mambaverse.engine.scores import classifier_scores

        return classifier_scores(self.scores, len(self.classes))

    def labels_of(self, samples: SampleSet) -> np.ndarray:
        """Return the class numbers (N,) of a set; domains that have them in memory return those."""
        return np.array([int(samples.sample(i, None)["target"]) for i in range(len(samples))])

    def baselines(self) -> dict[str, Callable[[], np.ndarray]]:
        """Return the floors of this task; here the most frequent class."""

        def majority() -> np.ndarray:
            most = np.bincount(self.labels_of(self.train_set), minlength=len(self.classes)).argmax()
            return np.full(len(self.reported_set), most)

        return {"majority": majority}


def _classes_of(path: Path) -> list[Any]:
    """Return the classes of the run that a weights file lies in; none where it lies in no run."""
    try:
        classes = read_facts(RunFolder(path.parent)).get("classes")
    except UserError:
        return []
    return classes if isinstance(classes, list) else []
