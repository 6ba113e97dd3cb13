"""The inputs of a bulk job, one by one: what to do with a bad one, and how many there were."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from mambaverse.config import RunConfig
from mambaverse.engine.task import NoLabelsError, Sample, Task
from mambaverse.errors import UserError

REMEDY = "--on-error skip leaves such inputs out and goes on"


class BadInputError(UserError):
    """One of several inputs cannot be read; the message names it."""


def check_inputs(inputs: Sequence[str]) -> None:
    """Raise UserError for an empty path, such as a shell's variable that is not set: it would be the current folder."""
    if "" in inputs:
        raise UserError("inputs: expected files or folders, got an empty path ''")


def load_each(
    task: Task, inputs: Sequence[str], on_bad: Callable[[UserError], None] | None
) -> Iterator[tuple[str, Sample]]:
    """Yield (name, sample) for each of `inputs`, in order.

    Args:
        task: Its `load_inputs` reads them.
        inputs: Files, or what else the task knows.
        on_bad: Called with what is wrong with an input, which is then left out; None: BadInputError is raised.

    Raises:
        UserError: an empty path.
    """
    check_inputs(inputs)
    for one in inputs:  # by itself: what is wrong with it, such as an empty folder, must not lose those behind it
        left: Iterator[tuple[str, Callable[[], Sample]]] | None = None
        while True:
            try:
                left = iter(task.load_inputs([one])) if left is None else left
                if (item := next(left, None)) is None:
                    break
                loaded = item[0], item[1]()
            except NoLabelsError:  # no input is to blame, and leaving one out helps nothing
                raise
            except UserError as error:
                if on_bad is None:
                    raise BadInputError(str(error)) from None
                on_bad(error)
                if left is None:
                    break
                continue
            yield loaded


class Skips:
    """What a bulk job does with bad inputs, as `--on-error` or the run's `data.on_error` says, and their number.

    Args:
        on_error: "raise" or "skip"; None: what `config` says.
        config: Of the run.
    """

    def __init__(self, on_error: str | None, config: RunConfig) -> None:
        self.policy = on_error or getattr(config.data, "on_error", "raise")
        self.count = 0

    @property
    def on_bad(self) -> Callable[[UserError], None] | None:
        """For `load_each`: reports an input on stderr and counts it, or None where it stops the job."""
        return self._skip if self.policy == "skip" else None

    def report(self, done: int) -> None:
        """Say on stderr how many inputs were skipped, if any were, beside `done` that were not.

        Raises:
            UserError: all of them were.
        """
        text = f"{self.count:,} of {self.count + done:,} inputs skipped"
        if self.count and not done:
            raise UserError(f"{text}: none is left")
        if self.count:
            print(text, file=sys.stderr)

    def _skip(self, error: UserError) -> None:
        self.count += 1
        print(f"skipped: {error}", file=sys.stderr)
