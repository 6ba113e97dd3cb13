"""The shapes turned_qk is tested and timed at, each with the reason it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.turned_qk import turned_qk


@dataclass(frozen=True)
class Case:
    """One shape: B and C (batch, length, rank, groups, state_dim), angles (batch, length, heads, turned)."""

    batch: int
    length: int
    rank: int
    groups: int
    heads: int
    state_dim: int
    turned: int
    reason: str


TESTED = (
    Case(2, 33, 1, 1, 4, 16, 4, "one group, half of the channels turn; more tokens than a tile"),
    Case(1, 9, 3, 2, 6, 12, 6, "several vectors a token, two groups, all channels turn; no power of two"),
    Case(3, 5, 1, 3, 3, 7, 2, "as many groups as heads; an odd number of channels"),
    Case(1, 1, 2, 1, 12, 2, 1, "one token; one pair; more heads than a program has"),
    Case(2, 3, 1, 1, 2, 6, 0, "nothing turns"),
    Case(2, 40, 1, 1, 2, 16, 4, "five tiles in the interpreter: backward's parts are added up in two runs of three"),
)

TIMED = (
    Case(2, 1024, 1, 1, 8, 64, 16, "a small language model: dim 256, expanded by 2"),
    Case(16, 197, 1, 1, 6, 128, 32, "vision, 224 x 224 pixels, dim 192 expanded by 2"),
)

TIMED_GPU = (
    Case(8, 2048, 1, 1, 32, 128, 32, "a language model of width 1024"),
    Case(128, 197, 1, 1, 6, 128, 32, "vision, 224 x 224 pixels, dim 192 expanded by 2"),
)


def make_inputs(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return all tensors of a case; B and C in `dtype`, the rest in float32 (float64 beside float64), from float64."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, to: torch.dtype = wide) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(to)

    tokens, size = (case.batch, case.length), case.state_dim
    return {
        "B": normal(*tokens, case.rank, case.groups, size, to=dtype),
        "C": normal(*tokens, case.rank, case.groups, size, to=dtype),
        "B_weight": 1 + 0.3 * normal(size),
        "C_weight": 1 + 0.3 * normal(size),
        "B_bias": 1 + 0.5 * normal(case.heads, case.rank, size),
        "C_bias": 1 + 0.5 * normal(case.heads, case.rank, size),
        "angles": 3 * normal(*tokens, case.heads, case.turned),
    }


def run(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Call the operator."""
    return turned_qk(**inputs)
