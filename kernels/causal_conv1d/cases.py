"""The shapes causal_conv1d is tested and timed at, each with the reason it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.causal_conv1d import causal_conv1d


@dataclass(frozen=True)
class Case:
    """One shape: x (batch, length, dim), weight (dim, width)."""

    batch: int
    length: int
    dim: int
    width: int
    reason: str


TESTED = (
    Case(2, 70, 33, 4, "two work items a sequence, channels beside every SIMD width"),
    Case(1, 200, 8, 4, "four work items of one sequence"),
    Case(3, 2, 16, 4, "shorter than the filter: the final state keeps rows of the initial one"),
    Case(2, 1, 5, 4, "one step, as in decoding"),
    Case(2, 9, 7, 1, "no memory: a state without rows"),
    Case(2, 13, 6, 2, "the shortest filter with a memory"),
    Case(1, 65, 3, 3, "odd filter, one position more than a work item has"),
    Case(1, 80, 4, 8, "long filter"),
    Case(2, 1, 1, 9, "one channel, all but one input from the state"),
)

TIMED = (
    Case(2, 1024, 512, 4, "a small language model: dim 256, expanded by 2"),
    Case(64, 65, 384, 4, "vim_tiny on 32 x 32 pixels: 64 patches and a class token"),
    Case(128, 197, 384, 4, "vim_tiny on 224 x 224 pixels"),
)

TIMED_GPU = (
    Case(8, 2048, 2048, 4, "a language model of width 1024, eight sequences"),
    Case(128, 197, 384, 4, "vim_tiny on 224 x 224 pixels"),
    Case(1, 131072, 512, 4, "one long sequence"),
)


def exponentials(case: Case) -> int:
    """Return a forward's: two an output, for SiLU."""
    return 2 * case.batch * case.length * case.dim


def make_inputs(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return x, weight, bias and initial_state of a case: x and the state in `dtype`, drawn in float64."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, to: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(to)

    return {
        "x": normal(case.batch, case.length, case.dim, to=dtype),
        "weight": normal(case.dim, case.width, to=wide) / case.width**0.5,
        "bias": normal(case.dim, to=wide),
        "initial_state": normal(case.batch, case.width - 1, case.dim, to=dtype),
    }


def run(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Call the operator with all that is optional."""
    return causal_conv1d(**inputs, activation="silu", return_final_state=True)


PEER = "causal_conv1d"
PEER_DIFFERS = "it takes no initial state and returns no final one"


def peer(load: Callable[[str], Any], inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[..., Any]] | None:
    """Return inputs and function of causal_conv1d's kernel for channels last: no states; None but for widths 2 to 4."""
    if not 2 <= inputs["weight"].shape[1] <= 4:
        return None
    conv = load("causal_conv1d:causal_conv1d_fn")
    tensors = {"x": inputs["x"].transpose(1, 2), "weight": inputs["weight"], "bias": inputs["bias"]}  # x (B, D, L)
    return tensors, lambda **given: conv(**given, activation="silu")
