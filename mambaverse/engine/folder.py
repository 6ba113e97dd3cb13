"""The run folder: what a training run leaves behind, and all that is needed to go on with it or to use it.

- config.yaml: the resolved config; feeds back into `mambaverse train`
- facts.json: what the data told the model: its classes, ...
- metrics.jsonl: one JSON object a line: {"kind": "train", "step": ...} or {"kind": "eval", "epoch": ...}
- best.safetensors: weights of the best epoch, by the monitored metric (their average, with `trainer.ema_decay`)
- last.safetensors: likewise of the last epoch
- results.json: the final table
- predictions.csv: what a classifier says of each sample of the reported set, in its order
- curves.png, confusion.png, per_class.csv, and the task's own pictures and split file
- explain/: pictures of what the model looks at, once `mambaverse explain` was asked for some
- state/: the full training state (state.py)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mambaverse.config import RunConfig, compose, import_plugins, to_yaml
from mambaverse.engine.checkpoint import load_weights
from mambaverse.engine.files import PART, locked, saving, write_atomic
from mambaverse.engine.state import StateFolder
from mambaverse.engine.task import TASKS, FactError, Task, fact
from mambaverse.errors import UserError, suggest, warn
from mambaverse.splits import read_split

T = TypeVar("T")
SPLIT = "split.csv"
OF_TASKS = ("predictions.png", "saliency.png", SPLIT, "split.bed", "sets.csv")  # what tasks leave in the folder


class RunFolder:
    """The paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.facts = path / "facts.json"
        self.metrics = path / "metrics.jsonl"
        self.best = path / "best.safetensors"
        self.last = path / "last.safetensors"
        self.results = path / "results.json"
        self.curves = path / "curves.png"
        self.confusion = path / "confusion.png"
        self.per_class = path / "per_class.csv"
        self.predictions = path / "predictions.csv"
        self.tensorboard = path / "tensorboard"
        self.explain = path / "explain"
        self.state = StateFolder(path / "state")
        self.lock = path / ".lock"  # whose holder trains here (see `claimed`)
        self._cut_off = path / (self.config.name + PART)

    def weights(self, config: RunConfig) -> Path:
        """Return the weights that the run reports and that are used afterwards, as `trainer.select` says."""
        return self.best if config.trainer.select == "best" else self.last

    @classmethod
    def new(cls, config: RunConfig, name: str) -> RunFolder:
        """Choose the folder of a new run: trainer.output_dir/trainer.run_name, or named after the config and the time.

        Raises:
            UserError: a folder of that name exists, unless it is a run and `trainer.overwrite` is set.
        """
        parent = Path(config.trainer.output_dir).expanduser()
        if config.trainer.run_name is None:
            stem = Path(name).with_suffix("").as_posix().strip("./").replace("/", "-")
            stem = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
            names = (stem + suffix for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
            with saving(parent):
                parent.mkdir(parents=True, exist_ok=True)
                return cls(next(parent / n for n in names if _made(parent / n)))
        if ".." in Path(config.trainer.run_name).parts or Path(config.trainer.run_name).is_absolute():
            raise UserError(
                f"trainer.run_name={config.trainer.run_name}: leads out of trainer.output_dir={parent}; expected a "
                "name in it"
            )
        if not Path(config.trainer.run_name).parts:
            raise UserError(f"trainer.run_name={config.trainer.run_name!r}: expected a name, or null for one by time")
        run = cls(parent / config.trainer.run_name)
        if not run.path.exists() or (run.path.is_dir() and run._is_empty()):
            return run
        if not run.config.is_file():
            raise UserError(f"{run.path} exists and is not a run; choose another trainer.run_name")
        if not config.trainer.overwrite:
            raise UserError(
                f"{run.path} is already a run; choose another trainer.run_name, replace it with "
                f"trainer.overwrite=true, or go on with it: {resume_command(run.path)}"
            )
        return run

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from training here at the same time; a folder in which nothing was begun goes again.

        The system gives the claim back however this process ends, and a data loader's worker does not inherit it.

        Raises:
            UserError: another process trains here.
        """
        with saving(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.lock.open("ab")
        with file:
            if not locked(file):
                raise UserError(
                    f"{self.path}: another process trains in it; wait for its end, or choose another trainer.run_name"
                )
            try:
                yield
            finally:
                self.lock.unlink(missing_ok=True)
                if self._is_empty():
                    self._cut_off.unlink(missing_ok=True)
                    self.path.rmdir()

    def _is_empty(self) -> bool:
        """Return whether nothing was begun here: a claim at most, and a config that a kill cut off."""
        return all(path in (self.lock, self._cut_off) for path in self.path.iterdir())

    def begin(self, config: RunConfig, task: Task) -> None:
        """Make the folder, clear what a run before it left, and write what this one starts from.

        A folder with a config is a run that can be resumed; if it is cut off here, that begins it once more.

        Raises:
            SaveError: something cannot be written.
        """
        with saving(self.path):
            for folder in (self.state.folder, self.tensorboard, self.explain):
                shutil.rmtree(folder, ignore_errors=True)
            pictures = (self.curves, self.confusion, *(self.path / name for name in OF_TASKS))
            for file in (self.metrics, self.best, self.last, self.results, self.per_class, self.predictions, *pictures):
                file.unlink(missing_ok=True)
            self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.config, to_yaml(config))
        write_atomic(self.facts, json.dumps(task.facts(), indent=1))
        with saving(self.path):
            task.save_split(self.path)

    def check_split(self, task: Task, scratch: Path, so: str = "") -> None:
        """Raise UserError unless the data are split as they were when the run began.

        Args:
            task: With its data sets.
            scratch: An empty folder.
            so: What follows if they are not, and what to do.
        """
        now = task.save_split(scratch)
        if now is None:
            return
        then = self.path / now.relative_to(scratch)
        if so and not then.is_file():
            warn(f"{then} is not there: it cannot be told whether the data are split as they were")
        elif not then.is_file() or _used(then) != _used(now):
            what = f"{then}: the data, or their split, are not those that this run began with"
            raise UserError(f"{what}: {so}" if so else what)

    def count_learnt(self, task: Task, scratch: Path) -> int:
        """Return how many samples of the set that `task` reports are in the training set of the run's split file.

        They are told by their contents, whatever they are called there: rows of a table have but a number.

        Args:
            task: With its data sets.
            scratch: An empty folder.
        """
        now = task.save_split(scratch)
        if now is None or not (then := self.path / now.relative_to(scratch)).is_file():
            return 0
        if now.name != SPLIT:
            return task.count_learnt(then)
        learnt = {sample for part, sample in _samples(then) if part == "train"}
        reported = "eval" if task.test_set is None else "test"
        return sum(part == reported and sample in learnt for part, sample in _samples(now))


def _samples(split: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Return the set of each line of a split.csv, and what tells its sample: a hash, without one name and size.

    Of a file that a task writes in its own way there are none.
    """
    rows = read_split(split)
    if not rows or not {"set", "name", "bytes", "sha256"} <= rows[0].keys():
        return []
    return [(row["set"], (row["sha256"],) if row["sha256"] else (row["name"], row["bytes"])) for row in rows]


def _used(split: Path) -> list[bytes]:
    """Return the lines of a split file but those of what was skipped, which say why in words that may change."""
    return [line for line in split.read_bytes().splitlines() if not line.startswith(b"skipped,")]


def _made(path: Path) -> bool:
    """Make a folder; False if it is there already."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def resume_command(path: Path) -> str:
    """Return what to type to go on with a run."""
    return f"mambaverse train --resume {path}"


def open_run(path: Path) -> RunFolder:
    """Return the run folder at `path`.

    Raises:
        UserError: there is none.
    """
    run = RunFolder(path)
    if not path.is_dir():
        runs = {str(file.parent) for place in (path.parent, Path("runs")) for file in place.glob("*/config.yaml")}
        raise UserError(f"no run folder {str(path)!r}" + (suggest(str(path), runs) if runs else ""))
    if not run.config.is_file():
        raise UserError(f"{path} is not a run folder, or its run never began: it has no config.yaml")
    return run


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config of the run at `path`, with `key=value` changes."""
    return compose(str(open_run(path).config), overrides)


def read_facts(run: RunFolder) -> dict[str, Any]:
    """Return what `Task.facts` returned when the run began."""
    try:
        facts = json.loads(run.facts.read_text(), parse_constant=_no_number)
        if not isinstance(facts, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{run.facts}: half written or missing ({error}); the run cannot be used") from None
    return facts


def _no_number(name: str) -> float:
    raise ValueError(f"{name} where a number is expected")


def load_run(path: Path, overrides: Sequence[str] = (), *, data: bool = True) -> tuple[RunConfig, Task, nn.Module]:
    """Return (config, task, model) of a trained run, the model on the CPU with the run's weights, in eval mode.

    Args:
        path: A run folder.
        overrides: `key=value` changes to its config: data.root=...
        data: Open the data sets too; without them the model can only label inputs.

    Raises:
        UserError: not a run folder, or half written.
        CheckpointError: the weights are damaged, or those of another model.
    """
    run = open_run(path)
    config = read_config(path, overrides)
    if not (weights := run.weights(config)).is_file():
        why = "it was stopped before its first evaluation; go on with it"
        if run.last.is_file():
            why = "put it back, or take the last weights, trainer.select=last; a run that was stopped goes on with"
        raise UserError(f"{path} has no {weights.name}: {why}: {resume_command(path)}")
    task = make_task(config)
    facts = read_facts(run)
    if data:
        task.setup()
        trained = _of_file(run, lambda: fact({"classes": task.classes, **facts}, "classes", list[str]))
        if list(task.classes) != list(trained):
            raise UserError(
                f"{path}: the data have classes {_short(task.classes)}; "
                f"the run was trained on {_short(trained)}{_difference(task.classes, trained)}"
            )
    else:
        _of_file(run, lambda: task.restore(facts))
    with torch.random.fork_rng(devices=[]):
        model = task.build_model()
    load_weights(model, weights)
    return config, task, model.eval()


def _of_file(run: RunFolder, read: Callable[[], T]) -> T:
    """Return what `read` returns of the run's facts; errors name their file."""
    try:
        return read()
    except KeyError as error:
        raise UserError(f"{run.facts}: lacks {error}; the run cannot be used without its data") from None
    except FactError as error:
        raise UserError(f"{run.facts}: {error}; the run cannot be used") from None


def make_task(config: RunConfig) -> Task:
    """Return the task that `config` names, its data not opened yet."""
    import_plugins(config.plugins)
    return TASKS.get(config.task.name)(config)


def _difference(found: Sequence[str], trained: Sequence[str]) -> str:
    """Say which class is the first that does not fit, and what to do."""
    new, gone = ([name for name in one if name not in other] for one, other in ((found, trained), (trained, found)))
    parts = [f"{new[0]!r} is none of the run's"] if new else []
    parts += [f"the run's {gone[0]!r} is not in the data"] if gone else []
    return f": {' and '.join(parts) or 'in another order'}; data.root= must name data with the run's classes"


def _short(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
