"""Splice sites of fruit-fly genes: 80 bases around the border of an exon, or around a GT or AG that is none.

7,158 + 1,522 sequences, read along the gene, the border in the middle: a donor (exon | GT, intron), an acceptor
(intron, AG | exon) or a decoy. The test genes are upstream's; no gene is in both sets. A one-hot SVM reads 93.2 % of
them right, one of k-mers 70.7 %: the place of a letter matters.

Source: the tutorial of AUGUSTUS (genes of chr2R, labelled by aligned proteins), Artistic Licence.
"""

from __future__ import annotations

from random import Random

from mambaverse.datasets import register_dataset
from mambaverse.tasks.dna.datasets._augustus import Augustus
from mambaverse.tasks.dna.genes import Gene, splice_sites


@register_dataset("dna/fly_splice")
class FlySplice(Augustus):
    """Donor, acceptor or decoy, in the middle of 80 bases."""

    summary = "splice sites of fruit-fly genes: 7,158 + 1,522 sequences of 80 bases; donor, acceptor, decoy"
    files = {"train": "fly_splice_train", "test": "fly_splice_test"}  # noqa: RUF012

    def rows(self, gene: Gene, draw: Random) -> list[tuple[str, str]]:
        """Return (sequence, label) of a gene."""
        return splice_sites(gene, draw)
