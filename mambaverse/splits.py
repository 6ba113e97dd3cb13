"""What is learnt from and what is held out, of tables and folders that come without a split of their own.

    data.val_fraction, data.split_seed     a share of every class (of the groups, with data.group)
    data.folds, data.fold                  one of k folds: stratified and shuffled, or with data.group by groups
    data.group                             rows with equal values stay on one side: genus, speaker, ...

A random split of data that has groups is scored on near copies of what was learnt; `split_items` warns of it. The split
is written into the run folder, one row a sample, with the hash of its content.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambaverse.config import DataConfig, SplitConfig
from mambaverse.errors import NO_TEXT, UserError, suggest, warn

HASH_LIMIT_BYTES = 2**31  # of all files; beyond it reading them would hold up the start, and sha256 stays empty
COLUMNS = ("set", "class", "group", "name", "bytes", "sha256")


@dataclass(frozen=True)
class Split:
    """Row numbers of both sets, ascending, and what the head of a run says of them."""

    train: list[int]
    eval: list[int]
    note: str
    groups: Sequence[str] | None = None  # of all rows, if the split is by groups


@dataclass(frozen=True)
class SplitRow:
    """One line of the split file; `content` (a file, or the bytes themselves) is what is hashed."""

    set: str  # train, eval, test or skipped
    label: str
    name: str
    content: Path | bytes
    group: str = ""


def split_items(
    labels: Sequence[str] | Sequence[int],
    config: SplitConfig,
    where: str,
    groups: Mapping[str, Sequence[str]] | None = None,
    names: Sequence[str] | None = None,
) -> Split:
    """Hold out some of the rows.

    Args:
        labels: The class of each row.
        config: How.
        where: The data's name, for messages.
        groups: What is known to bind rows together: {"genus": one value a row}.
        names: The rows' file names, on which a `data.group` that is a regular expression is searched.

    Raises:
        UserError: an unknown group; fewer rows or groups than the split needs.
    """
    known = groups or {}
    values = None if config.group is None else _group_values(config.group, where, known, names)
    if values is None and known:
        warn(
            f"{where}: a random split ignores the groups {', '.join(known)}: relatives of a held-out sample are learnt "
            f"from; data.group={next(iter(known))} keeps them on one side"
        )
    held_out = _fold(labels, values, config, where) if config.folds else _share(labels, values, config, where)
    mask = np.zeros(len(labels), bool)
    mask[held_out] = True
    lost = sorted(set(map(str, labels)) - {str(label) for label, out in zip(labels, mask, strict=True) if not out})
    if lost:
        warn(
            f"{where}: no sample of class {lost[0]!r} is left to learn from; "
            "choose another data.fold or data.split_seed"
        )
    train, evaluated = np.flatnonzero(~mask).tolist(), np.flatnonzero(mask).tolist()
    return Split(train, evaluated, _note(config), values)


def refuse_drawn(config: DataConfig, where: str, remedy: str = "") -> None:
    """Raise UserError if `config` says how to split data that come split: nothing would be drawn."""
    for name, value in config.changed("folds", "group", "val_fraction"):
        what = f"{where}: comes split; data.{name}={value} expects data that do not"
        raise UserError(f"{what}: {remedy or f'take data.{name} out'}")


def write_split(target: Path, rows: Iterable[SplitRow]) -> Path:
    """Write one line a row to the CSV file `target`, with sizes and SHA-256; returns `target`."""
    rows = list(rows)
    sizes = [len(r.content) if isinstance(r.content, bytes) else r.content.stat().st_size for r in rows]
    hashed = sum(sizes) <= HASH_LIMIT_BYTES
    with ThreadPoolExecutor(8) as pool, target.open("w", newline="", encoding="utf-8", errors=NO_TEXT) as file:
        digests = pool.map(_digest, rows) if hashed else iter([""] * len(rows))
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row, size, digest in zip(rows, sizes, digests, strict=True):
            writer.writerow((row.set, row.label, row.group, row.name, size, digest))
    return target


def write_digests(target: Path, rows: Iterable[SplitRow]) -> Path:
    """Write one line a set to the CSV file `target`, with its samples' number and a SHA-256 of them; returns `target`.

    For data that come split, whose samples need no list: it tells whether they are still the same. Rows have contents.
    """
    found: dict[str, tuple[int, Any]] = {}
    for row in rows:
        assert isinstance(row.content, bytes)
        count, digest = found.get(row.set) or (0, hashlib.sha256())
        digest.update(f"{row.label}\n{len(row.content)}\n".encode(errors=NO_TEXT) + row.content)
        found[row.set] = count + 1, digest
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("set", "samples", "sha256"))
        writer.writerows((name, count, digest.hexdigest()) for name, (count, digest) in found.items())
    return target


def read_split(path: Path) -> list[dict[str, str]]:
    """Return each line of what `write_split` or `write_digests` wrote, by its columns.

    Raises:
        csv.Error: a file that a task wrote in its own way.
    """
    with path.open(newline="", encoding="utf-8", errors=NO_TEXT) as lines:
        return list(csv.DictReader(lines))


def _group_values(
    group: str, where: str, known: Mapping[str, Sequence[str]], names: Sequence[str] | None
) -> Sequence[str]:
    if group in known:
        return known[group]
    if names is None or "(" not in group:
        hint = ", or a regular expression whose group 1 is read off the file names" if names is not None else ""
        raise UserError(f"{where}: unknown data.group {group!r}{suggest(group, known)}{hint}")
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UserError(f"data.group={group}: not a regular expression: {error}") from None
    if not pattern.groups:
        raise UserError(f"data.group={group}: expected a group in parentheses, what the file names have in common")
    values = []
    for name in names:
        if (match := pattern.search(name)) is None:
            raise UserError(f"{where}: data.group={group} does not match the file {name}")
        if not match[1]:
            raise UserError(f"{where}: data.group={group}: its group 1 is empty in the file {name}; expected a value")
        values.append(match[1])
    return values


def _fold(
    labels: Sequence[str] | Sequence[int], groups: Sequence[str] | None, config: SplitConfig, where: str
) -> np.ndarray:
    from sklearn.model_selection import GroupKFold, StratifiedKFold

    folds = config.folds or 0
    if groups is not None:
        _enough_groups(groups, folds, where, config)
        return list(GroupKFold(folds).split(labels, groups=groups))[config.fold][1]
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < folds:
        rarest = classes[counts.argmin()]
        raise UserError(f"{where}: class {str(rarest)!r} has {counts.min()} samples; {folds} folds need {folds}")
    shuffled = StratifiedKFold(folds, shuffle=True, random_state=config.split_seed)
    return list(shuffled.split(labels, labels))[config.fold][1]


def _share(
    labels: Sequence[str] | Sequence[int], groups: Sequence[str] | None, config: SplitConfig, where: str
) -> np.ndarray:
    if groups is not None:
        from sklearn.model_selection import GroupShuffleSplit

        _enough_groups(groups, 2, where, config)
        number = len(set(groups))
        count = min(math.ceil(config.val_fraction * number), number - 1)  # at least one, and not all
        drawn = GroupShuffleSplit(1, test_size=count, random_state=config.split_seed)
        return next(drawn.split(labels, groups=groups))[1]
    generator = torch.Generator().manual_seed(config.split_seed)
    values = np.asarray(labels)
    held_out = []
    for label in dict.fromkeys(labels):  # at least one of each class, and not all
        rows = np.flatnonzero(values == label)
        if len(rows) < 2:
            raise UserError(
                f"{where}: class {str(label)!r} has 1 usable sample; a class that is split needs two or more"
            )
        count = min(max(round(config.val_fraction * len(rows)), 1), len(rows) - 1)
        held_out.append(rows[torch.randperm(len(rows), generator=generator)[:count].numpy()])
    return np.concatenate(held_out)


def _enough_groups(groups: Sequence[str], least: int, where: str, config: SplitConfig) -> None:
    if (number := len(set(groups))) < least:
        raise UserError(f"{where}: data.group={config.group} has {number} groups; the split needs {least} or more")


def _note(config: SplitConfig) -> str:
    by = f" by {config.group}" if config.group else ""
    if config.folds:
        seed = "" if config.group else f", seed {config.split_seed}"
        return f"fold {config.fold} of {config.folds}{by}{seed}"
    share = "held out" if config.group else "of each class held out"
    return f"{config.val_fraction:.0%} {share}{by}, seed {config.split_seed}"


def _digest(row: SplitRow) -> str:
    try:
        return _sha256(row.content)
    except OSError:
        if row.set == "skipped":  # that it cannot be read may be why
            return ""
        raise


def _sha256(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
