"""Images as they lie in memory or on disk, uint8 (C, H, W), and the one reader of image files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from mambaverse.datasets import files_below
from mambaverse.errors import UserError

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
DECODE_ERRORS = (  # what Pillow was seen to raise, or may raise, on damaged files
    OSError, SyntaxError, ValueError, TypeError, EOFError, OverflowError, RuntimeError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
STATISTICS_FILES = 256  # images of a folder that its mean and standard deviation are estimated from
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R 601, as Pillow has it
BITS_PER_SAMPLE = 258  # a tag of TIFF
MODES = {1: "L", 3: "RGB"}


class Images(Protocol):
    """Labelled images."""

    @property
    def labels(self) -> Tensor:
        """Class numbers (N,), int64."""

    def __len__(self) -> int:
        """Number of images."""

    def load(self, index: int) -> Tensor:
        """Return image `index`, uint8 (C, H, W)."""


@dataclass(frozen=True)
class ArrayImages:
    """Images of one size in memory, uint8 (N, C, H, W)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Tensor:
        """Return image `index`, a view of the array."""
        return self.images[index]


@dataclass(frozen=True)
class FileImages:
    """Image files of any sizes, decoded when they are asked for."""

    paths: Sequence[Path]
    labels: Tensor
    in_chans: int = 3

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Tensor:
        """Return image `index`; UserError names the file if it cannot be decoded, and the remedy."""
        try:
            return read_image(self.paths[index], self.in_chans)
        except UserError as error:
            raise UserError(f"{error}; data.on_error=skip leaves such files out") from None


@dataclass(frozen=True)
class ImageSplits:
    """An opened image data set."""

    train: Images
    eval: Images
    classes: Sequence[str]
    size: int | None  # side of the images in pixels; None where they differ
    in_chans: int
    note: str = ""  # what else the head of a run says of the data
    skipped: Sequence[Path] = ()  # files that could not be read and were left out


def read_image(path: Path, in_chans: int) -> Tensor:
    """Decode an image file to uint8 (in_chans, H, W), upright as its EXIF orientation says.

    Raises:
        UserError: missing, truncated, or not an image; the message names the file.
    """
    try:
        return decode_image(path.read_bytes(), in_chans)
    except DECODE_ERRORS as error:
        raise UserError(f"{path}: {_reason(error)}") from None


def decode_image(data: bytes, in_chans: int) -> Tensor:
    """Decode an image in memory to uint8 (in_chans, H, W); raises one of `DECODE_ERRORS`."""
    with Image.open(BytesIO(data)) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return to_tensor(image, in_chans)


def to_tensor(image: Image.Image, in_chans: int) -> Tensor:
    """Return a Pillow image as uint8 (in_chans, H, W): 1 channel is its luminance; transparency is dropped.

    Images of 16 bits, and of 12, keep their upper 8. Images of floats and of 32-bit integers have no agreed range and
    raise ValueError.
    """
    _check_range(image)
    return _to_tensor(image, in_chans)


def _check_range(image: Image.Image) -> None:
    """Raise ValueError where it is not known what number is white. Pillow opens some 16-bit files as 32-bit ones."""
    unknown = image.mode == "I" and image.format not in ("PNG", "PPM") and _bits(image, 32) > 16
    if image.mode == "F" or unknown:
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"pixels are {kind}, which have no agreed range; save it with 8 or 16 bits a channel")


def _bits(image: Image.Image, else_: int) -> int:
    """Return the bits of a grey value, as a TIFF file says; of other images `else_`."""
    return getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (else_,))[0] if image.format == "TIFF" else else_


def _to_tensor(image: Image.Image, in_chans: int) -> Tensor:
    if image.mode.startswith("I"):  # 16-bit grey, whatever the byte order, or 12-bit grey of a TIFF
        upper = np.asarray(image).astype(np.int64) >> (_bits(image, 16) - 8)
        image = Image.fromarray(upper.clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "LAB":  # of which Pillow makes RGB, and no grey
        image = image.convert("RGB")
    pixels = np.array(image.convert(MODES[in_chans]))
    return torch.from_numpy(np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1)))


def to_pil(image: Tensor) -> Image.Image:
    """Return a uint8 (C, H, W) tensor as a Pillow image, mode L or RGB."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else rearrange(image, "c h w -> h w c").numpy())


def list_images(folder: Path) -> list[Path]:
    """Return the image files that `files_below` finds."""
    return [path for path in files_below(folder) if path.suffix.lower() in EXTENSIONS]


def with_channels(images: Images, in_chans: int) -> Images:
    """Return `images` in grey (1) or RGB (3)."""
    if isinstance(images, FileImages):
        return replace(images, in_chans=in_chans)
    if not isinstance(images, ArrayImages) or images.images.shape[1] == in_chans:
        return images
    if in_chans == 3:
        return replace(images, images=images.images.expand(-1, 3, -1, -1))
    weighted = torch.einsum("n c h w, c -> n h w", images.images.float(), torch.tensor(LUMINANCE))
    return replace(images, images=weighted.round().byte()[:, None])


def unreadable(paths: Sequence[Path]) -> list[Path]:
    """Return those of `paths` that cannot be decoded; a JPEG is read whole, but decoded at 1/8 of its size."""

    def broken(path: Path) -> bool:
        try:
            with Image.open(BytesIO(path.read_bytes())) as image:
                image.draft("L", (1, 1))
                image.load()
                _check_range(image)
                _to_tensor(Image.new(image.mode, (1, 1)), 3)  # whether a mode can be converted is a matter of no pixels
                return False
        except DECODE_ERRORS:
            return True

    with ThreadPoolExecutor(8) as pool:
        return [path for path, bad in zip(paths, pool.map(broken, paths), strict=True) if bad]


def check_labels(labels: np.ndarray, num_images: int, num_classes: int, path: Path) -> None:
    """Raise UserError unless there is a label of a known class for each image."""
    if len(labels) != num_images:
        raise UserError(f"{path}: {num_images:,} images, but {len(labels):,} labels")
    if not num_images:
        raise UserError(f"{path}: holds no images")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"{path}: labels {labels.min()}..{labels.max()}, expected 0..{num_classes - 1}")


def statistics(images: Images) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, for pixels in [0, 1].

    Exact over images in memory; over `STATISTICS_FILES` evenly spaced ones of a folder.
    """
    if isinstance(images, ArrayImages):
        counts = torch.stack([_histogram(channel) for channel in images.images.unbind(1)])
    else:
        step = max(len(images) // STATISTICS_FILES, 1)
        loaded = (images.load(i) for i in range(0, len(images), step))
        counts = torch.stack([torch.stack([_histogram(channel) for channel in image]) for image in loaded]).sum(0)
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp(min=0).sqrt()
    return [round(m, 4) for m in mean.tolist()], [round(s, 4) or 1.0 for s in std.tolist()]


def _histogram(channel: Tensor) -> Tensor:
    return torch.bincount(channel.reshape(-1), minlength=256).double()


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
        return (error.strerror or str(error)).lower()
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of a format that Pillow does not read"
    return f"the image cannot be decoded: {error}"
