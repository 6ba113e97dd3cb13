"""The shapes at which selective_scan is tested and timed, each with the reason it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.selective_scan import selective_scan


@dataclass(frozen=True)
class Case:
    """A shape of the operator. `groups` 0 means B and C without a group axis."""

    name: str
    reason: str
    batch: int
    length: int
    dim: int
    state_dim: int
    groups: int = 0
    is_complex: bool = False


TESTED = (
    Case("one_step", "length 1: no step before it, no chunk boundary", 2, 1, 3, 2),
    Case("odd", "nothing is a multiple of a SIMD width, a block or a chunk", 3, 13, 5, 3),
    Case("chunks", "two chunk boundaries and two blocks of channels, the last of each partly filled", 2, 131, 70, 4),
    Case("chunk_exact", "the length is a multiple of the chunk, the width of the block", 1, 128, 64, 2),
    Case("one_state", "N = 1, as in VMamba", 2, 67, 33, 1),
    Case("wide_state", "more states than channels", 1, 20, 6, 40),
    Case("groups", "grouped B and C; a group is narrower than a block", 2, 70, 24, 4, groups=3),
    Case("one_group", "a group axis of 1 equals none", 1, 9, 8, 4, groups=1),
    Case("many_sequences", "more sequences than backward has parts", 37, 3, 4, 2),
    Case("complex", "complex A over a chunk boundary", 2, 70, 10, 4, is_complex=True),
    Case("complex_groups", "complex A with groups, two blocks of channels", 1, 9, 132, 3, groups=2, is_complex=True),
)

TIMED = (
    Case("paper", "the S6 operator of a model of width 384", 2, 1024, 768, 16),
    Case("vision", "Vim-nano on 32-pixel images: short sequences, the batch is the parallel axis", 64, 65, 192, 16),
    Case("one_state", "N = 1, as in VMamba: bound by memory and elementwise functions", 2, 1024, 768, 1),
    Case("wide_state", "N = 64: bound by the recurrence", 2, 1024, 768, 64),
    Case("groups", "grouped B and C, as for the four directions of VMamba", 2, 1024, 768, 16, groups=4),
    Case("long", "one long sequence with few channels: little to do in parallel", 1, 8192, 192, 16),
    Case("complex", "complex A", 2, 1024, 768, 16, is_complex=True),
)

TIMED_GPU = (
    Case("lm_8x2k", "a language model of width 1024, eight sequences", 8, 2048, 2048, 16),
    Case("lm_1x2k", "the same, one sequence: few programs", 1, 2048, 2048, 16),
    Case("long", "one long sequence with few channels: the length is all there is in parallel", 1, 131072, 512, 16),
    Case("vim_224", "Vim-tiny on 224 x 224 pixels", 128, 197, 384, 16),
    Case("vim_32", "Vim-tiny on 32 x 32 pixels in patches of 4", 512, 65, 384, 16),
    Case("vim_1248", "Vim-tiny on one picture of 1248 x 1248 pixels", 1, 6085, 384, 16),
    Case("lm_8x8k", "a language model of width 768, longer sequences", 8, 8192, 1536, 16),
)


def checked_at(case: Case) -> Case:
    """Return the case itself or, where the reference's states would fill a GPU, a shorter one of its width."""
    if case.batch * case.length * case.dim * case.state_dim <= 2**28:
        return case
    return replace(case, batch=min(case.batch, 2), length=min(case.length, 300))


def exponentials(case: Case) -> int:
    """Return a forward's: a decay for each state (complex: and its sine and cosine), two for softplus and gate each."""
    return case.batch * case.length * case.dim * (case.state_dim * (3 if case.is_complex else 1) + 4)


def make_inputs(
    case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Return random inputs of a case, everything optional included, as a trained layer would see them.

    Args:
        case: The shape.
        seed: Seeds the numbers, which are drawn in float64 and then rounded.
        dtype: Of u, delta, B, C and z; parameters and states are float32, or float64 if this is.
        device: Where they are drawn; each has its own numbers.

    Returns:
        The tensors u, delta, A, B, C, D, z, delta_bias, initial_state. Δ is about 0.01 to 1, Re A in [-8, -0.5].
    """
    generator = torch.Generator(device).manual_seed(seed)
    b, length, dim, n = case.batch, case.length, case.dim, case.state_dim
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, to: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(to)

    def maybe_complex(*shape: int, to: torch.dtype) -> Tensor:
        if not case.is_complex:
            return normal(*shape, to=to)
        return torch.complex(normal(*shape, to=wide), normal(*shape, to=wide))

    grouped = (b, length, case.groups, n) if case.groups else (b, length, n)
    decay = -(0.5 + 7.5 * torch.rand(dim, n, generator=generator, dtype=torch.float64, device=device)).to(wide)
    frequency = torch.pi * torch.arange(n, dtype=wide, device=device).expand(dim, n)
    return {
        "u": normal(b, length, dim, to=dtype),
        "delta": normal(b, length, dim, to=dtype),
        "A": torch.complex(decay, frequency) if case.is_complex else decay,
        "B": maybe_complex(*grouped, to=dtype),
        "C": maybe_complex(*grouped, to=dtype),
        "D": normal(dim, to=wide),
        "z": normal(b, length, dim, to=dtype),
        "delta_bias": normal(dim, to=wide) - 2,
        "initial_state": maybe_complex(b, dim, n, to=wide),
    }


def run(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Call the operator with all that is optional."""
    return selective_scan(**inputs, delta_softplus=True, return_final_state=True)


PEER = "mamba_ssm"
PEER_DIFFERS = "it takes no initial state and returns no final one"


def peer(load: Callable[[str], Any], inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[..., Any]] | None:
    """Return inputs and function of mamba_ssm's CUDA kernel: length last, no initial state; None for complex A."""
    if inputs["A"].is_complex():
        return None
    scan = load("mamba_ssm.ops.selective_scan_interface:selective_scan_fn")
    tensors = {name: value for name, value in inputs.items() if name != "initial_state"}
    for name in ("u", "delta", "z"):
        tensors[name] = inputs[name].transpose(1, 2).contiguous()  # (B, D, L)
    for name in ("B", "C"):
        tensors[name] = inputs[name].movedim(1, -1).contiguous()  # (B, N, L) or (B, G, N, L)
    return tensors, lambda **given: scan(**given, delta_softplus=True)
