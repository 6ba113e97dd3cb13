"""A linear classifier beside the deep one: a learnt weight for each k-mer at each place of sequences of one length.

    scores = bias + sum over places t and k of W[t, k-mer of x at t],    penalty decay/2 Σ W²

It is logistic regression, learns by itself (see ensemble.py), and errs on other sequences than a deep model: what one
place says for itself is learnt from few of them, what places say together is left to the other.

The weights of single bases are those of a position weight matrix; those of all k up to a longest span the features of
the weighted degree kernel, Rätsch and Sonnenburg 2004, "Accurate splice site detection for Caenorhabditis elegans".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.ensemble import LinearScores
from mambaverse.tasks.dna.stems import kmer_rows


class PlaceScores(LinearScores):
    """Scores of the k-mers that begin at each place, k from 1 to `longest`, added up.

    A k-mer that touches an N, or reaches over the end, scores nothing.

    Args:
        places: Longest sequence in bases.
        longest: The largest k.
        num_classes: Scores.
        decay: Of the penalty on the weights, per sequence.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        places: int,
        longest: int,
        num_classes: int,
        decay: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spans = tuple(range(1, longest + 1))
        super().__init__((places, sum(4**k for k in spans)), num_classes, decay, device, dtype)
        self.spans = spans
        self.terms = nn.Identity()  # for hooks: what each k-mer says (B, L, number of k, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Return (B, num_classes) of ids (B, L)."""
        rows = kmer_rows(ids, self.spans)
        table = F.pad(self.penalised(), (0, 0, 0, 1))  # at each place a row of zeros, for where there is no k-mer
        first = torch.arange(rows.shape[1], device=ids.device)[:, None] * table.shape[1]
        return self.terms(F.embedding(rows + first, table.flatten(0, 1))).sum((1, 2)) + self.bias
