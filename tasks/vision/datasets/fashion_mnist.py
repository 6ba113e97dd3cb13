"""Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28 x 28, in the idx files of MNIST.

An idx file is four bytes 0, 0, 8 (unsigned bytes), number of axes; each axis' length as a big-endian uint32; the data.

Source: H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST, arXiv:1708.07747. Format: yann.lecun.com/exdb/mnist.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset, register_dataset
from mambaverse.errors import UserError
from mambaverse.splits import refuse_drawn
from mambaverse.tasks.vision.images import ArrayImages, ImageSplits, check_labels

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


@register_dataset("vision/fashion_mnist")
class FashionMNIST(Dataset):
    """Ten kinds of clothes, grey, 28 x 28; the official test images are the evaluation split."""

    summary = "Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28 x 28, 10 classes"
    needs = f"the idx files {', '.join(FILES)}, each plain or .gz"
    source = "the Debian package dataset-fashion-mnist, or github.com/zalandoresearch/fashion-mnist (MIT)"
    fetches = "the four .gz files (30 MB) with torchvision"
    system_places = (Path("/usr/share/datasets/fashion-mnist"),)

    def find(self, place: Path) -> Path | None:
        """Return the folder with all four files: `place`, or where torchvision puts them in it."""
        for folder in (place, place / "FashionMNIST" / "raw"):
            if all(_file(folder, name) for name in FILES):
                return folder
        return None

    def download(self, folder: Path) -> None:
        """Fetch the files with torchvision."""
        from torchvision.datasets import FashionMNIST as Torchvision

        Torchvision(str(folder), download=True)

    def open(self, config: DataConfig) -> ImageSplits:
        """Return the official splits."""
        refuse_drawn(config, self.name)
        folder = self.locate(config.root, config.download)
        train, test = (self._read(folder, part) for part in ("train", "t10k"))
        return ImageSplits(train, test, CLASSES, size=28, in_chans=1)

    def _read(self, folder: Path, part: str) -> ArrayImages:
        images, labels = (
            read_idx(path, axes)
            for name, axes in zip(FILES, (3, 1, 3, 1), strict=True)
            if name.startswith(part) and (path := _file(folder, name))
        )
        if images.shape[1:] != (28, 28):
            raise UserError(f"{folder}: expected images of 28 x 28, got {images.shape[1]} x {images.shape[2]}")
        check_labels(labels, len(images), len(CLASSES), folder)
        return ArrayImages(torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)))


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Return the unsigned bytes of an idx file (.gz or plain) of so many axes.

    Raises:
        UserError: damaged, truncated or of another format; the message names the file.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not readable as gzip: {error}") from None
    head = 4 + 4 * axes
    if len(data) < head or data[:4] != bytes((0, 0, 8, axes)):
        raise UserError(f"{path}: not an idx file of unsigned bytes with {axes} axes")
    shape = struct.unpack(f">{axes}I", data[4:head])
    if len(data) - head != np.prod(shape, dtype=np.int64):
        expected = " x ".join(map(str, shape))
        raise UserError(f"{path}: expected {expected} bytes after the head, got {len(data) - head:,}; it is truncated")
    return np.frombuffer(bytearray(data), np.uint8, offset=head).reshape(shape)


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
