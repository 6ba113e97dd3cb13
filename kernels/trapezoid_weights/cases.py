"""The shapes trapezoid_weights is tested and timed at, each with the reason it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.trapezoid_weights import trapezoid_weights


@dataclass(frozen=True)
class Case:
    """One shape: dt, a and trap (batch, length, heads)."""

    batch: int
    length: int
    heads: int
    reason: str


TESTED = (
    Case(2, 70, 4, "several blocks of tokens, the last not full"),
    Case(1, 33, 5, "heads that are no power of two"),
    Case(3, 1, 2, "one token, which none follows"),
    Case(2, 7, 1, "one head"),
)

TIMED = (
    Case(2, 1024, 8, "a small language model: dim 256, expanded by 2"),
    Case(16, 197, 6, "vision, 224 x 224 pixels, dim 192 expanded by 2"),
)

TIMED_GPU = (
    Case(8, 2048, 32, "a language model of width 1024"),
    Case(128, 197, 6, "vision, 224 x 224 pixels, dim 192 expanded by 2"),
    Case(1, 131072, 24, "one long sequence"),
)


def make_inputs(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return all tensors of a case; the bias in float32 (float64 beside float64), the rest in `dtype`, from float64."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

    shape = case.batch, case.length, case.heads
    return {
        "dt": normal(*shape).to(dtype),
        "a": (3 * normal(*shape)).to(dtype),
        "trap": (2 * normal(*shape)).to(dtype),
        "dt_bias": (normal(case.heads) - 3).to(wide),
    }


def run(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Call the operator."""
    return trapezoid_weights(**inputs)
