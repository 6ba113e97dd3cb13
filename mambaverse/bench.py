"""`mambaverse bench OP`: an operator's backends against its reference, correctness first, then milliseconds.

An operator's `cases.py` supplies `TIMED`, `make_inputs(case, seed=, dtype=)` and `run(inputs)`; see any of
them. A backend whose outputs or gradients are outside the tolerance of the dtype is not timed but reported.
"""

from __future__ import annotations

import csv
import fnmatch
import importlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mambaverse.errors import UserError, suggest
from mambaverse.kernels.backend import BACKENDS, use_backend, why_not
from mambaverse.kernels.testing import TOLERANCE, outputs_and_gradients, relative_rms

BUDGET_S = 2.0  # seconds spent on timing one function
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Row:
    """One backend at one case."""

    case: str
    backend: str
    error: float  # the largest relative RMS error against float64, over outputs and gradients
    worst: str  # what has that error
    forward_ms: float
    step_ms: float  # forward and backward
    forward_ratio: float  # the reference's time over this one's
    step_ratio: float


def list_ops() -> list[str]:
    """Return the operators that can be timed: folders of kernels/ with a cases.py."""
    return sorted(path.parent.name for path in (Path(__file__).parent / "kernels").glob("*/cases.py"))


def bench(
    op: str,
    *,
    case: str = "*",
    device: str | None = None,
    dtype: str = "fp32",
    repeat: int = 10,
    csv_path: Path | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Check and time the backends of `op` and print the table.

    Args:
        op: An operator's name.
        case: Pattern of the cases' names.
        device: "cpu" or "cuda"; None: cuda where there is one.
        dtype: "fp32", "bf16" or "fp16": of the operator's main inputs.
        repeat: Timed runs of each; the median counts.
        csv_path: A file that the rows are written to as well.
        console: Where to print; None: stdout.

    Raises:
        UserError: unknown operator or case, or a device that is not there.
    """
    console = console or Console()
    cases = _cases(op)
    chosen = [c for c in cases.TIMED if fnmatch.fnmatchcase(_label(c), case)]
    if not chosen:
        raise UserError(f"bench {op}: no case {case!r}{suggest(case, [_label(c) for c in cases.TIMED])}")
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UserError("bench: device cuda was asked for, but torch finds no GPU")
    backends = [b for b in BACKENDS if b != "auto" and why_not(op, b, target.type) is None]
    rows = []
    for item in chosen:
        console.print(f"{_label(item)}: {item.reason}", highlight=False)
        rows += _rows(cases, item, backends, target, DTYPES[dtype], repeat)
    where = platform.processor() or platform.machine() if target.type == "cpu" else torch.cuda.get_device_name()
    title = f"{op}, {dtype}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(_table(title, rows, TOLERANCE[DTYPES[dtype]]))
    if csv_path is not None:
        _write(csv_path, rows)
    return rows


def _cases(op: str) -> ModuleType:
    if op not in list_ops():
        raise UserError(f"bench: unknown operator {op!r}{suggest(op, list_ops())}")
    return importlib.import_module(f"mambaverse.kernels.{op}.cases")


def _label(case: Any) -> str:
    """Return a case's fields but for the reason: "batch 2, length 1024, dim 512, width 4"."""
    return ", ".join(f"{key} {value}" for key, value in asdict(case).items() if key != "reason")


def _rows(
    cases: ModuleType, case: Any, backends: list[str], device: torch.device, dtype: torch.dtype, repeat: int
) -> list[Row]:
    inputs = {k: v.to(device) for k, v in cases.make_inputs(case, dtype=dtype).items()}
    wide = {k: v.to(torch.complex128 if v.is_complex() else torch.float64) for k, v in inputs.items()}

    def run(**arguments: Tensor) -> Any:
        return cases.run(arguments)

    with use_backend("reference"):
        expected = outputs_and_gradients(run, wide)
    rows: list[Row] = []
    for backend in sorted(backends, key=lambda b: b != "reference"):
        with use_backend(backend):
            errors = {k: relative_rms(v, expected[k]) for k, v in outputs_and_gradients(run, inputs).items()}
            worst = max(errors, key=errors.__getitem__)
            forward_ms, step_ms = float("nan"), float("nan")
            if errors[worst] <= TOLERANCE[dtype]:
                forward_ms, step_ms = _times(run, inputs, repeat, device)
        first = rows[0] if rows else None
        ratios = (1.0, 1.0) if first is None else (first.forward_ms / forward_ms, first.step_ms / step_ms)
        rows.append(Row(_label(case), backend, errors[worst], worst, forward_ms, step_ms, *ratios))
    return rows


def _times(
    run: Callable[..., Any], inputs: Mapping[str, Tensor], repeat: int, device: torch.device
) -> tuple[float, float]:
    """Return median milliseconds of forward (no gradients), and of forward and backward."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}

    def forward() -> None:
        with torch.no_grad():
            run(**inputs)

    with torch.no_grad():
        cotangents = [torch.randn_like(out) for out in run(**inputs)]

    def step() -> None:
        torch.autograd.grad(run(**leaves), list(leaves.values()), cotangents)

    return _median_ms(forward, repeat, device), _median_ms(step, repeat, device)


def _median_ms(function: Callable[[], None], repeat: int, device: torch.device) -> float:
    """Return the median time of up to `repeat` calls, fewer (but one) of a slow function, after one that warms up."""
    function()
    times: list[float] = []
    while len(times) < repeat and sum(times) < BUDGET_S:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _table(title: str, rows: list[Row], tolerance: float) -> Table:
    table = Table(
        "case", "backend", "error (of)", "forward, ms", "fwd + bwd, ms", "ratio", "ratio fwd + bwd", title=title
    )
    for row in rows:
        error = f"{row.error:.1e} ({row.worst})"
        if row.error > tolerance:
            table.add_row(row.case, row.backend, f"[red]{error}, allowed {tolerance:.0e}", *["not timed"] * 2, "", "")
            continue
        ratios = (f"{row.forward_ratio:.1f}x", f"{row.step_ratio:.1f}x")
        table.add_row(row.case, row.backend, error, f"{row.forward_ms:.2f}", f"{row.step_ms:.2f}", *ratios)
    return table


def _write(path: Path, rows: list[Row]) -> None:
    try:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    except OSError as error:
        raise UserError(f"--csv {path}: {error.strerror}") from None
