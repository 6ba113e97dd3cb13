"""`mambaverse bench OP`: an operator's backends against its reference, correctness first, then milliseconds.

An operator's `cases.py` supplies `TIMED`, `make_inputs(case, seed=, dtype=, device=)` and `run(inputs)`; see any of
them. It may also supply

- `TIMED_GPU`: the cases that are timed on a GPU, in place of `TIMED`;
- `checked_at(case)`: a smaller case to check in place of one too large for the reference, which is then not timed;
- `CONSTANTS`: the names of inputs that take no gradient;
- `moved_bytes(inputs, outputs)`: what a forward reads and writes; by default each input and output once;
- `exponentials(case)`: how many a forward needs, softplus and SiLU two each; by default 0;
- `PEER`, a package, and `peer(load, inputs)`: (tensors, function of them by name) that do the same in that package with
  its own layout, or None where it cannot. `load("package.module:name")` imports, and only where the package is there.
  `PEER_DIFFERS` says what it leaves out.

A backend whose outputs or gradients are outside the tolerance of the dtype is not timed but reported.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mambaverse.bench.options import dtype_name
from mambaverse.bench.peers import installed, load
from mambaverse.bench.report import Report, Row, noting, noting_all
from mambaverse.bench.timing import Clock, Function
from mambaverse.errors import UserError, suggest
from mambaverse.kernels.backend import BACKENDS, use_backend, why_not
from mambaverse.kernels.testing import TOLERANCE, outputs_and_gradients, relative_rms

Run = Callable[..., Any]


def list_ops() -> list[str]:
    """Return the operators that can be timed: folders of kernels/ with a cases.py."""
    return sorted(path.parent.name for path in (Path(__file__).parents[1] / "kernels").glob("*/cases.py"))


def run(op: str, pattern: str | None, dtype: torch.dtype, clock: Clock, console: Console) -> Report:
    """Check and time the backends of `op` that run on the clock's device.

    Args:
        op: One of `list_ops()`.
        pattern: Of the cases' labels; None: all of them.
        dtype: Of the operator's main inputs.
        clock: Times; its device decides which cases and backends there are.
        console: Where each case is announced.

    Raises:
        UserError: no case matches.
    """
    cases = importlib.import_module(f"mambaverse.kernels.{op}.cases")
    all_cases = getattr(cases, "TIMED_GPU", cases.TIMED) if clock.kind == "cuda" else cases.TIMED
    chosen = [case for case in all_cases if fnmatch.fnmatchcase(_label(case), pattern or "*")]
    if not chosen:
        raise UserError(f"bench {op}: no case {pattern!r}{suggest(pattern or '', [_label(c) for c in all_cases])}")
    backends = [b for b in BACKENDS if b != "auto" and why_not(op, b, clock.device.type) is None]
    fast = "triton" if clock.device.type == "cuda" else "cpu"
    reason = why_not(op, fast, clock.device.type)
    rows: list[Row] = []
    for case in chosen:
        console.print(f"{_label(case)}: {case.reason}", highlight=False, soft_wrap=True)
        rows += _rows(cases, case, backends, dtype, clock)
    report = Report(op, dtype_name(dtype), clock.name, "backend", rows)
    if reason is not None:
        report.captions.append(f"{fast} cannot run here: {reason}")
    if hasattr(cases, "PEER_DIFFERS") and any(row.name == cases.PEER for row in rows):
        report.captions.append(f"{cases.PEER}: {cases.PEER_DIFFERS}")
    report.explain_wrong(f"{TOLERANCE[dtype]:.0e}")
    return report


def _rows(cases: ModuleType, case: Any, backends: list[str], dtype: torch.dtype, clock: Clock) -> list[Row]:
    small = cases.checked_at(case) if hasattr(cases, "checked_at") else case
    inputs, constants = _inputs(cases, small, dtype, clock.device)
    wide = {k: v.to(torch.complex128 if v.is_complex() else torch.float64) for k, v in inputs.items()}

    def call(**arguments: Tensor) -> Any:
        return cases.run({**constants, **arguments})

    rows = {name: Row(_short(case), name) for name in sorted(backends, key=lambda b: b != "reference")}
    actual = {}
    for name in rows:
        with use_backend(name):
            actual[name] = outputs_and_gradients(call, inputs)
    # of a sum that cancels, what rounding the outputs' gradients does to it is no backend's error
    rounded = [v.dtype for k, v in next(iter(actual.values())).items() if k.startswith("out")]
    with use_backend("reference"):
        expected = outputs_and_gradients(call, wide, cotangents_as=rounded)
    for name, row in rows.items():
        errors = {k: relative_rms(v, expected[k]) for k, v in actual[name].items()}
        row.worst = max(errors, key=errors.__getitem__)
        row.error = errors[row.worst]
    del expected, actual, wide
    if small is not case:
        inputs, constants = _inputs(cases, case, dtype, clock.device)
    for name, row in rows.items():
        if not row.passes(TOLERANCE[dtype]):
            continue
        if name == "reference" and small is not case:
            row.note = "too slow: not timed"
        else:
            with use_backend(name):
                _measure(row, cases, case, call, inputs, clock, graph=name != "reference")
    peer = _peer(cases, case, inputs, clock)
    for name, row in rows.items():
        if name != "reference":
            row.compare("reference", rows["reference"])
            if peer is not None:
                row.compare(peer.name, peer)
    return [*rows.values()] if peer is None else [*rows.values(), peer]


def _inputs(
    cases: ModuleType, case: Any, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs that gradients are asked for, and the others."""
    inputs: dict[str, Tensor] = cases.make_inputs(case, dtype=dtype, device=device)
    return inputs, {name: inputs.pop(name) for name in getattr(cases, "CONSTANTS", ())}


