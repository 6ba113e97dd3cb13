"""What a domain supplies to the engine: a `Task`. The engine knows nothing else of vision, DNA or audio.

A domain's task is one class in `tasks/<domain>/task.py`, registered under the domain's name; a further one is a file of
its own in `tasks/<domain>/tasks/`, registered under the file's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from mambaverse.config import DataConfig, RunConfig, TaskConfig
from mambaverse.engine.checkpoint import load_weights
from mambaverse.errors import UserError
from mambaverse.registry import Registry, is_a

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from mambaverse.engine.audit import Audit

Batch = Mapping[str, Any]  # named tensors (batch first) and lists
Sample = Mapping[str, Any]


class NoLabelsError(UserError):
    """The models of a task say no labels, whatever the input."""


FACTS: dict[Any, str] = {  # the types that facts have, in words
    int: "a whole number from 1",
    list[str]: "a list of names",
    list[float]: "a list of numbers",
    list[float] | None: "a list of numbers or None",
}


class FactError(UserError):
    """A fact of a run that cannot be one; who read them names the file."""


def fact(facts: Mapping[str, Any], name: str, kind: Any) -> Any:
    """Return what `Task.facts` noted under `name`, of the type `kind`, one of `FACTS`.

    Raises:
        KeyError: nothing.
        FactError: something else.
    """
    value = facts[name]
    if not is_a(value, kind) or (kind is int and value < 1):
        raise FactError(f"{name}: expected {FACTS[kind]}, got {value!r}")
    return value


class SampleSet(Protocol):
    """A map-style data set whose random choices come from the generator it is handed, and from nothing else.

    The engine seeds that generator from (seed, epoch, index), so a sample is the same whichever process loads it, and
    in a run that was stopped and resumed. The next sample gets the same generator: draw from it, do not keep it.
    """

    def __len__(self) -> int:
        """Number of samples."""

    def sample(self, index: int, generator: torch.Generator | None) -> Sample:
        """Return sample `index`; with a generator augmented by its draws, with None as it is."""


class EpochSet(SampleSet, Protocol):
    """A sample set that training sees otherwise in some epochs: shorter windows at first, say."""

    def of_epoch(self, epoch: int) -> SampleSet:
        """Return what is sampled in epoch number `epoch`, from 0; it has as many samples."""


@runtime_checkable
class BatchSet(SampleSet, Protocol):
    """A sample set that is held where the model is, and makes whole batches there."""

    def batch(
        self, indices: Sequence[int], key: int | None, generator: torch.Generator | None, device: torch.device
    ) -> Batch:
        """Return the batch of samples `indices`, as `Task.collate` would, on `device`.

        Args:
            indices: Of the samples.
            key: 63 bits that a sample's choices are to follow from, beside its index; None: no choices.
            generator: For what mixes samples; None: nothing does.
            device: Where the batch is wanted.
        """


@dataclass
class Prediction:
    """What a model says of one input."""

    name: str
    label: str
    probability: float  # of that label
    probabilities: dict[str, float]  # by label


class Task:
    """Base class of a domain's task: it holds the data, builds the model, and says what a step and a score are.

    Attributes:
        data_config: The `data` section of this domain.
        task_config: The `task` section of this domain.
        monitor: The metric that chooses the best weights (of those that `metrics` returns, or "loss"), and
        monitor_mode: whether "max" or "min" of it is best.
        train_set: What it learns from.
        eval_set: What chooses the best weights, and what the final table reports unless there is a
        test_set: then the final table and `eval` report that one, which nothing was chosen on.
        classes: Label names in the order of the outputs; empty where there are none.
        skipped: Samples that cannot be read and that data.on_error=skip left out of all sets.
        sheet_size: Inputs that `sheet` has room for; 0: the domain has no such picture.
    """

    data_config: ClassVar[type[DataConfig]] = DataConfig
    task_config: ClassVar[type[TaskConfig]] = TaskConfig
    monitor: str = "accuracy"
    monitor_mode: str = "max"
    sheet_size: ClassVar[int] = 0

    train_set: SampleSet
    eval_set: SampleSet
    test_set: SampleSet | None = None
    classes: Sequence[str] = ()
    skipped: int = 0

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @property
    def reported_set(self) -> SampleSet:
        """What the final table and `eval` report: `test_set` if there is one, else `eval_set`."""
        return self.eval_set if self.test_set is None else self.test_set

    def setup(self) -> None:
        """Open the data: set `train_set`, `eval_set` and `classes`. Called before `build_model`."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return what `build_model` and `load_inputs` need to know of the data, as JSON; the run folder keeps it."""
        return {"classes": list(self.classes)}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take over what `facts` returned when the run was trained, in place of `setup`: `predict` needs no data."""
        self.classes = fact(facts, "classes", list[str])

    def save_split(self, folder: Path) -> Path | None:
        """Write which sample is in which set, with hashes, into `folder`; None of a set that is always the same.

        A run is resumed only if this file comes out the same again.
        """
        return None

    def count_learnt(self, split: Path) -> int:
        """Return how many samples of `reported_set` a run learnt from whose `save_split` wrote the file `split`.

        Of the set, name and sha256 of a split.csv the engine reads it itself.
        """
        return 0

    def build_model(self) -> nn.Module:
        """Return the model that `config.model` describes, fitting the data; without its `checkpoint`."""
        raise NotImplementedError

    def load_checkpoint(self, model: nn.Module, path: Path) -> None:
        """Start `model` from the weights file `path` (`model.checkpoint`); override to map other names to ours."""
        load_weights(model, path)

    def collate(self, samples: Sequence[Sample], generator: torch.Generator | None) -> Batch:
        """Join samples to a batch; with a generator apply what mixes samples (mixup), to a batch of any size.

        Samples of `load_inputs` come without targets.
        """
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's output, batch first, for a batch that may have no targets."""
        raise NotImplementedError

    def check_output(self, output: Tensor, batch: Batch) -> None:
        """Raise UserError for an output of `forward`, in eval mode, that this task could not score."""

    def step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": mean loss, "output": what `update` scores, ...scalars to log}.

        Call `model(...)` itself and none of its methods: with several processes it is wrapped.
        """
        raise NotImplementedError

    def targets(self, batch: Batch) -> Tensor:
        """Return what the outputs of a batch are compared with, batch first: class numbers, for a classifier."""
        return batch["target"]

    def metrics(self) -> MetricCollection:
        """Return the metrics of an evaluation, by name, each a scalar; fresh ones.

        Beside them an evaluation reports "loss", the mean over the samples of their batches' losses; a metric of that
        name takes its place.
        """
        raise NotImplementedError

    def update(self, metrics: MetricCollection, output: Tensor, batch: Batch) -> None:
        """Feed one evaluated batch to the metrics."""
        metrics.update(output, self.targets(batch))

    def describe(self) -> dict[str, str]:
        """Return what the head of a run prints about the data: {"data": "digits, 1437 + 360 images of 8 x 8", ...}."""
        return {}

    def figures(self, folder: Path, model: nn.Module, outputs: Tensor, targets: Tensor) -> list[Path]:
        """Draw the domain's pictures of a finished evaluation into `folder` and return their paths.

        Outputs and targets are those of the whole `reported_set`, in its order, on the CPU; the model is the evaluated
        one, in eval mode, where it was trained.
        """
        return []

    def caveat(self) -> str:
        """Return one line that belongs beside every number: what the test set shares with training, say.

        "" if there is nothing to say; seconds, not minutes.
        """
        return ""

    def can_audit(self) -> None:
        """Raise UserError unless this task has an `audit`; asked before its data are opened."""
        if type(self).audit is Task.audit:
            raise UserError(f"audit: the task {self.config.task.name!r} has no audit")

    def audit(self, similarity: float | None = None) -> Audit:
        """Return what the evaluation sets share with the training set.

        Args:
            similarity: From which on samples are near neighbours, above 0 and at most 1; None: the task's own.
        """
        raise NotImplementedError("audit_config asks no task that leaves this out")

    def baselines(self) -> Mapping[str, Callable[[], np.ndarray]]:
        """Return simple models by name; each learns from `train_set` and returns class numbers for `reported_set`."""
        return {}

    def load_inputs(self, paths: Sequence[str]) -> Iterable[tuple[str, Callable[[], Sample]]]:
        """Yield (name, loader) for every input that `predict` was given; a loader raises UserError for a bad one.

        A generator is read as the predictions go on, so inputs of any number need no memory.
        """
        raise NotImplementedError

    def sheet(self, path: Path, samples: Sequence[Sample], rows: Sequence[Prediction], total: int) -> None:
        """Draw what `predict` said of its inputs into `path`: the first `sheet_size` samples of a `total`."""
        raise NotImplementedError(f"task {self.config.task.name!r} sets sheet_size and draws no sheet")

    def explain(self, path: Path, model: nn.Module, name: str, sample: Sample) -> None:
        """Draw what the model looks at in one input into `path`, for the command `explain`.

        Args:
            path: The .png to write.
            model: In eval mode.
            name: Of the input.
            sample: From `load_inputs`.

        Raises:
            UserError: there is nothing to look at in such a model.
        """
        raise NotImplementedError("explain_run asks no task that leaves this out")

    def probabilities(self, output: Tensor) -> Tensor:
        """Turn a model's output into probabilities (B, classes)."""
        return output.float().softmax(dim=-1)


TASKS: Registry[type[Task]] = Registry(
    "task", builtins=("mambaverse.tasks.*.task", "mambaverse.tasks.*.tasks"), group="mambaverse.tasks"
)


def register_task(name: str, *, overwrite: bool = False) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: make a `Task` available as `task.name=name`."""
    return TASKS.register_class(name, Task, overwrite=overwrite)


def run_schema(task: str) -> RunConfig:
    """Return an empty configuration whose `task` and `data` sections are those of the task called `task`."""
    cls = TASKS.get(task)
    return RunConfig(task=cls.task_config(), data=cls.data_config())
