"""The registered sizes of Caduceus: bidirectional, one projection in and out for both directions (mixer `vim`, added).

`ph` reads one strand; both are averaged after training, if at all (`data.strands=both`). `ps` reads both in one model,
whose scores do not depend on the strand; it has the same parameters. `checkpoint_path=` reads the files of the authors
(see checkpoints.py); those with untied weights need `mixer="s6"`, a Mamba for each direction.

Source: Schiff et al. 2024, "Caduceus" (arXiv 2403.03234), table 3; d64 and below are ours, for a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mambaverse.models import register_model
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.factory import ALSO, build

SIZES = ((32, 2), (48, 2), (64, 2), (64, 4), (118, 4), (128, 4), (256, 4), (256, 8), (256, 16))  # dim, depth
ADD = {"vim": {"merge": "add"}, "bidirectional": {"merge": "add"}}  # the two directions; Vision Mamba halves the sum


def _register(strand: str, dim: int, depth: int) -> None:
    def factory(pretrained: bool = False, **overrides: Any) -> nn.Module:
        given: Mapping[str, Mapping[str, Any]] = overrides.pop("mixer_args", None) or {}
        mixer_args = {name: {**ADD.get(name, {}), **given.get(name, {})} for name in {*ADD, *given}}
        defaults = {"dim": dim, "depth": depth, "mixer": "vim", "both_strands": strand == "ps"}
        return build(factory.__name__, pretrained, {**defaults, **overrides, "mixer_args": mixer_args})

    factory.__name__ = factory.__qualname__ = f"caduceus_{strand}_d{dim}_n{depth}"
    which = "both strands, equivariant" if strand == "ps" else "one strand"
    factory.__doc__ = f"Caduceus of {dim} channels and {depth} blocks; {which}."
    register_model(domain="dna", model=DnaModel, also=ALSO)(factory)


for _strand in ("ph", "ps"):
    for _dim, _depth in SIZES:
        _register(_strand, _dim, _depth)
