"""A linear score beside the deep one: a learnt weight for each k-mer at each place of sequences of one length.

    scores = deep(x) + sum over places t and k of W[t, k-mer of x at t]

What one place says for itself is learnt by the sum, in few steps and from few sequences; what places say together is
left to the deep model.

Source: Cheng et al. 2016, "Wide & Deep Learning for Recommender Systems" (arXiv 1606.07792), section 3; the weights of
single bases are those of a position weight matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.tasks.dna.stems import kmer_rows


class PlaceScores(nn.Module):
    """Scores of the k-mers that begin at each place, k from 1 to `longest`, added up.

    A k-mer that touches an N, or reaches over the end, scores nothing.

    Args:
        places: Longest sequence in bases.
        longest: The largest k.
        num_classes: Scores.
        drop_rate: Share of the k-mers that are left out while training.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        places: int,
        longest: int,
        num_classes: int,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spans = tuple(range(1, longest + 1))
        rows = sum(4**k for k in self.spans)
        self.weight = nn.Parameter(torch.zeros(places, rows, num_classes, device=device, dtype=dtype))
        self.drop_rate = drop_rate

    def forward(self, ids: Tensor) -> Tensor:
        """Return (B, num_classes) of ids (B, L)."""
        scores = self.parts(ids)
        if self.training and self.drop_rate:
            scores = F.dropout(torch.ones_like(scores[..., :1]), self.drop_rate) * scores
        return scores.sum((1, 2))

    def parts(self, ids: Tensor) -> Tensor:
        """Return what each k-mer of ids (B, L) says, (B, L, number of k, num_classes), at the place where it begins."""
        rows = kmer_rows(ids, self.spans)
        table = F.pad(self.weight, (0, 0, 0, 1))  # at each place a row of zeros, for where there is no k-mer
        first = torch.arange(rows.shape[1], device=ids.device)[:, None] * table.shape[1]
        return F.embedding(rows + first, table.flatten(0, 1))
