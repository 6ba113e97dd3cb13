"""From a stored image to the one the model sees: resize, crop, flip, RandAugment, erase; and mixing of a batch.

Every random choice comes from the generator that is handed in. RandAugment's operations and mixup are timm's, which
draw from the global generators of Python and NumPy: these are seeded from that generator for the time of the call.

Sources: random resized crop, Szegedy et al. 2015 (arXiv:1409.4842) section 6; RandAugment, arXiv:1909.13719; random
erasing, arXiv:1708.04896; mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Generator, Tensor

from mambaverse.errors import UserError
from mambaverse.tasks.vision.images import to_pil, to_tensor

CROP_TRIES = 10  # proposals of a random resized crop before the central one is taken
RATIO = (3 / 4, 4 / 3)  # width / height of random crops
ERASED_SHARE = (0.02, 1 / 3)  # of the image's area
ERASED_RATIO = (0.3, 1 / 0.3)


@dataclass
class Augment:
    """Callable (image, generator) -> uint8 (C, size, size); with generator None only resized and cut to the centre.

    Attributes:
        size: Side of the result in pixels.
        mean: Of each channel, for pixels in [0, 1]: fills what RandAugment leaves empty.
        std: Of each channel: the spread of erased pixels around the mean.
        crop_padding: Zero pixels put around the image before a random crop of `size`.
        crop_scale: Smallest and largest share of the image's area that a random resized crop takes.
        flip: Probability of a left-right flip.
        rand_augment: timm's RandAugment, such as "rand-m9-mstd0.5-inc1".
        erase: Probability that a rectangle is overwritten with noise.
    """

    size: int
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    crop_padding: int = 0
    crop_scale: Sequence[float] | None = None
    flip: float = 0.0
    rand_augment: str | None = None
    erase: float = 0.0

    def __post_init__(self) -> None:
        """Build RandAugment once; its import costs a second, so only where it is used."""
        self._policy: Any = None
        if self.rand_augment is not None:
            from timm.data.auto_augment import posterize, rand_augment_transform

            fill = tuple(round(255 * m) for m in self.mean)
            hparams = {"img_mean": fill if len(fill) > 1 else fill[0]}
            try:
                self._policy = rand_augment_transform(self.rand_augment, hparams)
            except (AssertionError, KeyError, ValueError) as error:
                example = "'rand-m9-mstd0.5-inc1'"
                raise UserError(
                    f"data.rand_augment: {self.rand_augment!r} is not a timm RandAugment such as {example}"
                    + (f" ({error})" if str(error) else "")
                ) from None
            if self._policy.num_layers < 1:
                raise UserError(f"data.rand_augment: {self.rand_augment!r} takes no operation; null does without")
            for op in self._policy.ops:
                if op.aug_fn is posterize:
                    op.aug_fn = _posterize

    def __call__(self, image: Tensor, generator: Generator | None) -> Tensor:
        """Return `image`, uint8 (C, H, W), as the model is to see it."""
        if generator is None:
            return fit(image, self.size)
        down, right, flip, erase = torch.rand(4, generator=generator).tolist()
        if self.crop_scale is not None:
            image = random_resized_crop(image, self.size, self.crop_scale, generator)
        else:
            image = fit(image, self.size)
            if self.crop_padding:
                places = 2 * self.crop_padding + 1
                image = shifted(image, int(down * places) - self.crop_padding, int(right * places) - self.crop_padding)
        if flip < self.flip:
            image = image.flip(-1)
        if self._policy is not None:
            image = self._rand_augment(image, generator)
        if erase < self.erase:
            image = erased(image, self.mean, self.std, generator)
        return image

    def _rand_augment(self, image: Tensor, generator: Generator) -> Tensor:
        policy, picture = self._policy, to_pil(image)
        uniform = policy.choice_weights is None  # then an operation may be drawn twice, as in timm
        weights = torch.ones(len(policy.ops)) if uniform else torch.as_tensor(policy.choice_weights)
        chosen = torch.multinomial(weights, policy.num_layers, replacement=uniform, generator=generator)
        with python_seeded(generator):
            for i in chosen.tolist():
                picture = policy.ops[i](picture)
        return to_tensor(picture, len(image))


def fit(image: Tensor, size: int) -> Tensor:
    """Scale the shorter side of `image` to `size` and cut the centre, (C, size, size)."""
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    height, width = max(round(height * scale), size), max(round(width * scale), size)
    image = resize(image, height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return image[:, top : top + size, left : left + size]


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (C, H, W) by antialiased bicubic interpolation."""
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """Move `image` by whole pixels and fill with zeros: a crop of the padded image, without padding it."""
    height, width = image.shape[-2:]
    moved = torch.zeros_like(image)
    moved[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
        :, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return moved


def random_resized_crop(image: Tensor, size: int, scale: Sequence[float], generator: Generator) -> Tensor:
    """Resize a random rectangle, of `scale` of the area and a log-uniform aspect ratio, to (C, size, size)."""
    height, width = image.shape[-2:]
    for area, ratio, y, x in torch.rand(CROP_TRIES, 4, generator=generator).tolist():
        h, w = _rectangle(height * width, scale, RATIO, area, ratio)
        if 0 < h <= height and 0 < w <= width:
            top, left = math.floor(y * (height - h + 1)), math.floor(x * (width - w + 1))
            return resize(image[:, top : top + h, left : left + w], size, size)
    return fit(image, size)


def erased(image: Tensor, mean: Sequence[float], std: Sequence[float], generator: Generator) -> Tensor:
    """Overwrite a random rectangle with normal noise of the data's mean and standard deviation."""
    height, width = image.shape[-2:]
    for area, ratio, y, x in torch.rand(CROP_TRIES, 4, generator=generator).tolist():
        h, w = _rectangle(height * width, ERASED_SHARE, ERASED_RATIO, area, ratio)
        if 0 < h < height and 0 < w < width:
            top, left = math.floor(y * (height - h + 1)), math.floor(x * (width - w + 1))
            noise = torch.randn(len(image), h, w, generator=generator)
            centre, spread = torch.tensor([mean, std])[:, :, None, None]
            image = image.clone()
            image[:, top : top + h, left : left + w] = (255 * (centre + spread * noise)).round().clamp(0, 255).byte()
            return image
    return image


def _rectangle(pixels: int, scale: Sequence[float], ratio: Sequence[float], u: float, v: float) -> tuple[int, int]:
    """Return height and width for a share of the area and a log-ratio at `u` and `v` of their ranges."""
    area = pixels * (scale[0] + u * (scale[1] - scale[0]))
    aspect = math.exp(math.log(ratio[0]) + v * (math.log(ratio[1]) - math.log(ratio[0])))
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def mix(images: Tensor, labels: Tensor, mixup: Any, generator: Generator) -> tuple[Tensor, Tensor]:
    """Apply timm's `Mixup` to float images (B, C, H, W) and labels (B,); returns them with targets (B, classes).

    timm pairs sample i with B-1-i, which needs an even B: the last of an odd batch stays as it is.
    """
    even = len(labels) // 2 * 2
    mixed, targets = [], []
    with numpy_seeded(generator):
        if even:
            x, t = mixup(images[:even], labels[:even])
            mixed, targets = [x], [t]
    if even < len(labels):
        from timm.data.mixup import mixup_target

        mixed.append(images[even:])
        targets.append(mixup_target(labels[even:], mixup.num_classes, 1.0, mixup.label_smoothing))
    return torch.cat(mixed), torch.cat(targets)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep `bits` of each channel, at least one: timm may ask for none, which Pillow 13 refuses."""
    return ImageOps.posterize(image, min(max(bits, 1), 8))


@contextmanager
def python_seeded(generator: Generator) -> Iterator[None]:
    """Seed Python's global generator by a draw from `generator`; put it back afterwards."""
    before = random.getstate()
    random.seed(_draw_seed(generator))
    try:
        yield
    finally:
        random.setstate(before)


@contextmanager
def numpy_seeded(generator: Generator) -> Iterator[None]:
    """Seed NumPy's global generator by a draw from `generator`; put it back afterwards."""
    before = np.random.get_state()
    np.random.seed(_draw_seed(generator))
    try:
        yield
    finally:
        np.random.set_state(before)


def _draw_seed(generator: Generator) -> int:
    return int(torch.randint(2**32, (), generator=generator, dtype=torch.int64))
