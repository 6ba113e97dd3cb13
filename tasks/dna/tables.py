"""From records to sets: labels numbered, bad records refused or counted, rows split into train, eval and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mambaverse.errors import UserError, suggest, warn
from mambaverse.splits import SplitRow, refuse_drawn, split_items
from mambaverse.tasks.dna.config import DnaDataConfig
from mambaverse.tasks.dna.files import Record
from mambaverse.tasks.dna.sequences import Background, Place, Sequences

SETS = {  # what a split column, or a folder, may call the sets
    "train": "train", "training": "train", "dev": "eval", "val": "eval", "valid": "eval", "validation": "eval",
    "eval": "eval", "test": "test", "testing": "test",
}  # fmt: skip
LISTED = 5  # skipped records that are named


@dataclass
class Table:
    """Labelled sequences, row by row.

    Attributes:
        ids: Of the bases, uint8 (L,) each.
        labels: Class names.
        names: What each row is called in its file.
        groups: Columns that bind rows together, by name.
        sets: "train", "eval" or "test" for every row, if the data come split; else empty.
        places: Chromosome, start and end of every row, 0-based and half-open, if the data know them; else empty.
        skipped: What was wrong with the records that were left out.
    """

    ids: list[np.ndarray] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)
    sets: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def take(self, rows: Sequence[int]) -> Table:
        """Return the table of some of the rows."""
        return Table(
            [self.ids[i] for i in rows],
            [self.labels[i] for i in rows],
            [self.names[i] for i in rows],
            {name: [values[i] for i in rows] for name, values in self.groups.items()},
            [self.sets[i] for i in rows] if self.sets else [],
            [self.places[i] for i in rows] if self.places else [],
            self.skipped,
        )

    def extend(self, other: Table) -> None:
        """Append the rows of another table of the same columns."""
        for mine, theirs in (
            (self.ids, other.ids), (self.labels, other.labels), (self.names, other.names), (self.sets, other.sets),
            (self.places, other.places), (self.skipped, other.skipped),
        ):  # fmt: skip
            mine.extend(theirs)  # type: ignore[arg-type]
        for name, values in other.groups.items():
            self.groups.setdefault(name, []).extend(values)


@dataclass
class DnaSplits:
    """An opened data set; `test` is None where no set is held back beside `eval`."""

    train: Sequences
    eval: Sequences
    classes: list[str]
    test: Sequences | None = None
    note: str = ""
    drawn: bool = False  # whether the split was drawn here, and is to be written down
    skipped: list[str] = field(default_factory=list)
    monitor: str | None = None  # the metric that the field reports of these data
    background: Background | None = None  # where more training sequences of one class can be cut out

    def rows(self) -> Iterable[SplitRow]:
        """Yield one line a sequence for the split file."""
        for name, part in (("train", self.train), ("eval", self.eval), ("test", self.test)):
            for i in range(0 if part is None else len(part)):
                assert part is not None
                group = "" if part.groups is None else part.groups[i]
                yield SplitRow(name, self.classes[part.labels[i]], part.names[i], part[i].tobytes(), group)
        yield from (SplitRow("skipped", "", reason, b"") for reason in self.skipped)


def collect(
    records: Iterable[Record],
    config: DnaDataConfig,
    label_of: Callable[[Record], str],
    groups: Sequence[str] = (),
    part: str | Callable[[Record], str] | None = None,
    place_of: Callable[[Record], Place] | None = None,
) -> Table:
    """Read all records into a table.

    Args:
        records: From one or several files.
        config: Says which letters are allowed, and whether bad records are left out.
        label_of: The class of a record.
        groups: Columns of the records that bind rows together.
        part: The set that they belong to, or how a record says so; None: the data do not come split.
        place_of: Where in its genome a record lies.

    Raises:
        UserError: a bad record, unless `on_error` is skip.
    """
    table = Table(groups={name: [] for name in groups})
    stream = iter(records)
    while True:
        try:
            if (record := next(stream, None)) is None:
                break
            ids = record.ids(strict=config.strict, rna=config.rna, max_unknown=config.max_unknown)
            if not (label := label_of(record).strip()):
                raise UserError(f"{record.where}: an empty label")
            name = part(record) if callable(part) else part
        except UserError as error:
            if config.on_error != "skip":
                raise
            table.skipped.append(str(error))
            continue
        table.ids.append(ids)
        table.labels.append(label)
        table.names.append(record.name)
        for column, values in table.groups.items():
            values.append(record.cells[column].strip())
        if name is not None:
            table.sets.append(name)
        if place_of is not None:
            table.places.append(place_of(record))
    return table


def set_of(cells: Mapping[str, str], where: str, column: str = "split") -> str:
    """Return the set that a row's split column names."""
    value = cells[column].strip().lower()
    if value not in SETS:
        raise UserError(f"{where}: column {column!r} says {cells[column]!r}{suggest(value, SETS)}")
    return SETS[value]


