"""Times selective_scan on the CPU side by side with transformers' loop and mambapy's parallel scan.

    python benchmarks/cpu_selective_scan.py [--quick] [--runs 11] [--threads 2] [--loop-length 256]

Everything is checked against float64 before it is timed. Contenders take turns, round after round, so that they meet
the same machine; tables show medians and, in brackets, minima of milliseconds. The backward of transformers' loop is
quadratic in the length, so it is timed at `--loop-length`, beside ours at that length (1024: minutes for one call).
A peer that is not installed (`pip install '.[bench]'`) is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
import torch
from peers import missing
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import silu, softplus

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.selective_scan import bidirectional_selective_scan, selective_scan
from mambaverse.kernels.selective_scan.cases import TIMED, Case, make_inputs
from mambaverse.kernels.testing import relative_rms

Scan = Callable[..., Tensor]
PAPER = TIMED[0]
SECONDS_PER_CONTENDER = 10


def ours(**inputs: Any) -> Tensor:
    return selective_scan(**inputs, delta_softplus=True)


def ours_reference(**inputs: Any) -> Tensor:
    with use_backend("reference"):
        return selective_scan(**inputs, delta_softplus=True)


def transformers_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    u, delta, z, B, C = (t.transpose(1, 2) for t in (u, delta, z, B, C))
    return mamba_selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True).transpose(1, 2)


def mambapy_pscan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    from mambapy.mamba import MambaBlock

    y = MambaBlock.selective_scan(None, u, softplus(delta + delta_bias), A, B, C, D)
    return y * silu(z)


PEERS: dict[Scan, str] = {transformers_loop: "transformers", mambapy_pscan: "mambapy"}


def prepare(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The inputs of a call in a model: everything but an initial state."""
    inputs = make_inputs(case, dtype=dtype)
    del inputs["initial_state"]
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def forward(scan: Scan, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> Tensor:
        with torch.no_grad():
            return scan(**inputs)

    return run


def forward_backward(scan: Scan, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> list[Tensor]:
        y = scan(**inputs)
        return [y.detach(), *torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))]

    return run


def error(scan: Scan, inputs: dict[str, Tensor]) -> float:
    """The largest relative RMS error of y and of all gradients against the float64 reference."""
    wide = {name: t.detach().to(torch.promote_types(t.dtype, torch.float64)) for name, t in inputs.items()}
    wide = {name: t.requires_grad_() for name, t in wide.items()}
    return max(map(relative_rms, forward_backward(scan, inputs)(), forward_backward(ours, wide)()))


def measure(contenders: dict[str, Callable[[], Any]], runs: int) -> dict[str, tuple[float, float]]:
    """Median and minimum milliseconds of each contender; one that takes seconds takes part in the first rounds only.

    The first call of each does not count, unless it alone takes so long that there is no other.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for name, run in contenders.items():
        start = time.perf_counter()
        run()
        if time.perf_counter() - start > SECONDS_PER_CONTENDER:
            times[name].append(time.perf_counter() - start)
    for _ in range(runs):
        for name, run in contenders.items():
            if sum(times[name]) > SECONDS_PER_CONTENDER:
                continue
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: (1e3 * statistics.median(t), 1e3 * min(t)) for name, t in times.items()}


def peak_extra_memory(run: Callable[[], Any]) -> int:
    """Bytes by which the process grows at most while `run` runs (Linux with glibc)."""
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])

    ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed before would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = field("VmRSS")
    run()
    return field("VmHWM") - before


def shown(times: tuple[float, float]) -> str:
    return f"{times[0]:.2f} ({times[1]:.2f})"


def against_peers(console: Console, runs: int, loop_length: int) -> None:
    """The operator of the paper's shape: softplus, D and z included, against the peers."""
    inputs, short = prepare(PAPER), prepare(replace(PAPER, length=loop_length))
    small = prepare(replace(PAPER, batch=1, length=128))
    scans: dict[str, Scan] = {
        "ours (cpu)": ours,
        "ours (reference)": ours_reference,
        "transformers, loop": transformers_loop,
        "mambapy, parallel scan": mambapy_pscan,
    }
    scans = {name: scan for name, scan in scans.items() if scan not in PEERS or not missing(PEERS[scan])}
    errors = {name: error(scan, inputs if scan is ours else small) for name, scan in scans.items()}
    fast = [name for name in scans if scans[name] in (ours, mambapy_pscan)]
    slow = [name for name in scans if scans[name] in (ours, transformers_loop)]
    rounds = [
        (f"forward, L={PAPER.length}", measure({n: forward(scan, inputs) for n, scan in scans.items()}, runs)),
        (f"forward + backward, L={PAPER.length}", measure({n: forward_backward(scans[n], inputs) for n in fast}, runs)),
        (f"forward + backward, L={loop_length}", measure({n: forward_backward(scans[n], short) for n in slow}, runs)),
    ]
    table = Table(title=f"B={PAPER.batch}, D={PAPER.dim}, N={PAPER.state_dim}, float32; softplus, bias, D and z")
    for column in ("what", "who", "error", "ms, median (min)", "ours is faster by"):
        table.add_column(column, justify="left" if column in ("what", "who") else "right", no_wrap=True)
    for what, times in rounds:
        for i, (name, time_) in enumerate(times.items()):
            ratio = f"{time_[0] / times['ours (cpu)'][0]:.1f}x" if i else ""
            table.add_row("" if i else what, name, f"{errors[name]:.1e}", shown(time_), ratio)
        table.add_section()
    console.print(table)