def _peer(cases: ModuleType, case: Any, inputs: dict[str, Tensor], clock: Clock) -> Row | None:
    """Return the row of the operator's peer, None where there is none or it runs on GPUs alone."""
    package = getattr(cases, "PEER", "")
    if not package or clock.kind != "cuda" or not installed(package):
        return None
    row = Row(_short(case), package)
    with noting_all(row):
        given = cases.peer(load, inputs)
        if given is None:
            return None
        tensors, function = given
        _measure(row, cases, case, function, tensors, clock, graph=True)
    return row


def _measure(
    row: Row, cases: ModuleType, case: Any, call: Run, inputs: Mapping[str, Tensor], clock: Clock, *, graph: bool
) -> None:
    """Time `call(**inputs)` and its gradients."""
    with noting(row):
        forward, step, outputs = functions(call, inputs)
        if hasattr(cases, "moved_bytes"):
            moved = cases.moved_bytes(inputs, outputs)
        else:
            moved = sum(value.nbytes for value in [*inputs.values(), *outputs])
        exponentials = cases.exponentials(case) if hasattr(cases, "exponentials") else 0
        row.measure(clock, forward, step, graph=graph, moved_bytes=moved, exponentials=exponentials)


def functions(call: Run, inputs: Mapping[str, Tensor]) -> tuple[Function, Function, list[Tensor]]:
    """Return what is timed of `call(**inputs)`: forward, forward and backward; and the outputs."""

    def forward() -> None:
        with torch.no_grad():
            call(**inputs)

    with torch.no_grad():
        outputs = _outputs(call(**inputs))
    cotangents = [torch.randn_like(out) for out in outputs]

    def step() -> None:
        # fresh leaves: autograd ties a leaf's gradient to the stream of its first use, which a capture refuses
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        torch.autograd.grad(_outputs(call(**leaves)), list(leaves.values()), cotangents, allow_unused=True)

    return forward, step, outputs


def _outputs(result: Any) -> list[Tensor]:
    """Return a tensor, or the tensors of a tuple, as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def _label(case: Any) -> str:
    """Return a case's fields but for the reason: "batch 2, length 1024, dim 512, width 4"."""
    return ", ".join(f"{key} {value}" for key, value in asdict(case).items() if key != "reason")


def _short(case: Any) -> str:
    """Return a case's name or, where it has none, its numbers: "2, 1024, 512, 4"."""
    fields = {key: value for key, value in asdict(case).items() if key != "reason"}
    parts = [" x ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in fields.values()]
    return fields.get("name") or ", ".join(parts)
