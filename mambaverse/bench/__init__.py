"""`mambaverse bench WHAT`: correctness first, then milliseconds.

| WHAT | what is timed | module |
|---|---|---|
| an operator | its backends, and the package it competes with where that is installed | `operators` |
| mixer | every registered mixer, or those named | `mixers` |
| scan_vs_attention | the selective scan, causal attention and a scan in plain PyTorch over the length | `lengths` |

What is measured and how: `timing`. The table, the CSV file and the plot: `report`, `plots`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mambaverse.bench import lengths as _lengths
from mambaverse.bench import mixers as _mixers
from mambaverse.bench import operators as _operators
from mambaverse.bench.operators import list_ops
from mambaverse.bench.options import check_applies, parse_device, parse_dtype, parse_lengths, parse_sizes
from mambaverse.bench.options import positive as _positive
from mambaverse.bench.plots import SUFFIXES, draw
from mambaverse.bench.report import Report
from mambaverse.bench.timing import clock_for
from mambaverse.engine.files import output_path
from mambaverse.errors import UserError, suggest

__all__ = ["bench", "list_ops"]

PIPE_WIDTH = 160  # of a table that no terminal shows; rich would squeeze it into 80 columns
MIXER, LENGTHS = "mixer", "scan_vs_attention"


def bench(
    what: str,
    names: Sequence[str] = (),
    *,
    case: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    repeat: int | str = 10,
    sizes: str | None = None,
    lengths: str | None = None,
    csv_path: Path | None = None,
    plot_path: Path | None = None,
    console: Console | None = None,
) -> Report:
    """Check and time `what`, print the table, and write the files that were asked for.

    Args:
        what: An operator's name, "mixer" or "scan_vs_attention".
        names: Of mixers; none: every registered one.
        case: Pattern of an operator's cases.
        device: "cpu" or "cuda"; None: cuda where there is one.
        dtype: "fp32", "bf16" or "fp16": of the operators' main inputs, or of the mixers' autocast (fp32: none). None:
            bf16 on a GPU, else fp32.
        repeat: Timed runs of each function; the median counts.
        sizes: Of mixers: "BxLxD" with batch, length and width, several separated by commas.
        lengths: Of scan_vs_attention: "512,1024,2k".
        csv_path: A file that the rows are written to as well.
        plot_path: A picture, whose suffix says the format.
        console: Where to print; None: stdout.

    Raises:
        UserError: unknown names, options that mean nothing here, or a device that is not there.
    """
    if what not in (known := [*list_ops(), MIXER, LENGTHS]):
        raise UserError(f"bench: unknown operator {what!r}{suggest(what, known)}")
    check_applies(f"bench {what}", {"a name": names}, what == MIXER, "`bench mixer`")
    check_applies(f"bench {what}", {"--sizes": sizes}, what == MIXER, "`bench mixer`")
    check_applies(f"bench {what}", {"--lengths": lengths}, what == LENGTHS, f"`bench {LENGTHS}`")
    check_applies(f"bench {what}", {"--case": case}, what in list_ops(), "operators")
    output_path("--csv", csv_path)
    output_path("--plot", plot_path, SUFFIXES)
    target = parse_device(device)
    clock = clock_for(target, _positive("--repeat", repeat))
    number = parse_dtype(dtype, target)
    console = console or Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH)
    if what == MIXER:
        report = _mixers.run(names, parse_sizes(sizes), number, clock, console)
    elif what == LENGTHS:
        report = _lengths.run(parse_lengths(lengths), number, clock, console)
    else:
        report = _operators.run(what, case, number, clock, console)
    report.print(console)
    if csv_path is not None:
        report.write_csv(csv_path)
    if plot_path is not None:
        draw(report, plot_path)
    return report
