"""Splice sites of fruit-fly genes: 80 bases around the border of an exon, or around a GT or AG that is none.

7,158 + 1,522 sequences, read along the gene, the border in the middle: a donor (exon | GT, intron), an acceptor
(intron, AG | exon) or a decoy. The test genes are upstream's; no gene is in both sets. A one-hot SVM reads 93.2 % of
them right, one of k-mers 70.7 %: the place of a letter matters.

With data.fresh=0.8 so many of the decoys are other ones whenever training sees it: one of the 254,489 GT and AG
in fly_windows of the training genes that have 40 bases of one kind (intron, say) around them.

Source: the tutorial of AUGUSTUS (genes of chr2R, labelled by aligned proteins), Artistic Licence.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np

from mambaverse.config import DataConfig
from mambaverse.datasets import MissingDataError, get_dataset, register_dataset
from mambaverse.tasks.dna.config import DnaDataConfig
from mambaverse.tasks.dna.datasets._augustus import Augustus
from mambaverse.tasks.dna.genes import HALF, Gene, splice_sites
from mambaverse.tasks.dna.sequences import Background, Sequences
from mambaverse.tasks.dna.tables import DnaSplits
from mambaverse.tasks.dna.tokens import A


@register_dataset("dna/fly_splice")
class FlySplice(Augustus):
    """Donor, acceptor or decoy, in the middle of 80 bases."""

    summary = "splice sites of fruit-fly genes: 7,158 + 1,522 sequences of 80 bases; donor, acceptor, decoy"
    files = {"train": "fly_splice_train", "test": "fly_splice_test"}  # noqa: RUF012

    def open(self, config: DataConfig) -> DnaSplits:
        """Return the splits; with `data.fresh` and where more decoys are."""
        assert isinstance(config, DnaDataConfig)
        splits: DnaSplits = super().open(config)
        if not config.fresh:
            return splits
        try:
            windows: DnaSplits = get_dataset("fly_windows", "dna").open(config)
        except MissingDataError as error:
            raise MissingDataError(f"data.fresh={config.fresh:g} (0 needs none of this): {error}") from None
        background = decoys(windows.train, splits.classes.index("decoy"))
        return replace(splits, background=background)

    def rows(self, gene: Gene, draw: Random) -> list[tuple[str, str]]:
        """Return (sequence, label) of a gene."""
        return splice_sites(gene, draw)


def decoys(windows: Sequences, label: int) -> Background:
    """Return the places in windows, each of one kind throughout, where a GT or an AG stands as at a splice site."""
    data, starts = windows.data, []
    adenine, guanine, thymine = A, A + 2, A + 3
    for first, end in pairwise(windows.bounds):
        at = np.arange(first + HALF, end - HALF + 1)  # of the border, were there one
        donor = (data[at] == guanine) & (data[at + 1] == thymine)
        acceptor = (data[at - 2] == adenine) & (data[at - 1] == guanine)
        starts.append(at[donor | acceptor] - HALF)
    return Background(label, data, np.concatenate(starts), 2 * HALF)
