"""A linear classifier beside the deep one: weights for the bands, or coefficients, of a clip at evenly spaced times.

    scores = bias + sum over places p in [0, 1] and bands f of W[p, f] x[p (T - 1), f],    penalty decay/2 Σ W²

It is logistic regression on a clip stretched to one length, and learns by itself (see mambaverse/ensemble.py). With a
few hundred clips it errs less than a deep model does, and on others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambaverse.ensemble import LinearScores
from mambaverse.tasks.audio.augment import interpolate


class TimeScores(LinearScores):
    """Scores of spectrograms of any length.

    Args:
        bins: Bands, or coefficients, F of an input.
        times: Evenly spaced places at which it is looked at.
        num_classes: Scores.
        decay: Of the penalty on the weights, per clip.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        bins: int,
        times: int,
        num_classes: int,
        decay: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((times, bins), num_classes, decay, device, dtype)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return (B, num_classes) of x (B, T, F), of which each clip has `lengths` (B,) frames; None: T."""
        if lengths is None:
            lengths = torch.full((x.shape[0],), x.shape[1])
        else:  # the frame behind the last has no share in it, but no share of what is not finite is not finite either
            behind = torch.arange(x.shape[1], device=x.device) >= lengths.to(x.device)[:, None]
            x = x.masked_fill(behind[..., None], 0)
        last = (lengths - 1).to(x.device, torch.float32)
        at = torch.linspace(0, 1, self.weight.shape[0], device=x.device) * last[:, None]
        return torch.einsum("bpf,pfc->bc", interpolate(x, at, 1), self.penalised()) + self.bias
