"""The 16S rRNA genes of dna/rrna16s without labels, to pretrain on: 5,181 records, 7.5 million bases; with mambaverse.

Genera are held out whole, a tenth of them to choose the weights and a tenth to be reported. Genes of one kind are much
alike, so that what a model reaches here says nothing of genomes.

Source: as dna/rrna16s.
"""

from __future__ import annotations

import random
from pathlib import Path

from mambaverse.datasets import data_home, register_dataset
from mambaverse.tasks.dna.datasets.rrna16s import EMBEDDED, STEM
from mambaverse.tasks.dna.files import read_records
from mambaverse.tasks.dna.pretraining.corpus import BuiltGenome, write_genome

SHARES = {"valid": 0.1, "test": 0.1}  # of the genera


@register_dataset("dna/rrna16s_genes")
class RRna16sGenes(BuiltGenome):
    """16S rRNA genes to pretrain on, split by genus."""

    summary = "16S rRNA genes without labels, to pretrain on: 5,181 records of 1,205 to 1,655 bases, genera held out"
    source = "microbiomeutil (Broad Institute), BSD-3-Clause; the table that comes with mambaverse"
    package = "mambaverse"
    note = "a tenth of the genera chooses the weights, a tenth is reported"

    def places(self, root: str | None) -> list[Path]:
        """Return `root`, or where the files are made, and what they are made of."""
        if root is not None:
            return [Path(root).expanduser()]
        return [data_home() / self.name.rpartition("/")[2], EMBEDDED]

    def find_package(self, place: Path) -> Path | None:
        """Return the table."""
        return found if (found := place / f"{STEM}.csv.xz").is_file() else None

    def build(self, raw: Path, folder: Path) -> None:
        """Write the genes as records, and which genus is in which set."""
        genes = {f"gene{i}": record for i, record in enumerate(read_records(raw), 1)}
        genus = {name: record.cells["genus"] for name, record in genes.items()}
        order = sorted(set(genus.values()))
        random.Random(0).shuffle(order)
        sets: dict[str, str] = {}
        for split, share in SHARES.items():
            sets |= dict.fromkeys(order[len(sets) : len(sets) + round(share * len(order))], split)
        rows: dict[str, list[tuple[str, int, int]]] = {"train": [], "valid": [], "test": []}
        for name, record in genes.items():
            rows[sets.get(genus[name], "train")].append((name, 0, len(record.letters)))
        write_genome(folder, {name: record.letters for name, record in genes.items()}, rows)
