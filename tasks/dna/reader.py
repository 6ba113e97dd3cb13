"""A trained run as a function of windows of DNA: windows of one length together, both strands where asked.

    both strands    q(x) = (q(x) + R q(rc(x))) / 2,    q what is asked, R its own way of turning over

`strands` is the word of the data configs. A model that reads both strands by itself (Caduceus-PS) gives the same for
both, so that it is asked once, whatever `strands` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mambaverse.config import RunConfig
from mambaverse.engine.folder import load_run
from mambaverse.engine.process import launch
from mambaverse.engine.task import Task
from mambaverse.ensemble import members_of
from mambaverse.errors import UserError
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.config import STRANDS
from mambaverse.tasks.dna.heads import LANGUAGE

TOKENS = 1 << 17  # bases of one pass, where no batch size is given
Ask = Callable[[Tensor, list[int]], tuple[Tensor, ...]]


class Reader:
    """A DNA model that is asked about windows.

    Args:
        model: A `DnaModel`, or an `Ensemble` of them with one head; it is put into eval mode.
        strands: "one", or "both" to average what is asked over both.
        batch_size: Windows of one pass; None: as many as have `TOKENS` bases, 256 at most.
        autocast: Makes the context that the model runs in.
        shortest: Bases of the shortest sequence that the model was trained on, below which its places mean others.

    Attributes:
        head: Of the model (see heads.py).
        both: Whether windows are to be read twice.
        windows_read: How many windows have gone through the model so far.

    Raises:
        UserError: no DNA model, or no such `strands`.
    """

    def __init__(
        self,
        model: nn.Module,
        strands: str = "one",
        batch_size: int | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        shortest: int = 1,
    ) -> None:
        members = members_of(model)
        if not all(isinstance(member, DnaModel) for member in members):
            raise UserError(f"expected a model of DNA sequences, got {type(members[0]).__name__}")
        if strands not in STRANDS:
            raise UserError(f"strands: expected one or both, got {strands!r}")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch size: expected at least 1, got {batch_size}")
        first = members[0]
        assert isinstance(first, DnaModel)
        self.model, self.first, self.single = model.eval(), first, len(members) == 1
        self.head, self.both = first.head, strands == "both" and not first.both_strands
        self.strands = "both" if first.both_strands else strands
        self.batch_size, self.autocast = batch_size, autocast
        self.shortest = 1 if first.places is None else shortest
        self.device = next(model.parameters()).device
        self.windows_read = 0

    @property
    def speaks(self) -> bool:
        """Whether the model gives probabilities of bases."""
        return self.head in LANGUAGE

    @torch.no_grad()
    def ask(self, windows: Sequence[np.ndarray], what: Ask) -> list[tuple[Tensor, ...]]:
        """Return what `what` says of each window, on the CPU.

        Args:
            windows: Ids (L,) of any lengths, at least 1.
            what: Gets ids (B, L) int64 on the model's device, and which of `windows` they are; returns some tensors
                (B, ...).
        """
        answers: list[tuple[Tensor, ...]] = [()] * len(windows)
        by_length: dict[int, list[int]] = {}
        for number, window in enumerate(windows):
            by_length.setdefault(len(window), []).append(number)
        for length, numbers in by_length.items():
            step = self.rows(length)
            for i in range(0, len(numbers), step):
                rows = numbers[i : i + step]
                ids = torch.from_numpy(np.stack([windows[row] for row in rows])).to(self.device).long()
                with self.autocast():
                    parts = [part.cpu() for part in what(ids, rows)]
                self.windows_read += len(rows)
                for at, row in enumerate(rows):
                    answers[row] = tuple(part[at] for part in parts)
        return answers

    def rows(self, length: int) -> int:
        """Return how many windows of `length` bases go through the model at a time."""
        return self.batch_size or max(1, min(256, TOKENS // max(length, 1)))

    def log_probs(self, ids: Tensor) -> Tensor:
        """Return log p (B, L, 16), float32, of what the head of a language model predicts at each place."""
        return self.model(ids).float().log_softmax(-1)

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the tokens (B, M, D or 2 D) after the last norm.

        Raises:
            UserError: an ensemble, which has no tokens of its own.
        """
        if not self.single:
            raise UserError("an ensemble has no embedding of its own: each member has another; train with members=1")
        return self.first.forward_features(ids).float()

    def check_length(self, length: int, what: str) -> None:
        """Raise UserError if the model has no places for windows of `length` bases; `what` names the option."""
        for member in members_of(self.model):
            assert isinstance(member, DnaModel)
            if member.places is not None and member.max_length and length > member.max_length:
                raise UserError(
                    f"{what}: {length:,} bases; the model has places for {member.max_length:,} only "
                    f"(position, wide or pool='place'): give {member.max_length} or fewer"
                )

    def check_window(self, length: int, what: str) -> None:
        """Raise UserError if the model has no places for a window of `length` bases, or has others for its bases."""
        self.check_length(length, what)
        if length < self.shortest:
            most = self.first.max_length or self.shortest
            expected = f"{self.shortest:,}" + (f" to {most:,}" if most > self.shortest else "")
            raise UserError(f"{what}: {length:,} bases; places count in this model: expected {expected}")


def check_range(option: str, value: int | None, least: int) -> None:
    """Raise UserError if a number of the command line is below `least`."""
    if value is not None and value < least:
        raise UserError(f"{option}: expected at least {least}, got {value}")


@contextmanager
def open_reader(
    path: Path,
    *,
    strands: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> Iterator[tuple[RunConfig, Task, Reader]]:
    """Yield (config, task, reader) of a trained run, on its device and in its precision; its data are not needed.

    Args:
        path: A run folder.
        strands: "one" or "both"; None: the run's data.strands, "one" where it has none.
        batch_size: Windows of one pass; None: see `Reader`.
        device: auto, cpu or cuda; None: as the run says.
        precision: fp32, bf16 or fp16; None: as the run says.

    Raises:
        UserError: not a run folder, half written, no run of a DNA model, several processes.
        CheckpointError: damaged weights.
    """
    given = {"trainer.device": device, "trainer.precision": precision}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    config, task, model = load_run(path, overrides, data=False)
    if not all(isinstance(member, DnaModel) for member in members_of(model)):
        raise UserError(f"{path}: a run of the task {config.task.name!r}; expected one of a DNA model")
    with launch(config.trainer) as accelerator:
        if accelerator.num_processes > 1:
            raise UserError("this command runs in one process; cut its input in pieces to use several GPUs")
        chosen = strands or str(getattr(config.data, "strands", "one"))
        shortest = getattr(task, "shortest", 1)
        yield config, task, Reader(model.to(accelerator.device), chosen, batch_size, accelerator.autocast, shortest)
