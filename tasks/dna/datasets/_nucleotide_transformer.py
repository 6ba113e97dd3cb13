"""The Nucleotide Transformer's downstream tasks, by their official files: the first 18, and the 18 revised ones.

    ROOT/TASK/{train,test}.fna                     the first set: headers '>NAME|LABEL'
    ROOT/TASK/{train,test}.{fna,csv,tsv,parquet}   either set, a folder a task
    ROOT/**/{train,test}*.{parquet,csv,tsv}        or in one table: columns sequence, name, label and task

`data.root` is a copy of one of the two repositories, `data.subset` a task in it, such as H3. Some names are in both
sets, for other sequences and splits. So they are two data sets, `nucleotide_transformer.py` and
`nucleotide_transformer_revised.py`; each refuses files with the other's tasks, and numbers of the two must not stand in
one column. Parquet needs pyarrow (`pip install pyarrow`). There are no dev sets: `data.dev_fraction=0.1` draws one.

The revised set tests on chromosomes that training does not have. Where its names tell the chromosome (chr7:1000-2000),
`data.group=chromosome` draws other such splits, and overlaps are looked for.

Source: Dalla-Torre et al. 2024, "Nucleotide Transformer", Nature Methods; huggingface.co/datasets/InstaDeepAI. Folders
and file names of the first set were read in its listing, task names of both in their lists; the headers and columns
are as others describe them: no file of either was at hand. Metrics: Schiff et al. 2024, "Caduceus", table 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import ClassVar

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset, refuse_unread
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.config import DnaDataConfig
from mambaverse.tasks.dna.files import Record, kind_of, read_records
from mambaverse.tasks.dna.sequences import Place
from mambaverse.tasks.dna.tables import DnaSplits, Table, collect, make_splits

PARTS = ("train", "test")
TASK, LABEL, CHROMOSOME = "task", "label", "chromosome"
ENDINGS = (".fna", ".fna.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
NAMED_PLACE = re.compile(r"(?<![A-Za-z0-9])chr(\d{1,2}|[XYM])(?:[:_](\d+)[-_](\d+))?(?![A-Za-z0-9])")
FIRST = ("H3", "H3K14ac", "H3K36me3", "H3K4me1", "H3K4me2", "H3K4me3", "H3K79me3", "H3K9ac", "H4", "H4ac")
REVISED = (
    "H2AFZ", "H3K27ac", "H3K27me3", "H3K36me3", "H3K4me1", "H3K4me2", "H3K4me3", "H3K9ac", "H3K9me3", "H4K20me1",
)  # fmt: skip
BOTH = (
    "enhancers", "enhancers_types", "promoter_all", "promoter_no_tata", "promoter_tata", "splice_sites_acceptors",
    "splice_sites_all", "splice_sites_donors",
)  # fmt: skip


def metric_of(task: str) -> str:
    """Return the metric that is reported of a task: accuracy, F1 of class 1, or MCC."""
    if task == "splice_sites_all":
        return "accuracy"
    return "f1" if task.startswith(("promoter", "splice_sites")) else "mcc"


class Downstream(Dataset):
    """What both sets share.

    Attributes:
        tasks: Its tasks.
        other: The set that it must not be mixed up with.
        others: That one's tasks.
    """

    needs = "data.root, a copy of its files, and data.subset, a task such as H3K4me3"
    tasks: ClassVar[Sequence[str]]
    other: ClassVar[str]
    others: ClassVar[Sequence[str]]

    def places(self, root: str | None) -> list[Path]:
        """Return `root`: there is no other place."""
        return [] if root is None else [Path(root).expanduser()]

    def find(self, place: Path) -> Path | None:
        """Return `place` if it is a folder."""
        return place if place.is_dir() else None

    def open(self, config: DataConfig) -> DnaSplits:
        """Return the official splits of the task `data.subset`, or those by chromosome."""
        assert isinstance(config, DnaDataConfig)
        refuse_unread(config, self.name, "task of it", "label", "label_pattern", "genome")
        place, subset = self.locate(config.root, config.download), config.subset
        if subset is None:
            raise UserError(f"data.subset is not set; the tasks of {self.name} are {', '.join(self.tasks)}")
        if subset not in self.tasks:
            if subset in self.others:
                raise UserError(f"data.subset={subset}: no task of {self.name}, but of data.name={self.other}")
            raise UserError(f"data.subset={subset}: no task of {self.name}{suggest(subset, self.tasks)}")
        self._refuse_other({path.name for path in place.iterdir() if path.is_dir()}, place)
        parts = {part: [_located(record) for record in self._read(place, subset, part)] for part in PARTS}
        records = list(chain(*parts.values()))
        known = all(CHROMOSOME in record.cells for record in records)
        if config.group == CHROMOSOME and not known:
            first = next(record for record in records if CHROMOSOME not in record.cells)
            raise UserError(f"{first.where}: data.group={CHROMOSOME}: no chromosome in its name {first.name!r}")
        groups = [CHROMOSOME] if known else []
        placed = known and all("start" in record.cells for record in records)
        table = Table(groups={name: [] for name in groups})
        for part, found in parts.items():
            place_of = _place_of if placed else None
            table.extend(collect(found, config, lambda r: r.cells[LABEL], groups, part, place_of))
        return replace(make_splits(table, config, f"{self.name}, {subset}"), monitor=metric_of(subset))

    def _read(self, place: Path, task: str, part: str) -> Iterator[Record]:
        """Yield the records of one set of a task."""
        own = [path for end in ENDINGS if (path := place / task / f"{part}{end}").is_file()]
        if own:
            yield from _records(own[0])
            return
        tables = [path for path in sorted(place.rglob(f"{part}*")) if path.name.endswith(ENDINGS[2:])]
        tables = [path for path in tables if path.parent.name not in self.tasks]  # those are of one task each
        if not tables:
            raise UserError(f"{place}: holds no {task}/{part}.fna, nor a table {part}*.parquet or {part}*.csv")
        seen: set[str] = set()
        for path in tables:
            for record in _records(path, [TASK]):
                name = record.cells.get(TASK, task)  # a broken row of a csv has none, and is reported
                seen.add(name)
                if name == task:
                    yield record
            self._refuse_other(seen, path)
        if task not in seen:
            raise UserError(f"{tables[0]}: column {TASK!r} never says {task!r}{suggest(task, seen)}")

    def _refuse_other(self, names: set[str], where: Path) -> None:
        """Raise UserError if there are tasks that only the other set has."""
        strange = sorted(names & (set(self.others) - set(self.tasks)))
        if strange:
            raise UserError(f"{where}: holds {strange[0]}, which is of data.name={self.other}; this is {self.name}")


def _records(path: Path, needs: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the records of one file, each with "label" among its cells."""
    if path.suffix == ".parquet":
        yield from _parquet(path, needs)
    elif kind_of(path) == "table":
        yield from map(_named, read_records(path, "sequence", [LABEL, *needs]))
    else:
        yield from map(_labelled, read_records(path, unique=False))  # names tell where it is from, and may repeat


