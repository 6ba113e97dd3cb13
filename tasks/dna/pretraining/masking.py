"""What a language model of DNA is asked: bases that are masked, or each base from those before it.

    masked     each base (A, C, G, T) is chosen with probability p; of the chosen 80 % become [MASK], 10 % a base drawn
               from A, C, G, T, which may be the same, and 10 % stay; the target is what they were
    next       the target at place t is base t + 1, so that the first base of a window is not asked

A target that is no base, N or padding, is [PAD], which is never scored. In Caduceus' code all places are chosen alike,
the random ones are drawn from all 12 ids, and N are [PAD] for the model too: `compat`.

Source: Devlin et al. 2019, "BERT" (arXiv 1810.04805), section 3.1; Schiff et al. 2024, "Caduceus" (arXiv 2403.03234).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from mambaverse.tasks.dna.tokens import MASK, PAD, VOCAB, A, N, T, is_base

MASKED, RANDOM = 0.8, 0.1  # of what is chosen; the rest stays
BASES = T - A + 1


def mask_bases(
    ids: np.ndarray, rate: float, generator: Generator, *, compat: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the model sees, and what it is asked, uint8 (L,) each.

    Args:
        ids: Of the bases, uint8 (L,).
        rate: The probability p of a base to be chosen.
        generator: Makes all draws.
        compat: Choose and draw as Caduceus' code does.
    """
    draws = torch.rand(len(ids), generator=generator).numpy() / rate  # below 1: chosen, and how far says what becomes
    first, count = (0, len(VOCAB)) if compat else (A, BASES)
    others = torch.randint(first, first + count, (len(ids),), generator=generator, dtype=torch.uint8).numpy()
    if compat:
        ids = np.where(ids == N, np.uint8(PAD), ids)
    known = is_base(ids)
    chosen = draws < 1 if compat else (draws < 1) & known
    seen = np.where(chosen & (draws < MASKED), np.uint8(MASK), ids)
    seen = np.where(chosen & (draws >= MASKED) & (draws < MASKED + RANDOM), others, seen)
    return seen, np.where(chosen & known, ids, np.uint8(PAD))


def next_bases(ids: Tensor) -> Tensor:
    """Return the targets of ids (B, L), likewise (B, L): the base that follows, `[PAD]` where none does."""
    targets = torch.full_like(ids, PAD)
    targets[:, :-1] = ids[:, 1:]
    return torch.where(is_base(targets), targets, PAD)
