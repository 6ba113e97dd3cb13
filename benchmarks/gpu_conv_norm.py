"""causal_conv1d, the norms and the one-step updates on a GPU: error against float64, then milliseconds and GB/s.

    python benchmarks/gpu_conv_norm.py [--check]

"graph": a CUDA graph of 12 calls that take turns over enough input sets to leave the L2 cache behind, median of 9
replays. "do_bench": triton.testing.do_bench, median; "host": microseconds until the call returns, the GPU idle or not.
GB/s counts each input read once and each output written once. `--check` also takes errors at the largest shapes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from mambaverse.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from mambaverse.kernels.norm import gated_rms_norm, rms_norm
from mambaverse.kernels.selective_scan.update import selective_scan_update
from mambaverse.kernels.testing import relative_rms

CALLS = 12
CONV = ((8, 2048, 2048), (128, 197, 384), (1, 131072, 512))  # B, L, D
NORM = ((16384, 1024), (128 * 197, 192), (128 * 197, 384))  # rows, D: the mixers' sizes
BF16 = torch.bfloat16


def graph_ms(calls: list[Callable[[], Any]]) -> float:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            calls[i % len(calls)]()
    graph.replay()
    times = []
    for _ in range(9):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / CALLS)
    return sorted(times)[4]


def host_us(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        call()
    return (time.perf_counter() - start) / 50 * 1e6


def gradients(function: Callable[..., Any], leaves: list[Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    """Run forward and backward on fresh leaves: gradients of those of another stream cannot be captured."""
    fresh = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*fresh)
    return *(o.detach() for o in out), *torch.autograd.grad(out, fresh, cotangents)


def row(
    name: str, function: Callable[..., Any], make: Callable[[], list[Tensor]], shared: list[Tensor],
    forward_bytes: int, backward_bytes: int, check: bool,
) -> None:  # fmt: skip
    """Print a line for `function(*make(), *shared)`, which returns a tuple."""
    sets: list[tuple[list[Tensor], list[Tensor]]] = []
    first = [0.0, 0.0]
    for i in range(max(2, min(6, int(220e6 // forward_bytes) + 1))):
        leaves = [*make(), *shared]
        start = time.perf_counter()
        with torch.no_grad():
            cotangents = [torch.randn_like(o) for o in function(*leaves)]
        torch.cuda.synchronize()
        middle = time.perf_counter()
        results = gradients(function, leaves, cotangents)
        torch.cuda.synchronize()
        if i == 0:
            first = [middle - start, time.perf_counter() - middle]
            error = float("nan")
            if check or leaves[0].numel() < 12e6:
                wide = gradients(function, [v.double() for v in leaves], [c.double() for c in cotangents])
                error = max(relative_rms(a, e) for a, e in zip(results, wide, strict=True))
        sets.append((leaves, cotangents))

    def forward(leaves: list[Tensor]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return function(*leaves)

        return call

    forwards = [forward(leaves) for leaves, _ in sets]
    steps = [lambda s=s: gradients(function, *s) for s in sets]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps[0]()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    fwd, both = graph_ms(forwards), graph_ms(steps)
    eager = [do_bench(c, return_mode="median", warmup=10, rep=40) for c in (forwards[0], steps[0])]
    print(
        f"| {name} | {error:.1e} | {fwd:.4f} / {both:.4f} | {eager[0]:.3f} / {eager[1]:.3f} | "
        f"{forward_bytes / fwd / 1e6:.0f} / {(forward_bytes + backward_bytes) / both / 1e6:.0f} | "
        f"{host_us(forwards[0]):.0f} / {host_us(steps[0]):.0f} | {first[0]:.1f} + {first[1]:.1f} | {peak:.0f} |",
        flush=True,
    )


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="errors at the largest shapes too: slow, 20 GB")
    check = parser.parse_args().check
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print("| bf16, fwd / fwd+bwd | error | graph ms | do_bench ms | GB/s | host us | first call s | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for batch, length, dim in CONV:
        size = batch * length * dim * 2

        def conv(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
            return (causal_conv1d(x, weight, bias, activation="silu"),)

        def make(shape: tuple[int, ...] = (batch, length, dim)) -> list[Tensor]:
            return [normal(*shape, dtype=BF16)]

        row(f"conv {batch}, {length}, {dim}", conv, make, [normal(dim, 4), normal(dim)], 2 * size, 3 * size, check)
    for rows, dim in NORM:
        for dtype in (BF16, torch.float32):
            wide = dtype.itemsize

            def make(shape: tuple[int, int] = (rows, dim), dtype: torch.dtype = dtype) -> list[Tensor]:
                return [normal(*shape, dtype=BF16), normal(*shape, dtype=dtype)]

            def norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
                return rms_norm(x, weight, residual=residual)

            bytes_ = rows * dim * (4 + 2 * wide), rows * dim * (2 + 3 * wide + (2 if wide == 4 else 0))
            row(f"rms + residual {str(dtype)[6:]} {rows}, {dim}", norm, make, [normal(dim)], *bytes_, check)

        def make(shape: tuple[int, int] = (rows, dim)) -> list[Tensor]:
            return [normal(*shape, dtype=BF16), normal(*shape, dtype=BF16)]

        def gated(x: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor]:
            return (gated_rms_norm(x, weight, z),)

        row(f"gated rms {rows}, {dim}", gated, make, [normal(dim)], rows * dim * 6, rows * dim * 10, check)

    batch, dim, size = 64, 2048, 16
    state, conv_state = normal(batch, dim, size), normal(batch, 3, dim, dtype=BF16)
    u, a, b, d = normal(batch, dim, dtype=BF16), -normal(dim, size).exp(), normal(batch, size), normal(dim)
    weight = normal(dim, 4)
    for name, call in {
        "selective_scan_update": lambda: selective_scan_update(
            state, u, u, a, b, b, d, z=u, delta_bias=d, delta_softplus=True
        ),
        "causal_conv1d_update": lambda: causal_conv1d_update(u, conv_state, weight, d, "silu"),
    }.items():
        eager = do_bench(call, return_mode="median", warmup=10, rep=40)
        print(f"{name} {batch}, {dim}: graph {graph_ms([call]):.4f} ms, do_bench {eager:.4f} ms")


if __name__ == "__main__":
    main()
