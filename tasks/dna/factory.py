"""What the factories of all DNA models share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mambaverse.errors import UserError, warn
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.checkpoints import SWAP, load_checkpoint, read_checkpoint

ALSO = ("checkpoint_path",)  # arguments of the factories that are none of the model's class


def build(name: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the model of `arguments`, with the weights of `checkpoint_path` if one is given.

    A file of Caduceus-PS whose strands change places (see strands.py) sets `rcps_swap_halves`, unless that is given.

    Raises:
        UserError: `pretrained`, since nothing is published yet; options that do not fit each other.
        CheckpointError: a file that cannot be read, or is of another model.
    """
    if pretrained:
        raise UserError(f"model {name!r}: there are no published weights yet; train it, or load a checkpoint")
    arguments = dict(arguments)
    path = arguments.pop("checkpoint_path", None)
    if path is None:
        return DnaModel(**arguments)
    file, is_given = read_checkpoint(path), SWAP in arguments
    if file.swaps and arguments.get("both_strands") and not is_given:
        warn(f"{file.source}: a fused Caduceus-PS; rcps_swap_halves is set, and has to be for whatever is saved of it")
        arguments[SWAP] = True
    model = DnaModel(**arguments)
    load_checkpoint(model, file, swap_as_built=is_given)
    return model