def per_case(console: Console, runs: int) -> None:
    """Every timed case in float32 and the paper's in 16 bit and in both directions."""
    table = Table(title="every case, ours on the CPU")
    for column in ("case", "B, L, D, N, G", "dtype", "error", "forward", "forward + backward", "updates/µs, forward"):
        table.add_column(column, justify="left" if column in ("case", "dtype") else "right")

    def both_directions(**inputs: Any) -> Tensor:
        return bidirectional_selective_scan(**inputs, delta_softplus=True)

    rows: list[tuple[str, Case, torch.dtype, Scan]] = [(c.name, c, torch.float32, ours) for c in TIMED]
    rows += [(PAPER.name, PAPER, dtype, ours) for dtype in (torch.bfloat16, torch.float16)]
    rows += [("both directions", PAPER, torch.float32, both_directions)]
    for name, case, dtype, scan in rows:
        inputs = prepare(case, dtype)
        one = error(scan, prepare(replace(case, batch=1, length=130), dtype)) if scan is ours else float("nan")
        times = measure({"f": forward(scan, inputs), "fb": forward_backward(scan, inputs)}, runs)
        updates = case.batch * case.length * case.dim * case.state_dim * (1 if scan is ours else 2)
        shape = f"{case.batch}, {case.length}, {case.dim}, {case.state_dim}, {case.groups or 1}"
        speed = f"{updates / times['f'][0] / 1e3:.0f}"
        table.add_row(name, shape, str(dtype)[6:], f"{one:.1e}", shown(times["f"]), shown(times["fb"]), speed)
    console.print(table)


def memory(console: Console) -> None:
    """Peak memory of backward beyond what is there when it starts, its results included."""
    inputs = prepare(PAPER)
    y = ours(**inputs)
    dy = torch.ones_like(y)
    torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True)
    extra = peak_extra_memory(lambda: torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True))
    size = sum(t.nbytes for t in inputs.values()) + dy.nbytes
    size += sum(t.nbytes for t in inputs.values())
    console.print(
        f"Peak extra memory of backward: {extra / 2**20:.0f} MiB, gradients included; its inputs and gradients: "
        f"{size / 2**20:.0f} MiB; ratio {extra / size:.2f}"
    )


def after_matmul(console: Console, runs: int) -> None:
    """Whether threads of torch that still spin after a matrix product slow the scan down."""
    inputs = {name: t.detach() for name, t in prepare(PAPER).items()}
    x, weight = torch.randn(PAPER.batch * PAPER.length, PAPER.dim), torch.randn(PAPER.dim, 2 * PAPER.dim)

    def product_then_scan() -> None:
        x @ weight
        ours(**inputs)

    contenders = {"product": lambda: x @ weight, "scan": lambda: ours(**inputs), "both": product_then_scan}
    times = measure(contenders, 3 * runs)
    product, scan, both = (times[name][0] for name in contenders)
    console.print(
        f"A matrix product {product:.2f} ms, a scan {scan:.2f} ms, one after the other {both:.2f} ms: "
        f"{both - product - scan:+.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 runs, the loop's backward at length 64, no other cases")
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--loop-length", type=int, default=256, help="length for the backward of transformers' loop")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs, loop_length = (3, 64) if arguments.quick else (arguments.runs, arguments.loop_length)
    console = Console(width=130)
    peers = "".join(f", {name} {version(name)}" for name in PEERS.values() if not missing(name))
    console.print(
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads; torch {torch.__version__}, "
        f"numba {numba.__version__}{peers}; {datetime.date.today()}"
    )
    if without := missing(*PEERS.values()):
        console.print(without, markup=False)
    against_peers(console, runs, loop_length)
    memory(console)
    after_matmul(console, runs)
    if not arguments.quick:
        per_case(console, runs)


if __name__ == "__main__":
    main()
