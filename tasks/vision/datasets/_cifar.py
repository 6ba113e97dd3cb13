"""What CIFAR-10 and CIFAR-100 share: Python 2 pickles of uint8 rows, in a folder or in the .tar.gz they came in.

A row is 3,072 bytes: 32 x 32 red, then green, then blue. A pickle can run code, so that only NumPy's arrays are let in.
Also read: one .npz with each image as JPEG bytes, `{split}_jpeg[{split}_offset[i] : {split}_offset[i + 1]]`, and
`{split}_label`, for split in train, test.

Source: A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009; cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset
from mambaverse.errors import UserError
from mambaverse.splits import refuse_drawn
from mambaverse.tasks.vision.images import DECODE_ERRORS, ArrayImages, ImageSplits, check_labels, decode_image

ROW = 3 * 32 * 32
SAFE = {  # what the pickle of an array names; Python 2's module names on the left
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}


class Cifar(Dataset):
    """Base of the two; the official test images are the evaluation split."""

    folder: ClassVar[str]  # of the pickles, inside the archive
    archive: ClassVar[str]
    train_files: ClassVar[Sequence[str]]
    test_file: ClassVar[str]
    meta_file: ClassVar[str]
    label_key: ClassVar[str]
    names_key: ClassVar[str]
    classes: ClassVar[Sequence[str]] = ()  # for the .npz, which has no names

    def find(self, place: Path) -> Path | None:
        """Return the folder of pickles, the archive, or the .npz, at `place` or in it."""
        if place.is_file():
            return place if place.name.endswith((".tar.gz", ".tar", *((".npz",) if self.classes else ()))) else None
        for folder in (place, place / self.folder):
            if all((folder / name).is_file() for name in self._files()):
                return folder
        archive = place / self.archive
        return archive if archive.is_file() else None

    def download(self, folder: Path) -> None:
        """Fetch and unpack the archive with torchvision."""
        import torchvision.datasets

        getattr(torchvision.datasets, type(self).__name__)(str(folder), download=True)

    def open(self, config: DataConfig) -> ImageSplits:
        """Return the official splits."""
        refuse_drawn(config, self.name)
        path = self.locate(config.root, config.download)
        if path.suffix == ".npz":
            return self._open_npz(path)
        batches = self._read_folder(path) if path.is_dir() else self._read_archive(path)
        meta = batches[self.meta_file]
        try:
            classes = list(meta[self.names_key])
            train = [self._images(path / name, batches[name], len(classes)) for name in self.train_files]
            test = self._images(path / self.test_file, batches[self.test_file], len(classes))
        except KeyError as error:
            raise UserError(f"{path}: not the Python version of {self.name}: it has no {error}") from None
        images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
        return ImageSplits(ArrayImages(images, labels), ArrayImages(*test), classes, size=32, in_chans=3)

    def _files(self) -> list[str]:
        return [*self.train_files, self.test_file, self.meta_file]

    def _read_folder(self, folder: Path) -> dict[str, dict[str, Any]]:
        return {name: _unpickle((folder / name).read_bytes(), folder / name) for name in self._files()}

    def _read_archive(self, path: Path) -> dict[str, dict[str, Any]]:
        found = {}
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    name = Path(member.name).name
                    if member.isfile() and name in self._files() and (file := archive.extractfile(member)):
                        found[name] = _unpickle(file.read(), path / name)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not readable as a tar archive: {error}") from None
        if missing := [name for name in self._files() if name not in found]:
            raise UserError(f"{path}: has no file {missing[0]!r}, which {self.name} needs")
        return found

    def _images(self, path: Path, batch: dict[str, Any], num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
        data, labels = np.asarray(batch["data"]), np.asarray(batch[self.label_key])
        if data.ndim != 2 or data.shape[1] != ROW or data.dtype != np.uint8:
            raise UserError(f"{path}: expected rows of {ROW} bytes, got {data.dtype} {data.shape}")
        check_labels(labels, len(data), num_classes, path)
        return torch.from_numpy(data.reshape(-1, 3, 32, 32)), torch.from_numpy(labels.astype(np.int64))

    def _open_npz(self, path: Path) -> ImageSplits:
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            train, test = (self._decode(path, arrays, split) for split in ("train", "test"))
        except KeyError as error:
            raise UserError(f"{path}: not {self.name} as JPEG: it has no array {error}") from None
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, zlib.error) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: not readable as .npz: {error}") from None
        return ImageSplits(train, test, self.classes, size=32, in_chans=3, note="JPEG copies")

    def _decode(self, path: Path, arrays: dict[str, np.ndarray], split: str) -> ArrayImages:
        data, offsets = arrays[f"{split}_jpeg"].tobytes(), arrays[f"{split}_offset"]
        labels = arrays[f"{split}_label"]
        check_labels(labels, len(offsets) - 1, len(self.classes), path)

        def image(i: int) -> torch.Tensor:
            try:
                decoded = decode_image(data[offsets[i] : offsets[i + 1]], 3)
            except DECODE_ERRORS as error:
                raise UserError(f"{path}: {split} image {i} cannot be decoded: {error}") from None
            if decoded.shape != (3, 32, 32):
                raise UserError(f"{path}: {split} image {i} is {decoded.shape[2]} x {decoded.shape[1]}, not 32 x 32")
            return decoded

        images = torch.stack([image(i) for i in range(len(labels))])
        return ArrayImages(images, torch.from_numpy(labels.astype(np.int64)))


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return only what arrays are made of."""
        if (module, name) not in SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and only NumPy arrays are expected")
        return SAFE[module, name]


def _unpickle(data: bytes, path: Path) -> dict[str, Any]:
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"{path}: not readable as a pickle: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content
