"""Scores of a model on a data set, and labels for new inputs."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor, nn

from mambaverse.config import ConfigError, OptimConfig, RunConfig, TrainerConfig, argument_layers
from mambaverse.engine import report
from mambaverse.engine.baseline import check_baselines, print_baselines
from mambaverse.engine.data import Loader, eval_jobs, to_device
from mambaverse.engine.files import output_path, saving
from mambaverse.engine.folder import load_run, open_run
from mambaverse.engine.inputs import REMEDY, BadInputError, Skips, load_each
from mambaverse.engine.process import launch, shard_of
from mambaverse.engine.progress import Counter, Screen
from mambaverse.engine.task import Prediction, Sample, Task
from mambaverse.errors import UserError, warn

TAKEN = {"trainer": {"device", "num_threads", "precision", "select"}, "optim": set[str]()}  # which an evaluation reads
OTHER_DATA = {  # keys of data that name others, or another split
    "name", "root", "subset", "genome", "val_fraction", "dev_fraction", "folds", "fold", "split_seed", "group",
}  # fmt: skip
OVERLAP = "an evaluation may meet what the run learnt from; data.root=... evaluates it on other data"
SHEET_FORMATS = (".jpg", ".pdf", ".png", ".svg")
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
        ConfigError: a key that cannot be changed, or that only training reads.
        UserError: not a run folder, half written, or of other classes than the data.
    """
    return _evaluate(path, overrides)[1]


def evaluate_run(
    path: Path, overrides: Sequence[str] = (), console: Console | None = None, *, baseline: bool = False
) -> dict[str, float]:
    """`evaluate`, and print the table; with `baseline` beside the task's simple baselines on the same data."""
    task, metrics = _evaluate(path, overrides, baseline)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        console = console or Screen()
        which = task.config.trainer.select
        console.print(f"{path}, {which} weights, {reported_name(task)}:", highlight=False, soft_wrap=True)
        console.print(report.metrics_table(metrics))
        if note := report.skipped_note(task):
            console.print(note, highlight=False)
        if caveat := task.caveat():
            console.print(caveat, highlight=False, soft_wrap=True)
        if baseline:
            print_baselines(task, console, metrics)
    return metrics


def reported_name(task: Task) -> str:
    """Return what the reported set is called."""
    return "evaluation set" if task.test_set is None else "test set"


def _evaluate(path: Path, overrides: Sequence[str], baseline: bool = False) -> tuple[Task, dict[str, float]]:
    _check_taken(overrides)
    config, task, model = load_run(path, overrides)
    if baseline:
        check_baselines(task)
    with tempfile.TemporaryDirectory() as scratch:
        if not _names_data(overrides):
            open_run(path).check_split(task, Path(scratch), OVERLAP)
        elif learnt := open_run(path).count_learnt(task, Path(scratch)):
            warn(f"{path}: learnt from {learnt:,} of the {len(task.reported_set):,} samples that it is evaluated on")
    with launch(config.trainer) as accelerator:
        return task, score_set(task, model.to(accelerator.device), accelerator).metrics


def _names_data(overrides: Sequence[str]) -> bool:
    """Return whether the overrides say which data to evaluate on, or how they are split."""
    layers: list[Any] = [OmegaConf.to_container(layer) for _, layer in argument_layers(overrides)]
    return any(OTHER_DATA & set(layer["data"]) for layer in layers if isinstance(layer.get("data"), dict))


