"""What the factories of all DNA models share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mambaverse.errors import UserError
from mambaverse.tasks.dna.backbone import DnaClassifier


def build(name: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the classifier of `arguments`.

    Raises:
        UserError: `pretrained`, since nothing is published yet; options that do not fit each other.
    """
    if pretrained:
        raise UserError(f"model {name!r}: there are no published weights yet; train it, or load a checkpoint")
    return DnaClassifier(**arguments)
