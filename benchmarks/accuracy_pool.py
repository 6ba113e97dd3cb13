"""Many small training runs side by side: processes that stay, each on its GPU or on a core, longest runs first.

A run that ended (results.json and settings.json in its folder) is not run again. One that was stopped goes on from its
saved state. One that fails is noted in failures.json, and tried again by the next call.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import torch
from accuracy_plans import Run
from rich.console import Console

from mambaverse.config import compose
from mambaverse.engine.run import train
from mambaverse.errors import UserError

FAILURES = "failures.json"
EVERY = 20.0  # seconds between two lines of progress
PATIENCE = 45.0  # seconds that runs have to save themselves when all is to end


def finished(out: Path, run: Run) -> bool:
    """Whether the run ended, with the settings that are asked for now.

    Raises:
        UserError: it ended with others.
    """
    folder = out / run.name
    if not ((folder / "results.json").is_file() and (folder / "settings.json").is_file()):
        return False
    given = json.loads((folder / "settings.json").read_text())
    if sorted(given) != sorted(run.settings):
        changed = ", ".join(sorted({*given} ^ {*run.settings}))
        raise UserError(f"{folder}: was run with other settings ({changed}); choose another --out, or delete it")
    return True


class Pool:
    """Processes that train runs.

    Args:
        out: The folder of run folders.
        gpus: How many there are to use; 0: the CPU is used.
        workers: Processes in all.
        deadline: When to stop, by `time.monotonic`.
    """

    def __init__(self, out: Path, gpus: int, workers: int, deadline: float) -> None:
        self.out, self.gpus, self.size, self.deadline = out, gpus, workers, deadline
        self.stopping = False
        self.failures: dict[str, str] = {}
        self._workers: list[_Worker] = []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._cards = visible.split(",") if visible else [str(i) for i in range(gpus)]

    def run(self, runs: Sequence[Run]) -> None:
        """Train `runs`, until all are done, the deadline comes, or a signal does."""
        todo = deque(sorted((run for run in runs if not finished(self.out, run)), key=lambda run: -run.steps))
        path = self.out / FAILURES
        self.failures = json.loads(path.read_text()) if path.is_file() else {}
        total, steps = len(todo), sum(run.steps for run in todo)
        print(f"{len(runs) - total} of {len(runs)} runs are done; {total:,} to go, {steps:,} steps", flush=True)
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        began = told = monotonic()
        done = gone = 0
        try:
            self._workers = [self._start(index) for index in range(min(self.size, total))]
            while (todo or any(worker.run for worker in self._workers)) and not self.stopping:
                for index, worker in enumerate(self._workers):
                    if worker.run is None and todo:
                        worker.give(todo.popleft())
                    elif worker.run is not None and (answer := worker.answer()) is not None:
                        run, worker.run = worker.run, None
                        done, gone = done + 1, gone + run.steps
                        error, usable = answer
                        self._note(run, error)
                        if not usable:
                            self._workers[index] = self._start(index)
                now = monotonic()
                if now - told > EVERY:
                    told = now
                    left = f", about {(now - began) / 60 * (steps - gone) / gone:.1f} min left" if gone else ""
                    busy = sum(worker.run is not None for worker in self._workers)
                    counts = f"{done} of {total} runs, {len(self.failures)} failed, {busy} under way"
                    print(f"{(now - began) / 60:.1f} min: {counts}, {gone / steps:.0%} of the steps{left}", flush=True)
                self.stopping = self.stopping or now > self.deadline
                wait([worker.pipe for worker in self._workers if worker.run], timeout=0.5)
        finally:
            self._end()
            for number, handler in previous.items():
                signal.signal(number, handler)
        print(f"{done} runs in {(monotonic() - began) / 60:.1f} min" + ", stopped" * self.stopping, flush=True)

    def _start(self, index: int) -> _Worker:
        card = self._cards[index % self.gpus] if self.gpus else ""
        return _Worker(self.out, card, self.out / "logs" / f"worker{index}.log")

    def _note(self, run: Run, error: str) -> None:
        """Write down how a run ended; "" is well."""
        if error:
            print(f"{run.name}: {error}", flush=True)
            self.failures[run.name] = error
        elif self.failures.pop(run.name, None) is None:
            return
        (self.out / FAILURES).write_text(json.dumps(self.failures, indent=1))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _end(self) -> None:
        """End the processes: those that train save what they have."""
        for worker in self._workers:
            worker.process.terminate()
        until = monotonic() + PATIENCE
        for worker in self._workers:
            worker.process.join(max(until - monotonic(), 0.1))
            if worker.alive:
                worker.process.kill()


class _Worker:
    """One process, the run that it has, and the pipe between."""

    def __init__(self, out: Path, card: str, log: Path) -> None:
        self.run: Run | None = None
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        os.environ["CUDA_VISIBLE_DEVICES"] = card  # the new process has it before it imports torch
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, out, log), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def give(self, run: Run) -> None:
        self.run = run
        self.pipe.send(run)

    def answer(self) -> tuple[str, bool] | None:
        """Return how the run ended, "" if well, and whether the process goes on; None: it has not ended."""
        try:
            return self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            self.process.join(5)
            return f"the process ended with exit code {self.process.exitcode}", False


def _work(pipe: Connection, out: Path, log: Path) -> None:
    """Train what comes down the pipe. After an error that nobody foresaw the process ends: its GPU may be unwell."""
    os.setpgrp()  # Ctrl-C and signals to the group reach the parent alone, which passes them on
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    while True:
        try:
            run = pipe.recv()
        except EOFError:
            return
        try:
            signalled = _train(run, out)
        except UserError as error:
            pipe.send((_line(error), True))
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            pipe.send((f"{type(error).__name__}: {_line(error)}", False))
            return
        else:
            if signalled:
                return
            pipe.send(("", True))


def _train(run: Run, out: Path) -> bool:
    """Train one run, or go on with it; return whether a signal stopped it."""
    folder = out / run.name
    if finished(out, run):
        return False
    place = [f"trainer.output_dir={out}", f"trainer.run_name={run.name}"]
    quick = ["trainer.num_threads=1", "trainer.save_minutes=null", "trainer.pictures=false"]
    config = compose(run.config, [*run.where, *run.settings, *place, *quick])
    begun = folder if (folder / "config.yaml").is_file() else None
    stopped = train(config, name=run.config, resume=begun, console=Console(quiet=True)).signal is not None
    if not stopped:
        (folder / "settings.json").write_text(json.dumps(run.settings))
    if config.trainer.compile:
        torch.compiler.reset()  # or the next model counts as this one, compiled anew, and that may be done 8 times
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the card is shared
    return stopped


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:500]
