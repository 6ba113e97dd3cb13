"""What a domain supplies to the engine: a `Task`. The engine knows nothing else of vision, DNA or audio.

A task is one class in `tasks/<domain>/task.py`, registered under the domain's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from mambaverse.config import DataConfig, RunConfig, TaskConfig
from mambaverse.registry import Registry

Batch = Mapping[str, Any]  # named tensors (batch first) and lists
Sample = Mapping[str, Any]


class SampleSet(Protocol):
    """A map-style data set whose random choices come from the generator it is handed, and from nothing else."""

    def __len__(self) -> int:
        """Number of samples."""

    def sample(self, index: int, generator: torch.Generator | None) -> Sample:
        """Return sample `index`; with a generator augmented by its draws, with None as it is."""


class Task:
    """Base class of a domain's task: it holds the data, builds the model, and says what a step and a score are.

    Attributes:
        data_config: The `data` section of this domain.
        task_config: The `task` section of this domain.
        monitor: The metric that chooses the best weights (of those that `metrics` returns), and
        monitor_mode: whether "max" or "min" of it is best.
    """

    data_config: ClassVar[type[DataConfig]] = DataConfig
    task_config: ClassVar[type[TaskConfig]] = TaskConfig
    monitor: str = "accuracy"
    monitor_mode: str = "max"

    train_set: SampleSet
    eval_set: SampleSet  # what chooses the best weights, and what the final table reports
    classes: Sequence[str]  # label names in the order of the outputs; empty where there are none

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def setup(self) -> None:
        """Open the data: set `train_set`, `eval_set` and `classes`. Called once, before `build_model`."""
        raise NotImplementedError

    def build_model(self) -> nn.Module:
        """Return the model that `config.model` describes, fitting the data."""
        raise NotImplementedError

    def collate(self, samples: Sequence[Sample], generator: torch.Generator | None) -> Batch:
        """Join samples to a batch; with a generator apply what mixes samples (mixup)."""
        raise NotImplementedError

    def step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": mean loss, "output": what `update` scores, ...scalars to log}."""
        raise NotImplementedError

    def metrics(self) -> MetricCollection:
        """Return the metrics of an evaluation, by name; fresh ones."""
        raise NotImplementedError

    def update(self, metrics: MetricCollection, output: Tensor, batch: Batch) -> None:
        """Feed one evaluated batch to the metrics."""
        raise NotImplementedError

    def describe(self) -> dict[str, str]:
        """Return what the head of a run prints about the data: {"data": "digits, 1437 + 360 images of 8 x 8", ...}."""
        return {}

    def figures(self, folder: Path, outputs: Tensor, targets: Tensor) -> list[Path]:
        """Draw the domain's pictures of a finished evaluation into `folder` and return their paths."""
        return []

    def load_inputs(self, paths: Sequence[str]) -> Sequence[tuple[str, Callable[[], Sample]]]:
        """Return (name, loader) for every input that `predict` was given; a loader raises UserError for a bad one."""
        raise NotImplementedError

    def probabilities(self, output: Tensor) -> Tensor:
        """Turn a model's output into probabilities (B, classes)."""
        return output.float().softmax(dim=-1)


TASKS: Registry[type[Task]] = Registry("task", builtins="mambaverse.tasks.*.task", group="mambaverse.tasks")


def register_task(name: str, *, overwrite: bool = False) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: make a `Task` available as `task.name=name`."""
    return TASKS.register(name, overwrite=overwrite)


def run_schema(task: str) -> RunConfig:
    """Return an empty configuration whose `task` and `data` sections are those of the task called `task`."""
    cls = TASKS.get(task)
    return RunConfig(task=cls.task_config(), data=cls.data_config())
