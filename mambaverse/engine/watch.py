"""What a trainer watches: the numbers of its updates, which must stay finite, and the metric that chooses the best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from mambaverse.config import RunConfig
from mambaverse.engine.state import Averages
from mambaverse.engine.task import Task
from mambaverse.errors import UserError, suggest


class NotFiniteError(UserError):
    """The loss, the gradient or a weight is infinite or not a number.

    Attributes:
        what: What is, as "the loss is nan".
        update: The number of the optimizer step, from 1, and
        lr: its learning rate.
    """

    def __init__(self, what: str, update: int, lr: float, advice: str = "") -> None:
        super().__init__(f"{what} at step {update} (lr {lr:.3g}){advice}")
        self.what, self.update, self.lr = what, update, lr


class Meter:
    """Keeps what each update logged on its device, until it is worth waiting for: reading a number stops a GPU."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._pending: list[tuple[dict[str, Tensor], int, float, int]] = []
        self.loss: float | None = None  # the last one that was read

    def add(self, logged: dict[str, Tensor], update: int, lr: float, num_batches: int) -> None:
        """Note the scalars of one update, means over its batches."""
        self._pending.append((logged, update, lr, num_batches))

    def read(self, *into: Averages) -> None:
        """Add what was noted, mean over processes, to the averages.

        Raises:
            NotFiniteError: a loss or a gradient's norm; on every process alike.
        """
        if not self._pending:
            return
        names = list(self._pending[0][0])
        table = torch.stack([torch.stack([row[name].float() for name in names]) for row, *_ in self._pending])
        table = self._accelerator.reduce(table, "mean")
        for values, (_, update, lr, num_batches) in zip(table.tolist(), self._pending, strict=True):
            logged = dict(zip(names, values, strict=True))
            for name in ("loss", "grad_norm"):
                # With fp16 an infinite gradient is how the scaler finds its scale: that step is skipped.
                scaled = name == "grad_norm" and self._accelerator.scaler is not None
                if not scaled and not math.isfinite(logged.get(name, 0.0)):
                    raise NotFiniteError(f"the {name.replace('_', ' ')} is {logged[name]}", update, lr)
            for averages in into:
                averages.add(logged, num_batches)
            self.loss = logged["loss"]
        self._pending = []


@dataclass(frozen=True)
class Monitor:
    """The metric that chooses the best weights."""

    name: str
    more_is_better: bool

    def better(self, value: float, best: float | None) -> bool:
        """Whether `value` beats `best`; one that is not finite beats nothing but None."""
        return best is None or self._merit(value) > self._merit(best)

    def _merit(self, value: float) -> float:
        if not math.isfinite(value):
            return -math.inf
        return value if self.more_is_better else -value


def choose_monitor(config: RunConfig, task: Task) -> Monitor:
    """Return the metric that `trainer.monitor` names, or the task's own.

    Raises:
        UserError: there is no such metric.
    """
    name = config.trainer.monitor or task.monitor
    metrics = task.metrics()
    if name == "loss":
        return Monitor(name, False)
    if name not in metrics:
        raise UserError(f"trainer.monitor: there is no metric {name!r}{suggest(name, ['loss', *metrics])}")
    if name == task.monitor:
        return Monitor(name, task.monitor_mode == "max")
    return Monitor(name, metrics[name].higher_is_better is not False)
