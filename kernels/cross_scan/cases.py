"""The shapes cross_scan and cross_merge are tested and timed at, each with the reason it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mambaverse.kernels.cross_scan import cross_merge, cross_scan


@dataclass(frozen=True)
class Case:
    """One shape: x (batch, height, width, dim)."""

    batch: int
    height: int
    width: int
    dim: int
    reason: str


TESTED = (
    Case(2, 5, 7, 33, "odd sides, channels beside every SIMD width"),
    Case(3, 4, 4, 8, "a square: rows and columns are as long"),
    Case(1, 1, 9, 5, "one row: its columns are single tokens"),
    Case(2, 6, 1, 3, "one column"),
    Case(1, 1, 1, 1, "one token, four times"),
)

TIMED = (
    Case(2, 56, 56, 96, "the first stage of vmamba_tiny_s1l8_224, batch 2"),
    Case(8, 14, 14, 384, "its third stage, batch 8"),
)

TIMED_GPU = (
    Case(128, 56, 56, 96, "the first stage of vmamba_tiny_s1l8_224, batch 128"),
    Case(128, 14, 14, 384, "its third stage, batch 128"),
)


def moved_bytes(inputs: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> int:
    """Return what the two forwards read and write: x once and four times, y four times and once."""
    return 5 * (inputs["x"].nbytes + outputs[1].nbytes)


def make_inputs(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return x (B, H, W, D) and y (B, 4, H · W, D) of a case in `dtype`, drawn in float64."""
    generator = torch.Generator(device).manual_seed(seed)
    grid = case.batch, case.height, case.width, case.dim
    shapes = {"x": grid, "y": (case.batch, 4, case.height * case.width, case.dim)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(dtype)
        for name, shape in shapes.items()
    }


def run(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scan x, and merge y to a grid of that of x."""
    x = inputs["x"]
    return cross_scan(x), cross_merge(inputs["y"], (x.shape[1], x.shape[2]))
