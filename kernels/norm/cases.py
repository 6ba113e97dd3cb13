"""The shapes the norms are tested and timed at, each with the reason it is there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mambaverse.kernels.norm import gated_rms_norm, rms_norm


@dataclass(frozen=True)
class Case:
    """One shape: x is `shape`, its last axis D; `group_size` divides D."""

    shape: tuple[int, ...]
    group_size: int
    reason: str


TESTED = (
    Case((2, 70, 33), 11, "more than two blocks of 64 rows, channels beside every SIMD width, three groups"),
    Case((65, 64), 16, "one row more than a block"),
    Case((1, 1, 96), 96, "one token, as in decoding"),
    Case((7,), 7, "no axis but the channels"),
    Case((2, 3, 2, 5), 1, "four axes; groups of one"),
    Case((3, 1), 1, "one channel"),
)

TIMED = (
    Case((2048, 256), 256, "a small language model: 2 x 1024 tokens"),
    Case((64 * 65, 192), 192, "vim_tiny on 32 x 32 pixels, batch 64"),
    Case((25216, 192), 192, "vim_tiny on 224 x 224 pixels, batch 128"),
)


def make_inputs(case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return x, weight, residual and z of a case: x and z in `dtype`, the others in float32, drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual, z = (torch.randn(case.shape, generator=generator, dtype=torch.float64) for _ in range(3))
    weight = torch.rand(case.shape[-1], generator=generator, dtype=torch.float64) + 0.5
    return {"x": x.to(dtype), "weight": weight.to(wide), "residual": residual.to(wide), "z": z.to(dtype)}


def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Call the fused addition and norm, and the gated norm."""
    x, weight = inputs["x"], inputs["weight"]
    return *rms_norm(x, weight, residual=inputs["residual"]), gated_rms_norm(x, weight, inputs["z"])
