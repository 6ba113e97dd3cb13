"""Which genome do 200 bases come from: human, fruit fly or Escherichia coli?

12,000 + 3,000 fragments of either strand; the human test fragments are of a chromosome of their own (chr5), those of
fly and E. coli of the last part of the genome.

Source: human chr3, 4 and 5 (2 Mb each) and fly chr2R in the tutorial of AUGUSTUS; E. coli 536 of bowtie's examples.
"""

from __future__ import annotations

from mambaverse.datasets import register_dataset
from mambaverse.tasks.dna.datasets._prepared import Prepared


@register_dataset("dna/species3")
class Species3(Prepared):
    """Human, fly or E. coli, of 200 bases of either strand."""

    summary = "species of origin: 12,000 + 3,000 fragments of 200 bases; human, fly, ecoli"
    needs = "species3_200bp.csv.gz (sequence, label, split)"
    source = "fragments of the genomes in the Debian packages augustus-doc and bowtie-examples"
    files = {"": "species3_200bp"}  # noqa: RUF012
    split = "split"
