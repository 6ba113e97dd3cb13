"""Scores of a model on a data set, and labels for new inputs."""

from __future__ import annotations

import csv
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor, nn

from mambaverse.engine import report
from mambaverse.engine.baseline import print_baselines
from mambaverse.engine.data import Loader, eval_jobs, to_device
from mambaverse.engine.folder import load_run
from mambaverse.engine.process import launch, shard_of
from mambaverse.engine.progress import Counter
from mambaverse.engine.task import Sample, Task
from mambaverse.errors import UserError

TABLE_ROWS = 1000  # of predictions; more inputs make more tables, so that none waits for the last


@dataclass
class Scores:
    """An evaluation: the metrics, "loss" among them, and on request every output and target, in the set's order."""

    metrics: dict[str, float]
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))
    targets: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.no_grad()
def score(
    task: Task,
    model: nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    *,
    collect: bool = False,
    stopped: Callable[[], bool] = bool,
) -> Scores | None:
    """Evaluate `model` on the loader's samples, each counted once, over all processes.

    Args:
        task: Says what a step and a score are.
        model: Put into eval mode.
        loader: Of the evaluation set.
        accelerator: Gives the device, the precision and the other processes.
        collect: Keep outputs and targets (on the first process).
        stopped: Asked before each batch; once it says True the evaluation ends with None.
    """
    model.eval()
    metrics = task.metrics().to(accelerator.device)
    loss, count = torch.zeros((), dtype=torch.float64, device=accelerator.device), 0
    kept: list[tuple[int, Tensor, Tensor]] = []
    num_samples, batch_size = len(loader.samples), task.config.data.eval_batch_size
    for job, batch in loader.run(eval_jobs(num_samples, batch_size, shard_of(accelerator))):
        if stopped():
            return None
        with accelerator.autocast():
            result = task.step(model, batch)
        output = result["output"].float()
        loss += result["loss"] * len(job.indices)
        count += len(job.indices)
        task.update(metrics, output, batch)
        if collect:
            kept.append((job.indices[0], output.cpu(), task.targets(batch).cpu()))
    total, count = accelerator.reduce(torch.stack([loss, torch.full_like(loss, count)]), "sum").tolist()
    with warnings.catch_warnings():  # fewer samples than processes: one may have had none to update with
        warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
        values = {"loss": total / count, **{name: _scalar(name, v) for name, v in metrics.compute().items()}}
    if not collect:
        return Scores(values)
    kept = sorted(gather_object(kept), key=lambda part: part[0])
    return Scores(values, torch.cat([part[1] for part in kept]), torch.cat([part[2] for part in kept]))


def score_set(task: Task, model: nn.Module, accelerator: Accelerator, *, collect: bool = False) -> Scores:
    """Evaluate `model` once on the set that the task reports (see `score`)."""
    how = (task.collate, 0, accelerator.device, task.config.data.num_workers)
    with closing(Loader(task.reported_set, *how)) as loader:
        scores = score(task, model, loader, accelerator, collect=collect)
    assert scores is not None
    return scores


