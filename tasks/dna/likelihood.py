"""How likely DNA is to a language model: of bases that are masked, of each base after those before it, of windows.

    masked         log p(x[t] | all others),  t masked
    pseudo         Σ_t log p(x[t] | those not masked), every base masked once: those whose place is r mod 8, r = 0..7
    causal         Σ_{t > 0} log p(x[t] | x[0..t-1]);  the first base has nothing before it and is not counted

Probabilities are those of the model's whole vocabulary. Bases that are N say nothing and are left out of each sum. An
eighth of the bases masked at a time is near the 15 % of masked training; that takes 8 passes of a window where masking
one base at a time takes as many as it has bases.

Sources: Salazar et al. 2020, "Masked Language Model Scoring" (arXiv 1910.14659), on pseudo-log-likelihoods.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambaverse.tasks.dna.reader import Reader
from mambaverse.tasks.dna.tokens import MASK, is_base

MASK_EVERY = 8  # bases, of which one is masked at a time


def next_base(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return log p of each base after those before it, float64 (B, L); 0 for the first one and where there is no base.

    Args:
        log_probs: Of the next base at each place, (B, L, 16); sums of ten thousand need more than float32.
        ids: (B, L).
    """
    said = log_probs[:, :-1].gather(2, ids[:, 1:, None])[..., 0].double()
    return torch.nn.functional.pad(torch.where(is_base(ids[:, 1:]), said, 0.0), (1, 0))


def masked_sites(reader: Reader, ids: Tensor, sites: Sequence[Sequence[int]]) -> Tensor:
    """Return log p (B, K, 16) at the places that are masked in each row, all of a row's at once.

    Args:
        reader: Of a model with the head "mlm".
        ids: (B, L).
        sites: Places, one list a row; the result is filled up with 0 to the longest.
    """
    rows = torch.tensor([row for row, places in enumerate(sites) for _ in places], device=ids.device)
    columns = torch.tensor([place for places in sites for place in places], device=ids.device)
    masked = ids.clone()
    masked[rows, columns] = MASK
    found = reader.log_probs(masked)[rows, columns]
    longest = max(map(len, sites))
    order = torch.tensor([at for places in sites for at in range(len(places))], device=ids.device)
    out = found.new_zeros(len(ids), longest, found.shape[-1])
    out[rows, order] = found
    return out


def pseudo(reader: Reader, ids: Tensor, places: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return log p of each base while it is masked, float64 (B, L), 0 where there is no base.

    Args:
        reader: Of a model with the head "mlm".
        ids: (B, L).
        places: Numbers of the bases (B, L) or (L,): those that are equal modulo 8 are masked together.
        counted: Which bases are asked for, bool (B, L); no others are masked. None: all.
    """
    total = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    asked = is_base(ids) if counted is None else is_base(ids) & counted
    for phase in range(MASK_EVERY):
        chosen = asked & (places % MASK_EVERY == phase)
        log_probs = reader.log_probs(torch.where(chosen, MASK, ids))
        said = log_probs.gather(2, ids[..., None])[..., 0].double()
        total = torch.where(chosen, said, total)
    return total
