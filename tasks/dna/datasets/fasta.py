"""Your own sequences: a table with labels, a FASTA file with labels in its headers, or a folder of FASTA files.

    data.root=my.csv              columns sequence and label (data.sequence=, data.label= name others); .tsv; .gz, .xz
    data.root=my.fa               >name label=donor      (data.label=kind: >name kind="a donor"; or data.label_pattern)
    data.root=folder              CLASS/*.fa, or CLASS.fa: the folder's or the file's name is the label
    data.root=folder              train/ and test/ (and dev/ or val/) with one of these in each: it comes split

A table's column `split` (train, dev, test) says how it is split; else `data.val_fraction` or `data.folds` do, and
`data.group=COLUMN` keeps rows that belong together on one side, and splits anew what comes split. For FASTA, it is a
header's key. `data.dev_fraction` draws a dev set out of the training set.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset, refuse_unread, register_dataset
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.config import DnaDataConfig
from mambaverse.tasks.dna.files import LOST, Record, is_sequence_file, kind_of, read_records, sequence_files, stem_of
from mambaverse.tasks.dna.tables import SETS, DnaSplits, Table, collect, make_splits, set_of

SPLIT = "split"
NEARLY = re.compile(rf"({'|'.join(SETS)})([-_.]?\d+|\..*)")  # train_1, test.2, train.v2: a set's name, but no set
LABELLED = {"label": {"table", "FASTA"}, "label_pattern": {"FASTA"}}  # what each key is read of
KEY_VALUE = re.compile(r'(?:^|[\s;|])([\w.-]+)=(?:"([^"]*)"(?=[\s;|]|$)|([^\s;|"][^\s;|]*))')


@register_dataset("dna/fasta")
class Fasta(Dataset):
    """Labelled sequences in FASTA files or tables of one's own."""

    summary = "your own sequences: FASTA or CSV, plain or compressed"
    needs = "data.root: a .csv with sequence and label, a .fa with label=... in its headers, or a folder CLASS/*.fa"

    def places(self, root: str | None) -> list[Path]:
        """Return `root`: there is no other place."""
        return [] if root is None else [Path(root).expanduser()]

    def find(self, place: Path) -> Path | None:
        """Return `place` if it exists."""
        return place if place.exists() else None

    def open(self, config: DataConfig) -> DnaSplits:
        """Return the splits that the data come with, or that are drawn."""
        assert isinstance(config, DnaDataConfig)
        root = self.locate(config.root, config.download)
        _refuse_unread(root, config)
        if root.is_file():
            return make_splits(_file(root, config), config, str(root))
        if not (parts := _parts(root)):
            return make_splits(_folder(root, config), config, str(root))
        table = Table()
        for path in parts:
            part = SETS[_stem(path).lower()]
            table.extend(_folder(path, config, part) if path.is_dir() else _file(path, config, part))
        return make_splits(table, config, str(root))


def _parts(root: Path) -> list[Path]:
    """Return the sets that a folder comes split into; none if it holds classes.

    Raises:
        UserError: a name such as train_1, or test where nothing is to learn from: it would be read as a class.
    """
    folders, files = _entries(root)
    stems = {path: _stem(path).lower() for path in sorted([*folders, *files])}
    parts = [path for path, stem in stems.items() if stem in SETS]
    split = "train" in {SETS[stems[path]] for path in parts}
    for path, stem in stems.items():
        if NEARLY.fullmatch(stem) or (stem in SETS and not split):
            raise UserError(
                f"{path}: named as a set, not as a class; a folder that comes split holds train and test (and dev or "
                "val), each one file or folder of exactly that name; give a class another name"
            )
    return parts


def _refuse_unread(root: Path, config: DnaDataConfig) -> None:
    """Raise UserError if `config` says of labels, or of a data set's parts, what no file at `root` is asked."""
    refuse_unread(config, str(root), "file of one's own", "subset", "genome")
    parts = [root] if root.is_file() else _parts(root) or [root]
    kinds = {_kind(path) for path in parts}
    for key, read in LABELLED.items():
        if not kinds & read:
            refuse_unread(config, str(root), " or ".join(sorted(kinds)), key)
    if config.label_pattern is not None and kinds == {"FASTA"}:
        refuse_unread(config, str(root), "FASTA with data.label_pattern", "label")


def _kind(path: Path) -> str:
    """Return what says the labels at `path`: a table, FASTA, or folders and files by their names."""
    if path.is_file():
        return "table" if kind_of(path) == "table" else "FASTA"
    folders, files = _entries(path)
    if folders or (len(files) > 1 and not any(kind_of(file) == "table" for file in files)):
        return "folder of classes"
    return _kind(files[0]) if files else "folder"


def _file(path: Path, config: DnaDataConfig, part: str | None = None) -> Table:
    if kind_of(path) == "table":
        return _table(path, config, part)
    groups = [] if config.group is None else [config.group]
    asked = groups if config.label_pattern is not None else [config.label or "label", *groups]
    records = (_with_keys(record, asked) for record in read_records(path))
    return collect(_having(records, groups), config, _header_label(config), groups, part)