def make_splits(table: Table, config: DnaDataConfig, where: str) -> DnaSplits:
    """Number the labels by sorted name, leave out small classes, and split the rows unless they come split.

    With `data.group` rows that come split are put together and split anew. With `data.dev_fraction` a part of the
    training rows, by the same groups, becomes the dev set, and what is held out, or was, the test set.

    Raises:
        UserError: no rows, one class, a label that is not among the training rows, a set that is missing, folds of
            rows that come split.
    """
    note = _report(table, where)
    if not table.ids:
        raise UserError(f"{where}: holds no usable sequences{': ' + table.skipped[0] if table.skipped else ''}")
    notes = [note] if note else []
    counts = Counter(table.labels)
    small = [name for name, count in counts.items() if count < config.min_count]
    if small:
        table = table.take([i for i, label in enumerate(table.labels) if counts[label] >= config.min_count])
        notes.append(f"{len(small)} classes with fewer than {config.min_count} sequences left out")
    classes = sorted(set(table.labels))
    if len(classes) < 2:
        found = f"only one class, {classes[0]!r}" if classes else f"no class of {config.min_count} sequences"
        raise UserError(f"{where}: {found}; expected two or more")
    labels = np.array([classes.index(label) for label in table.labels])
    groups: Sequence[str] | None = None
    drawn = not table.sets or config.group is not None
    if not drawn:
        refuse_drawn(config, where, "take it out, or split anew by groups with data.group")
        chosen = _official(table, where)
    else:
        split = split_items(table.labels, config, where, table.groups, table.names)
        chosen, groups = {"train": split.train, "eval": split.eval}, split.groups
        notes.append(f"its own split set aside: {split.note}" if table.sets else split.note)
    if config.dev_fraction:
        chosen = _with_dev(chosen, table, config, where)
        notes.append(f"{config.dev_fraction:.0%} of the rest chooses the weights, seed {config.split_seed}")
        drawn = True
    parts = {
        name: Sequences(
            [table.ids[i] for i in rows],
            labels[rows],
            [table.names[i] for i in rows],
            None if groups is None else [groups[i] for i in rows],
            [table.places[i] for i in rows] if table.places else None,
        )
        for name, rows in chosen.items()
    }
    return DnaSplits(parts["train"], parts["eval"], classes, parts.get("test"), ", ".join(notes), drawn, table.skipped)


def _official(table: Table, where: str) -> dict[str, list[int]]:
    """Return the rows of each set; a test set without a dev set is the evaluation set."""
    rows: dict[str, list[int]] = {"train": [], "eval": [], "test": []}
    for i, name in enumerate(table.sets):
        rows[name].append(i)
    if not rows["train"] or not (rows["eval"] or rows["test"]):
        have = ", ".join(name for name, found in rows.items() if found)
        raise UserError(f"{where}: comes split, and has only {have}; expected train and test (and dev)")
    known = {table.labels[i] for i in rows["train"]}
    for name in ("eval", "test"):
        for i in rows[name]:
            if table.labels[i] not in known:
                raise UserError(
                    f"{where}: label {table.labels[i]!r} of {table.names[i]} ({name}) is not among the training labels"
                    f"{suggest(table.labels[i], known)}"
                )
    if not rows["eval"]:
        rows["eval"] = rows.pop("test")
    elif not rows["test"]:
        del rows["test"]
    return rows


def _with_dev(chosen: Mapping[str, list[int]], table: Table, config: DnaDataConfig, where: str) -> dict[str, list[int]]:
    """Return the sets with a part of the training rows as "eval"; what was "eval" is the test set."""
    if "test" in chosen:
        raise UserError(f"{where}: comes with a dev set; data.dev_fraction={config.dev_fraction:g} would draw another")
    kept = table.take(chosen["train"])
    again = replace(config, val_fraction=config.dev_fraction, folds=None, fold=0)
    split = split_items(kept.labels, again, where, kept.groups if config.group else None, kept.names)
    train, dev = ([chosen["train"][i] for i in part] for part in (split.train, split.eval))
    return {"train": train, "eval": dev, "test": chosen["eval"]}


def _report(table: Table, where: str) -> str:
    """Warn of what was left out, and return the words for the head of a run."""
    if not table.skipped:
        return ""
    count = len(table.skipped)
    warn(f"{where}: {count:,} of {count + len(table.ids):,} records left out (data.on_error=skip); the first are:")
    for reason in table.skipped[:LISTED]:
        warn(f"  {reason}")
    return f"{count:,} bad records skipped"
