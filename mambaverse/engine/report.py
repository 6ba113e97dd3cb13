"""The head and the tables of a run: what will be trained, and what came of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor, nn

from mambaverse.config import RunConfig
from mambaverse.engine.data import to_device
from mambaverse.engine.progress import format_seconds
from mambaverse.engine.task import Task
from mambaverse.flops import Cost, count_flops
from mambaverse.kernels.backend import current_backend

if TYPE_CHECKING:
    from mambaverse.engine.trainer import Trainer

MAX_CLASSES = 20  # of a table on the screen; per_class.csv has any number


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def sample_cost(task: Task, model: nn.Module, device: torch.device) -> Cost:
    """Return what a forward pass of one sample costs, in eval mode, and have the task check what comes out."""
    batch = to_device(task.collate([task.eval_set.sample(0, None)], None), device)
    training = model.training
    model.eval()
    cost = count_flops(lambda: task.check_output(task.forward(model, batch), batch))
    model.train(training)
    return cost


def head(config: RunConfig, task: Task, trainer: Trainer) -> dict[str, str]:
    """Return what a run prints before it begins, by name."""
    device, processes = trainer.device, trainer.accelerator.num_processes
    cost = sample_cost(task, trainer.weights, device)
    mixer, optim, accumulate = config.model.mixer, config.optim, config.trainer.accumulate
    batch = str(trainer.plan.batch_size * processes * accumulate)
    if processes * accumulate > 1:
        batch += f" ({trainer.plan.batch_size} x {processes} processes x {accumulate} accumulated)"
    return {
        "model": config.model.name + (f", mixer {mixer}" if mixer is not None else ""),
        "parameters": format_count(count_parameters(trainer.weights)),
        "FLOPs": _cost(cost),
        "data": config.data.name,
        **task.describe(),
        "batch": batch,
        "optimizer": f"{optim.name}, lr {optim.lr:g}, {optim.schedule}, weight decay {optim.weight_decay:g}",
        "length": f"{_plural(config.trainer.epochs, 'epoch')} of {_plural(trainer.epoch_updates, 'step')}",
        "device": f"{device_name(device)}, {config.trainer.precision}, {_plural(torch.get_num_threads(), 'thread')}"
        + (f", compiled ({config.trainer.compile})" if config.trainer.compile else ""),
        "backend": _backend(device),
    }


def head_table(rows: Mapping[str, str]) -> Table:
    """Return the head as two columns."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def skipped_note(task: Task) -> str:
    """Return what the end of a run or an evaluation says of samples that were left out; "" if none were."""
    kept = sum(len(part) for part in (task.train_set, task.eval_set, task.test_set) if part is not None)
    total = kept + task.skipped
    return f"{task.skipped:,} of {total:,} samples skipped: they cannot be read" if task.skipped else ""


def results_table(results: Mapping[str, Any]) -> Table:
    """Return the final table: the metrics of the best weights, and what they cost."""
    table = metrics_table(results["metrics"])
    table.add_section()
    table.add_row("epochs", str(results["epochs"]))
    table.add_row("training time", format_seconds(results["seconds"]))
    table.add_row("parameters", format_count(results["parameters"]))
    return table


def metrics_table(metrics: Mapping[str, float | None]) -> Table:
    """Return the metrics of an evaluation as a table."""
    table = Table("metric", "value")
    table.columns[1].justify = "right"
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), "not finite" if value is None else f"{value:.4f}")
    return table


def per_class(counts: Tensor, classes: Sequence[str]) -> Iterator[tuple[str, int, float, float, float]]:
    """Yield (class, samples, precision, recall, F1) from a confusion matrix (true class, predicted class).

    0 where a ratio has no denominator: a class that was never predicted, or that has no samples.
    """
    right, predicted, samples = counts.diagonal(), counts.sum(0), counts.sum(1)
    for name, hit, said, count in zip(classes, right.tolist(), predicted.tolist(), samples.tolist(), strict=True):
        yield name, count, hit / max(said, 1), hit / max(count, 1), 2 * hit / max(said + count, 1)


def per_class_table(counts: Tensor, classes: Sequence[str]) -> Table:
    """Return `per_class` as a table."""
    table = Table("class", "samples", "precision", "recall", "F1")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for name, count, *scores in per_class(counts, classes):
        table.add_row(name, f"{count:,}", *(f"{score:.4f}" for score in scores))
    return table


def per_class_csv(counts: Tensor, classes: Sequence[str]) -> str:
    """Return `per_class` as CSV text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("class", "samples", "precision", "recall", "f1"))
    for name, count, *scores in per_class(counts, classes):
        writer.writerow((name, count, *(f"{score:.6f}" for score in scores)))
    return text.getvalue()


def predictions_table(rows: Sequence[Sequence[str]]) -> Table:
    """Return (name, label, probability) rows as a table."""
    table = Table("input", "label", "probability")
    table.columns[2].justify = "right"
    for column in table.columns[:2]:  # a name is shown whole, in several lines if need be
        column.overflow = "fold"
    for row in rows:
        table.add_row(*row)
    return table


def format_count(count: float) -> str:
    """Return 25797000 as "25.80 M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def device_name(device: torch.device) -> str:
    """Return "cpu", or the GPU's product name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _cost(cost: Cost) -> str:
    own = f"; scans and norms {cost.own_share:.0%}" if cost.operators else ""
    text = f"{format_count(cost.flops)} a sample, forward ({format_count(cost.multiply_adds)} multiply-adds{own})"
    return text + (f", without {', '.join(cost.uncounted)}" if cost.uncounted else "")


def _backend(device: torch.device) -> str:
    chosen = current_backend()
    if chosen != "auto":
        return chosen
    return f"auto ({ {'cpu': 'cpu', 'cuda': 'triton'}.get(device.type, 'reference') })"
