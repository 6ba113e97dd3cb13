"""The shapes the norms are tested and timed at, each with the reason it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

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

TIMED_GPU = (
    Case((16384, 1024), 1024, "a language model of width 1024: 8 x 2048 tokens"),
    Case((128 * 197, 192), 192, "vim_tiny on 224 x 224 pixels, batch 128"),
    Case((128 * 197, 384), 384, "vim_small on 224 x 224 pixels, batch 128"),
)


def exponentials(case: Case) -> int:
    """Return a forward's: two a channel of the gated norm, for SiLU."""
    return 2 * prod(case.shape)


def moved_bytes(inputs: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> int:
    """Return what a forward reads and writes: both norms read x and the weight."""
    twice = inputs["x"].nbytes + inputs["weight"].nbytes
    return twice + sum(value.nbytes for value in [*inputs.values(), *outputs])


def make_inputs(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return x, weight, residual and z of a case: x and z in `dtype`, the others in float32, drawn in float64."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual, z = (
        torch.randn(case.shape, generator=generator, dtype=torch.float64, device=device) for _ in range(3)
    )
    weight = torch.rand(case.shape[-1], generator=generator, dtype=torch.float64, device=device) + 0.5
    return {"x": x.to(dtype), "weight": weight.to(wide), "residual": residual.to(wide), "z": z.to(dtype)}


def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Call the fused addition and norm, and the gated norm."""
    x, weight = inputs["x"], inputs["weight"]
    return *rms_norm(x, weight, residual=inputs["residual"]), gated_rms_norm(x, weight, inputs["z"])


PEER = "mamba_ssm"


def peer(load: Callable[[str], Any], inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[..., Any]]:
    """Return inputs and function of mamba_ssm's two Triton norms."""
    norm = load("mamba_ssm.ops.triton.layer_norm:rms_norm_fn")
    gated = load("mamba_ssm.ops.triton.layernorm_gated:rmsnorm_fn")

    def both(x: Tensor, weight: Tensor, residual: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        y, new_residual = norm(x, weight, None, residual=residual, eps=1e-5, prenorm=True)
        return y, new_residual, gated(x, weight, None, z=z, eps=1e-5, norm_before_gate=False)

    return inputs, both
