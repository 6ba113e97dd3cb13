"""What is made of the fruit-fly genes in AUGUSTUS' tutorial: two tables, of upstream's training and test genes."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from random import Random
from typing import ClassVar

from mambaverse.tasks.dna.datasets._prepared import Prepared
from mambaverse.tasks.dna.genes import Gene, read_genes

GENES = {"train": "genes.gb.train", "test": "genes.gb.test"}
SYSTEM = Path("/usr/share/doc/augustus/tutorial/results")


class Augustus(Prepared):
    """Base of the data sets that are cut out of those genes."""

    needs: ClassVar[str] = "two files NAME_train.csv.gz and NAME_test.csv.gz (sequence, label, gene)"
    source: ClassVar[str] = "the Debian package augustus-doc (Artistic Licence)"
    package: ClassVar[str] = "augustus-doc (Debian)"

    def rows(self, gene: Gene, draw: Random) -> list[tuple[str, str]]:
        """Return the (sequence, label) pairs of a gene."""
        raise NotImplementedError

    def places(self, root: str | None) -> list[Path]:
        """Return `root`, or where the built tables and the installed package are."""
        return [*super().places(root), *([] if root is not None else [SYSTEM])]

    def find_package(self, place: Path) -> Path | None:
        """Return the folder with both files of genes."""
        if not place.is_dir():
            return None
        found = (path.parent for path in place.rglob(GENES["train"]))
        return next((folder for folder in found if (folder / GENES["test"]).is_file()), None)

    def build(self, raw: Path, folder: Path) -> None:
        """Write both tables."""
        draw = Random(0)
        for part, name in GENES.items():
            with gzip.open(folder / f"{self.files[part]}.csv.gz", "wt", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(("sequence", "label", "gene"))
                for gene in read_genes(raw / name):
                    writer.writerows((letters, label, gene.name) for letters, label in self.rows(gene, draw))
