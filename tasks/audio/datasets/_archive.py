"""A data set in one zip: audio files and a manifest.csv with a row for each."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

from mambaverse.errors import UserError, suggest

MANIFEST = "manifest.csv"


def read_manifest(archive: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of the manifest in a zip; each has `columns`, "file" among them, and its file is in the zip.

    Raises:
        UserError: no zip, no manifest, a column or a file that is missing; the message names it.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            names = set(opened.namelist())
            if MANIFEST not in names:
                raise UserError(f"{archive}: has no {MANIFEST}")
            rows = list(csv.DictReader(io.StringIO(opened.read(MANIFEST).decode("utf-8-sig"))))
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{archive}: not readable as a zip with a {MANIFEST}: {error}") from None
    if not rows:
        raise UserError(f"{archive}: its {MANIFEST} has no rows")
    for column in columns:
        if column not in rows[0]:
            raise UserError(f"{archive}: its {MANIFEST} has no column {column!r}{suggest(column, rows[0])}")
    for row in rows:
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
