"""The training loop: updates, evaluations, what is written when, and how a run goes on from where it was stopped.

An epoch is: for each group of `accumulate` batches, loss -> gradients -> clip -> optimizer -> schedule -> average;
then, after every `eval_interval` epochs and after the last one, evaluate (the average, if there is one) ->
best.safetensors, last.safetensors -> state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, nullcontext
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import nn

from mambaverse.config import RunConfig, to_yaml
from mambaverse.engine.data import Job, Loader, TrainPlan
from mambaverse.engine.evaluate import score
from mambaverse.engine.files import write_weights
from mambaverse.engine.folder import RunFolder
from mambaverse.engine.graphed import GraphedStep, keep_gradients
from mambaverse.engine.logs import MetricsLog
from mambaverse.engine.optim import Schedule, create_optimizer
from mambaverse.engine.process import StopRequest, shard_of
from mambaverse.engine.progress import Display
from mambaverse.engine.state import Position, get_generators, set_generators
from mambaverse.engine.task import Batch, Task
from mambaverse.engine.watch import Meter, NotFiniteError, choose_monitor
from mambaverse.errors import UserError

GRAPHS = ("reduce-overhead", "max-autotune")  # what torch.compile calls its modes with CUDA graphs


class Trainer:
    """Owns what a run consists of, and trains it.

    Args:
        config: The run.
        task: Set up.
        model: On any device; moved.
        folder: Where everything is written.
        accelerator: This process and its device.

    Raises:
        UserError: an optimizer, schedule or monitored metric that does not exist; too few samples, or none to evaluate.
    """

    def __init__(
        self, config: RunConfig, task: Task, model: nn.Module, folder: RunFolder, accelerator: Accelerator
    ) -> None:
        trainer, data = config.trainer, config.data
        self.config, self.task, self.folder, self.accelerator = config, task, folder, accelerator
        self.device, self.is_main = accelerator.device, accelerator.is_main_process
        self.alone = accelerator.num_processes == 1
        self.monitor = choose_monitor(config, task)
        if not len(task.eval_set):
            raise UserError("the evaluation set has no samples")
        self.plan = TrainPlan(len(task.train_set), data.batch_size, trainer.seed, shard_of(accelerator))
        self.epoch_updates = math.ceil(self.plan.num_batches / trainer.accumulate)
        self.weights = model.to(self.device)  # the model itself, whatever it is wrapped in for training
        self.average = None
        if trainer.ema_decay is not None:  # with warm-up: the average of a short run is not its initial weights
            self.average = ModelEmaV3(self.weights, decay=trainer.ema_decay, use_warmup=True)
        self.graphs = trainer.compile in GRAPHS and self.device.type == "cuda"
        capturable = self.graphs and accelerator.scaler is None  # which decides on the CPU whether to take a step
        optimizer = create_optimizer(self.weights, config.optim, capturable=capturable)
        self.schedule = Schedule(optimizer, config.optim, trainer.epochs, self.epoch_updates)
        self.model, self.optimizer = accelerator.prepare(self.weights, optimizer)
        captured = capturable and optimizer.defaults.get("capturable")
        self._take_step = GraphedStep(optimizer) if captured else None
        self.parameters = [p for p in self.weights.parameters() if p.requires_grad]
        self.position = Position()
        self.meter = Meter(accelerator)
        self._log: MetricsLog | None = None
        self._stop = StopRequest()
        self._signal: int | None = None  # the one that all processes stop for
        self._saved: int | None = None  # updates at the last saved state, and
        self._saved_at = self._clock = perf_counter()  # when that was
        self._lr = config.optim.lr

    def state(self) -> dict[str, Any]:
        """Return everything that must survive, as tensors and plain values."""
        scaler = self.accelerator.scaler
        return {
            "config": to_yaml(self.config),
            "position": self.position.to_dict(),
            "model": self.weights.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "generators": gather_object([get_generators(self.device)]),
            "num_batches": self.plan.num_batches,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            UserError: it was another number of processes, or another amount of data.
        """
        generators = state["generators"]
        if len(generators) != self.accelerator.num_processes:
            raise UserError(
                f"{self.folder.path}: trained by {len(generators)} processes, not by "
                f"{self.accelerator.num_processes}; resume it with as many"
            )
        if state["num_batches"] != self.plan.num_batches:
            raise UserError(
                f"{self.folder.path}: trained on {state['num_batches']} batches an epoch; "
                f"the data now make {self.plan.num_batches}"
            )
        self.position = Position.from_dict(state["position"])
        self.weights.load_state_dict(state["model"])
        for group in state["optimizer"]["param_groups"]:
            if "capturable" in group:  # whether there are CUDA graphs follows from where it is resumed
                group["capturable"] = bool(self.optimizer.defaults.get("capturable"))
        self.optimizer.load_state_dict(state["optimizer"])  # and the learning rate: the schedule keeps nothing
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        set_generators(generators[self.accelerator.process_index], self.device)
        self._saved = self.position.updates

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or `patience` of them brought nothing better."""
        return self._finished_after(self.position.epoch)

    def _finished_after(self, epoch: int) -> bool:
        trainer = self.config.trainer
        stalled = trainer.patience is not None and epoch - self.position.best_epoch >= trainer.patience
        return epoch >= trainer.epochs or stalled

    def fit(self, log: MetricsLog | None, console: Console) -> int | None:
        """Train until finished, or until a signal asks to stop, whose number is returned.

        Raises:
            NotFiniteError: training diverged; the last saved state is good.
            SaveError: something could not be written; likewise.
        """
        self._log = log
        epochs = self.config.trainer.epochs
        total, done = epochs * self.epoch_updates, self.position.updates
        display = Display(console, epochs=epochs, total=total, done=done, metric=self.monitor.name)
        how = (self.task.collate, self.plan.seed, self.device, self.config.data.num_workers)
        self._saved_at = self._clock = perf_counter()
        try:
            with (
                self._stop,
                display,
                closing(Loader(self.task.train_set, *how)) as batches,
                closing(Loader(self.task.eval_set, *how)) as held_out,
            ):
                while not self.finished:
                    if self._train_epoch(batches, display) or self._end_epoch(held_out, display):
                        return self._signal
            return None
        except NotFiniteError as error:
            raise self._explain(error) from None

    def _train_epoch(self, loader: Loader, display: Display) -> bool:
        """Learn from the batches of this epoch that are left; return whether to stop."""
        position, trainer = self.position, self.config.trainer
        self.model.train()
        batches = loader.run(self.plan.jobs(position.epoch, position.batch))
        began, samples, rate = perf_counter(), 0, None
        while position.batch < self.plan.num_batches:
            size = min(trainer.accumulate, self.plan.num_batches - position.batch)
            self._update(batches, size)
            samples += size * self.plan.batch_size * self.accelerator.num_processes
            at_line = position.updates % trainer.log_every == 0
            if at_line or (self.alone and self.device.type == "cpu"):  # reading a loss waits for a GPU
                self._read()
            if at_line:
                rate = samples / (perf_counter() - began)
                began, samples = perf_counter(), 0
                row = {"kind": "train", "step": position.updates, "epoch": self._fraction(), "lr": self._lr}
                self._write({**row, **position.interval.take(), "samples_per_s": rate})
            display.step(position.updates, position.epoch + 1, self.meter.loss, rate)
            if self._interrupted(at_line):
                return True
        self._read()
        return False

    def _update(self, batches: Iterator[tuple[Job, Batch]], size: int) -> None:
        """Take one optimizer step on `size` batches."""
        position, accelerator = self.position, self.accelerator
        rows, kept = [], set[torch.Tensor]()
        for micro in range(size):
            batch = next(batches)[1]
            with nullcontext() if micro == size - 1 else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    result = self.task.step(self.model, batch)
                accelerator.backward(result["loss"] / size)
            if self.graphs and micro < size - 1:
                keep_gradients(self.parameters, kept)
            rows.append({name: value.detach() for name, value in result.items() if name != "output"})
        logged = {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]} if size > 1 else rows[0]
        if self.config.trainer.clip_grad is not None:
            logged["grad_norm"] = accelerator.clip_grad_norm_(self.parameters, self.config.trainer.clip_grad)
        (self._take_step or self.optimizer.step)()
        self.optimizer.zero_grad()
        position.batch += size
        position.updates += 1
        self._lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.meter.add(logged, position.updates, self._lr, size)
        self.schedule.step(position.updates)
        if self.average is not None:
            self.average.update(self.weights, step=position.updates)

    def _read(self) -> None:
        """Read what the last updates logged, and check that it is finite."""
        self.meter.read(self.position.interval, self.position.of_epoch)

    def _end_epoch(self, loader: Loader, display: Display) -> bool:
        """Evaluate if it is time to, and write what an epoch leaves; return whether to stop."""
        position, after = self.position, self.position.epoch + 1
        self._check_weights()
        if after % self.config.trainer.eval_interval and not self._finished_after(after):
            position.epoch, position.batch = after, 0
            return self._interrupted(True)
        self._share_statistics()
        model = self.weights if self.average is None else self.average.module
        generators = get_generators(self.device)  # an evaluation changes nothing that training draws from
        stopped = self._asked if self.alone else bool
        scores = score(self.task, model, loader, self.accelerator, stopped=stopped)
        set_generators(generators, self.device)
        if scores is None:
            return self._interrupted(True)
        value = scores.metrics[self.monitor.name]
        better = self.monitor.better(value, position.best)
        position.epoch, position.batch = after, 0
        row = {"kind": "eval", "step": position.updates, "epoch": position.epoch}
        row |= {"train_loss": position.of_epoch.take()["loss"], **scores.metrics}
        self._write({**row, "seconds": self._seconds()})
        if better:
            position.best, position.best_epoch = value, position.epoch
        if self.is_main:
            about = {"epoch": str(position.epoch), self.monitor.name: repr(value)}
            for path in [self.folder.best] * better + [self.folder.last]:
                write_weights(path, model.state_dict(), about)
            display.epoch(row, position.updates, best=better)
        self.save()
        return not self.finished and self._interrupted(True, saved=True)

    def _share_statistics(self) -> None:
        """Give every process the batch norms' statistics of the first, whose weights are saved."""
        if self.alone:
            return
        for module in (self.weights, *(() if self.average is None else (self.average.module,))):
            for buffer in module.buffers():
                buffer.copy_(broadcast(buffer.clone(), from_process=0))

    def save(self) -> None:
        """Save the state; every process takes part.

        Raises:
            NotFiniteError: a weight is not finite; nothing was saved.
            SaveError: it could not be written; the state before it is kept.
        """
        self._read()
        self._check_weights()
        self.position.seconds = self._seconds()
        self._clock = self._saved_at = perf_counter()
        self.position.log_bytes = self._log.sync() if self._log is not None else 0
        state = self.state()
        if self.is_main:
            self.folder.state.save(state)
        self._saved = self.position.updates
        self.accelerator.wait_for_everyone()

    def _interrupted(self, at_line: bool, *, saved: bool = False) -> bool:
        """Save if a signal asks to stop or the time has come; return whether to stop.

        Processes must agree, so several of them ask each other where they exchange numbers anyway.
        """
        minutes = self.config.trainer.save_minutes
        due = minutes is not None and perf_counter() - self._saved_at > 60 * minutes
        self._signal = self._stop.signal
        if not self.alone:
            if not at_line:
                return False
            flags = torch.tensor([self._stop.signal or 0, due], device=self.device)
            signals, dues = self.accelerator.gather(flags[None]).T.tolist()
            self._signal, due = max(signals) or None, bool(dues[0])
        if (due or self._signal is not None) and not saved:
            self.save()
        return self._signal is not None

    def _asked(self) -> bool:
        return self._stop.signal is not None

    def _check_weights(self) -> None:
        if not torch.stack([p.isfinite().all() for p in self.parameters]).all():
            raise NotFiniteError("a weight is not finite", self.position.updates, self._lr)

    def _explain(self, error: NotFiniteError) -> NotFiniteError:
        """Add to `error` where it happened, what is kept, and what may help."""
        epoch = (error.update - 1) // self.epoch_updates + 1
        kept = "nothing had been saved yet"
        if self._saved is not None:
            kept = f"the state after step {self._saved} is kept in {self.folder.state.folder}"
        advice = "try a lower optim.lr, a longer optim.warmup_epochs or a smaller trainer.clip_grad"
        return NotFiniteError(error.what, error.update, error.lr, f" of epoch {epoch}: stopped; {kept}; {advice}")

    def _write(self, row: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(row)

    def _fraction(self) -> float:
        return self.position.epoch + self.position.batch / self.plan.num_batches

    def _seconds(self) -> float:
        return self.position.seconds + perf_counter() - self._clock
