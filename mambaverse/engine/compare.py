"""Is one run better than another, or than a floor? The paired bootstrap over the samples that both were scored on.

    d = score(truth, ours) - score(truth, theirs)            on the samples there are
    d* likewise on N samples drawn with replacement, the same ones for both; the standard error is the deviation of d*

Where several runs are given, seeds of one config, the mean of their scores counts. What the error covers is the choice
of the samples, not that of the seeds or of the training set.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 6; Matthews' correlation of more than two
classes is that of Gorodkin 2004. Since only counts matter, samples that all predictions agree on are drawn together, by
a multinomial.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mambaverse.engine.folder import make_task, open_run, read_config
from mambaverse.engine.progress import Screen
from mambaverse.errors import UserError, suggest
from mambaverse.splits import read_split

SCORES = ("accuracy", "f1", "macro_f1", "mcc")
RESAMPLES = 2_000
MOST_RESAMPLES = 1_000_000  # the standard error's own error is then 0.07 %
AT_ONCE = 4_000_000  # numbers of draws that are held at a time
HEADER = ("item", "target", "predicted")


@dataclass(frozen=True)
class Comparison:
    """What the paired bootstrap says.

    Attributes:
        ours: The score, the mean over runs.
        theirs: Likewise.
        standard_error: Of ours - theirs.
        below: Share of the resamples in which ours is below theirs.
    """

    ours: float
    theirs: float
    standard_error: float
    below: float

    @property
    def difference(self) -> float:
        """Return ours - theirs."""
        return self.ours - self.theirs


def paired_bootstrap(
    truth: np.ndarray,
    ours: np.ndarray,
    theirs: np.ndarray,
    *,
    score: str = "mcc",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare predictions of the same samples.

    Args:
        truth: Class numbers (N,).
        ours: Predicted ones, (N,) or of R runs (R, N).
        theirs: Likewise, of any number of runs.
        score: One of `SCORES`; "f1" is that of class 1 of two.
        resamples: How many draws the error is estimated from.
        seed: Of the draws.

    Raises:
        UserError: an unknown score, too few or too many resamples, no samples, or not the same number everywhere.
    """
    _check_score(score)
    if not 2 <= resamples <= MOST_RESAMPLES:
        raise UserError(f"resamples: expected 2 to {MOST_RESAMPLES:,}, got {resamples:,}; {RESAMPLES:,} are usual")
    ours, theirs = np.atleast_2d(ours), np.atleast_2d(theirs)
    if not len(truth) or ours.shape[1] != len(truth) or theirs.shape[1] != len(truth):
        raise UserError(f"compare: {len(truth)} targets, {ours.shape[1]} and {theirs.shape[1]} predictions")
    kinds, counts = np.unique(np.concatenate([truth[None], ours, theirs]), axis=1, return_counts=True)
    classes = int(kinds.max()) + 1
    targets, split = kinds[0], 1 + len(ours)

    def scores(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean scores of both sides under each row of weights."""
        found = [_score(score, targets, row, weights, classes) for row in kinds[1:]]
        return np.mean(found[: split - 1], axis=0), np.mean(found[split - 1 :], axis=0)

    mine, other = (float(value[0]) for value in scores(counts[None].astype(float)))
    draw = np.random.default_rng(seed)
    differences: list[np.ndarray] = []
    done = 0
    while done < resamples:
        size = min(max(1, AT_ONCE // len(counts)), resamples - done)
        weights = draw.multinomial(len(truth), counts / counts.sum(), size=size).astype(float)
        one, two = scores(weights)
        differences.append(one - two)
        done += size
    drawn = np.concatenate(differences)
    return Comparison(mine, other, float(drawn.std(ddof=1)), float((drawn < 0).mean()))


def _check_score(name: str) -> None:
    if name not in SCORES:
        raise UserError(f"no score {name!r} to compare{suggest(name, SCORES)}")


def _score(name: str, truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    """Return the score under each of W rows of weights (W, U) of U kinds of samples, (W,); 0 where it is undefined."""
    total = weights.sum(1)
    right = weights @ (truth == predicted)
    if name == "accuracy":
        return right / total
    one_hot = np.eye(classes)
    true, said = weights @ one_hot[truth], weights @ one_hot[predicted]
    if name == "mcc":
        spread = (total**2 - (said**2).sum(1)) * (total**2 - (true**2).sum(1))
        return np.divide(
            right * total - (true * said).sum(1), np.sqrt(spread), out=np.zeros(len(total)), where=spread > 0
        )
    hits = weights @ (one_hot[truth] * (truth == predicted)[:, None])
    both = true + said
    f1 = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    if name == "f1":
        return f1[:, 1] if classes > 1 else np.zeros(len(total))
    return f1.sum(1) / (both > 0).sum(1)  # classes that a draw has not are no part of its mean


def predictions_csv(probabilities: Tensor, targets: Tensor, classes: Sequence[str]) -> str:
    """Return what a run says of each sample of its reported set, in order, as CSV text.

    Args:
        probabilities: (N, classes).
        targets: Class numbers (N,).
        classes: Their names.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*HEADER, *classes))
    best = probabilities.argmax(1).tolist()
    for item, (target, said, row) in enumerate(zip(targets.tolist(), best, probabilities.tolist(), strict=True)):
        writer.writerow((item, classes[target], classes[said], *(f"{p:.6f}" for p in row)))
    return text.getvalue()


