"""The floor beside a number: a task's simple baselines, fitted and scored on the very data that a run has.

Source of the habit: DESIGN section 7; a k-mer SVM beats some published genome models (docs/dna.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.table import Table

from mambaverse.config import RunConfig
from mambaverse.engine.classifier import Classifier
from mambaverse.engine.folder import make_task
from mambaverse.engine.progress import Screen, format_seconds
from mambaverse.engine.task import Task
from mambaverse.errors import UserError

Floors = dict[str, dict[str, float]]


def check_baselines(task: Task) -> None:
    """Raise UserError unless the task has baselines; asked before what they are to stand beside takes its time."""
    if not isinstance(task, Classifier):
        raise _no_baselines(task)


def _no_baselines(task: Task) -> UserError:
    return UserError(f"task {task.config.task.name!r} has no baselines")


def fit_baselines(task: Task, console: Console) -> Floors:
    """Return {baseline: {"accuracy", "macro_f1", "mcc", "seconds"}} on the reported set; of two classes "f1" too.

    Raises:
        UserError: the task has no baselines.
    """
    found = task.baselines()
    if not found or not isinstance(task, Classifier):
        raise _no_baselines(task)
    truth = task.labels_of(task.reported_set)
    floors: Floors = {}
    for name, fit in found.items():
        start = perf_counter()
        predicted = np.asarray(fit())
        seconds = perf_counter() - start
        console.print(f"baseline {name}: {format_seconds(seconds)}", highlight=False)
        floors[name] = {**scores_of(truth, predicted, len(task.classes)), "seconds": round(seconds, 2)}
    return floors


def scores_of(truth: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
    """Return "accuracy", "macro_f1" and "mcc" of predicted class numbers (N,), and "f1" where there are two classes."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    scores = {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "mcc": float(matthews_corrcoef(truth, predicted)),
    }
    if classes == 2:
        scores["f1"] = float(f1_score(truth, predicted, zero_division=0))
    return scores


def baselines_table(floors: Floors, ours: Mapping[str, float] | None = None) -> Table:
    """Return a row for each baseline, and with `ours` one for the run's own metrics.

    Then only what the run's task reports has a column: a task chooses its `scores`, baselines have all that there are.
    """
    rows = {**floors, **({} if ours is None else {"this run": ours})}
    columns = {"accuracy": "accuracy", "macro_f1": "macro F1", "f1": "F1", "mcc": "MCC"}
    reported = {key for one in floors.values() for key in one} if ours is None else ours
    shown = {key: name for key, name in columns.items() if key in reported}
    table = Table("model", *shown.values())
    for column in table.columns[1:]:
        column.justify = "right"
    for name, scores in rows.items():
        cells = (scores.get(key) for key in shown)
        table.add_row(name, *("" if value is None else f"{value:.4f}" for value in cells))
    return table


def print_baselines(task: Task, console: Console, ours: Mapping[str, float] | None = None) -> Floors:
    """`fit_baselines`, and print the table."""
    floors = fit_baselines(task, console)
    console.print(baselines_table(floors, ours))
    return floors


def baseline_config(config: RunConfig, console: Console | None = None) -> Floors:
    """Open the data of `config`, and print what its task's baselines reach on them."""
    console = console or Screen()
    task = make_task(config)
    task.setup()
    for name, value in task.describe().items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    return print_baselines(task, console)
