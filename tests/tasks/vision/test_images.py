"""Reading images: every mode becomes uint8 (C, H, W), and what cannot be read is named."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from mambaverse.errors import UserError
from mambaverse.tasks.vision.images import (
    ArrayImages,
    FileImages,
    read_image,
    statistics,
    to_pil,
    to_tensor,
    unreadable,
    with_channels,
)

Save = Callable[..., Path]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_any_mode_becomes_grey_or_rgb(mode: str, in_chans: int) -> None:
    image = to_tensor(Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode), in_chans)
    assert image.shape == (in_chans, 4, 5) and image.dtype == torch.uint8
    assert image.float().mean() > 250


def test_sixteen_bits_keep_the_upper_eight(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 5), 0x80FF, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png", 3).unique().tolist() == [0x80]


def test_twelve_bits_of_a_tiff_keep_the_upper_eight(tmp_path: Path) -> None:
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}  # size, bits, where 3 bytes lie
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    pixels = bytes.fromhex("fff80000")  # 0xfff, 0x800, and a byte that fills the word
    (tmp_path / "x.tif").write_bytes(b"II*\0\x0c\0\0\0" + pixels + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert read_image(tmp_path / "x.tif", 1).tolist() == [[[0xFF, 0x80]]]


@pytest.mark.parametrize("suffix", [".png", ".pgm", ".tif"])
@pytest.mark.parametrize("mode", ["I", None])
def test_what_a_file_says_are_sixteen_bits_are_read_so_whatever_pillow_opens_it_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, mode: str | None
) -> None:
    """Older versions of Pillow open such PNG files as "I" too; newer ones have PGM so."""
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(np.full((4, 5), 0x80FF, np.uint16)).save(path)
    if mode is not None:
        opened = Image.open
        monkeypatch.setattr(Image, "open", lambda file: as_mode(opened(file), mode))
    assert read_image(path, 3).unique().tolist() == [0x80]
    assert unreadable([path]) == []


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Make `image` what it is after a conversion, with all that its file says."""
    image.load()
    converted = image.convert(mode)
    image.im, image._mode = converted.im, converted.mode
    return image


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (5, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.info["transparency"] = b"\x00\xff"
    image.save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", 3)[:, 0, 0].tolist() == [10, 20, 30]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg", 3).shape == (3, 8, 4)


def test_grey_is_the_luminance_that_pillow_computes(save_image: Save, tmp_path: Path) -> None:
    colour = read_image(save_image(tmp_path / "x.png"), 3)
    grey = with_channels(ArrayImages(colour[None], torch.zeros(1, dtype=torch.int64)), 1)
    assert (grey.load(0).int() - read_image(tmp_path / "x.png", 1).int()).abs().max() <= 1


def test_pillow_and_back_is_the_same(save_image: Save, tmp_path: Path) -> None:
    for in_chans in (1, 3):
        image = read_image(save_image(tmp_path / "x.png"), in_chans)
        assert to_tensor(to_pil(image), in_chans).equal(image)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".bmp", ".tif"])
def test_a_truncated_image_is_named(save_image: Save, tmp_path: Path, suffix: str) -> None:
    path = save_image(tmp_path / f"half{suffix}", size=(64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"half{suffix}: .*(cannot be decoded|not an image)"):
        read_image(path, 3)
    assert unreadable([path]) == [path]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_named_whatever_its_file_is_called(save_image: Save, tmp_path: Path) -> None:
    whole = save_image(tmp_path / "x.avif", size=(64, 64)).read_bytes()
    path = tmp_path / "x.jpg"
    path.write_bytes(whole.replace(b"iloc", b"lost"))
    with pytest.raises(UserError, match=r"x\.jpg: the image cannot be decoded: Failed to decode"):  # a RuntimeError
        read_image(path, 3)
    assert unreadable([path]) == [path]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not an image"), (b"hello", "not an image"), (None, "no such file")],
    ids=["empty", "text", "missing"],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "x.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.jpg: {reason}"):
        read_image(path, 3)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match=r"f\.tif: .*floats"):
        read_image(tmp_path / "f.tif", 1)
    assert unreadable([tmp_path / "f.tif"]) == [tmp_path / "f.tif"]


@pytest.mark.parametrize("value", [7, 200, 70_000, 2**31 - 1])
def test_integers_of_32_bits_are_refused(tmp_path: Path, value: int) -> None:
    Image.fromarray(np.full((4, 4), value, np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(UserError, match=r"i\.tif: .*32-bit integers, which have no agreed range"):
        read_image(tmp_path / "i.tif", 1)
    assert unreadable([tmp_path / "i.tif"]) == [tmp_path / "i.tif"]


def test_statistics_are_those_of_the_pixels(save_image: Save, tmp_path: Path) -> None:
    pixels = torch.randint(0, 200, (50, 3, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[:, 2] = 7  # a constant channel must not divide by zero
    mean, std = statistics(ArrayImages(pixels, torch.zeros(50)))
    scaled = pixels.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert std == pytest.approx([*scaled.std((0, 2, 3), correction=0).tolist()[:2], 1.0], abs=1e-4)


def test_statistics_of_files_of_several_sizes(save_image: Save, tmp_path: Path) -> None:
    paths = [save_image(tmp_path / f"{n}.png", size=(n, n), seed=n) for n in (8, 16)]
    mean, _ = statistics(FileImages(paths, torch.zeros(2)))
    pixels = torch.cat([read_image(path, 3).flatten(1) for path in paths], 1).double() / 255
    assert mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-4)
