"""`mambaverse bench mixer`: every registered mixer, or those named, with default arguments, on the same tokens.

A mixer runs under autocast (bf16, the default on a GPU) or in fp32. Its output and the gradient of its tokens are first
compared with a float64 copy of it, on at most 2 sequences of 256 tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from mambaverse.bench.options import dtype_name
from mambaverse.bench.peers import installed, load
from mambaverse.bench.report import Report, Row, noting, noting_all
from mambaverse.bench.timing import Clock
from mambaverse.errors import UserError, suggest
from mambaverse.kernels.testing import relative_rms
from mambaverse.mixers import create_mixer, list_mixers
from mambaverse.testing.checks import BF16_TOLERANCE
from mambaverse.testing.subject import TOLERANCE, seeded

SIZES = {  # (B, L, D)
    "cpu": ((2, 512, 192),),
    "cuda": ((8, 2048, 1024), (128, 197, 192)),  # a language model's, Vim-tiny's on 224 x 224 pixels
}
TOLERANCES = {torch.float32: TOLERANCE, torch.bfloat16: BF16_TOLERANCE, torch.float16: BF16_TOLERANCE / 8}
CHECKED = (2, 256)  # at most so many sequences of so many tokens are run in float64
PEERS = {"s6": "mamba_ssm:Mamba", "ssd": "mamba_ssm:Mamba2"}  # the modules whose parameters these have


def run(
    names: Sequence[str],
    sizes: Sequence[tuple[int, int, int]] | None,
    dtype: torch.dtype,
    clock: Clock,
    console: Console,
) -> Report:
    """Check and time mixers.

    Args:
        names: Registered names, or "package.module:Class"; none: every registered mixer.
        sizes: (B, L, D) each; None: those of `SIZES` for the device.
        dtype: Of autocast; float32: none.
        clock: Times, and where.
        console: Where each size is announced.

    Raises:
        UserError: unknown mixer, or one that cannot be built at its width.
    """
    for name in names:
        if ":" not in name and name not in list_mixers():
            raise UserError(f"bench mixer: unknown mixer {name!r}{suggest(name, list_mixers())}")
    rows: list[Row] = []
    for size in sizes or SIZES[clock.kind]:
        console.print("batch {}, length {}, width {}".format(*size), highlight=False)
        for name in names or list_mixers():
            rows += _rows(name, size, dtype, clock, named=bool(names))
    report = Report("mixers", dtype_name(dtype), clock.name, "mixer", rows)
    report.captions.append("case: batch, length, width; default arguments" + _under(dtype))
    report.explain_wrong(f"{TOLERANCES[dtype]:.1e}")
    return report


def _under(dtype: torch.dtype) -> str:
    return "" if dtype is torch.float32 else f"; fp32 weights under {dtype_name(dtype)} autocast"


def _rows(name: str, size: tuple[int, int, int], dtype: torch.dtype, clock: Clock, *, named: bool) -> list[Row]:
    case = ", ".join(map(str, size))
    row = Row(case, name)
    try:
        with seeded(0):
            mixer = create_mixer(name, size[-1]).to(clock.device)
    except ValueError as error:  # UserError is one
        if named:
            raise UserError(f"bench mixer: {error}") from None
        row.note = str(error)
        return [row]
    with noting(row):
        row.error, row.worst = _check(mixer, size, dtype, clock.device)
        if row.passes(TOLERANCES[dtype]):
            _measure(row, mixer, size, dtype, clock)
    target = PEERS.get(name, "")
    package = target.partition(":")[0]
    if not target or clock.kind != "cuda" or not installed(package):
        return [row]
    peer = Row(case, target)
    with noting_all(peer):
        _measure(peer, load(target)(size[-1]).to(clock.device), size, dtype, clock)
    row.compare(package, peer)
    return [row, peer]


def _check(mixer: nn.Module, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[float, str]:
    """Return the larger of two relative RMS errors against float64, and whose it is."""
    small = min(size[0], CHECKED[0]), min(size[1], CHECKED[1]), size[2]
    x = _tokens(small, device)
    wide = copy.deepcopy(mixer).double()
    results = []
    for module, tokens, number in ((mixer, x, dtype), (wide, x.double(), torch.float32)):
        leaf = tokens.requires_grad_()
        y = _forward(module, leaf, number)
        (dx,) = torch.autograd.grad(y, leaf, _tokens(small, device, seed=2).to(y))
        results.append({"y": y.detach(), "dx": dx})
    errors = {key: relative_rms(value, results[1][key]) for key, value in results[0].items()}
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def _measure(row: Row, mixer: nn.Module, size: tuple[int, int, int], dtype: torch.dtype, clock: Clock) -> None:
    x = _tokens(size, clock.device)

    def forward() -> None:
        with torch.no_grad():
            _forward(mixer, x, dtype)

    with torch.no_grad():
        cotangent = torch.randn_like(_forward(mixer, x, dtype))
    parameters = [p for p in mixer.parameters() if p.requires_grad]

    def step() -> None:
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(_forward(mixer, leaf, dtype), [leaf, *parameters], cotangent, allow_unused=True)

    row.measure(clock, forward, step)


def _forward(mixer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    arguments: dict[str, Any] = {}
    if getattr(mixer, "needs_spatial_shape", False):
        arguments["spatial_shape"] = _grid(x.shape[1])
    with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
        return mixer(x, **arguments)


def _grid(length: int) -> tuple[int, int]:
    """Return (H, W) with H · W = length, as square as can be."""
    height = next(h for h in range(math.isqrt(length), 0, -1) if length % h == 0)
    return height, length // height


def _tokens(size: tuple[int, int, int], device: torch.device, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device)
