"""GenomicBenchmarks, in both forms that it comes in: a folder of texts a class, or places in a genome.

    NAME/{train,test}/CLASS/*.txt      one sequence a file (what its downloader writes)
    NAME/{train,test}/CLASS.csv.gz     id, region, start, end, strand: 0-based, half-open; with data.genome=FASTA
    NAME/metadata.yaml                 of the second form: the classes, and the genome (url) of each

`data.root` is the folder with the data sets, `data.subset` one of them; or `data.root` is the data set itself. Classes
are numbered by sorted name. (Numbering them in the order of the directory, as others do, can swap the labels.) A place
on strand '-' is read from the other strand; one on '+', '.' or '' as it is. Where classes lie in different files, as
coding_seqs in cDNA, `data.genome` names several, with commas between.

There is no dev set: `data.dev_fraction=0.1` draws one from the training set. `data.group=chromosome` puts both sets of
places together and splits them anew by chromosome. In human_enhancers_ensembl and human_nontata_promoters nearly half
of the test set overlaps the training set; a run says so.

Source: Grešová et al. 2023, "Genomic benchmarks", BMC Genomic Data 24:25; the layout of its repository's datasets/
(README.md, metadata.yaml). Overlaps: measured on its interval files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset, refuse_unread, register_dataset
from mambaverse.errors import UserError, suggest, warn
from mambaverse.tasks.dna.config import DnaDataConfig
from mambaverse.tasks.dna.files import Record, read_records
from mambaverse.tasks.dna.sequences import Place
from mambaverse.tasks.dna.tables import DnaSplits, Table, collect, make_splits
from mambaverse.tasks.dna.tokens import reverse_complement

LEAKS = {
    "human_enhancers_ensembl": "38.5 %",
    "human_nontata_promoters": "49.3 %",
    "drosophila_enhancers_stark": "26.6 %",
}
COLUMNS = ("id", "region", "start", "end", "strand")
CHROMOSOME = "chromosome"
TABLES = re.compile(r"(.+)\.csv(\.gz)?$")
STRANDS = ("+", "-", "", ".")


@register_dataset("dna/genomic_benchmarks")
class GenomicBenchmarks(Dataset):
    """One data set of GenomicBenchmarks, split as published or by chromosome."""

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
        """Return the official splits of `data.subset`, or those by chromosome."""
        assert isinstance(config, DnaDataConfig)
        refuse_unread(config, self.name, "data set of it", "label", "label_pattern")
        folder = self._choose(self.locate(config.root, config.download), config.subset)
        if (share := LEAKS.get(folder.name)) and config.group is None:
            warn(f"{folder.name}: {share} of its test places overlap training places; its scores flatter")
        intervals = any(TABLES.match(path.name) for path in folder.glob("train/*"))
        if intervals and config.genome is None:
            named = "".join(f"; {name} is of {url}" for name, url in _genomes(folder).items())
            raise UserError(f"{folder}: holds places in a genome; data.genome=FASTA says which{named}")
        if not intervals:
            refuse_unread(config, str(folder), "text", "genome")
        if config.group == CHROMOSOME and not intervals:
            raise UserError(
                f"{folder}: data.group={CHROMOSOME}: texts do not say where they lie; take the form with places "
                "(CLASS.csv.gz, from its repository's datasets/) and data.genome"
            )
        groups = [CHROMOSOME] if intervals else []
        table = Table(groups={name: [] for name in groups})
        for part in ("train", "test"):
            records = _intervals(folder / part, config) if intervals else _texts(folder / part)
            place = _place_of if intervals else None
            table.extend(collect(records, config, lambda r: r.cells["class"], groups, part, place))
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
        files = sorted(path.glob("*.txt"), key=lambda p: (len(p.name), p.name))
        if not files:
            raise UserError(f"{path}: an empty class: no .txt files in it")
        for file in files:
            (record,) = read_records(file)
            yield Record(f"{path.name}/{file.name}", record.letters, record.where, "", {"class": path.name})


def _genomes(folder: Path) -> dict[str, str]:
    """Return the genome of each class, as metadata.yaml names it; nothing if there is no such file."""
    path = folder / "metadata.yaml"
    if not path.is_file():
        return {}
    try:
        classes = yaml.load(path.read_text(), yaml.BaseLoader)["classes"]  # a class may be called no
        return {name: str(about["url"]) for name, about in sorted(classes.items())}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: expected `classes:` with a name and a `url:` each; get the file again") from None


def _intervals(folder: Path, config: DnaDataConfig) -> Iterator[Record]:
    """Yield the sequences at the places in the csv files, in the order of the genome's records."""
    wanted: dict[str, list[Record]] = {}
    found = {match[1]: file for file in sorted(folder.glob("*")) if (match := TABLES.match(file.name))}
    if (known := set(_genomes(folder.parent))) and (other := sorted(known ^ set(found))):
        where = "metadata.yaml" if other[0] in known else folder.name
        raise UserError(f"{folder}: class {other[0]!r} is in {where} alone; get the data set again")
    for name, file in found.items():
        for row in read_records(file, "region", COLUMNS):
            cells = {**row.cells, "class": name}
            key = _plain(cells["region"]) if row.cells else ""
            wanted.setdefault(key, []).append(Record(row.name, b"", row.where, "", cells, row.problem))
    assert config.genome is not None
    for path in config.genome.split(","):
        for chromosome in read_records(Path(path.strip()).expanduser()):
            for row in wanted.pop(_plain(chromosome.name), []):
                yield _cut(row, chromosome)
    for name, rows in wanted.items():
        for row in rows:
            problem = row.problem or f"no record {name!r} in {config.genome}"
            yield Record(row.name, b"", row.where, "", row.cells, problem)


def _cut(row: Record, chromosome: Record) -> Record:
    name = f"{row.cells['class']}/{row.cells['id']}"
    cells = {**row.cells, CHROMOSOME: _plain(chromosome.name)}
    try:
        start, end = int(cells["start"]), int(cells["end"])
    except ValueError:
        return Record(name, b"", row.where, "", cells, "start and end: expected whole numbers")
    if not 0 <= start < end <= len(chromosome.letters):
        problem = f"{start}-{end} is not within {chromosome.name} of {len(chromosome.letters):,} bases; another genome?"
        return Record(name, b"", row.where, "", cells, problem)
    if (strand := cells["strand"].strip()) not in STRANDS:
        return Record(name, b"", row.where, "", cells, f"strand {strand!r}: expected +, -, . or nothing")
    letters = chromosome.letters[start:end]
    if strand == "-":
        letters = reverse_complement(letters)
    return Record(name, letters, row.where, "", cells)


def _place_of(record: Record) -> Place:
    return record.cells[CHROMOSOME], int(record.cells["start"]), int(record.cells["end"])


def _plain(region: str) -> str:
    """Return a chromosome's name without chr: both spellings are in use."""
    return re.sub(r"^chr", "", region, flags=re.IGNORECASE)
