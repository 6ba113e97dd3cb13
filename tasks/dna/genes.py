"""Examples cut out of annotated genes: splice sites and windows, read along the gene.

A gene's coding sequence is join(a..b, c..d, ...): exons; between them lie introns. On the + strand a donor is the place
behind an exon (the intron begins with GT), an acceptor the place before the next (the intron ends with AG).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np

from mambaverse.tasks.dna.genome.genbank import read_genbank
from mambaverse.tasks.dna.tokens import reverse_complement

HALF, WINDOW, STEP = 40, 200, 100  # bases on either side of a splice site; of a window, and from one to the next
KINDS = ("flank", "intron", "coding")
LEAST_DECOYS = 2  # of a gene, though it have no intron


@dataclass(frozen=True)
class Gene:
    """A gene and its surroundings, as the file has them.

    Attributes:
        name: Of the record.
        letters: The + strand, upper case.
        exons: (start, end) of the coding parts on it, 0-based, half-open, ascending.
        reverse: Whether the gene is read on the - strand.
    """

    name: str
    letters: str
    exons: list[tuple[int, int]]
    reverse: bool

    def along(self) -> tuple[str, list[tuple[int, int]]]:
        """Return letters and exons on the strand of the gene."""
        if not self.reverse:
            return self.letters, self.exons
        size = len(self.letters)
        return _other_strand(self.letters), [(size - end, size - start) for start, end in reversed(self.exons)]


def read_genes(path: Path) -> list[Gene]:
    """Return the records of a GenBank file that have one CDS.

    Raises:
        UserError: what `read_genbank` raises.
    """
    genes = []
    for record in read_genbank(path, ("CDS",)):
        if len(record.features) == 1:
            (feature,) = record.features
            exons = sorted((part.start, part.end) for part in feature.parts)
            genes.append(Gene(record.name, record.letters.decode().upper(), exons, feature.strand == "-"))
    return genes


def splice_sites(gene: Gene, draw: Random) -> list[tuple[str, str]]:
    """Return (80 bases, donor | acceptor | decoy): all sites of the gene, and as many decoys, drawn by `draw`.

    A decoy has GT or AG where a site has it, and is none.
    """
    letters, exons = gene.along()
    sites = [(place, kind) for (_, a), (b, _) in pairwise(exons) for place, kind in ((a, "donor"), (b, "acceptor"))]
    places = {place for place, _ in sites}
    candidates = [  # GT begins an intron, AG ends one
        at
        for at in range(HALF, len(letters) - HALF)
        if (letters.startswith("GT", at) or letters.startswith("AG", at - 2)) and at not in places
    ]
    decoys = draw.sample(candidates, min(max(len(sites), LEAST_DECOYS), len(candidates)))
    rows = [*(reversed(sites) if gene.reverse else sites), *((place, "decoy") for place in decoys)]
    return [
        (letters[place - HALF : place + HALF], kind) for place, kind in rows if HALF <= place <= len(letters) - HALF
    ]


def windows(gene: Gene, draw: Random | None = None) -> list[tuple[str, str]]:
    """Return (200 bases, coding | intron | flank) every 100 bases, where all are of one kind; nothing is drawn."""
    kinds = np.zeros(len(gene.letters), np.uint8)
    kinds[gene.exons[0][0] : gene.exons[-1][1]] = 1
    for start, end in gene.exons:
        kinds[start:end] = 2
    rows = []
    for start in range(0, len(gene.letters) - WINDOW + 1, STEP):
        found = set(kinds[start : start + WINDOW].tolist())
        if len(found) == 1:
            letters = gene.letters[start : start + WINDOW]
            rows.append(
                (_other_strand(letters) if gene.reverse else letters, ("flank", "intron", "coding")[found.pop()])
            )
    return rows


def _other_strand(letters: str) -> str:
    return reverse_complement(letters.encode()).decode()
