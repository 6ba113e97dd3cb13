"""The registered sizes of the causal Mamba for DNA.

Source: Gu and Dao 2023, "Mamba" (arXiv 2312.00752), appendix E.3: blocks x channels of the size sweep, every block
there being two here; d128_n4 is that of the GenomicBenchmarks table in Schiff et al. 2024; d64_n4 and below are ours.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mambaverse.models import register_model
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.factory import ALSO, build

SIZES = (
    (64, 2), (64, 4), (64, 8), (96, 10), (128, 4), (128, 12), (192, 14), (256, 16), (384, 20), (512, 24),
)  # fmt: skip


def _register(dim: int, depth: int) -> None:
    def factory(pretrained: bool = False, **overrides: Any) -> nn.Module:
        defaults = {"dim": dim, "depth": depth, "mixer": "s6", "causal": True}
        return build(factory.__name__, pretrained, {**defaults, **overrides})

    factory.__name__ = factory.__qualname__ = f"dna_mamba_d{dim}_n{depth}"
    factory.__doc__ = f"Causal Mamba of {dim} channels and {depth} blocks for DNA."
    register_model(domain="dna", model=DnaModel, also=ALSO)(factory)


for _dim, _depth in SIZES:
    _register(_dim, _depth)