def _check_taken(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a key of `trainer` or `optim` that only training reads; unknown ones `compose` refuses."""
    for source, layer in argument_layers(overrides):
        given: Any = OmegaConf.to_container(layer)  # not resolved: what an interpolation stands for is no key
        for section, config in (("trainer", TrainerConfig), ("optim", OptimConfig)):
            unread = {one.name for one in fields(config)} - TAKEN[section]
            keys = given[section] if isinstance(given.get(section), dict) else {}
            if wrong := [key for key in keys if key in unread]:
                taken = (f"{name}.{key}" for name, own in TAKEN.items() for key in sorted(own))
                raise ConfigError(
                    f"{source}: {section}.{wrong[0]} changes no evaluation, only training reads it; "
                    f"an evaluation takes data.*, model.*, task.*, {', '.join(taken)}"
                )


def predict(
    path: Path,
    inputs: Sequence[str],
    *,
    on_bad: Callable[[UserError], None] | None = None,
    keep: Callable[[Sample, Prediction], None] | None = None,
) -> Iterator[Prediction]:
    """Yield a prediction for every input, in order, by a run's best weights.

    Args:
        path: A run folder; its data set is not needed.
        inputs: Files, or what else the task's `load_inputs` knows.
        on_bad: Called with what is wrong with an input, which is then left out; None: the error is raised, after the
            predictions of the inputs before it.
        keep: Called with every sample and what is said of it, before that is yielded.
    """
    yield from _predict(load_run(path, data=False), inputs, on_bad, keep)


@torch.no_grad()
def _predict(
    run: tuple[RunConfig, Task, nn.Module],
    inputs: Sequence[str],
    on_bad: Callable[[UserError], None] | None,
    keep: Callable[[Sample, Prediction], None] | None,
) -> Iterator[Prediction]:
    config, task, model = run
    with launch(config.trainer) as accelerator:
        model.to(accelerator.device)
        loaded = load_each(task, inputs, on_bad)
        wrong: UserError | None = None
        while wrong is None:
            batch: list[tuple[str, Sample]] = []
            try:
                for item in islice(loaded, config.data.eval_batch_size):
                    batch.append(item)  # one by one: those before a bad one are labelled yet
            except BadInputError as error:
                wrong = error
            if not batch and wrong is None:
                return
            for row, (_, sample) in zip(_label(task, model, accelerator, batch), batch, strict=True):
                if keep is not None:
                    keep(sample, row)
                yield row
        raise wrong


def predict_run(
    path: Path, inputs: Sequence[str], *, form: str = "table", on_error: str | None = None, sheet: Path | None = None
) -> None:
    """`predict`, and print the rows as they come; how far it is, and what is skipped, goes to stderr.

    Args:
        path: A run folder.
        inputs: Files, or folders of them.
        form: "table"; "csv" with columns input, label, probability, and one for every label; "json", an object a line
            with name (what the csv calls input), label, probability, and probabilities by label.
        on_error: "raise" stops at a bad input, "skip" reports it on stderr, goes on, and counts them at the end; None:
            the run's data.on_error.
        sheet: A picture of the inputs with what is said of them, of as many as fit; its suffix says the format.

    Raises:
        UserError: not a run folder; a bad input, after the rows of those before it; inputs that are all skipped; no
            sheet in this domain.
    """
    output_path("--sheet", sheet, SHEET_FORMATS, map(Path, inputs))
    run = load_run(path, data=False)
    config, task = run[:2]
    if sheet is not None and not task.sheet_size:
        raise UserError(f"--sheet: the task {config.task.name!r} draws no sheet of what it has labelled")
    kept: list[tuple[Sample, Prediction]] = []

    def keep(sample: Sample, row: Prediction) -> None:
        if sheet is not None and len(kept) < task.sheet_size:
            kept.append((sample, row))

    skips, counter = Skips(on_error, config), Counter(Screen(stderr=True), "labelled")
    printing = {"csv": _print_csv, "json": _print_json, "table": _print_table}[form]
    try:
        printing(counter.watch(_predict(run, inputs, skips.on_bad, keep)))
    except BadInputError as error:
        raise UserError(f"{error}; {REMEDY}") from None
    finally:
        if sheet is not None and kept:
            with saving(sheet):
                task.sheet(sheet, [sample for sample, _ in kept], [row for _, row in kept], counter.done)
    skips.report(counter.done)


def _label(
    task: Task, model: nn.Module, accelerator: Accelerator, named: Sequence[tuple[str, Sample]]
) -> Iterator[Prediction]:
    if not named:
        return
    batch = to_device(task.collate([sample for _, sample in named], None), accelerator.device)
    with accelerator.autocast():
        output = task.forward(model, batch)
    for (name, _), row in zip(named, task.probabilities(output).tolist(), strict=True):
        by_label = dict(zip(task.classes, row, strict=True))
        label = max(by_label, key=by_label.__getitem__)
        yield Prediction(name, label, by_label[label], by_label)


def _print_json(rows: Iterator[Prediction]) -> None:
    for row in rows:
        print(json.dumps(vars(row), ensure_ascii=False), flush=True)


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
                Screen().print(report.predictions_table(done))
                done = []
    finally:
        if done:
            Screen().print(report.predictions_table(done))


def _scalar(name: str, value: Tensor) -> float:
    if value.numel() != 1:
        raise ValueError(f"metric {name!r}: expected one number, got shape {tuple(value.shape)}")
    return float(value)
