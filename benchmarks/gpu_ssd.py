"""Times ssd in bfloat16 on a GPU: a CUDA graph of forward, of forward and backward, and the kernels of the latter.

    python benchmarks/gpu_ssd.py [--case first+z] [--repeat 7]

Graphs: milliseconds, the median of 15 replays, the L2 cache overwritten before each. Kernels: microseconds, the mean of
torch.profiler over `--repeat` calls of forward and backward, all launches of one added up. Peak: the megabytes that
they need at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mambaverse.bench.timing import Clock, clock_for
from mambaverse.kernels.ssd import ssd
from mambaverse.kernels.ssd.cases import Case, make_inputs, make_weights

CASES = {
    "first": Case(8, 2048, 32, 64, 1, 128, "a language model of width 1024"),
    "second": Case(1, 131072, 24, 64, 1, 128, "one long sequence"),
    "third": Case(128, 197, 12, 64, 1, 64, "vision, 224 x 224 pixels"),
    "own": Case(8, 2048, 32, 64, 32, 128, "B and C a head, as in Mamba-3"),
    "wide": Case(4, 1024, 16, 64, 1, 256, "many states"),
}
TIMED = ("first", "first+z", "second", "third", "third+z", "own+z+w", "wide")
KERNELS = (
    *("scan", "carry", "combine", "steps"),
    *("walk", "within", "through_states", "rest_of_one", "sum_up"),
    *("gradient_BC", "gradient_x", "reduce_params", "reduce_parts"),
)


def inputs_of(name: str) -> dict[str, Tensor]:
    case, *options = name.split("+")
    inputs = make_inputs(CASES[case], dtype=torch.bfloat16, device="cuda")
    del inputs["initial_state"]
    if "z" not in options:
        del inputs["z"]
    if "w" in options:
        inputs |= make_weights(CASES[case], device="cuda")
    return inputs


def kernel_us(function: Callable[[], object], repeat: int) -> dict[str, float]:
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeat):
            function()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiled.key_averages():
        kernel = max((k for k in KERNELS if event.key.startswith(k)), key=len, default="others")
        times[kernel] = times.get(kernel, 0.0) + event.self_device_time_total / repeat
    return times


def column(name: str, repeat: int, clock: Clock) -> dict[str, str]:
    inputs: dict[str, Any] = inputs_of(name)
    forward = clock.times(lambda: ssd(**inputs, dt_softplus=True))
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    dy = torch.randn_like(leaves["x"])

    def function() -> object:
        return torch.autograd.grad(ssd(**leaves, dt_softplus=True), list(leaves.values()), dy)

    both, peak, kernels = clock.times(function), clock.peak_mb(function), kernel_us(function, repeat)
    return {
        "fwd, ms": f"{forward.ms:.4f}",
        "fwd+bwd, ms": f"{both.ms:.4f}",
        **{k: f"{kernels[k]:.1f}" if k in kernels else "-" for k in (*KERNELS, "others")},
        "kernels": f"{sum(kernels.values()) - kernels.get('others', 0.0):.0f}",
        "peak, MB": f"{peak:,.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", action="append", choices=TIMED, help="all if left out")
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    console, clock = Console(), clock_for(torch.device("cuda"), 15)
    console.print(clock.name, highlight=False)
    columns = {}
    for name in options.case or TIMED:
        columns[name] = column(name, options.repeat, clock)
        torch.cuda.empty_cache()
    table = Table("", *columns, box=None)
    for measure in next(iter(columns.values())):
        table.add_row(measure, *(values[measure] for values in columns.values()))
    console.print(table)


if __name__ == "__main__":
    main()
