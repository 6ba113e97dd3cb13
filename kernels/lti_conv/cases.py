"""The shapes lti_conv is tested and timed at, each with the reason it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.lti_conv import lti_conv


@dataclass(frozen=True)
class Case:
    """One shape: u (batch, length, dim), A (dim, num_states)."""

    batch: int
    length: int
    dim: int
    num_states: int
    reason: str


TESTED = (
    Case(2, 70, 33, 5, "channels beside the 16 of a work item, length beside the four steps of a load"),
    Case(40, 4, 2, 3, "more sequences than groups of partial sums, exactly four steps"),
    Case(3, 7, 16, 1, "one state, one full block of channels"),
    Case(2, 1, 5, 4, "one step, as in decoding"),
    Case(1, 3, 1, 2, "one channel, shorter than a load"),
)

LONG = (
    Case(1, 1024, 8, 32, "usual S4D: 64 states of which 32 are kept, phases up to 10 radians a step"),
    Case(1, 8192, 8, 32, "phases that wind 80000 radians"),
)

TIMED = (
    Case(2, 1024, 512, 32, "a small language model with S4D's default of 64 states"),
    Case(64, 65, 192, 32, "vim_tiny's tokens on 32 x 32 pixels"),
    Case(4, 1024, 256, 8, "few states, where the recurrence gains most on the FFT"),
    Case(2, 8192, 64, 32, "long sequences, where the FFT gains"),
)


def make_inputs(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return u, A, B, C, dt and D of a case: S4D-Lin with u in `dtype`, drawn in float64."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (case.dim, case.num_states)
    B, C = (torch.randn(2, *shape, generator=generator, dtype=torch.float64, device=device).to(wide) for _ in range(2))
    frequency = torch.pi * torch.arange(case.num_states, dtype=wide, device=device).expand(shape)
    return {
        "u": torch.randn(case.batch, case.length, case.dim, generator=generator, dtype=torch.float64, device=device).to(
            dtype
        ),
        "A": torch.complex(torch.full_like(frequency, -0.5), frequency),
        "B": torch.complex(*B),
        "C": torch.complex(*C),
        "dt": (0.001 * 100 ** torch.rand(case.dim, generator=generator, dtype=torch.float64, device=device)).to(wide),
        "D": torch.randn(case.dim, generator=generator, dtype=torch.float64, device=device).to(wide),
    }


def run(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Call the operator with all that is optional but an initial state."""
    return lti_conv(**inputs, return_final_state=True)
