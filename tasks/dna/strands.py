"""The other strand of a batch, and the blocks of the published Caduceus-PS, in which the two strands change places.

A model of both strands carries a, the tokens of a sequence, and b, those of its reverse complement, as one batch of 2 B
rows (see backbone.py). A block f with its norm N and the sum r that it carries is applied to each, and R turns tokens
over: reversed along the length and along the channels.

    new models          a, b <- f(N(a + r_a)), f(N(b + r_b))              r_a, r_b <- a + r_a, b + r_b
    SwappedBlock        a, b <- f(N(R(b + r_b))), f(N(R(a + r_a)))        r_a, r_b <- R(b + r_b), R(a + r_a)

The second is what Caduceus computes with `fused_add_norm=True`, the setting of its published weights: there the halves
of the channels are exchanged before every norm but the last. It is as equivariant as the first, and another function of
the same weights.

Source: Schiff et al. 2024, "Caduceus" (arXiv 2403.03234), section 3.2, and the code beside it (RCPSMambaBlock).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambaverse.blocks import Block
from mambaverse.ensemble import members_of
from mambaverse.mixers.bidirectional import reversed_order
from mambaverse.tasks.dna.tokens import A, T, is_base


class SwappedBlock(Block):
    """A `Block` on rows [a; b] of two strands, each of which goes on with what the other was, turned over.

    Arguments, shapes and results are those of `Block`; the number of rows, or of packed sequences, is even, and those
    of the second half are as long as those of the first.
    """

    def forward(
        self, x: Tensor, residual: Tensor | None = None, spatial_shape: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Block.forward`."""
        return super().forward(_swapped(x), None if residual is None else _swapped(residual), spatial_shape)

    def forward_sequence(
        self,
        x: Tensor,
        residual: Tensor | None,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor, Any]:
        """See `Block.forward_sequence`."""
        order = None if cu_seqlens is None else _swapped_order(cu_seqlens, x.shape[1])
        x, residual = _swapped(x, order), None if residual is None else _swapped(residual, order)
        return super().forward_sequence(x, residual, state, cu_seqlens, spatial_shape, return_state)


def complement(ids: Tensor) -> Tensor:
    """Return ids of any shape with A and T, C and G exchanged; all others stay."""
    return torch.where(is_base(ids), A + T - ids, ids)


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse x (B, L, ...) along its length, or each row's first `lengths[b]` entries; padding stays where it is."""
    if lengths is None:
        return x.flip(1)
    at = torch.arange(x.shape[1], device=x.device)
    order = torch.where(at < lengths[:, None], lengths[:, None] - 1 - at, at)  # (B, L)
    return x[torch.arange(len(x), device=x.device)[:, None], order]


def reads_both(model: nn.Module) -> bool:
    """Whether what a model, or each member of an ensemble, says is the same for both strands: `both_strands`."""
    return all(bool(getattr(member, "both_strands", False)) for member in members_of(model))


def _swapped(x: Tensor, order: Tensor | None = None) -> Tensor:
    """Return [R b; R a] of rows [a; b] (2 B, L, D), or of packed ones (1, L, D), given where their tokens come from."""
    if order is not None:
        return x[:, order].flip(-1)
    return x.unflatten(0, (2, -1)).flip(0, 2, 3).flatten(0, 1)


def _swapped_order(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return the places (L,) that the tokens of 2 B packed sequences come from."""
    half = length // 2
    order = reversed_order(cu_seqlens[: len(cu_seqlens) // 2 + 1], half)
    return torch.cat([order + half, order])
