"""Images that stay where the model is, and are cut, turned, coloured and erased there, a batch at a time.

Every random choice is a hash of (key, sample, number of the choice), so that it is the same whatever batch a sample is
in, on any device, and in a run that was stopped and resumed; `key` is the seed's and the epoch's.

Sources: TrivialAugment, Müller and Hutter 2021 (arXiv 2103.10158), table 6, but that images move half as far: one
operation a sample, of random strength;
cutout, DeVries and Taylor 2017 (arXiv 1708.04552). The hash is SplitMix64 (Steele et al. 2014).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mambaverse.engine.task import Batch, Sample
from mambaverse.tasks.vision.images import LUMINANCE, ArrayImages

CHOICES = 8  # random numbers a sample: down, right, flip, operation, strength, sign, erased row and column
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


@dataclass(frozen=True)
class DeviceAugment:
    """Callable (images, uniform numbers) -> images, float32 (B, C, H, W) in [0, 255].

    Attributes:
        crop_padding: Zero pixels put around an image before a random crop of its own size.
        flip: Probability of a left-right flip.
        trivial: Whether one operation of TrivialAugment follows.
        cutout: Side in pixels of a square that is overwritten with `fill`; 0: none.
        fill: Of each channel, in [0, 255]: erased pixels, and those that turning leaves empty.
    """

    crop_padding: int = 0
    flip: float = 0.0
    trivial: bool = False
    cutout: int = 0
    fill: Sequence[float] = ()

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        """Return uint8 `images` (B, C, H, W) as they are to be learnt from, by the numbers u (B, CHOICES) in [0, 1)."""
        x = _cropped(images, u[:, 0], u[:, 1], u[:, 2] < self.flip, self.crop_padding).float()
        fill = constant(tuple(self.fill) or (0.0,) * x.shape[1], x.device)
        if self.trivial:
            x = _trivial(x, u[:, 3], u[:, 4], u[:, 5] < 0.5, fill)
        if self.cutout:
            x = torch.where(_square(x, u[:, 6], u[:, 7], self.cutout), fill, x)
        return x


class DeviceImages:
    """Images in memory, kept and augmented on the device of the model.

    Args:
        images: uint8, all of one size.
        augment: Applied to what is learnt from; None: images are left as they are.
        finish: (float images (B, C, H, W), classes (B,), the batch's generator or None) -> a batch of the task.
    """

    def __init__(
        self,
        images: ArrayImages,
        augment: DeviceAugment | None,
        finish: Callable[[Tensor, Tensor, Generator | None], Batch],
    ) -> None:
        self.images, self.augment, self.finish = images, augment, finish
        self._there: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, generator: Generator | None) -> Sample:
        """Return image `index` as it is, for pictures; what is learnt from comes in batches."""
        return {"image": self.images.load(index), "target": int(self.images.labels[index])}

    def batch(
        self, indices: Sequence[int], key: int | None, generator: Generator | None, device: torch.device
    ) -> Batch:
        """Return a batch on `device`; with a key augmented by it, with a generator mixed by it."""
        if device not in self._there:
            self._there[device] = self.images.images.to(device), self.images.labels.to(device)
        images, labels = self._there[device]
        at = torch.tensor(indices)
        at = (at.pin_memory() if device.type == "cuda" else at).to(device, non_blocking=True)
        chosen = images[at]
        if key is None or self.augment is None:
            return self.finish(chosen.float(), labels[at], generator)
        return self.finish(self.augment(chosen, uniform(key, at, CHOICES)), labels[at], generator)


@lru_cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one number a channel, (1, C, 1, 1) float32; copied to a device once, since a copy waits for it."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def uniform(key: int, samples: Tensor, count: int) -> Tensor:
    """Return float32 (B, count) in [0, 1): the 24 upper bits of SplitMix64 at key + a place for each sample and number.

    Args:
        key: 63 bits.
        samples: (B,) int64.
        count: Numbers a sample.
    """
    place = samples[:, None] * count + torch.arange(count, device=samples.device)
    x = key + (place + 1) * _signed(0x9E3779B97F4A7C15)  # int64 wraps around, as the hash wants
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(x ^ _shifted(x, 31), 40).float() / 2**24


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift 64 bits right, zeros from the left."""
    return (x >> by) & (2 ** (64 - by) - 1)


def _cropped(images: Tensor, down: Tensor, right: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Move each image by up to `padding` pixels either way, zeros following, and flip those of `flip`."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    places = 2 * padding + 1
    rows = (down * places).long()[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(batch, -1)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + (right * places).long()[:, None]
    at = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[at, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _square(x: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """Return a mask (B, 1, H, W) of a square around a random pixel, cut off at the border."""
    masks = []
    for size, centre in ((x.shape[2], row), (x.shape[3], column)):
        distance = torch.arange(size, device=x.device) - (centre * size).long()[:, None]
        masks.append((distance >= -(side // 2)) & (distance < side - side // 2))
    return (masks[0][:, :, None] & masks[1][:, None, :])[:, None]


def _trivial(x: Tensor, choice: Tensor, strength: Tensor, negative: Tensor, fill: Tensor) -> Tensor:
    """Apply one operation a sample, of the wide space; the coloured ones are worked out for all and then chosen."""
    coloured = {
        "identity": lambda s, signed: x,
        "autocontrast": lambda s, signed: _autocontrast(x),
        "equalize": lambda s, signed: _equalize(x),
        "posterize": lambda s, signed: _posterize(x, s),
        "solarize": lambda s, signed: torch.where(x >= 256 * (1 - s), 255 - x, x),
        "color": lambda s, signed: _blend(_grey(x), x, 1 + 0.99 * signed),
        "contrast": lambda s, signed: _blend(_grey(x).mean((2, 3), keepdim=True), x, 1 + 0.99 * signed),
        "brightness": lambda s, signed: _blend(torch.zeros_like(x), x, 1 + 0.99 * signed),
        "sharpness": lambda s, signed: _blend(_smooth(x), x, 1 + 0.99 * signed),
    }
    number = (choice * (len(coloured) + len(GEOMETRIC))).long().view(-1, 1, 1, 1)
    s = ((strength * 31).floor() / 30).view(-1, 1, 1, 1)  # 31 strengths, from 0 to 1
    signed = torch.where(negative.view(-1, 1, 1, 1), -s, s)
    result = x
    for i, operation in enumerate(coloured.values()):
        if i:
            result = torch.where(number == i, operation(s, signed), result)
    return _moved(result, number.flatten() - len(coloured), signed.flatten(), fill)


def _moved(x: Tensor, which: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    """Shear (to 0.99), move (to half of its side) or turn (to 135°) each sample by what `which` of GEOMETRIC it is."""
    amounts = dict(zip(GEOMETRIC, (torch.where(which == i, strength, 0.0) for i in range(len(GEOMETRIC))), strict=True))
    angle = amounts["rotate"] * math.radians(135.0)
    rows = [
        torch.stack([angle.cos(), angle.sin() + 0.99 * amounts["shear_x"], amounts["translate_x"]], -1),
        torch.stack([0.99 * amounts["shear_y"] - angle.sin(), angle.cos(), amounts["translate_y"]], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    there = F.grid_sample(x - fill, grid, mode="nearest", padding_mode="zeros", align_corners=False) + fill
    return torch.where(((which >= 0) & (strength != 0)).view(-1, 1, 1, 1), there, x)


def _blend(other: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return (other + weight * (x - other)).clamp(0, 255)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    return (x * constant(LUMINANCE, x.device)).sum(1, keepdim=True).expand_as(x)


def _smooth(x: Tensor) -> Tensor:
    """Return x smoothed over 3 x 3 pixels, the middle one counting 5 of 13; the border stays."""
    smooth = x.clone()
    inner = F.avg_pool2d(x, 3, stride=1) * 9 + 4 * x[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = inner / 13
    return smooth


def _posterize(x: Tensor, strength: Tensor) -> Tensor:
    """Keep 8 to 2 bits of each channel."""
    step = 2.0 ** (6 * strength).round()
    return (x / step).floor() * step


def _autocontrast(x: Tensor) -> Tensor:
    """Stretch each channel to [0, 255]; a flat one stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    spread = torch.where(high > low, high - low, 255.0)
    return torch.where(high > low, ((x - low) * (255 / spread)).clamp(max=255), x)


def _equalize(x: Tensor) -> Tensor:
    """Give each channel of each image a flat histogram, as Pillow does; one with a single value stays."""
    levels = x.flatten(2).long()
    histogram = torch.zeros((*levels.shape[:2], 256), device=x.device)
    histogram.scatter_add_(2, levels, torch.ones_like(levels, dtype=histogram.dtype))
    last = 255 - (histogram.flip(-1) > 0).int().argmax(-1, keepdim=True)  # the highest value there is
    step = ((levels.shape[2] - histogram.gather(2, last)) / 255).floor()
    before = histogram.cumsum(-1) - histogram
    table = torch.where(step > 0, ((before + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255), -1.0)
    equal = table.gather(2, levels)
    return torch.where(equal < 0, levels.float(), equal).view_as(x)
