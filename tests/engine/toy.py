"""A task small enough to train in a blink: points on a plane, labelled by the sector they lie in."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from mambaverse.config import DataConfig, RunConfig, TaskConfig, compose
from mambaverse.engine.task import Batch, Sample, Task, register_task
from mambaverse.errors import UserError

CLASSES = ("east", "north", "west", "south")


@dataclass
class ToyData(DataConfig):
    name: str = "sectors"
    num_train: int = 100
    num_eval: int = 50
    noise: float = 0.1
    bad: int = -1  # a sample that cannot be read


@dataclass
class ToyConfig(TaskConfig):
    name: str = "toy"
    mix: bool = True
    dropout: float = 0.2
    nan_at: int = -1  # the training step whose loss is not a number
    sleep_s: float = 0.0  # of every training step


class Sectors:
    """Deterministic points; with a generator they are shaken."""

    def __init__(self, size: int, seed: int, noise: float = 0.0, bad: int = -1) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.points = torch.randn(size, 2, generator=draw)
        angle = torch.atan2(self.points[:, 1], self.points[:, 0])
        self.labels = ((angle + torch.pi / 4) // (torch.pi / 2)).long() % len(CLASSES)
        self.noise, self.bad = noise, bad

    def __len__(self) -> int:
        return len(self.points)

    def sample(self, index: int, generator: torch.Generator | None) -> Sample:
        if index == self.bad:
            raise UserError(f"sample {index} is truncated")
        point = self.points[index]
        if generator is not None:
            point = point + self.noise * torch.randn(2, generator=generator)
        return {"point": point, "target": self.labels[index], "index": index}


class Net(nn.Module):
    def __init__(self, dropout: float, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Linear(2, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.gelu(self.norm(self.stem(x)))))

    def no_weight_decay(self) -> set[str]:
        return {"stem.weight"}


@register_task("toy", overwrite=True)
class Toy(Task):
    """Sectors of the plane."""

    data_config = ToyData
    task_config = ToyConfig
    signal_at = -1  # the training step in which this process (the first of several) gets `signal`, once
    signal = signal.SIGTERM
    train_set: Sectors
    eval_set: Sectors

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.steps = 0
        self.seen: list[list[int]] = []

    def setup(self) -> None:
        data: Any = self.config.data
        self.train_set = Sectors(data.num_train, 1, data.noise, data.bad)
        self.eval_set = Sectors(data.num_eval, 2)
        self.classes = CLASSES

    def save_split(self, folder: Path) -> Path | None:
        path = folder / "split.csv"
        path.write_text(f"train,{len(self.train_set)}\neval,{len(self.eval_set)}\n")
        return path

    def build_model(self) -> nn.Module:
        task: Any = self.config.task
        return Net(task.dropout, **self.config.model.args)

    def collate(self, samples: Sequence[Sample], generator: torch.Generator | None) -> Batch:
        batch: dict[str, Any] = {"point": torch.stack([s["point"] for s in samples])}
        if "target" in samples[0]:
            batch["target"] = torch.stack([s["target"] for s in samples])
            batch["index"] = [s["index"] for s in samples]
        task: Any = self.config.task
        if generator is not None and task.mix:
            order = torch.randperm(len(samples), generator=generator)
            batch["point"] = 0.9 * batch["point"] + 0.1 * batch["point"][order]
        return batch

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["point"])

    def step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        output = self.forward(model, batch)
        loss = F.cross_entropy(output, batch["target"])
        if model.training:
            loss = self._train_step(loss, batch)
        return {"loss": loss, "output": output}

    def _train_step(self, loss: Tensor, batch: Batch) -> Tensor:
        task: Any = self.config.task
        self.steps += 1
        self.seen.append(batch["index"])
        if task.sleep_s:
            time.sleep(task.sleep_s)
        if self.steps == Toy.signal_at and os.environ.get("RANK", "0") == "0":
            Toy.signal_at = -1
            os.kill(os.getpid(), Toy.signal)
        return loss * float("nan") if self.steps == task.nan_at else loss

    def metrics(self) -> MetricCollection:
        return MetricCollection({"accuracy": MulticlassAccuracy(len(CLASSES), average="micro")})

    def load_inputs(self, paths: Sequence[str]) -> Sequence[tuple[str, Callable[[], Sample]]]:
        def load(text: str) -> Sample:
            try:
                x, y = map(float, text.split(","))
            except ValueError:
                raise UserError(f"{text!r}: expected two numbers") from None
            return {"point": torch.tensor([x, y])}

        return [(path, partial(load, path)) for path in paths]


def toy_config(folder: Path, *overrides: str, name: str = "run") -> RunConfig:
    """Return a config that trains for 4 epochs of 6 steps, in folder/name; no pictures, which take longer than that."""
    text = """
plugins: [tests.engine.toy]
task: {name: toy}
model: {name: net}
data: {batch_size: 16}
optim: {lr: 0.02, warmup_epochs: 0.5}
trainer: {epochs: 4, log_every: 3, num_threads: 1, device: cpu, pictures: false}
"""
    path = folder / "toy.yaml"
    path.write_text(text)
    return compose(str(path), [f"trainer.output_dir={folder}", f"trainer.run_name={name}", *overrides])


def numbers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of metrics.jsonl without what they say of time."""
    return [{k: v for k, v in row.items() if k not in ("samples_per_s", "seconds")} for row in rows]
