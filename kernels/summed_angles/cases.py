"""The shapes summed_angles is tested and timed at, each with the reason it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.summed_angles import summed_angles


@dataclass(frozen=True)
class Case:
    """One shape: dt (batch, length, heads), rate (batch, length, pairs)."""

    batch: int
    length: int
    heads: int
    pairs: int
    reason: str


TESTED = (
    Case(2, 70, 4, 8, "several chunks, the last not full"),
    Case(1, 64, 3, 5, "full chunks; pairs that are no power of two"),
    Case(3, 1, 2, 1, "one token, one pair"),
    Case(2, 7, 1, 33, "less than a chunk; one head"),
    Case(1, 18, 5, 33, "more columns than a GPU program has"),
)

TIMED = (
    Case(2, 1024, 8, 16, "a small language model: dim 256, expanded by 2"),
    Case(16, 197, 6, 32, "vision, 224 x 224 pixels, dim 192 expanded by 2"),
)

TIMED_GPU = (
    Case(8, 2048, 32, 32, "a language model of width 1024"),
    Case(128, 197, 6, 32, "vision, 224 x 224 pixels, dim 192 expanded by 2"),
    Case(1, 131072, 24, 32, "one long sequence"),
)


def make_inputs(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return dt, rate and initial of a case as a trained layer would see them, drawn in float64."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

    tokens = case.batch, case.length
    return {
        "dt": torch.nn.functional.softplus(normal(*tokens, case.heads) - 2).to(dtype),
        "rate": torch.tanh(normal(*tokens, case.pairs)).to(dtype),
        "initial": normal(case.batch, case.heads, case.pairs).to(dtype),
    }


def run(inputs: dict[str, Any]) -> Tensor:
    """Call the operator."""
    return summed_angles(**inputs)