def _table(path: Path, config: DnaDataConfig, part: str | None) -> Table:
    label, sequence = config.label or "label", config.sequence
    keys = {sequence: "data.sequence", label: "data.label"}
    columns = next((list(r.cells) for r in read_records(path, sequence, [label], keys) if r.cells), [])
    records = read_records(path, sequence, [label], keys)
    groups = _groups(config.group, columns, keys, path)
    if part is None and SPLIT in columns:
        return collect(records, config, lambda r: r.cells[label], groups, lambda r: set_of(r.cells, r.where))
    if part is not None:
        return collect(records, config, lambda r: r.cells[label], groups, part)
    others = [name for name in columns if name not in keys]
    table = collect(records, config, lambda r: r.cells[label], others, part)
    table.groups = {name: values for name, values in table.groups.items() if name == config.group or _binds(values)}
    return table


def _groups(group: str | None, columns: Sequence[str], keys: Mapping[str, str], path: Path) -> list[str]:
    """Return the column whose rows stay together, none if none is asked for."""
    if group is None:
        return []
    if group not in columns or group in keys or group == SPLIT:
        raise UserError(f"{path}: data.group={group}: no such column{suggest(group, set(columns) - {SPLIT, *keys})}")
    return [group]


def _entries(root: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders and the files of sequences in `root`, sorted."""
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    return [path for path in entries if path.is_dir()], [path for path in entries if is_sequence_file(path)]


def _folder(root: Path, config: DnaDataConfig, part: str | None = None) -> Table:
    folders, files = _entries(root)
    if not folders and not files:
        raise UserError(f"{root}: holds no sequence files (.fa, .fasta, .fna, .csv), nor class folders of them")
    if not folders and any(kind_of(path) == "table" for path in files):
        if len(files) > 1:
            raise UserError(f"{root}: several files, one of them a table; data.root=FILE says which is meant")
        return _file(files[0], config, part)
    if not folders and len(files) == 1:
        return _file(files[0], config, part)
    keys = [] if config.group is None else [config.group]
    table = Table(groups={key: [] for key in keys})
    for path in folders or files:
        inside = sequence_files(path)
        if not inside:
            raise UserError(f"{path}: an empty class: no sequence files in it")
        name = path.name if path.is_dir() else _stem(path)
        for file in inside:
            records = _having((_with_keys(record, keys) for record in read_records(file)), keys)
            table.extend(collect(records, config, partial(_named, name), keys, part))
    return table


def _named(name: str, record: Record) -> str:
    return name


def _header_label(config: DnaDataConfig) -> Callable[[Record], str]:
    """Return how the header of a FASTA record says its label."""
    if config.label_pattern is not None:
        try:
            pattern = re.compile(config.label_pattern)
        except re.error as error:
            raise UserError(f"data.label_pattern={config.label_pattern}: not a regular expression: {error}") from None
        if not pattern.groups:
            raise UserError(f"data.label_pattern={config.label_pattern}: expected a group in parentheses, the label")

        def search(record: Record) -> str:
            if (found := pattern.search(record.header)) is None:
                raise UserError(f"{record.where}: data.label_pattern does not match its header")
            if LOST in (text := found[1] or ""):
                raise UserError(f"{record.where}: its label is not UTF-8 text; save the file as UTF-8")
            return text

        return search
    key = config.label or "label"

    def label(record: Record) -> str:
        if key not in record.cells:
            raise UserError(
                f"{record.where}: a missing label: expected '>{record.name} {key}=...', or data.label_pattern"
            )
        return record.cells[key]

    return label


def _having(records: Iterator[Record], keys: Sequence[str]) -> Iterator[Record]:
    """Mark the records whose header lacks one of the keys."""
    for record in records:
        missing = next((key for key in keys if key not in record.cells), None)
        if missing is not None and not record.problem:
            problem = f"data.group={missing}: no {missing}=... in its header{suggest(missing, record.cells)}"
            record = Record(record.name, record.letters, record.where, record.header, record.cells, problem)
        yield record


def _with_keys(record: Record, asked: Sequence[str]) -> Record:
    """Return a FASTA record with the key=value and key="some words" of its header as cells.

    A key of `asked` with two values, or with bytes that are not UTF-8, is a problem of the record.
    """
    cells: dict[str, str] = {}
    problem = ""
    for key, quoted, bare in KEY_VALUE.findall(record.header):
        value = quoted or bare
        if key in asked and cells.get(key, value) != value:
            problem = problem or f"its header says {key}={cells[key]} and {key}={value}; expected one of them"
        if key in asked and LOST in value:
            problem = problem or f"{key}= in its header is not UTF-8 text; save the file as UTF-8"
        cells[key] = value
    return replace(record, cells=cells, problem=record.problem or problem)


def _binds(values: Sequence[str]) -> bool:
    """Whether a column names groups: values that repeat, and not numbers of many kinds."""
    kinds = set(values)
    numbers = all(re.fullmatch(r"-?\d*\.?\d+(e-?\d+)?", value) for value in kinds)
    return 1 < len(kinds) <= 0.8 * len(values) and not numbers


def _stem(path: Path) -> str:
    return stem_of(path) if path.is_file() else path.name
