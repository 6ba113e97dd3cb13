"""A data set in one zip: audio files and a manifest.csv with a row for each; read in place, and written by a build."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from mambaverse.errors import UserError, suggest
from mambaverse.tasks.audio.reading import read_audio
from mambaverse.tasks.audio.wav import encode_wav

MANIFEST = "manifest.csv"
RATE = 16_000  # Hz, of what a build writes
FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # of the members, so that a build is the same to the byte


def read_manifest(archive: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of the manifest in a zip; each fills `columns`, "file" among them, and its file is in the zip.

    Raises:
        UserError: no zip, no manifest, a column, a cell or a file that is missing; the message names it.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            names = set(opened.namelist())
            if MANIFEST not in names:
                raise UserError(f"{archive}: has no {MANIFEST}")
            rows = list(csv.DictReader(io.StringIO(opened.read(MANIFEST).decode("utf-8-sig")), strict=True))
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{archive}: not readable as a zip with a {MANIFEST}: {error}") from None
    if not rows:
        raise UserError(f"{archive}: its {MANIFEST} has no rows")
    for column in columns:
        if column not in rows[0]:
            raise UserError(f"{archive}: its {MANIFEST} has no column {column!r}{suggest(column, rows[0])}")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(f"{archive}: row {number} of its {MANIFEST} has not as many cells as its head")
        if empty := [column for column in columns if not row[column]]:
            raise UserError(f"{archive}: row {number} of its {MANIFEST} has nothing in the column {empty[0]!r}")
        if row["file"] not in names:
            raise UserError(f"{archive}: {MANIFEST} names {row['file']!r}, which is not in it")
    return rows


def has_manifest(path: Path, columns: Sequence[str]) -> bool:
    """Whether `path` is a zip whose manifest has `columns`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as opened:
        if MANIFEST not in opened.namelist():
            return False
        with opened.open(MANIFEST) as file:
            head = file.readline().decode("utf-8-sig", "replace").strip().split(",")
    return set(columns) <= set(head)


def write_archive(
    target: Path, columns: Sequence[str], rows: Iterable[tuple[Sequence[str], Path]], seconds: float | None = None
) -> None:
    """Write a zip of 16-kHz 16-bit mono WAV files and their manifest.

    Args:
        target: The zip.
        columns: Of the manifest, the first of them "file".
        rows: The manifest's rows, each with the audio file whose samples it names.
        seconds: Longer files are cut.

    Raises:
        UserError: no rows, or a file that cannot be read.
    """
    text = io.StringIO()
    manifest = csv.writer(text, lineterminator="\n")
    manifest.writerow(columns)
    number = 0
    with zipfile.ZipFile(target, "w") as archive:
        for values, path in rows:
            samples = read_audio(path, RATE, report=_ignore)
            if seconds is not None:
                samples = samples[: round(seconds * RATE)]
            _write(archive, values[0], encode_wav(samples, RATE))
            manifest.writerow(values)
            number += 1
        _write(archive, MANIFEST, text.getvalue())
    if not number:
        raise UserError(f"{target.parent}: no clips to write")


def _write(archive: zipfile.ZipFile, name: str, content: bytes | str) -> None:
    archive.writestr(zipfile.ZipInfo(name, FIXED_DATE), content, zipfile.ZIP_DEFLATED)


def _ignore(line: str) -> None:
    """What is silent or clipped is said when the clips are read, not when they are converted."""
