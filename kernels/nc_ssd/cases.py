"""The shapes nc_ssd is tested and timed at, each with the reason it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.nc_ssd import nc_ssd


@dataclass(frozen=True)
class Case:
    """One shape: x (batch, length, heads, head_dim), B and C (batch, length, groups, state_dim)."""

    batch: int
    length: int
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    reason: str


TESTED = (
    Case(2, 130, 4, 16, 2, 16, "several blocks of tokens, the last not full; two heads a group"),
    Case(1, 64, 2, 64, 1, 64, "one full block at the usual sizes"),
    Case(2, 1, 3, 5, 3, 7, "one token; as many groups as heads; sizes that are no power of two"),
    Case(1, 71, 2, 33, 1, 20, "one column more than half a tile"),
    Case(3, 17, 6, 8, 2, 48, "states wider than heads"),
)

TIMED = (
    Case(16, 197, 6, 64, 1, 64, "vision, 224 x 224 pixels: 196 patches and a class token, dim 192 expanded by 2"),
    Case(1, 4096, 12, 64, 1, 64, "vision, 1024 x 1024 pixels"),
)

TIMED_GPU = (
    Case(128, 197, 6, 64, 1, 64, "vision, 224 x 224 pixels, dim 192 expanded by 2"),
    Case(8, 6085, 6, 64, 1, 64, "vision, 1248 x 1248 pixels, dim 192 expanded by 2"),
    Case(8, 2048, 32, 64, 1, 128, "width 1024, expanded by 2"),
)


def make_inputs(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return x, dt, A, B, C, D and dt_bias of a case as a trained layer would see them.

    x, dt, B and C are in `dtype`, parameters in float32 (float64 beside float64); drawn in float64.
    """
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, to: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(to)

    tokens = (case.batch, case.length)
    return {
        "x": normal(*tokens, case.heads, case.head_dim, to=dtype),
        "dt": normal(*tokens, case.heads, to=dtype),
        "A": -(0.5 + 7.5 * torch.rand(case.heads, generator=generator, dtype=torch.float64, device=device)).to(wide),
        "B": normal(*tokens, case.groups, case.state_dim, to=dtype),
        "C": normal(*tokens, case.groups, case.state_dim, to=dtype),
        "D": normal(case.heads, to=wide),
        "dt_bias": normal(case.heads, to=wide) - 2,
    }


def run(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Call the operator with all that is optional."""
    return (nc_ssd(**inputs, dt_softplus=True),)
