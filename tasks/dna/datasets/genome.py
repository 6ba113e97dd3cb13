"""Your own genome: a FASTA file with any number of records, and a BED file of splits if there is one.

    data.root=hg38.fa                              one file, plain or BGZF; or data.genome=hg38.fa
    data.root=hg38 data.bed=human-sequences.bed    a folder with one FASTA file; data.genome= names one of several
    data.bed=...                                   chromosome, start, end, split: train, valid, test

Without a BED file the split is drawn (see pretraining/splits.py).
"""

from __future__ import annotations

from pathlib import Path

from mambaverse.datasets import register_dataset
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.files import kind_of
from mambaverse.tasks.dna.pretraining.config import DnaLmDataConfig
from mambaverse.tasks.dna.pretraining.corpus import GenomeDataset, beside


@register_dataset("dna/genome")
class OwnGenome(GenomeDataset):
    """A genome of one's own."""

    summary = "your own genome: FASTA (plain or BGZF), and a BED file of splits if there is one; for pretraining"
    needs = "data.root or data.genome, a FASTA file (or data.root a folder with one)"

    def places(self, root: str | None) -> list[Path]:
        """Return `root`: there is no other place."""
        return [] if root is None else [Path(root).expanduser()]

    def find(self, place: Path) -> Path | None:
        """Return `place` if it exists."""
        return place if place.exists() else None

    def files(self, config: DnaLmDataConfig) -> tuple[Path, Path | None]:
        """Return the files that the config names."""
        root = self.locate(config.root if config.root is not None else config.genome)
        folder = root if root.is_dir() else root.parent
        fasta = root
        if config.genome is not None and config.root is not None:
            fasta = beside(folder, config.genome)
        elif root.is_dir():
            found = sorted(p for p in root.iterdir() if p.is_file() and kind_of(p) == "fasta")
            if len(found) != 1:
                have = f"{len(found)} FASTA files" if found else "no FASTA file (.fa, .fasta, .fna)"
                raise UserError(f"{root}: {have}; data.genome names the one that is meant{_names(found)}")
            fasta = found[0]
        bed = None if config.bed is None else beside(folder, config.bed)
        if bed is not None and not bed.is_file():
            raise UserError(f"data.bed={config.bed}: no such file, nor in {folder}{_near(bed, folder)}")
        return fasta, bed


def _names(found: list[Path]) -> str:
    return f": {', '.join(path.name for path in found[:4])}" if found else ""


def _near(bed: Path, folder: Path) -> str:
    beds = [path.name for path in folder.iterdir() if ".bed" in path.suffixes]
    return suggest(bed.name, beds) if beds else ""
