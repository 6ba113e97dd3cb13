"""The shapes nc_ssd is tested and timed at, each with the reason it is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.nc_ssd import nc_ssd
from mambaverse.kernels.ssd.cases import Case
from mambaverse.kernels.ssd.cases import make_inputs as ssd_inputs

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
    """Return x, dt, A, B, C, D and dt_bias of a case, those of ssd."""
    inputs = ssd_inputs(case, seed=seed, dtype=dtype, device=device)
    return {name: value for name, value in inputs.items() if name not in ("z", "initial_state")}


def run(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Call the operator with all that is optional."""
    return (nc_ssd(**inputs, dt_softplus=True),)
