"""The tables of `accuracy_grid.py`, from the run folders that there are, and the floors beside them.

A floor is fitted once a set and fold, and kept in OUT/floors/SET-foldN.json with what it says of every sample, so that
it can be compared sample by sample with runs from another machine: copy that folder.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from accuracy_plans import Plan, Run, Set
from accuracy_pool import FAILURES, finished

from mambaverse.config import compose
from mambaverse.engine.baseline import scores_of
from mambaverse.engine.classifier import Classifier
from mambaverse.engine.compare import paired_bootstrap, read_predictions
from mambaverse.engine.folder import make_task
from mambaverse.errors import UserError

# Test MCC x 100 of DNABERT-2 (117 M parameters, fine-tuned), Zhou et al. 2024 (arXiv 2306.15006), as summary tables of
# later papers print it; of the tasks of mouse it was recalled, not read again.
DNABERT2 = {
    "gue/mouse/0": 56.8, "gue/mouse/2": 79.3, "gue/mouse/3": 66.5, "gue/mouse/4": 52.7,
    "gue/prom/prom_core_all": 69.37, "gue/prom/prom_core_tata": 74.17, "gue/tf/0": 71.99, "gue/tf/1": 76.06,
}  # fmt: skip
MAJORITY, KMERS = "majority", "3- to 6-mers tf-idf, linear SVM"


def fit_floors(sets: Sequence[Set], data: Path, out: Path) -> None:
    """Fit the floors of every fold that are not there yet, on the CPU; needs scikit-learn."""
    for part in sets:
        for fold in range(part.folds):
            if (file := _floor_file(out, part, fold)).is_file():
                continue
            config = compose(part.config, [*part.settings, *part.fold(fold), *part.where(data)])
            task = make_task(config)
            assert isinstance(task, Classifier)
            task.setup()
            truth = task.labels_of(task.reported_set)
            found: dict[str, Any] = {}
            for name, fit in task.baselines().items():
                start = perf_counter()
                said = np.asarray(fit())
                seconds = round(perf_counter() - start, 2)
                scores = scores_of(truth, said, len(task.classes))
                found[name] = {"scores": scores, "seconds": seconds, "predicted": said.tolist()}
                print(f"{file.stem}: {name}: {part.score} {scores[part.score]:.4f}, {seconds:.0f} s", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            part_file = file.with_suffix(".part")
            part_file.write_text(json.dumps({"classes": list(task.classes), "truth": truth.tolist(), "floors": found}))
            part_file.replace(file)


@dataclass(frozen=True)
class Cell:
    """What the finished runs of a set and a mixer reach: the mean over folds, as mean and deviation over seeds."""

    mean: float
    deviation: float | None
    done: int
    total: int
    seconds: float
    parameters: int

    def __str__(self) -> str:
        spread = f" ± {self.deviation:.2f}" if self.deviation is not None else ""
        return f"{self.mean:.2f}{spread}" + (f" ({self.done} of {self.total})" if self.done < self.total else "")


def write_tables(name: str, plan: Plan, runs: Sequence[Run], out: Path) -> None:
    """Print a plan's table as markdown, and write it and its numbers to OUT/NAME.md and .csv."""
    ended = [run for run in runs if finished(out, run)]
    results = {run.name: json.loads((out / run.name / "results.json").read_text()) for run in ended}
    lines = list({"gue": _gue, "cifar10": _images}.get(name, _grid)(plan, runs, results, out))
    failures = json.loads((out / FAILURES).read_text()) if (out / FAILURES).is_file() else {}
    reasons: dict[str, list[str]] = {}
    for run in runs:
        if run.name in failures:
            reasons.setdefault(failures[run.name], []).append(run.name)
    failed = [
        f"- {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in reasons.items()
    ]
    text = "\n".join([_title(name, runs, results, out), "", *lines, *([""] if failed else []), *failed]) + "\n"
    (out / f"{name}.md").write_text(text)
    print(text, end="")
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("data", "config", "score", "mixer", "mean", "deviation", "runs", "of", "seconds a run",
                         "parameters", "floor", "floor's model"))  # fmt: skip
        for part in plan.sets:
            floor = _floor(part, out)
            for mixer in plan.mixers:
                if (cell := _cell(part, mixer, runs, results)) is not None:
                    numbers = (cell.mean, cell.deviation, cell.done, cell.total, cell.seconds, cell.parameters)
                    writer.writerow((part.name, part.config, part.score, mixer, *numbers, *(floor or ("", ""))))


def _title(name: str, runs: Sequence[Run], results: dict[str, Any], out: Path) -> str:
    """Return what a table's numbers are of."""
    if not results:
        return f"{name}: 0 of {len(runs)} runs."
    devices = ", ".join(sorted({f"{one['device']}, torch {one['versions']['torch']}" for one in results.values()}))
    ended = date.fromtimestamp(max((out / run / "results.json").stat().st_mtime for run in results))
    count = f"{len(runs)}" if len(results) == len(runs) else f"{len(results)} of {len(runs)}"
    return f"{name}: {count} runs, {devices}, {ended}. In %, mean ± deviation over seeds of the mean over folds."


def _grid(plan: Plan, runs: Sequence[Run], results: dict[str, Any], out: Path) -> Iterator[str]:
    """Yield the lines of a table with a row a set and a column a mixer."""
    goals = any(part.goal for part in plan.sets)
    mixers = [mixer or "ours" for mixer in plan.mixers]
    yield from _head("data", "folds", "score", "floor", *mixers, *(["goal"] if goals else []))
    for part in plan.sets:
        floor = _floor(part, out)
        cells = [_cell(part, mixer, runs, results) for mixer in plan.mixers]
        if floor is None and not any(cells):
            continue
        beside = "" if floor is None else f"{floor[0]:.2f} ({floor[1]})"
        goal = [f"{part.goal:g}" if part.goal else ""] if goals else []
        yield _row(part.name, part.folds, part.score, beside, *(str(cell or "") for cell in cells), *goal)


