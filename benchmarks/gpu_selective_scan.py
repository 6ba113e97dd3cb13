"""Times selective_scan on a GPU: forward, forward + backward, and both directions, eager and as a CUDA graph.

    python benchmarks/gpu_selective_scan.py [--case "128,384,197"] [--dtype bf16] [--csv FILE]

Each case is checked against float64 first, at its width and at most 300 steps and 2 sequences. Inputs: D, z, bias and
softplus, N = 16; gradients of all eight; with both directions, inputs and parameters of their own, and one gate. The
floor is the larger of bytes at 3.0 TB/s and exponentials at 3.7e12 a second, 20 an element (16 decays, softplus, gate):
a forward's on one H100.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from mambaverse.bench.options import DTYPES
from mambaverse.bench.timing import BYTES_PER_S, EXPONENTIALS_PER_S
from mambaverse.kernels.selective_scan import bidirectional_selective_scan, selective_scan
from mambaverse.kernels.selective_scan.cases import TIMED_GPU, Case, exponentials, make_inputs
from mambaverse.kernels.testing import TOLERANCE, outputs_and_gradients, relative_rms

SHAPES = [(case.batch, case.dim, case.length) for case in TIMED_GPU]
STATES = 16
HEADER = ("B, D, L", "error (of)", "floor")
COLUMNS = [f"{what} {how}" for what in ("fwd", "fwd+bwd", "two directions fwd+bwd") for how in ("graph", "eager")]


def case_inputs(batch: int, dim: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = make_inputs(Case("", "", batch, length, dim, STATES), dtype=dtype, device="cuda")
    del inputs["initial_state"]
    return inputs


def error(batch: int, dim: int, length: int, dtype: torch.dtype) -> tuple[float, str]:
    inputs = case_inputs(min(batch, 2), dim, min(length, 300), dtype)
    flags: dict[str, Any] = {"delta_softplus": True, "return_final_state": True}
    actual = outputs_and_gradients(selective_scan, inputs, **flags)
    expected = outputs_and_gradients(selective_scan, {k: v.double() for k, v in inputs.items()}, **flags)
    errors = {name: relative_rms(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def graph_ms(function: Callable[[], object]) -> float:
    """Return the median time of 15 replays of `function` captured."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def both_ms(function: Callable[[], object]) -> list[float]:
    return [graph_ms(function), triton.testing.do_bench(function, warmup=20, rep=100, return_mode="median")]


def times(batch: int, dim: int, length: int, dtype: torch.dtype) -> list[float]:
    inputs = case_inputs(batch, dim, length, dtype)
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    both = {name: (leaf, leaf.detach().clone().requires_grad_()) for name, leaf in leaves.items() if name != "z"}
    cotangent = torch.randn_like(inputs["u"])

    def forward() -> Tensor:
        with torch.no_grad():
            return selective_scan(**inputs, delta_softplus=True)

    def step() -> tuple[Tensor, ...]:
        y = selective_scan(**leaves, delta_softplus=True)
        return torch.autograd.grad(y, list(leaves.values()), cotangent)

    def step_of_both() -> tuple[Tensor, ...]:
        y = bidirectional_selective_scan(**both, z=leaves["z"], delta_softplus=True)
        return torch.autograd.grad(y, [*(leaf for pair in both.values() for leaf in pair), leaves["z"]], cotangent)

    return [*both_ms(forward), *both_ms(step), *both_ms(step_of_both)]


def floor_ms(batch: int, dim: int, length: int, dtype: torch.dtype) -> float:
    elements, rows = batch * dim * length, batch * length
    moved = (4 * elements + 2 * rows * STATES) * dtype.itemsize
    decays_and_gates = exponentials(Case("", "", batch, length, dim, STATES))
    return 1e3 * max(moved / BYTES_PER_S, decays_and_gates / EXPONENTIALS_PER_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help='one shape, "B,D,L"; all of them by default')
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.dtype]
    shapes = [tuple(map(int, arguments.case.split(",")))] if arguments.case else SHAPES
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {arguments.dtype}, ms"
    )
    print(" | ".join((*HEADER, *COLUMNS)))
    rows = []
    for shape in shapes:
        worst, name = error(*shape, dtype)
        row = [str(shape), f"{worst:.1e} ({name})", f"{floor_ms(*shape, dtype):.3f}"]
        row += [f"{ms:.3f}" for ms in times(*shape, dtype)] if worst <= TOLERANCE[dtype] else ["wrong: not timed"]
        print(" | ".join(row), flush=True)
        rows.append(row)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            csv.writer(file).writerows([(*HEADER, *COLUMNS), *rows])


if __name__ == "__main__":
    main()
