"""The shapes ssd is tested and timed at, each with the reason it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels.ssd import ssd


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
    Case(2, 70, 4, 16, 2, 16, "two chunks of 35, two heads a group"),
    Case(1, 64, 2, 64, 1, 64, "one full chunk at the usual sizes: no state is carried"),
    Case(2, 1, 3, 5, 3, 7, "one step, as in decoding; as many groups as heads; beside every SIMD width"),
    Case(1, 131, 2, 33, 1, 20, "three chunks, the last shorter; one column more than two registers"),
    Case(3, 17, 6, 8, 2, 48, "states wider than heads, one position more than a padded tile"),
    Case(6, 130, 1, 1, 1, 1, "scalar recurrences; of one alone, what is summed may cancel"),
)

TIMED = (
    Case(2, 1024, 8, 64, 1, 64, "a small language model: dim 256, expanded by 2"),
    Case(64, 65, 6, 64, 1, 64, "vision, 32 x 32 pixels: 64 patches and a class token, dim 192 expanded by 2"),
    Case(16, 197, 12, 64, 1, 64, "vision, 224 x 224 pixels: 196 patches and a class token, dim 384 expanded by 2"),
    Case(1, 2048, 24, 64, 1, 128, "the sizes of Mamba-2 130M"),
    Case(2, 1024, 8, 16, 1, 16, "small heads and states"),
)


def make_inputs(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return x, dt, A, B, C, D, z, dt_bias and initial_state of a case as a trained layer would see them.

    x, dt, B, C and z are in `dtype`, parameters and states in float32 (float64 beside float64); drawn in float64.
    """
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, to: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(to)

    tokens, heads = (case.batch, case.length), (case.heads, case.head_dim)
    return {
        "x": normal(*tokens, *heads, to=dtype),
        "dt": normal(*tokens, case.heads, to=dtype),
        "A": -(0.5 + 7.5 * torch.rand(case.heads, generator=generator, dtype=torch.float64, device=device)).to(wide),
        "B": normal(*tokens, case.groups, case.state_dim, to=dtype),
        "C": normal(*tokens, case.groups, case.state_dim, to=dtype),
        "D": normal(case.heads, to=wide),
        "z": normal(*tokens, *heads, to=dtype),
        "dt_bias": normal(case.heads, to=wide) - 2,
        "initial_state": normal(case.batch, *heads, case.state_dim, to=wide),
    }


def make_weights(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return weight and own_weight of a case as Mamba-3 has them, positive, the second less; drawn in float64.

    Not from any seed: in some draws dA and d dt_bias, one number a head, cancel to 1e-3 of what they add up.
    """
    generator = torch.Generator(device).manual_seed(seed + 2)
    shape = 2, case.batch, case.length, case.heads
    own, rest = F.softplus(torch.randn(shape, generator=generator, dtype=torch.float64, device=device) - 2).to(dtype)
    return {"weight": own + rest, "own_weight": own}


def run(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Call the operator with all that is optional."""
    return ssd(**inputs, dt_softplus=True, return_final_state=True)