def _labelled(record: Record) -> Record:
    """Read the label off a header '>NAME|LABEL'."""
    name, bar, label = record.header.rpartition("|")
    if not bar or not label.strip():
        problem = record.problem or f"expected a header '>NAME|LABEL', got {record.header!r}"
        return replace(record, problem=problem)
    return replace(record, name=name.strip() or record.name, cells={LABEL: label.strip()})


def _named(record: Record) -> Record:
    return replace(record, name=record.cells.get("name") or record.name)


def _parquet(path: Path, needs: Sequence[str]) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow; or convert it to csv") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            for name in ("sequence", LABEL, *needs):
                if name not in columns:
                    raise UserError(f"{path}: no column {name!r}{suggest(name, columns)}")
            kept = [name for name in ("sequence", "name", LABEL, TASK) if name in columns]
            number = 0
            for batch in file.iter_batches(columns=kept):
                for row in batch.to_pylist():
                    number += 1
                    cells = {name: "" if value is None else str(value) for name, value in row.items()}
                    letters = cells.pop("sequence").encode()
                    yield Record(cells.get("name") or str(number), letters, f"{path}, row {number:,}", "", cells)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())}; get the file again") from None


def _located(record: Record) -> Record:
    """Add the chromosome, and start and end if they are there, that a name tells."""
    if (found := NAMED_PLACE.search(record.name)) is None:
        return record
    place = {CHROMOSOME: found[1]}
    if found[2] is not None and int(found[2]) < int(found[3]):
        place |= {"start": found[2], "end": found[3]}
    return replace(record, cells={**record.cells, **place})


def _place_of(record: Record) -> Place:
    return record.cells[CHROMOSOME], int(record.cells["start"]), int(record.cells["end"])
