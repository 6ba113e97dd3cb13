"""The genome of Escherichia coli 536 out of a Debian package, 4.9 million bases; the last fifth is held out.

Half of that chooses the weights, half is reported: `dna/species3` tests on the last part of this genome too.

Source: NC_008253.1 (Hochhut et al. 2006), in the examples of bowtie.
"""

from __future__ import annotations

from pathlib import Path

from mambaverse.datasets import register_dataset
from mambaverse.tasks.dna.files import read_records
from mambaverse.tasks.dna.pretraining.corpus import BuiltGenome, write_genome

SYSTEM = Path("/usr/share/doc/bowtie/examples/genomes")
FILE, NAME = "NC_008253.fna", "NC_008253.1"
TRAIN, VALID = 0.8, 0.9  # where training ends, and what chooses the weights


@register_dataset("dna/ecoli536")
class EColi536(BuiltGenome):
    """A bacterium's genome to pretrain on."""

    summary = "the genome of Escherichia coli 536, 4.9 Mb, to pretrain on; its last fifth held out"
    source = "the Debian package bowtie-examples (sequence: NCBI NC_008253.1)"
    package = "bowtie-examples (Debian)"
    note = "the last fifth is held out"

    def places(self, root: str | None) -> list[Path]:
        """Return `root`, or where the built files and the installed package are."""
        return [*super().places(root), *([] if root is not None else [SYSTEM])]

    def find_package(self, place: Path) -> Path | None:
        """Return the FASTA file."""
        return next((p for p in sorted(place.rglob(f"{FILE}*")) if p.is_file()), None) if place.is_dir() else None

    def build(self, raw: Path, folder: Path) -> None:
        """Write the record, and what is held out."""
        letters = b"".join(record.letters for record in read_records(raw))
        first, second = round(TRAIN * len(letters)), round(VALID * len(letters))
        bounds = {"train": (0, first), "valid": (first, second), "test": (second, len(letters))}
        write_genome(folder, {NAME: letters}, {split: [(NAME, a, b)] for split, (a, b) in bounds.items()})
