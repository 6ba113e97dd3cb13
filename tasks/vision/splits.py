"""Which image file is in which set, written down: one row a file, so that a run's data can be checked and had again.

set,class,file,bytes,sha256
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mambaverse.tasks.vision.images import FileImages, ImageSplits

HASH_LIMIT_BYTES = 2**31  # of a folder; beyond it reading every file would hold up the start, and sha256 stays empty
COLUMNS = ("set", "class", "file", "bytes", "sha256")


def write_split(target: Path, splits: ImageSplits, root: Path) -> None:
    """Write the files of both sets, and those left out as unreadable, to the CSV file `target`.

    Args:
        target: The file to write.
        splits: An opened data set of image files.
        root: The folder that the file names are given relative to.
    """
    rows = list(_rows(splits))
    sizes = [path.stat().st_size for *_, path in rows]
    hashed = sum(sizes) <= HASH_LIMIT_BYTES
    with ThreadPoolExecutor(8) as pool, target.open("w", newline="") as file:
        digests = pool.map(_sha256, (path for *_, path in rows)) if hashed else iter([""] * len(rows))
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for (name, label, path), size, digest in zip(rows, sizes, digests, strict=True):
            writer.writerow((name, label, path.relative_to(root).as_posix(), size, digest))


def _rows(splits: ImageSplits) -> Iterator[tuple[str, str, Path]]:
    for name, images in (("train", splits.train), ("eval", splits.eval)):
        assert isinstance(images, FileImages)
        yield from (
            (name, splits.classes[label], path)
            for path, label in zip(images.paths, images.labels.tolist(), strict=True)
        )
    yield from (("skipped", "", path) for path in splits.skipped)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
