"""The shapes rotary is tested and timed at, each with the reason it is there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mambaverse.kernels.rotary import rotary


@dataclass(frozen=True)
class Case:
    """One shape: x (batch, length, heads, size); the angles of all rows are the same if `shared`."""

    batch: int
    length: int
    heads: int
    size: int
    shared: bool
    reason: str


CONSTANTS = ("cos", "sin")

TESTED = (
    Case(2, 7, 3, 10, True, "odd numbers of all"),
    Case(3, 33, 9, 8, False, "more heads than a program has, and several blocks of tokens; angles of their own"),
    Case(1, 1, 1, 2, True, "one token, one pair"),
    Case(1, 3, 2, 400, False, "more pairs than a tile has in the interpreter"),
)

TIMED = (Case(2, 1024, 8, 64, True, "a small language model of width 512"),)

TIMED_GPU = (
    Case(8, 2048, 16, 64, True, "queries of a language model of width 1024"),
    Case(128, 197, 3, 64, True, "vision, 224 x 224 pixels, width 192"),
)


def make_inputs(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return x in `dtype`, and cosines and sines in float32 at least; drawn in float64."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = case.batch, case.length, case.heads, case.size
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
    table = 1 if case.shared else case.batch, case.length, case.size // 2
    angles = 6.3 * torch.rand(table, generator=generator, dtype=torch.float64, device=device)
    wide = torch.promote_types(dtype, torch.float32)
    return {"x": x.to(dtype), "cos": angles.cos().to(wide), "sin": angles.sin().to(wide)}


def run(inputs: dict[str, Tensor]) -> Tensor:
    """Call the operator."""
    return rotary(**inputs)
