"""Labelled clips, as files or in a zip: decoded when they are asked for, and kept while there is room."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mambaverse.config import SplitConfig
from mambaverse.errors import UserError, warn
from mambaverse.splits import SplitRow, split_items
from mambaverse.tasks.audio.reading import decode_audio, read_audio

BYTES_A_SAMPLE = 4
NAMED = 3  # files that a warning names


@dataclass(frozen=True)
class Source:
    """Where one clip lies: a file, or a member of a zip archive."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    def content(self) -> Path | bytes:
        """Return the file, or the member's bytes.

        Raises:
            UserError: a member that is missing or damaged; the message names it.
        """
        if not self.member:
            return self.path
        archive = open_archive(self.path)
        try:
            return archive.read(self.member)
        except (KeyError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            reason = error.args[0] if isinstance(error, KeyError) else str(error) or "cut short"
            raise UserError(f"{self}: not readable in its zip: {reason}; get the zip again") from None

    def read(self, rate: int, report: list[str] | None = None) -> np.ndarray:
        """Return mono samples (L,) float32 at `rate` Hz; what is odd about them is added to `report`.

        Raises:
            UserError: it cannot be used; the message names it.
        """
        say = _ignore if report is None else report.append
        content = self.content()
        if isinstance(content, bytes):
            return decode_audio(content, str(self), rate, report=say)
        return read_audio(content, rate, report=say)


@dataclass(frozen=True)
class Collection:
    """Clips before they are split: sources, labels and names, one a clip, and what is known to bind clips together."""

    sources: Sequence[Source]
    labels: Sequence[str]
    names: Sequence[str]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def take(self, rows: Sequence[int]) -> Collection:
        """Return the clips `rows`."""
        return Collection(
            [self.sources[i] for i in rows],
            [self.labels[i] for i in rows],
            [self.names[i] for i in rows],
            {name: [values[i] for i in rows] for name, values in self.groups.items()},
        )


class Clips:
    """Labelled clips of one rate, and those of them that were decoded.

    Args:
        collection: The clips.
        classes: Names in the order of the class numbers.
        rate: In Hz, to which files of other rates are resampled.
        cache_bytes: Decoded clips are kept up to so many bytes; each loading process has its own.
    """

    def __init__(self, collection: Collection, classes: Sequence[str], rate: int, cache_bytes: int) -> None:
        self.collection, self.rate = collection, rate
        number = {name: i for i, name in enumerate(classes)}
        self.labels: Tensor = torch.tensor([number[label] for label in collection.labels], dtype=torch.int64)
        self._kept: dict[int, Tensor] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, report: list[str] | None = None) -> Tensor:
        """Return clip `index`, mono samples (L,) float32; UserError names the file if it cannot be used."""
        if index not in self._kept:
            clip = torch.from_numpy(self.collection.sources[index].read(self.rate, report))
            if clip.nbytes > self._room:
                return clip
            self._room -= clip.nbytes
            self._kept[index] = clip
        return self._kept[index]

    def preload(self) -> list[str]:
        """Decode clips until the cache is full or all are there; return a line for each that is silent or clipped."""
        report: list[str] = []
        for index in range(len(self)):
            before = self._room
            self.load(index, report)
            if self._room == before:
                break
        return report

    def seconds(self) -> list[float]:
        """Return the durations of the clips that are decoded."""
        return [len(clip) / self.rate for clip in self._kept.values()]


@dataclass(frozen=True)
class AudioSplits:
    """An opened audio data set."""

    train: Collection
    eval: Collection
    classes: Sequence[str]
    note: str = ""  # what else the head of a run says of the data
    test: Collection | None = None
    skipped: Sequence[Source] = ()  # files that could not be used and were left out
    group: str | None = None  # what the split kept on one side, for the split file

    def rows(self) -> list[SplitRow]:
        """Return the lines of the split file."""
        rows = []
        for name, part in (("train", self.train), ("eval", self.eval), ("test", self.test)):
            if part is None:
                continue
            groups = part.groups.get(self.group or "", [""] * len(part.sources))
            rows += [
                SplitRow(name, label, file, source.content(), group)
                for source, label, file, group in zip(part.sources, part.labels, part.names, groups, strict=True)
            ]
        return rows + [SplitRow("skipped", "", str(source), _content_if_any(source)) for source in self.skipped]


def split_collection(collection: Collection, config: SplitConfig, where: str, rate: int, note: str = "") -> AudioSplits:
    """Split clips that come without a split of their own, as `config` says; `where` names the data in messages.

    Raises:
        UserError: one class only, a group that is not known, or a file that cannot be used.
    """
    collection, skipped = readable(collection, config.on_error, rate)
    classes = class_names(collection.labels, where)
    drawn = split_items(collection.labels, config, where, collection.groups, collection.names)
    if drawn.groups is not None and config.group not in collection.groups:
        groups = {**collection.groups, str(config.group): drawn.groups}
        collection = Collection(collection.sources, collection.labels, collection.names, groups)
    notes = [note, drawn.note, *skipped_note(skipped)]
    train, held_out = (collection.take(rows) for rows in (drawn.train, drawn.eval))
    text = ", ".join(part for part in notes if part)
    return AudioSplits(train, held_out, classes, text, skipped=skipped, group=config.group)


def class_names(labels: Sequence[str], where: str) -> list[str]:
    """Return the sorted names of the classes, two or more."""
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise UserError(
            f"{where}: only one class, {classes[0]!r}; expected two or more" if classes else f"{where}: no clips"
        )
    return classes


def readable(collection: Collection, on_error: str, rate: int) -> tuple[Collection, list[Source]]:
    """Return the clips that can be decoded and the sources of the others: with `on_error` "skip" all are tried."""
    if on_error != "skip":
        return collection, []
    kept, skipped, first = [], [], ""
    for row, source in enumerate(collection.sources):
        try:
            source.read(rate)
            kept.append(row)
        except UserError as error:
            skipped.append(source)
            first = first or str(error)
    if skipped:
        warn(f"{len(skipped)} of {len(collection.sources)} files skipped, the first: {first}; split.csv lists them")
    return collection.take(kept), skipped


def skipped_note(skipped: Sequence[Source]) -> list[str]:
    """Return what the head of a run says of skipped files."""
    return [f"{len(skipped)} unusable file{'s' * (len(skipped) != 1)} skipped"] if skipped else []


def warn_of(lines: Sequence[str], where: str) -> None:
    """Print one warning for the clips that are silent or clipped, by what they are."""
    by_kind: dict[str, list[str]] = {}
    for line in lines:
        name, _, oddity = line.rpartition(": ")  # names of files may hold colons
        by_kind.setdefault(oddity.partition(" (")[0], []).append(name)
    for kind, names in by_kind.items():
        named = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
        warn(f"{where}: {len(names)} clip{'s' * (len(names) != 1)} {kind}: {named}")


def open_archive(path: Path) -> zipfile.ZipFile:
    """Return the open zip at `path`, kept open: reading its directory takes as long as reading a hundred clips.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        return _archive(path, path.stat().st_mtime_ns, os.getpid())
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not readable as a zip: {error}") from None


@lru_cache(maxsize=8)
def _archive(path: Path, changed: int, process: int) -> zipfile.ZipFile:
    """Open a zip: once as long as it is unchanged, and in each process, as they would share a file's position."""
    return zipfile.ZipFile(path)


def _content_if_any(source: Source) -> Path | bytes:
    try:
        return source.content()
    except UserError:  # which is why it was skipped
        return b""


def _ignore(line: str) -> None:
    """Take a line that was said before."""
