"""Data sets that are genomes: what the task `dna_lm` opens, as the task `dna` opens labelled sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mambaverse.config import ConfigError, DataConfig
from mambaverse.datasets import Dataset, get_dataset, list_datasets
from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.pretraining.config import DnaLmDataConfig
from mambaverse.tasks.dna.pretraining.splits import GenomeSplit, split_genome

FASTA, BED = "genome.fa", "splits.bed"  # of the genomes that are made out of packages
LINE = 80  # letters


@dataclass
class Corpus:
    """An opened genome and its split."""

    genome: Genome
    split: GenomeSplit


class GenomeDataset(Dataset):
    """Base of the data sets that are genomes.

    Attributes:
        note: What there is to say of the split that comes with it.
    """

    note: ClassVar[str] = ""

    def open(self, config: DataConfig) -> Corpus:
        """Return the genome, its records in one FASTA file, and the intervals of each set."""
        assert isinstance(config, DnaLmDataConfig)
        fasta, bed = self.files(config)
        genome = Genome(fasta, config.aliases)
        return Corpus(genome, split_genome(genome, config, bed, "" if config.bed else self.note))

    def files(self, config: DnaLmDataConfig) -> tuple[Path, Path | None]:
        """Return the FASTA file, and the BED file of splits if there is one.

        Raises:
            MissingDataError: they are not there.
        """
        raise NotImplementedError


class BuiltGenome(GenomeDataset):
    """A genome that is made out of a package: genome.fa and splits.bed in a folder."""

    needs = f"{FASTA} and {BED}"

    def find(self, place: Path) -> Path | None:
        """Return `place` if both files are in it."""
        return place if (place / FASTA).is_file() and (place / BED).is_file() else None

    def files(self, config: DnaLmDataConfig) -> tuple[Path, Path | None]:
        """Return both, or the BED file that the config names."""
        if config.genome is not None:
            raise ConfigError(f"data.genome: {self.name} comes with its own; data.name=genome reads yours")
        folder = self.locate(config.root, config.download)
        return folder / FASTA, folder / BED if config.bed is None else beside(folder, config.bed)


def write_genome(folder: Path, records: Mapping[str, bytes], rows: Mapping[str, list[tuple[str, int, int]]]) -> None:
    """Write genome.fa and splits.bed into `folder`.

    Args:
        folder: There.
        records: Letters by name.
        rows: (record, start, end) of each split, "train", "valid" and "test".
    """
    with (folder / FASTA).open("wb") as file:
        for name, letters in records.items():
            file.write(b">%s\n" % name.encode())
            for start in range(0, len(letters), LINE):
                file.write(letters[start : start + LINE] + b"\n")
    lines = [f"{name}\t{a}\t{b}\t{split}\n" for split, found in rows.items() for name, a, b in found]
    (folder / BED).write_text("".join(lines))


def beside(folder: Path, name: str) -> Path:
    """Return the file `name`: in `folder`, or else a path of its own."""
    return found if (found := folder / name).is_file() else Path(name).expanduser()


def corpus_named(name: str) -> GenomeDataset:
    """Return the data set `name`, which must be a genome.

    Raises:
        ConfigError: it holds labelled sequences.
        RegistryError: there is none of that name.
    """
    dataset = get_dataset(name, "dna")
    if not isinstance(dataset, GenomeDataset):
        found = (n.removeprefix("dna/") for n in list_datasets("dna/*"))
        genomes = [other for other in found if isinstance(get_dataset(other, "dna"), GenomeDataset)]
        raise ConfigError(
            f"data.name={name}: labelled sequences, for task.name=dna; pretraining reads genomes: {', '.join(genomes)}"
        )
    return dataset
