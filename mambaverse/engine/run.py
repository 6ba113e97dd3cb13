"""One run from its config to its run folder: `train`, and `resume` for one that was stopped.

The head is printed before anything is written; the end is a table, curves.png and confusion.png.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf
from rich.console import Console

from mambaverse._version import __version__
from mambaverse.config import RunConfig
from mambaverse.engine import plots, report
from mambaverse.engine.baseline import check_baselines, print_baselines
from mambaverse.engine.build import set_checkpointing
from mambaverse.engine.checkpoint import CheckpointError, load_weights
from mambaverse.engine.classifier import Classifier
from mambaverse.engine.compare import predictions_csv
from mambaverse.engine.data import MODEL, PROCESS, derive_seed
from mambaverse.engine.evaluate import reported_name, score_set
from mambaverse.engine.files import SaveError, write_atomic
from mambaverse.engine.folder import RunFolder, make_task, open_run, read_config, resume_command
from mambaverse.engine.logs import MetricsLog, Row, read_metrics, require_tensorboard
from mambaverse.engine.process import launch
from mambaverse.engine.progress import Screen
from mambaverse.engine.state import seed_generators
from mambaverse.engine.task import run_schema
from mambaverse.engine.trainer import Trainer
from mambaverse.engine.watch import NotFiniteError
from mambaverse.ensemble import members_of
from mambaverse.errors import UserError

# Keys of a config that a resumed run may change: its numbers do not depend on them.
FREE = {
    "data.root",
    "data.download",
    "data.num_workers",
    "trainer.num_threads",
    "trainer.tensorboard",
    "trainer.pictures",
    "trainer.save_minutes",
    "trainer.output_dir",
    "trainer.run_name",
    "trainer.overwrite",
}


@dataclass
class Result:
    """What came of a run.

    Attributes:
        folder: The run folder.
        best: The best value of the monitored metric.
        metrics: Those of the run's weights, evaluated once more at the end; empty if the run was stopped.
        history: The rows of metrics.jsonl.
        signal: The signal that stopped the run, or None if it came to its end.
    """

    folder: Path
    best: float | None
    metrics: dict[str, float]
    history: list[Row]
    signal: int | None = None


def train(
    config: RunConfig, *, name: str = "run", resume: Path | None = None, console: Console | None = None
) -> Result:
    """Train what `config` describes, in a run folder of its own.

    Args:
        config: The run.
        name: The config's name, after which the folder is named if `trainer.run_name` is not set.
        resume: The folder of a run that was stopped; it goes on from its last saved state.
        console: Where to print; None: stdout.

    Raises:
        UserError: whatever the config, the data, a full disk or a diverging loss is to blame for.
    """
    console = console or Screen(lasting=True)
    seed = config.trainer.seed
    if config.trainer.tensorboard:
        require_tensorboard()
    with launch(config.trainer) as accelerator, ExitStack() as claims:
        if not accelerator.is_main_process:
            console = Console(quiet=True)
        task = make_task(config)
        if config.trainer.baseline:
            check_baselines(task)
        with accelerator.local_main_process_first():
            task.setup()
        seed_generators(derive_seed(seed, MODEL))
        model = task.build_model()
        set_checkpointing(model, config)
        folder = _claim_folder(config, name, resume, accelerator, claims)
        state = None if resume is None else _load_state(folder, config)
        if state is None and config.model.checkpoint is not None:
            for member in members_of(model):
                task.load_checkpoint(member, Path(config.model.checkpoint).expanduser())
        if state is not None:
            with tempfile.TemporaryDirectory() as scratch:
                folder.check_split(task, Path(scratch))
        trainer = Trainer(config, task, model, folder, accelerator)
        if accelerator.is_main_process:
            head = report.head(config, task, trainer)
            console.print(report.head_table({**head, "run folder": str(folder.path)}))
        seed_generators(derive_seed(seed, PROCESS, accelerator.process_index))
        if state is not None:
            _take_over(trainer, state)
        elif accelerator.is_main_process:
            folder.begin(config, task)
        accelerator.wait_for_everyone()
        with _told_to_make_room(folder):
            return _run(trainer, console)


def resume(folder: Path, console: Console | None = None) -> Result:
    """Go on with the run in `folder`, by its own config, from its last saved state (or its beginning)."""
    return train(read_config(folder), resume=folder, console=console)


def _run(trainer: Trainer, console: Console) -> Result:
    """Train, and write what the end of a run leaves."""
    folder, position = trainer.folder, trainer.position
    log = None
    try:
        if trainer.is_main:
            board = folder.tensorboard if trainer.config.trainer.tensorboard else None
            log = MetricsLog(folder.metrics, keep=position.log_bytes, step=position.updates, tensorboard=board)
        signal = trainer.fit(log, console)
    except SaveError:
        raise
    except NotFiniteError:
        _draw_curves(trainer)
        raise
    except UserError as error:  # a bad sample: what was saved before it is kept
        again = f"if it was whole when the run began, restore it and go on: {resume_command(folder.path)}"
        raise UserError(f"{error}; {again}") from error
    finally:
        if log is not None:
            log.close()
    _draw_curves(trainer)
    metrics: dict[str, float] = {}
    if signal is None:
        metrics = _conclude(trainer, console)
    elif trainer.is_main:
        at = f"epoch {position.epoch + 1}, step {position.updates}"
        console.print(f"Stopped at {at}. To go on: {resume_command(folder.path)}", highlight=False, soft_wrap=True)
    history = read_metrics(folder.metrics)
    return Result(folder.path, position.best, metrics, history, signal)


@contextmanager
def _told_to_make_room(folder: RunFolder) -> Iterator[None]:
    """Let a SaveError of the body say how to go on."""
    try:
        yield
    except SaveError as error:
        raise SaveError(
            f"{error}; make room, then go on from the last saved state: {resume_command(folder.path)}"
        ) from error


def _conclude(trainer: Trainer, console: Console) -> dict[str, float]:
    """Evaluate the run's weights once more, from their file, and write and print what they give."""
    folder, task, position = trainer.folder, trainer.task, trainer.position
    config = trainer.config
    load_weights(trainer.weights, folder.weights(config))
    scores = score_set(task, trainer.weights, trainer.accelerator, collect=True)
    if trainer.is_main:
        results: dict[str, Any] = {
            "metrics": {name: value if math.isfinite(value) else None for name, value in scores.metrics.items()},
            "set": reported_name(task),
            "weights": config.trainer.select,
            "monitor": trainer.monitor.name,
            "best_epoch": position.best_epoch,
            "epochs": position.epoch,
            "steps": position.updates,
            "seconds": round(position.seconds, 1),
            "parameters": report.count_parameters(trainer.weights),
            "device": report.device_name(trainer.device),
            "skipped": task.skipped,
            "caveat": task.caveat(),
            "processes": trainer.accelerator.num_processes,
            "versions": {"mambaverse": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        write_atomic(folder.results, json.dumps(results, indent=1))
        pictures = config.trainer.pictures
        files = [folder.curves] if pictures else []
        counts = plots.count_confusion(scores.outputs, scores.targets, len(task.classes))
        if counts is not None:
            write_atomic(folder.per_class, report.per_class_csv(counts, task.classes))
            files.append(folder.per_class)
            if pictures:
                plots.draw_confusion(folder.confusion, counts, task.classes)
                files.append(folder.confusion)
        if isinstance(task, Classifier) and scores.targets.ndim == 1:
            said = task.probabilities(scores.outputs)
            write_atomic(folder.predictions, predictions_csv(said, scores.targets, task.classes))
            files.append(folder.predictions)
        if pictures:
            files += task.figures(folder.path, trainer.weights.eval(), scores.outputs, scores.targets)
        if position.epoch < config.trainer.epochs:
            stalled = f"no better {trainer.monitor.name} in {position.epoch - position.best_epoch} epochs"
            console.print(f"Stopped early: {stalled}.", highlight=False)
        epoch = position.best_epoch if config.trainer.select == "best" else position.epoch
        console.print(
            f"{config.trainer.select.capitalize()} weights, of epoch {epoch}, {reported_name(task)}:", highlight=False
        )
        console.print(report.results_table(results))
        if counts is not None and len(task.classes) <= report.MAX_CLASSES:
            console.print(report.per_class_table(counts, task.classes))
        if note := report.skipped_note(task):
            console.print(note, highlight=False)
        if caveat := task.caveat():
            console.print(caveat, highlight=False, soft_wrap=True)
        if config.trainer.baseline:
            results["baselines"] = print_baselines(task, console, scores.metrics)
            write_atomic(folder.results, json.dumps(results, indent=1))
        console.print(f"{folder.path}: {', '.join(p.name for p in files)}", highlight=False, soft_wrap=True)
    trainer.accelerator.wait_for_everyone()
    return scores.metrics


def _draw_curves(trainer: Trainer) -> None:
    if trainer.is_main and trainer.config.trainer.pictures:
        rows = read_metrics(trainer.folder.metrics)
        plots.draw_curves(
            trainer.folder.curves, rows, trainer.monitor.name, more_is_better=trainer.monitor.more_is_better
        )


def _claim_folder(
    config: RunConfig, name: str, resume: Path | None, accelerator: Accelerator, claims: ExitStack
) -> RunFolder:
    """Return the folder to train in, the same on every process, and keep others out until `claims` end."""
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            folder = RunFolder.new(config, name) if resume is None else open_run(resume)
            claims.enter_context(folder.claimed())
            if resume is None and config.trainer.run_name is not None:
                RunFolder.new(config, name)  # another process may have begun and ended one meanwhile
            answer = [folder.path]
        except UserError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return RunFolder(answer[0])


def _load_state(folder: RunFolder, config: RunConfig) -> dict[str, Any] | None:
    """Return the last saved state of a run that goes on, if its config is the one it began with; None: nothing yet."""
    state = folder.state.load()
    begun: Any = OmegaConf.structured(read_config(folder.path))
    if state is not None and "config" in state:  # what it was trained by, whatever became of the file
        saved = OmegaConf.create(state["config"])
        begun = OmegaConf.merge(OmegaConf.structured(run_schema(saved.task.name)), saved)
    old, new = (OmegaConf.to_container(c) for c in (begun, OmegaConf.structured(config)))
    changed = [key for key in _differences(old, new) if key not in FREE]
    if changed:
        raise UserError(
            f"{folder.path}: a resumed run keeps its config, but {', '.join(changed)} changed; put it back, or, for a "
            f"new run that starts from its weights: model.checkpoint={folder.last}"
        )
    return state


def _take_over(trainer: Trainer, state: dict[str, Any]) -> None:
    """Let `trainer` go on from `state`.

    Raises:
        CheckpointError: it lacks something, or holds what does not fit.
    """
    try:
        trainer.load_state(state)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"{trainer.folder.state.folder}: damaged, or of another version ({said}); for a new run that starts "
            f"from its weights: model.checkpoint={trainer.folder.last}"
        ) from error


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys in which two nested dictionaries differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield prefix
        return
    for key in {**old, **new}:
        yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
