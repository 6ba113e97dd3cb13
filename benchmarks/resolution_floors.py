"""What image models need at least by resolution: the floors of their operators, beside which a time can be judged.

    python benchmarks/resolution_floors.py [--models NAME[:MIXER[:KEY=VALUE]],...] [--sizes 224,...]
                                           [--times resolution_sweep.csv]

A model runs on the meta device, on shapes alone, in bfloat16. Matrix products, convolutions, attention and our
operators but `norm` count: each takes at least the longest of the bytes of its inputs and outputs at 3.0 TB/s, its
exponentials at 3.7e12 a second and its products at 600 TFLOP/s (one H100; the first two as in `mambaverse bench`).
Norms (but the gated one), residuals and elementwise operations count nothing: they can be fused; nor does what an
operator keeps for its backward pass. Attention is the fused one, whose matrix of scores stays on the chip.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from resolution_sweep import MODELS, PIXELS, SIZES, build
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import mambaverse.timm  # noqa: F401 (makes our models known)
from mambaverse.bench.timing import BYTES_PER_S, EXPONENTIALS_PER_S

FLOPS_PER_S = 600e12
UNCOUNTED = "norm"
KEPT = ("chunk_states", "total", "state")  # from a forward to its backward pass, by choice
RESULTS = {"selective_scan": 2, "bidirectional_selective_scan": 2, "ssd": 2, "nc_ssd": 1}  # the rest is kept
PRODUCTS = ("mm", "addmm", "bmm", "convolution", "convolution_backward")


@dataclass
class Floors:
    """Seconds that the operators counted so far need, by what they wait for, and with the longest of each."""

    bytes: float = 0.0
    exponentials: float = 0.0
    products: float = 0.0
    least: float = 0.0
    other: set[str] = field(default_factory=set)  # operators of ours that are not counted

    def add(self, moved: float, exponentials: float, flops: float) -> None:
        """Count one operator."""
        parts = (moved / BYTES_PER_S, exponentials / EXPONENTIALS_PER_S, flops / FLOPS_PER_S)
        self.bytes, self.exponentials, self.products = (
            total + part for total, part in zip((self.bytes, self.exponentials, self.products), parts, strict=True)
        )
        self.least += max(parts)


def _scan(given: dict[str, Any], directions: int) -> float:
    """Count a decay for each state, and two for softplus and gate each."""
    return given["u"].numel() * (directions * (given["A"].shape[-1] + 2) + 2 * (given["z"] is not None))


EXPONENTIALS: dict[str, Callable[[dict[str, Any]], float]] = {  # of an operator, and as many of its backward pass
    "selective_scan": lambda given: _scan(given, 1),
    "bidirectional_selective_scan": lambda given: _scan(given, 2),
    "ssd": lambda given: 3.0 * given["dt"].numel(),
    "nc_ssd": lambda given: 2.0 * given["dt"].numel(),
    "causal_conv1d": lambda given: 2.0 * given["x"].numel(),
    "depthwise_conv2d": lambda given: 2.0 * given["x"].numel(),
    "gated_rms_norm": lambda given: 2.0 * given["x"].numel(),
    "cross_scan": lambda given: 0.0,
    "cross_merge": lambda given: 0.0,
}


class Counting(TorchDispatchMode):
    """Counts what runs in it."""

    def __init__(self, floors: Floors) -> None:
        super().__init__()
        self.floors = floors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        ours = func.namespace == "mambaverse"
        operator = name.removesuffix("_backward") if ours else name
        if ours and operator not in (*EXPONENTIALS, UNCOUNTED):
            self.floors.other.add(name)
        elif operator in (EXPONENTIALS if ours else PRODUCTS):
            given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
            needed = [value for key, value in given.items() if key not in KEPT]
            made = out[: RESULTS[name]] if name in RESULTS else out
            moved = sum(t.nbytes for t in (*_tensors(needed), *_tensors(made)))
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
            self.floors.add(moved, EXPONENTIALS[operator](given) if ours else 0.0, flops)
        return out


class FusedAttention(TorchFunctionMode):
    """Counts attention as one operator, forward and, where gradients are wanted, backward."""

    def __init__(self, floors: Floors) -> None:
        super().__init__()
        self.floors = floors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        forward = (q.nbytes + k.nbytes + v.nbytes + q.nbytes, scores, 4 * scores * q.shape[3])
        self.floors.add(*forward)
        if q.requires_grad:  # q, k, v, the output and its gradient in, three gradients out; five products for two
            self.floors.add(2 * forward[0], scores, 2.5 * forward[2])
        return q + k.mean() + v.mean()  # of the right shape, and a gradient for each


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in _tensors(value)] if isinstance(values, (tuple, list)) else []


def floors_of(name: str, size: int, batch: int, training: bool) -> Floors:
    """Return the floors of a batch of one model at one size, forward or forward and backward."""
    floors = Floors()
    with torch.device("meta"):
        model = build(name, size)
        images = torch.randn(batch, 3, size, size, dtype=torch.bfloat16)
    model.bfloat16().train(training)
    with Counting(floors), FusedAttention(floors), torch.set_grad_enabled(training):
        result = model(images)
        if training:
            result.float().square().mean().backward()
    return floors


def main() -> None:
    """Print the floors of every model at every size, beside times if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--pixels", type=int, default=PIXELS, help="of a batch")
    parser.add_argument("--times", type=Path, help="what resolution_sweep.py wrote with --csv")
    options = parser.parse_args()
    console = Console(width=150)
    rows = list(csv.DictReader(options.times.open())) if options.times else []
    times = {(row["model"], int(row["size"])): row for row in rows}
    table = Table("model", "px (batch)", "", "bytes, ms", "exponentials, ms", "products, ms", "floor, ms", "images/s")
    if times:
        table.add_column("measured")
    other: set[str] = set()
    for name in options.models.split(","):
        for size in map(int, options.sizes.split(",")):
            batch = max(1, options.pixels // size**2)
            for what in ("inference", "training"):
                one = floors_of(name, size, batch, what == "training")
                other |= one.other
                parts = (one.bytes, one.exponentials, one.products, one.least)
                cells = [f"{1e3 * part:.2f}" for part in parts] + [f"{batch / one.least:,.0f}"]
                if times:
                    row = times.get((name, size))
                    share = f"{float(row[what]):,.0f} ({float(row[what]) * one.least / batch:.0%})" if row else ""
                    cells.append(share)
                table.add_row(name, f"{size} ({batch})", what, *cells)
    console.print(table)
    if other:
        console.print(f"not counted: {', '.join(sorted(other))}")


if __name__ == "__main__":
    main()
