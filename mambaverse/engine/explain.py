"""Pictures of what a run's model looks at, one an input: its task draws them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from mambaverse.engine.files import saving
from mambaverse.engine.folder import RunFolder, load_run
from mambaverse.engine.inputs import REMEDY, BadInputError, Skips, load_each
from mambaverse.engine.process import launch
from mambaverse.engine.progress import Screen
from mambaverse.engine.task import Task
from mambaverse.errors import UserError

LONGEST = 200  # bytes of a picture's name: a disk has 255, and a number and endings follow


def explain_run(
    path: Path,
    inputs: Sequence[str],
    *,
    out: Path | None = None,
    on_error: str | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Draw what a run's model looks at in each input; prints and returns the paths of the pictures.

    Args:
        path: A run folder; its data set is not needed.
        inputs: Files, or what else the task's `load_inputs` knows.
        out: The folder of the pictures, made if it is not there; None: explain/ in the run folder.
        on_error: "raise" stops at a bad input, "skip" reports it on stderr, goes on, and counts them at the end; None:
            the run's data.on_error.
        console: Where to print; None: stdout.

    Raises:
        UserError: not a run folder; an input that cannot be read; inputs that are all skipped; a domain that draws
            no such picture.
    """
    console = console or Screen()
    config, task, model = load_run(path, data=False)
    if type(task).explain is Task.explain:
        raise UserError(f"explain: the task {config.task.name!r} draws no picture of what its model looks at")
    folder = RunFolder(path).explain if out is None else out
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: a file is there; expected a folder")
    skips, written = Skips(on_error, config), list[Path]()
    with launch(config.trainer) as accelerator:
        model.to(accelerator.device)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        try:
            for name, sample in load_each(task, inputs, skips.on_bad):
                target = folder / picture_name(name, written)
                if target.exists() and target.resolve() in {Path(given).resolve() for given in (*inputs, name)}:
                    raise UserError(f"--out {folder}: the picture of {name} would replace it; choose another folder")
                with saving(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                with torch.random.fork_rng(devices=[]):
                    task.explain(target, model, name, sample)
                written.append(target)
                console.print(str(target), highlight=False, soft_wrap=True, markup=False)
        except BadInputError as error:
            raise UserError(f"{error}; {REMEDY}") from None
    skips.report(len(written))
    return written


def picture_name(name: str, written: Sequence[Path]) -> str:
    """Return the file name of an input's picture, of a length that any disk has.

    "photos/a b.jpg" is a_b.png, or a_b-2.png if that is taken.
    """
    stem = re.sub(r"[^\w.-]+", "_", Path(name).stem).strip(".") or "input"
    stem = stem.encode()[:LONGEST].decode(errors="ignore")
    taken = {path.name for path in written}
    numbered = (f"{stem}{suffix}.png" for suffix in ("", *(f"-{n}" for n in range(2, len(taken) + 3))))
    return next(candidate for candidate in numbered if candidate not in taken)
