"""Several classifiers as one: each learns by itself, and what they say is averaged.

    training:    scores (B, M, classes), every member's own, each with the gradient that it would have alone
    evaluation:  scores (B, classes) = log(1/M Σ_m softmax(scores_m)), so that their softmax is the mean probability

Small models that learn from few samples differ more by their seed than by their recipe; M of them err less than one,
and models of different kinds less than either.

Source: Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles"
(arXiv 1612.01474), section 2.4, without adversarial examples; all members see the same batches here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambaverse.errors import UserError


class _Identity(torch.autograd.Function):
    """x, with the gradient scale g + decay x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, decay: float) -> Tensor:
        ctx.scale, ctx.decay = scale, decay
        ctx.save_for_backward(*[x] if decay else [])
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = ctx.scale * grad
        return torch.add(grad, ctx.saved_tensors[0], alpha=ctx.decay) if ctx.decay else grad, None, None


def shrunk(weight: Tensor, decay: float) -> Tensor:
    """Return `weight`, to the gradient of which decay · weight is added: that of a penalty decay/2 Σ weight².

    Unlike the weight decay of AdamW it is weighed against the gradient of the loss, so that the weights of what is seen
    rarely stay small.
    """
    return _Identity.apply(weight, 1.0, decay)


def joined(scores: Sequence[Tensor], training: bool) -> Tensor:
    """Return what the head of this file says of the `scores` (B, ..., classes) of several models.

    The mean over all rows of (B, M, ..., classes) is the loss to take while training.
    """
    if training:
        return _Identity.apply(torch.stack(list(scores), dim=1), float(len(scores)), 0.0)
    shares = torch.stack([s.float().log_softmax(-1) for s in scores])
    return shares.logsumexp(0) - math.log(len(scores))


class LinearScores(nn.Module):
    """What linear classifiers that learn beside a deep model share: weight and bias, zeros at first, and a penalty.

    Args:
        shape: Of the features.
        num_classes: Scores.
        decay: Of the penalty decay/2 Σ weight², per sample.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: a penalty that would be none.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        decay: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= decay < math.inf:
            raise UserError(f"wide_decay: expected a finite number of at least 0, got {decay!r}")
        self.weight = nn.Parameter(torch.empty(*shape, num_classes, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype))
        self.decay = decay
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def penalised(self) -> Tensor:
        """Return the weight (*shape, num_classes), in training with the penalty's gradient."""
        return shrunk(self.weight, self.decay) if self.training and self.decay else self.weight


class Ensemble(nn.Module):
    """Models with the same inputs and classes.

    Args:
        members: Two or more; what they return is (B, classes), or in training (B, ..., classes).
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """Return what the head of this file says of the members' scores.

        Args:
            inputs: Passed to every member.
            options: Likewise.
        """
        return joined([member(*inputs, **options) for member in self.members], self.training)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay would harm in a member."""
        return {
            f"members.{i}.{name}"
            for i, member in enumerate(self.members)
            for name in getattr(member, "no_weight_decay", set)()  # timm's models have it, others need not
        }


def members_of(model: nn.Module) -> list[nn.Module]:
    """Return the members of an ensemble; any other model is its own only member."""
    return list(model.members) if isinstance(model, Ensemble) else [model]
