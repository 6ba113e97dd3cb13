"""Genomes in files: FASTA with random access, regions, BED, VCF, GenBank features and bedGraph tracks.

The names here are imported on first use: `python -m mambaverse.tasks.dna.genome.bgzf` finds no second copy of itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambaverse.tasks.dna.genome.fasta import Genome, open_genome
    from mambaverse.tasks.dna.genome.regions import Region, parse_region

_HOMES = {"Genome": "fasta", "Region": "regions", "open_genome": "fasta", "parse_region": "regions"}

__all__ = ["Genome", "Region", "open_genome", "parse_region"]


def __getattr__(name: str) -> Any:
    """Import a public name from its home (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