def read_predictions(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return (classes, targets, predictions) of a finished run.

    Raises:
        UserError: not a run folder, not finished, or with a damaged file.
    """
    file = open_run(path).predictions
    if not file.is_file():
        raise UserError(f"{path}: has no {file.name}: it did not come to its end, or tells no classes apart")
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            header, *rows = csv.reader(lines)
        classes = header[len(HEADER) :]
        numbers = {name: i for i, name in enumerate(classes)}
        targets, said = (np.array([numbers[row[i]] for row in rows], np.int64) for i in (1, 2))
    except (KeyError, IndexError, ValueError, csv.Error):  # ValueError: an empty file, or no UTF-8
        raise UserError(f"{file}: damaged: expected {', '.join(HEADER)} and a probability a class") from None
    return classes, targets, said


def compare_runs(
    runs: Sequence[Path],
    others: Sequence[Path] = (),
    *,
    score: str | None = None,
    resamples: int = RESAMPLES,
    console: Console | None = None,
) -> dict[str, Comparison]:
    """Print how the mean of `runs` stands to that of `others`, or, without any, to each of their task's baselines.

    Args:
        runs: Folders of finished runs on the same data: seeds of one config.
        others: Those that they are compared with; they were reported on the same samples.
        score: One of `SCORES`; None: what the first run was chosen by, or accuracy if that is none of them.
        resamples: Draws of the bootstrap.
        console: Where to print; None: stdout.

    Raises:
        UserError: an unknown score, a run given twice, runs that were not reported on the same samples; no baselines.
    """
    console = console or Screen()
    if score is not None:
        _check_score(score)  # before baselines are fitted
    _refuse_repeats(runs)
    _refuse_repeats(others)
    classes, truth, first = read_predictions(runs[0])
    if score is None:
        score = _chosen_by(runs[0])
    if score == "f1" and len(classes) != 2:
        raise UserError(f"f1 is that of the second of two classes, and here are {len(classes)}; macro_f1 is over all")
    samples = _reported_samples(runs[0])
    ours = np.stack([first, *(_same(path, runs[0], classes, truth, samples) for path in runs[1:])])
    sides: dict[str, np.ndarray]
    if others:
        sides = {
            ", ".join(map(str, others)): np.stack([_same(path, runs[0], classes, truth, samples) for path in others])
        }
    else:
        sides = _floors(runs[0], truth)
    found = {
        name: paired_bootstrap(truth, ours, theirs, score=score, resamples=resamples) for name, theirs in sides.items()
    }
    seeds = f", mean of {len(runs)} runs" if len(runs) > 1 else ""
    console.print(f"{score} of {len(truth):,} samples{seeds}; {resamples:,} paired resamples", highlight=False)
    console.print(_table(found))
    return found


def _refuse_repeats(runs: Sequence[Path]) -> None:
    """Raise UserError if a run is given twice: a mean of seeds would count it as two."""
    folders = [path.resolve() for path in runs]
    for at, (path, folder) in enumerate(zip(runs, folders, strict=True)):
        if folder in folders[:at]:
            raise UserError(f"{path}: given twice; a mean over runs takes each once")


def _chosen_by(run: Path) -> str:
    """Return the score that a run was chosen by, accuracy if that is none of `SCORES`."""
    file = open_run(run).results
    try:
        monitored = json.loads(file.read_text())["monitor"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: half written or missing; --score says what to compare by") from None
    return monitored if monitored in SCORES else "accuracy"


def _same(
    path: Path, first: Path, classes: list[str], truth: np.ndarray, samples: list[tuple[str, str]] | None
) -> np.ndarray:
    """Return the predictions of a run that was reported on `samples`, those of `first`, with the targets `truth`."""
    names, targets, said = read_predictions(path)
    if names != classes or not np.array_equal(targets, truth):
        raise UserError(f"{path} and {first} were not reported on the same samples: their targets differ")
    if samples is not None and _reported_samples(path) not in (None, samples):
        raise UserError(f"{path} and {first} were not reported on the same samples: their splits differ")
    return said


def _reported_samples(run: Path) -> list[tuple[str, str]] | None:
    """Return what a run's split.csv, or sets.csv, has of the set that was reported; None of other kinds of file."""
    file = next((path for name in ("split.csv", "sets.csv") if (path := run / name).is_file()), None)
    if file is None:
        return None
    try:
        rows = [(row["set"], row.get("name", ""), row["sha256"]) for row in read_split(file)]
    except (KeyError, csv.Error):  # a task may write what it likes
        return None
    reported = "test" if any(part == "test" for part, *_ in rows) else "eval"
    return [(name, digest) for part, name, digest in rows if part == reported]


def _floors(run: Path, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Return the predictions of the run's task's baselines, on the data and the split that it began with."""
    from mambaverse.engine.classifier import Classifier

    task = make_task(read_config(run))
    if not isinstance(task, Classifier):
        raise UserError(f"task {task.config.task.name!r} has no baselines; --to RUN names what to compare with")
    task.setup()
    with tempfile.TemporaryDirectory() as scratch:
        open_run(run).check_split(task, Path(scratch), "baselines would be fitted to others; --to compares runs alone")
    if not np.array_equal(task.labels_of(task.reported_set), truth):
        raise UserError(f"{run}: the data are not those that it was reported on: their labels differ")
    return {name: np.asarray(fit()) for name, fit in task.baselines().items()}


def _table(found: dict[str, Comparison]) -> Table:
    table = Table("compared with", "ours", "theirs", "difference", "standard error", "resamples below")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for name, c in found.items():
        numbers = (f"{c.ours:.4f}", f"{c.theirs:.4f}", f"{c.difference:+.4f}", f"{c.standard_error:.4f}")
        table.add_row(name, *numbers, f"{c.below:.1%}")
    return table
