"""What a training run shows while it runs: a bar on a terminal, and one plain line an epoch everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from time import monotonic
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mambaverse.errors import leave_stdout, warn

Item = TypeVar("Item")
REDRAW_S = 0.2  # least time between two drawings of the bar
LINE_S = 30.0  # without a terminal: least time between two lines within an epoch
_BEHIND = len("  9:59:59 left  best")  # what an epoch's line may end with


class Screen(Console):
    """A console that prints names as they are, where rich takes [a] for a style and :x: for a picture.

    Args:
        stderr: Print there.
        lasting: Where nobody reads any more (`| head`), say so on stderr and go on; else that is a BrokenPipeError.
    """

    def __init__(self, *, stderr: bool = False, lasting: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)
        self._lasting = lasting

    def on_broken_pipe(self) -> None:
        """Say what rich makes an exit of."""
        if not self._lasting:
            raise BrokenPipeError
        self.quiet = True
        leave_stdout()
        warn("nobody reads the output any more; it goes on without")


class Display:
    """The bar: epoch, loss, metric, samples/s and time left.

    Args:
        console: Where to print.
        epochs: Epochs of the run.
        total: Optimizer steps of the run, of which
        done: so many were taken in earlier sessions.
        metric: The monitored metric's name.
    """

    def __init__(self, console: Console, *, epochs: int, total: int, done: int, metric: str) -> None:
        self._console, self._epochs, self._total, self._done, self._metric = console, epochs, total, done, metric
        self._drawn = monotonic()
        self._old = self._new = (0, self._drawn)  # steps taken, and when; of all so far a quarter to half, and twice it
        self._best = ""
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[text]}"))
            # Drawn by us, between steps: a thread of rich's own takes the interpreter lock from the loop.
            self._bar = Progress(*columns, console=console, auto_refresh=False, transient=True, expand=True)
            self._task = self._bar.add_task("", total=total, completed=done, text="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, updates: int, epoch: int, loss: float | None, samples_per_s: float | None) -> None:
        """Show that `updates` steps have been taken, in epoch number `epoch` (from 1); None: not known yet."""
        now = monotonic()
        self._mark(updates, now)
        if now - self._drawn < (LINE_S if self._bar is None else REDRAW_S):
            return
        self._drawn = now
        parts = [] if loss is None else [f"loss {loss:.4f}"]
        parts += [self._best] if self._best else []
        parts += [] if samples_per_s is None else [f"{samples_per_s:,.0f} samples/s"]
        parts += self._left(updates)
        if self._bar is None:
            self._print("  ".join([f"epoch {epoch}/{self._epochs}", f"step {updates}/{self._total}", *parts]))
        else:
            now_in = f"epoch {epoch}/{self._epochs}"
            self._bar.update(self._task, completed=updates, description=now_in, text="  ".join(parts))
            self._bar.refresh()

    def epoch(self, row: dict[str, Any], updates: int, *, best: bool) -> None:
        """Print the line of a finished epoch, from its row of metrics.jsonl; on a terminal as much as fits."""
        self._drawn = monotonic()
        self._mark(updates, self._drawn)
        if best:
            self._best = f"best {self._metric} {row[self._metric]:.4f}"
        place = f"epoch {row['epoch']:>{len(str(self._epochs))}}/{self._epochs}"
        parts = self._fitting({name: value for name, value in row.items() if isinstance(value, float)}, len(place))
        self._print("  ".join([place, *parts, *self._left(updates), *["best"] * best]))

    def _fitting(self, values: dict[str, float], before: int) -> list[str]:
        """Return "name 0.1234" of each value, on a terminal of those that fit behind `before` characters.

        Losses are named in short there before a metric is left out, and the last ones are, but never the monitored.
        """
        room = self._console.width - before - _BEHIND if self._console.is_terminal else math.inf
        for names in ({"loss": "eval loss"}, {"train_loss": "train", "loss": "eval"}):
            parts = {k: f"{names.get(k, k).replace('_', ' ')} {value:.4f}" for k, value in values.items()}
            if _width(parts) <= room:
                break
        for name in reversed([k for k in values if k not in ("train_loss", "loss", self._metric)]):
            if _width(parts) > room:
                del parts[name]
        return list(parts.values())

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _mark(self, updates: int, now: float) -> None:
        taken = updates - self._done
        if taken > 0 and taken >= 2 * self._new[0]:
            self._old, self._new = self._new, (taken, now)

    def _left(self, updates: int) -> list[str]:
        """Return "1:15 left", by the pace of the later half of the steps, or more: the first one may compile."""
        taken, to_go = updates - self._done, self._total - updates
        since, then = self._old
        if to_go and not since:
            return []  # one step tells nothing
        seconds = (monotonic() - then) / max(taken - since, 1) * to_go
        return [f"{format_seconds(seconds)} left"]


def _width(parts: dict[str, str]) -> int:
    return sum(2 + len(part) for part in parts.values())


class Counter:
    """Counts what passes through `watch`, on one line that is drawn anew on a terminal, else a line now and then.

    Args:
        console: Where to draw: stderr, where stdout is for results.
        verb: What is done to an item: "labelled".
        total: How many there are; None: not known.
    """

    def __init__(self, console: Console, verb: str, total: int | None = None) -> None:
        self._console, self._verb, self._total = console, verb, total
        self._began = self._drawn = monotonic()
        self.done = 0

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items."""
        for item in items:
            self.done += 1
            yield item
            self._draw()
        self.clear()

    def add(self, count: int) -> None:
        """Count so many more at once."""
        self.done += count
        self._draw()

    def clear(self) -> None:
        """Wipe the line off a terminal."""
        if self._drawn != self._began and self._console.is_terminal:
            self._console.print(" " * 60, end="\r")

    def _draw(self) -> None:
        now, live = monotonic(), self._console.is_terminal
        if now - self._drawn <= (REDRAW_S if live else LINE_S):
            return
        self._drawn = now
        rate = self.done / (now - self._began)
        text = f"{self._verb} {self.done:,}, {rate:,.0f} a second"
        if self._total is not None:
            left = format_seconds((self._total - self.done) / rate) if self.done else "?"
            text = f"{self._verb} {self.done:,} of {self._total:,}, {rate:,.0f} a second, {left} left"
        self._console.print(text, end="\r" if live else "\n", highlight=False)


def format_seconds(seconds: float) -> str:
    """Return 75 as "1:15", 3700 as "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
