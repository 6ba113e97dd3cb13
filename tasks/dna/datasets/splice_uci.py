"""UCI splice junctions of primates: 60 bases around a place that is a donor (ei), an acceptor (ie) or neither (n).

The set has 185 sequences more than once; each is kept once, since a copy of a held-out sequence tells its label.

Source: UCI Molecular Biology (Splice-junction Gene Sequences), CC BY 4.0; in the R package mlbench (GPL-2) as DNA.rda:
three bits a base, A 100, C 010, G 001, T 000.
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np

from mambaverse.datasets import register_dataset
from mambaverse.errors import UserError
from mambaverse.tasks.dna.datasets._prepared import Prepared
from mambaverse.tasks.dna.datasets._rda import read_rda
from mambaverse.tasks.dna.tables import Table

LENGTH = 60
STEM = "splice_uci"


@register_dataset("dna/splice_uci")
class SpliceUci(Prepared):
    """Donor, acceptor or neither; ten folds (`data.folds=10 data.fold=0`)."""

    summary = "UCI splice junctions: 3,001 distinct sequences of 60 bases; donor (ei), acceptor (ie), neither (n)"
    needs = f"{STEM}.csv.gz (sequence, label)"
    source = "the Debian package r-cran-mlbench (GPL-2); UCI's original is CC BY 4.0"
    package = "r-cran-mlbench (Debian)"
    files = {"": STEM}  # noqa: RUF012
    system_places = (Path("/usr/lib/R/site-library/mlbench"),)

    def find_package(self, place: Path) -> Path | None:
        """Return DNA.rda."""
        if place.is_file():
            return place if place.name == "DNA.rda" else None
        return next(iter(sorted(place.rglob("DNA.rda"))), None) if place.is_dir() else None

    def build(self, raw: Path, folder: Path) -> None:
        """Write the table from R's data frame of 180 two-level factors and a class."""
        columns = read_rda(raw).get("DNA", {})
        bits, labels = [values for name, values in columns.items() if name != "Class"], columns.get("Class")
        if labels is None or len(bits) != 3 * LENGTH:
            raise UserError(f"{raw}: expected a data frame DNA with {3 * LENGTH} columns and Class")
        codes = np.array(bits, int).T.reshape(-1, LENGTH, 3) @ [1, 2, 3]  # 0 T, 1 A, 2 C, 3 G
        with gzip.open(folder / f"{STEM}.csv.gz", "wt", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("sequence", "label"))
            letters = np.array(list("TACG"))[codes]
            writer.writerows(("".join(row), label) for row, label in zip(letters, labels, strict=True))

    def prune(self, table: Table) -> Table:
        """Return each sequence once."""
        first = {row.tobytes(): i for i, row in reversed(list(enumerate(table.ids)))}
        return table.take(sorted(first.values()))
