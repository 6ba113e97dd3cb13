"""16S rRNA genes: which class of bacteria a gene, or 250 bases of it, comes from. Ships with mambaverse, 0.4 MB.

5,181 distinct sequences of 1,205 to 1,655 bases with six ranks each. Sequences of one genus are alike, so that the
split by genus (`data.group=genus`) is the honest one. A few labels look odd, so 100 % is out of reach.

Source: rRNA16S.gold.fasta of microbiomeutil (Broad Institute, BSD-3-Clause), labels of the Ribosomal Database Project.
"""

from __future__ import annotations

import csv
import lzma
from collections.abc import Sequence
from pathlib import Path

from mambaverse.datasets import register_dataset
from mambaverse.errors import UserError
from mambaverse.tasks.dna.datasets._prepared import Prepared
from mambaverse.tasks.dna.files import read_records

RANKS = ("phylum", "class", "order", "family", "genus")
EMBEDDED = Path(__file__).parents[1] / "embedded"
STEM, FASTA = "rrna16s_full", "rRNA16S.gold.fasta"


@register_dataset("dna/rrna16s")
class RRna16s(Prepared):
    """The class (`data.label`: or another rank) of 16S rRNA genes."""

    summary = "16S rRNA genes: 5,181 sequences of 1,205 to 1,655 bases with phylum, class, order, family and genus"
    needs = f"{STEM}.csv.xz, which comes with mambaverse"
    source = "microbiomeutil (Broad Institute), BSD-3-Clause"
    package = "microbiomeutil-data (Debian)"
    files = {"": STEM}  # noqa: RUF012
    labels = ("class", "phylum", "order", "family", "genus")
    groups = ("genus", "family", "order")

    def places(self, root: str | None) -> list[Path]:
        """Return `root`, or the folder that is part of the package."""
        return [EMBEDDED] if root is None else [Path(root).expanduser()]

    def find_package(self, place: Path) -> Path | None:
        """Return the FASTA file of microbiomeutil."""
        if place.is_file():
            return place if place.name.startswith(FASTA) else None
        return next((p for p in place.rglob(f"{FASTA}*") if p.is_file()), None) if place.is_dir() else None

    def build(self, raw: Path, folder: Path) -> None:
        """Write the table: the header's last tab field holds kingdom to genus."""
        with lzma.open(folder / f"{STEM}.csv.xz", "wt", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("sequence", *RANKS))
            for record in read_records(raw):
                ranks: Sequence[str] = [part.strip() for part in record.header.split("\t")[-1].split(";")]
                if len(ranks) != 1 + len(RANKS):
                    raise UserError(f"{record.where}: expected kingdom to genus in the header, got {record.header!r}")
                writer.writerow((record.letters.decode().upper(), *ranks[1:]))
