"""What a registry knows, as a table on the screen: `mambaverse list mixers -v`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mambaverse.engine.progress import Screen
from mambaverse.engine.report import format_count


def print_described(entries: Sequence[dict[str, str]], counted: bool) -> None:
    """Print a table of `entries`, and below it the arguments: once for all that take the same."""
    counts = {"parameters": "parameters", "multiply_adds": "multiply-adds"} if counted else {}
    table = Table()
    table.add_column("name", overflow="fold")
    for title in counts.values():
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("summary", overflow="fold")
    takes: dict[tuple[str, str], list[str]] = {}
    for about in entries:
        numbers = [format_count(int(about[key])) if about[key] else "" for key in counts]
        table.add_row(about["name"], *numbers, about["summary"])
        if about["arguments"]:
            takes.setdefault((about["source"], about["arguments"]), []).append(about["name"])
    screen = Screen()
    screen.print(table)
    if sys.flags.optimize > 1:
        screen.print("Python runs with -OO, which strips the docstrings that summaries are taken from.")
    if counted:
        screen.print("Arguments, with the defaults of the class; a name sets the sizes of its own:")
    for (source, taken), names in takes.items():
        screen.print(Text(f"{source}: {', '.join(names)}", style="bold"))
        screen.print(Padding(taken, (0, 0, 0, 4)))