def _gue(plan: Plan, runs: Sequence[Run], results: dict[str, Any], out: Path) -> Iterator[str]:
    """Yield the lines of GUE's table, and what they come to."""
    columns = ("k-mer floor", "ours - floor", "standard error", "best floor", "DNABERT-2", "seconds")
    yield from _head("task", "mixer", "MCC", *columns)
    compared = above = above_best = above_published = 0
    below: list[str] = []
    for part in plan.sets:
        best, kmers, published = _floor(part, out), _floor(part, out, KMERS), DNABERT2[part.name]
        for mixer in plan.mixers:
            own = [run for run in runs if (run.set, run.mixer) == (part.name, mixer) and run.name in results]
            if (cell := _cell(part, mixer, runs, results)) is None:
                continue
            compared, above_published = compared + 1, above_published + (cell.mean > published)
            beside = [""] * 4
            if best is not None and kmers is not None:
                difference, error = _compare(own, part, KMERS, out)
                above, above_best = above + (difference > 0), above_best + (cell.mean > best[0])
                below += [f"{part.name} ({mixer})"] * (difference < -error)
                other = "the same" if best[1] == KMERS else f"{best[0]:.2f} ({best[1]})"
                beside = [f"{kmers[0]:.2f}", f"{difference:+.2f}", f"{error:.2f}", other]
            task = part.name.removeprefix("gue/")
            yield _row(task, mixer, cell, *beside, f"{published:.1f}", f"{cell.seconds:.0f}")
    yield ""
    if compared:
        yield (
            f"Of {compared}: above the k-mer floor ({KMERS}) on {above}, more than one paired-bootstrap standard error "
            f"below it on {', '.join(below) or 'none'}; above the best floor, as the test set has it, on {above_best}; "
            f"above DNABERT-2 on {above_published}. MCC x 100 of the test sets; the dev sets chose the weights. "
            "DNABERT-2 (117 M parameters, fine-tuned): Zhou et al. 2024, arXiv 2306.15006, as later papers' tables "
            "print it; of the tasks of mouse as recalled."
        )


def _images(plan: Plan, runs: Sequence[Run], results: dict[str, Any], out: Path) -> Iterator[str]:
    """Yield the lines of a table with a row a model."""
    yield from _head("model", "parameters", "epochs", "accuracy by seed", "mean", "minutes a run")
    for part in plan.sets:
        if (cell := _cell(part, "", runs, results)) is None:
            continue
        own = [results[run.name] for run in runs if run.set == part.name and run.name in results]
        each = ", ".join(f"{100 * one['metrics'][part.score]:.2f}" for one in own)
        size, minutes = f"{cell.parameters / 1e6:.2f} M", f"{cell.seconds / 60:.1f}"
        yield _row(f"`{part.name}`", size, own[0]["epochs"], each, cell, minutes)


def _compare(runs: Sequence[Run], part: Set, floor: str, out: Path) -> tuple[float, float]:
    """Return the difference of the runs' mean score to the floor's, and its paired-bootstrap error, x 100.

    Raises:
        UserError: the floor was not scored on the samples of the runs.
    """
    kept = json.loads(_floor_file(out, part, 0).read_text())
    truth = np.array(kept["truth"])
    ours = []
    for run in runs:
        classes, targets, said = read_predictions(out / run.name)
        if classes != kept["classes"] or not np.array_equal(targets, truth):
            raise UserError(f"{out / run.name}: its targets are not those of {_floor_file(out, part, 0)}")
        ours.append(said)
    theirs = np.array(kept["floors"][floor]["predicted"])
    found = paired_bootstrap(truth, np.stack(ours), theirs, score=part.score)
    return 100 * found.difference, 100 * found.standard_error


def _cell(part: Set, mixer: str, runs: Sequence[Run], results: dict[str, Any]) -> Cell | None:
    own = [run for run in runs if (run.set, run.mixer) == (part.name, mixer)]
    found = [(run, results[run.name]) for run in own if run.name in results]
    if not found:
        return None
    by_seed: dict[int, list[float]] = {}
    for run, result in found:
        by_seed.setdefault(run.seed, []).append(100 * result["metrics"][part.score])
    whole = [statistics.mean(values) for values in by_seed.values() if len(values) == part.folds]
    values = [100 * result["metrics"][part.score] for _, result in found]
    return Cell(
        mean=statistics.mean(values),
        deviation=statistics.stdev(whole) if len(whole) > 1 else None,
        done=len(found),
        total=len(own),
        seconds=statistics.mean(result["seconds"] for _, result in found),
        parameters=found[0][1]["parameters"],
    )


def _floor(part: Set, out: Path, only: str | None = None) -> tuple[float, str] | None:
    """Return the mean over folds of the best floor (or of one) and its name; None: they were not all fitted."""
    files = [_floor_file(out, part, fold) for fold in range(part.folds)]
    if not all(file.is_file() for file in files):
        return None
    kept = [json.loads(file.read_text())["floors"] for file in files]
    names = [only] if only else [name for name in kept[0] if name != MAJORITY]
    return max((statistics.mean(100 * one[name]["scores"][part.score] for one in kept), name) for name in names)


def _floor_file(out: Path, part: Set, fold: int) -> Path:
    return out / "floors" / f"{part.stem}-fold{fold}.json"


def _head(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield "|" + "---|" * len(names)


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
