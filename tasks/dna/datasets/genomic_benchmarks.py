"""GenomicBenchmarks, in both forms that it comes in: a folder of texts a class, or places in a genome.

    NAME/{train,test}/CLASS/*.txt      one sequence a file (what its downloader writes)
    NAME/{train,test}/CLASS.csv.gz     id, region, start, end, strand: 0-based, half-open; with data.genome=FASTA

`data.root` is the folder with the data sets, `data.subset` one of them; or `data.root` is the data set itself. Classes
are numbered by sorted name. (Numbering them in the order of the directory, as others do, can swap the labels.)

In human_enhancers_ensembl and human_nontata_promoters nearly half of the test set overlaps the training set; a run
says so.

Source: Grešová et al. 2023, "Genomic benchmarks", BMC Genomic Data 24:25. Overlaps: measured on its interval files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset, register_dataset
from mambaverse.errors import UserError, suggest, warn
from mambaverse.tasks.dna.config import DnaDataConfig
from mambaverse.tasks.dna.files import Record, read_records
from mambaverse.tasks.dna.tables import DnaSplits, Table, collect, make_splits
from mambaverse.tasks.dna.tokens import reverse_complement

LEAKS = {
    "human_enhancers_ensembl": "38.5 %",
    "human_nontata_promoters": "49.3 %",
    "drosophila_enhancers_stark": "26.6 %",
}
COLUMNS = ("id", "region", "start", "end", "strand")


@register_dataset("dna/genomic_benchmarks")
class GenomicBenchmarks(Dataset):
    """One data set of GenomicBenchmarks, split as published."""

    summary = "GenomicBenchmarks: 9 data sets of enhancers, promoters, coding or not, ...; official splits"
    needs = "data.root, a folder with NAME/train/ and NAME/test/, and data.subset=NAME"
    source = "github.com/ML-Bioinfo-CEITEC/genomic_benchmarks (Apache-2.0), or its download_dataset"

    def places(self, root: str | None) -> list[Path]:
        """Return `root`, or where its downloader writes."""
        return [Path(root).expanduser() if root is not None else Path.home() / ".genomic_benchmarks"]

    def find(self, place: Path) -> Path | None:
        """Return `place` if it is a folder."""
        return place if place.is_dir() else None

    def open(self, config: DataConfig) -> DnaSplits:
        """Return the official splits of `data.subset`."""
        assert isinstance(config, DnaDataConfig)
        folder = self._choose(self.locate(config.root, config.download), config.subset)
        if share := LEAKS.get(folder.name):
            warn(f"{folder.name}: {share} of its test places overlap training places; its scores flatter")
        intervals = any(folder.glob("train/*.csv.gz"))
        if intervals and config.genome is None:
            raise UserError(f"{folder}: holds places in a genome; data.genome=FASTA says which (the metadata name it)")
        table = Table()
        for part in ("train", "test"):
            records = _intervals(folder / part, config) if intervals else _texts(folder / part)
            table.extend(collect(records, config, lambda r: r.cells["class"], part=part))
        return make_splits(table, config, str(folder))

    def _choose(self, place: Path, subset: str | None) -> Path:
        if subset is None and (place / "train").is_dir():
            return place
        known = sorted(path.parent.name for path in place.glob("*/train"))
        if subset is None or subset not in known:
            what = "data.subset is not set" if subset is None else f"data.subset={subset}: not in {place}"
            raise UserError(f"{what}{suggest(subset or '', known)}")
        return place / subset


def _texts(folder: Path) -> Iterator[Record]:
    """Yield the sequences of one folder of .txt files a class."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not classes:
        raise UserError(f"{folder}: holds no class folders of .txt files, nor csv.gz files of places")
    for path in classes:
        for file in sorted(path.glob("*.txt"), key=lambda p: (len(p.name), p.name)):
            (record,) = read_records(file)
            yield Record(f"{path.name}/{file.name}", record.letters, record.where, "", {"class": path.name})


def _intervals(folder: Path, config: DnaDataConfig) -> Iterator[Record]:
    """Yield the sequences at the places in the csv.gz files, in the order of the genome's records."""
    wanted: dict[str, list[Record]] = {}
    for file in sorted(folder.glob("*.csv.gz")):
        for row in read_records(file, "region", COLUMNS):
            cells = {**row.cells, "class": file.name.removesuffix(".csv.gz")}
            key = _plain(cells["region"]) if cells else ""
            wanted.setdefault(key, []).append(Record(row.name, b"", row.where, "", cells, row.problem))
    assert config.genome is not None
    for chromosome in read_records(Path(config.genome).expanduser()):
        for row in wanted.pop(_plain(chromosome.name), []):
            yield _cut(row, chromosome)
    for name, rows in wanted.items():
        for row in rows:
            yield Record(
                row.name, b"", row.where, "", row.cells, row.problem or f"no record {name!r} in {config.genome}"
            )


def _cut(row: Record, chromosome: Record) -> Record:
    name = f"{row.cells['class']}/{row.cells['id']}"
    try:
        start, end = int(row.cells["start"]), int(row.cells["end"])
    except ValueError:
        return Record(name, b"", row.where, "", row.cells, "start and end: expected whole numbers")
    if not 0 <= start < end <= len(chromosome.letters):
        problem = f"{start}-{end} is not within {chromosome.name} of {len(chromosome.letters):,} bases; another genome?"
        return Record(name, b"", row.where, "", row.cells, problem)
    letters = chromosome.letters[start:end]
    if row.cells["strand"] == "-":
        letters = reverse_complement(letters)
    return Record(name, letters, row.where, "", row.cells)


def _plain(region: str) -> str:
    """Return a chromosome's name without chr: both spellings are in use."""
    return re.sub(r"^chr", "", region, flags=re.IGNORECASE)
