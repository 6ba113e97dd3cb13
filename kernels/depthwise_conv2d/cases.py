"""The shapes depthwise_conv2d is tested and timed at, each with the reason it is there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mambaverse.kernels.depthwise_conv2d import depthwise_conv2d


@dataclass(frozen=True)
class Case:
    """One shape: x (batch, height, width, dim), weight (dim, rows, columns)."""

    batch: int
    height: int
    width: int
    dim: int
    rows: int
    columns: int
    reason: str


TESTED = (
    Case(2, 5, 7, 33, 3, 3, "odd sides, channels beside every tile"),
    Case(1, 19, 18, 8, 3, 3, "more than one band of rows and block of columns"),
    Case(2, 2, 3, 5, 5, 5, "a filter that is larger than the grid"),
    Case(1, 9, 4, 6, 7, 3, "taller than it is wide"),
    Case(1, 1, 6, 3, 1, 5, "one row"),
    Case(3, 1, 1, 1, 1, 1, "one token, one channel, one tap"),
)

TIMED = (
    Case(2, 56, 56, 192, 3, 3, "the first stage of vmamba_tiny_s1l8_224, batch 2"),
    Case(64, 8, 8, 640, 3, 3, "vim_tiny with ncssd on 32 x 32 pixels, batch 64"),
)

TIMED_GPU = (
    Case(8, 78, 78, 512, 3, 3, "vim_tiny with ncssd on 1248 x 1248 pixels, batch 8"),
    Case(512, 8, 8, 640, 3, 3, "a vim of width 256 with ncssd on 32 x 32 pixels, batch 512"),
    Case(128, 56, 56, 192, 3, 3, "the first stage of vmamba_tiny_s1l8_224, batch 128"),
    Case(128, 14, 14, 768, 3, 3, "its third stage, batch 128"),
)


def exponentials(case: Case) -> int:
    """Return a forward's: two an output, for SiLU."""
    return 2 * case.batch * case.height * case.width * case.dim


def make_inputs(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return x, weight and bias of a case: x in `dtype`, parameters in float32 at least; drawn in float64."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int, to: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(to)

    return {
        "x": normal(case.batch, case.height, case.width, case.dim, to=dtype),
        "weight": normal(case.dim, case.rows, case.columns, to=wide) / (case.rows * case.columns) ** 0.5,
        "bias": normal(case.dim, to=wide),
    }


def run(inputs: dict[str, Tensor]) -> Tensor:
    """Call the operator with all that is optional."""
    return depthwise_conv2d(**inputs, activation="silu")
