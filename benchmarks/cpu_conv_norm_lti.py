"""causal_conv1d, the norms and lti_conv on the CPU beside what PyTorch offers: equal numbers first, then the time.

    python benchmarks/cpu_conv_norm_lti.py [--quick] [--threads 2] [--repeat 20]

Errors are relative RMS against float64, the worst of the outputs and gradients, ours and the peer's. Times are minima
over runs in which ours and the peer's take turns. Peers: the depthwise `conv1d` on (B, D, L) with SiLU; an addition and
`layer_norm` or `rms_norm`; S4D as published, its kernel from a Vandermonde product and the convolution by FFT.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numba
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mambaverse.kernels.causal_conv1d import cases as conv_cases
from mambaverse.kernels.causal_conv1d import causal_conv1d
from mambaverse.kernels.lti_conv import cases as lti_cases
from mambaverse.kernels.lti_conv import lti_conv
from mambaverse.kernels.norm import cases as norm_cases
from mambaverse.kernels.norm import gated_rms_norm, layer_norm, rms_norm
from mambaverse.kernels.testing import TOLERANCE, outputs_and_gradients, relative_rms

Inputs = dict[str, Tensor]


@dataclass
class Row:
    """One comparison: `ours` and `peer` take the inputs by name; errors are measured on `small`."""

    name: str
    shape: str
    ours: Callable[..., Any]
    peer: Callable[..., Any]
    inputs: Inputs
    small: Inputs


def conv_rows() -> Iterator[Row]:
    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, activation="silu")

    def peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        width = weight.shape[1]
        p = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=width - 1, groups=x.shape[2])[..., : x.shape[1]]
        return F.silu(p).mT

    for case in conv_cases.TIMED:
        x = torch.randn(case.batch, case.length, 2 * case.dim).chunk(2, -1)[0]  # half of an input projection
        inputs = {"x": x, "weight": torch.randn(case.dim, case.width), "bias": torch.randn(case.dim)}
        shape = f"{case.batch} x {case.length} x {case.dim}, width {case.width}"
        yield Row("causal_conv1d + silu", shape, ours, peer, inputs, inputs | {"x": x[:2]})


def norm_rows() -> Iterator[Row]:
    def added_layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        t = x + residual
        return F.layer_norm(t, weight.shape, weight, bias), t

    def added_rms(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        t = x + residual
        return F.rms_norm(t, weight.shape, weight, 1e-5), t

    def gated(x: Tensor, weight: Tensor, z: Tensor) -> Tensor:
        return F.rms_norm(x * F.silu(z), weight.shape, weight, 1e-5)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, weight, bias)[0]

    def plain_peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias)

    for case in norm_cases.TIMED:
        shape = " x ".join(map(str, case.shape))
        x, other = torch.randn(2, *case.shape)
        weight, bias = torch.randn(2, case.shape[-1])
        both = {"x": x, "weight": weight}
        for name, ours, peer, inputs in (
            ("rms_norm + residual", rms_norm, added_rms, both | {"residual": other}),
            ("layer_norm + residual", layer_norm, added_layer, both | {"bias": bias, "residual": other}),
            ("layer_norm", plain, plain_peer, both | {"bias": bias}),
            ("gated_rms_norm", gated_rms_norm, gated, both | {"z": other}),
        ):
            yield Row(name, shape, ours, peer, inputs, inputs)


def lti_rows() -> Iterator[Row]:
    def peer(u: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, D: Tensor) -> Tensor:
        length = u.shape[1]
        z = A * dt.unsqueeze(-1)
        scale = C * B * (torch.exp(z) - 1) / A
        powers = torch.exp(z.unsqueeze(-1) * torch.arange(length, device=u.device))
        K = 2 * torch.einsum("dn,dnl->dl", scale, powers).real
        spectrum = torch.fft.rfft(u.mT, n=2 * length) * torch.fft.rfft(K, n=2 * length)
        return (torch.fft.irfft(spectrum, n=2 * length)[..., :length] + D.unsqueeze(-1) * u.mT).mT

    for case in lti_cases.TIMED:
        system = case.dim, case.num_states
        n = torch.arange(case.num_states).expand(system)
        inputs = {
            "u": torch.randn(case.batch, case.length, case.dim),
            "A": torch.complex(torch.full(system, -0.5), math.pi * n),
            "B": torch.ones(system, dtype=torch.complex64),
            "C": torch.randn(system, dtype=torch.complex64),
            "dt": torch.logspace(-3, -1, case.dim),
            "D": torch.randn(case.dim),
        }
        few = {k: v[:1, :, :: case.dim // 8] if k == "u" else v[:: case.dim // 8] for k, v in inputs.items()}
        yield Row(
            "lti_conv",
            f"{case.batch} x {case.length} x {case.dim}, {case.num_states} states",
            lti_conv,
            peer,
            inputs,
            few,
        )


def error(function: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs) -> float:
    """Return the worst relative RMS error of outputs and gradients; `reference` runs in float64."""
    wide = {k: v.to(torch.complex128 if v.is_complex() else torch.float64) for k, v in inputs.items()}
    expected = outputs_and_gradients(reference, wide)
    return max(relative_rms(v, expected[k]) for k, v in outputs_and_gradients(function, inputs).items())


def times_ms(row: Row, repeat: int) -> list[float]:
    """Return our forward, the peer's, our forward and backward, the peer's."""
    leaves = {k: v.detach().requires_grad_() for k, v in row.inputs.items()}
    with torch.no_grad():
        out = row.ours(**leaves)
    cotangents = [torch.randn_like(o) for o in (out if isinstance(out, tuple) else (out,))]

    def forward(function: Callable[..., Any]) -> None:
        with torch.no_grad():
            function(**leaves)

    def both(function: Callable[..., Any]) -> None:
        out = function(**leaves)
        torch.autograd.grad(out, list(leaves.values()), cotangents)

    runs = [(run, f) for run in (forward, both) for f in (row.ours, row.peer)]
    best = [math.inf] * len(runs)
    for i in range(repeat + 1):  # the first compiles and fills caches
        for j, (run, function) in enumerate(runs):
            start = time.perf_counter()
            run(function)
            if i:
                best[j] = min(best[j], 1e3 * (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first shape of each operator")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=20, help="timed runs of each, of which the fastest counts")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    title = f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, numba {numba.__version__}"
    table = Table("operator", "shape", title=title, caption="times in ms; ratio: the peer's time over ours")
    for column in ("error", "peer's", "forward", "peer's", "ratio", "fwd + bwd", "peer's", "ratio"):
        table.add_column(column, justify="right")
    for rows in (conv_rows, norm_rows, lti_rows):
        first = ""
        for row in rows():
            first = first or row.shape
            if arguments.quick and row.shape != first:
                break
            errors = error(row.ours, row.ours, row.small), error(row.peer, row.ours, row.small)
            if not errors[0] <= TOLERANCE[torch.float32]:
                raise SystemExit(f"{row.name} {row.shape}: relative RMS error {errors[0]:.1e}, nothing timed")
            ours, peer, ours_both, peer_both = times_ms(row, arguments.repeat)
            table.add_row(
                row.name, row.shape, *(f"{e:.0e}" for e in errors), f"{ours:.2f}", f"{peer:.2f}",
                f"{peer / ours:.1f}x", f"{ours_both:.2f}", f"{peer_both:.2f}", f"{peer_both / ours_both:.1f}x",
            )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
