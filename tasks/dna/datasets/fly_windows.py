"""Windows of fruit-fly genes: are 200 bases coding, intron, or beside the gene?

19,713 + 4,786 windows, read along the gene, of unequal classes (intron 58 %): look at macro F1. Upstream's test genes.

Source: as fly_splice.
"""

from __future__ import annotations

from random import Random

from mambaverse.datasets import register_dataset
from mambaverse.tasks.dna.datasets._augustus import Augustus
from mambaverse.tasks.dna.genes import Gene, windows


@register_dataset("dna/fly_windows")
class FlyWindows(Augustus):
    """Coding, intron or flank, of 200 bases."""

    summary = "windows of fruit-fly genes: 19,713 + 4,786 sequences of 200 bases; coding, intron, flank"
    files = {"train": "fly_windows_train", "test": "fly_windows_test"}  # noqa: RUF012

    def rows(self, gene: Gene, draw: Random) -> list[tuple[str, str]]:
        """Return (sequence, label) of a gene."""
        return windows(gene, draw)
