"""What the prepared tables share: one csv, or one a set, plain or compressed, in a folder or named itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset, refuse_unread
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.config import DnaDataConfig
from mambaverse.tasks.dna.files import read_records
from mambaverse.tasks.dna.tables import DnaSplits, Table, collect, make_splits, set_of

ENDINGS = (".csv", ".csv.gz", ".csv.xz")


class Prepared(Dataset):
    """A data set in csv files with a column `sequence`.

    Attributes:
        files: File names without their ending, by the set that they hold; "" for all of them.
        labels: Columns that may be the label, the first by default.
        groups: Columns that bind rows together.
        split: The column that says which set a row belongs to, if there is one.
    """

    files: ClassVar[Mapping[str, str]]
    labels: ClassVar[Sequence[str]] = ("label",)
    groups: ClassVar[Sequence[str]] = ()
    split: ClassVar[str | None] = None

    def find(self, place: Path) -> Path | None:
        """Return `place`, if it is the one file, or a folder with all of them."""
        if place.is_file():
            return place if place.name in {f"{stem}{end}" for stem in self.files.values() for end in ENDINGS} else None
        return place if all(_file(place, stem) for stem in self.files.values()) else None

    def open(self, config: DataConfig) -> DnaSplits:
        """Return the splits."""
        assert isinstance(config, DnaDataConfig)
        refuse_unread(config, self.name, "prepared table", "subset", "label_pattern", "genome")
        place = self.locate(config.root, config.download)
        if place.is_file() and len(self.files) > 1:
            place = place.parent
        label = config.label or self.labels[0]
        if label not in self.labels:
            raise UserError(f"data.label={label}: no label of {self.name}{suggest(label, self.labels)}")
        groups = [name for name in self.groups if name != label]
        table = Table(groups={name: [] for name in groups})
        for part, stem in self.files.items():
            path = place if place.is_file() else _file(place, stem)
            assert path is not None
            needs = [label, *groups, *([self.split] if self.split else [])]
            records = read_records(path, "sequence", needs)
            split = self.split
            sets = part or (None if split is None else lambda r, s=split: set_of(r.cells, r.where, s))
            table.extend(collect(records, config, lambda r: r.cells[label], groups, sets))
        return make_splits(self.prune(table), config, self.name)

    def prune(self, table: Table) -> Table:
        """Return the rows that are used: all of them, unless a data set says otherwise."""
        return table


def _file(folder: Path, stem: str) -> Path | None:
    return next((path for end in ENDINGS if (path := folder / f"{stem}{end}").is_file()), None)