def evaluate(path: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Return the metrics of a run's weights on the set that its task reports.

    Args:
        path: A run folder.
        overrides: `key=value` changes to its config, such as data.root=...

    Raises:
        UserError: not a run folder, half written, or of other classes than the data.
    """
    return _evaluate(path, overrides)[1]


def evaluate_run(
    path: Path, overrides: Sequence[str] = (), console: Console | None = None, *, baseline: bool = False
) -> dict[str, float]:
    """`evaluate`, and print the table; with `baseline` beside the task's simple baselines on the same data."""
    task, metrics = _evaluate(path, overrides)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        console = console or Console()
        which = task.config.trainer.select
        console.print(f"{path}, {which} weights, {reported_name(task)}:", highlight=False, soft_wrap=True)
        console.print(report.metrics_table(metrics))
        if baseline:
            print_baselines(task, console, metrics)
    return metrics


def reported_name(task: Task) -> str:
    """Return what the reported set is called."""
    return "evaluation set" if task.test_set is None else "test set"


def _evaluate(path: Path, overrides: Sequence[str]) -> tuple[Task, dict[str, float]]:
    config, task, model = load_run(path, overrides)
    with launch(config.trainer) as accelerator:
        return task, score_set(task, model.to(accelerator.device), accelerator).metrics


@dataclass
class Prediction:
    """What a model says of one input."""

    name: str
    label: str
    probability: float  # of that label
    probabilities: dict[str, float]  # by label


@torch.no_grad()
def predict(
    path: Path, inputs: Sequence[str], *, on_bad: Callable[[UserError], None] | None = None
) -> Iterator[Prediction]:
    """Yield a prediction for every input, in order, by a run's best weights.

    Args:
        path: A run folder; its data set is not needed.
        inputs: Files, or what else the task's `load_inputs` knows.
        on_bad: Called with what is wrong with an input, which is then left out; None: the error is raised, after the
            predictions of the inputs before it.
    """
    config, task, model = load_run(path, data=False)
    with launch(config.trainer) as accelerator:
        model.to(accelerator.device)
        names: list[str] = []
        samples: list[Sample] = []
        inputs_left = iter(task.load_inputs(inputs))
        while True:
            try:
                if (item := next(inputs_left, None)) is None:
                    break
                sample = item[1]()
            except UserError as error:
                if on_bad is not None:
                    on_bad(error)
                    continue
                yield from _label(task, model, accelerator, names, samples)
                raise
            names.append(item[0])
            samples.append(sample)
            if len(samples) == config.data.eval_batch_size:
                yield from _label(task, model, accelerator, names, samples)
                names, samples = [], []
        yield from _label(task, model, accelerator, names, samples)


def predict_run(path: Path, inputs: Sequence[str], *, form: str = "table", on_error: str = "raise") -> None:
    """`predict`, and print the rows as they come; how far it is, and what is skipped, goes to stderr.

    Args:
        path: A run folder.
        inputs: Files, or folders of them.
        form: "table"; "csv" with a column for every label; "json", one object a line.
        on_error: "raise" stops at a bad input, "skip" reports it on stderr, goes on, and counts them at the end.
    """
    skipped = 0

    def skip(error: UserError) -> None:
        nonlocal skipped
        skipped += 1
        print(f"skipped: {error}", file=sys.stderr)

    counter = Counter(Console(stderr=True), "labelled")
    rows = counter.watch(predict(path, inputs, on_bad=skip if on_error == "skip" else None))
    if form == "csv":
        _print_csv(rows)
    elif form == "json":
        for row in rows:
            print(json.dumps(vars(row), ensure_ascii=False), flush=True)
    else:
        _print_table(rows)
    if skipped:
        print(f"{skipped:,} of {skipped + counter.done:,} inputs skipped", file=sys.stderr)


def _label(
    task: Task, model: nn.Module, accelerator: Accelerator, names: Sequence[str], samples: Sequence[Sample]
) -> Iterator[Prediction]:
    if not samples:
        return
    batch = to_device(task.collate(samples, None), accelerator.device)
    with accelerator.autocast():
        output = task.forward(model, batch)
    for name, row in zip(names, task.probabilities(output).tolist(), strict=True):
        by_label = dict(zip(task.classes, row, strict=True))
        label = max(by_label, key=by_label.__getitem__)
        yield Prediction(name, label, by_label[label], by_label)


def _print_csv(rows: Iterator[Prediction]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for number, row in enumerate(rows):
        if number == 0:
            writer.writerow(["input", "label", "probability", *row.probabilities])
        writer.writerow([row.name, row.label, *(f"{p:.6f}" for p in (row.probability, *row.probabilities.values()))])


def _print_table(rows: Iterator[Prediction]) -> None:
    done: list[tuple[str, str, str]] = []
    try:
        for row in rows:
            done.append((row.name, row.label, f"{row.probability:.4f}"))
            if len(done) == TABLE_ROWS:
                Console().print(report.predictions_table(done))
                done = []
    finally:
        if done:
            Console().print(report.predictions_table(done))


def _scalar(name: str, value: Tensor) -> float:
    if value.numel() != 1:
        raise ValueError(f"metric {name!r}: expected one number, got shape {tuple(value.shape)}")
    return float(value)
