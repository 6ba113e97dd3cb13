"""The `data` and `task` sections of an image run."""

from __future__ import annotations

from dataclasses import dataclass

from mambaverse.config import ConfigError, SplitConfig
from mambaverse.engine.classifier import ClassifierConfig


@dataclass
class VisionDataConfig(SplitConfig):
    """Which images, of what size, and how training varies them."""

    img_size: int | None = None  # side in pixels that images are scaled to; None: the data set's own
    in_chans: int | None = None  # 1 (grey) or 3 (RGB), to which images are converted; None: the data set's own
    mean: list[float] | None = None  # of each channel, for pixels in [0, 1]; None: of the training images
    std: list[float] | None = None  # likewise
    crop_padding: int = 0  # zero pixels around a training image before a crop of its own size
    crop_scale: list[float] | None = None  # smallest and largest share of the area of random resized crops
    flip: float = 0.0  # probability of a left-right flip
    rand_augment: str | None = None  # timm's RandAugment: rand-m9-mstd0.5-inc1
    erase: float = 0.0  # probability that a rectangle is overwritten with noise
    on_device: bool = False  # keep images that fit into memory where the model is, and vary them there
    trivial_augment: bool = False  # with on_device: one operation of TrivialAugment an image
    cutout: int = 0  # with on_device: side in pixels of a square that is overwritten with the mean

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        super().__post_init__()
        if self.img_size is not None and self.img_size < 1:
            raise ConfigError(f"data.img_size: expected at least 1, got {self.img_size}")
        if self.in_chans not in (None, 1, 3):
            raise ConfigError(f"data.in_chans: expected 1 (grey) or 3 (RGB), got {self.in_chans}")
        if self.crop_padding < 0:
            raise ConfigError(f"data.crop_padding: expected at least 0, got {self.crop_padding}")
        if self.crop_scale is not None and not (
            len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        ):
            raise ConfigError(f"data.crop_scale: expected [smallest, largest] in (0, 1], got {self.crop_scale}")
        if self.crop_scale is not None and self.crop_padding:
            raise ConfigError("data.crop_padding and data.crop_scale are two ways to crop; set one of them")
        for key in ("trivial_augment", "cutout"):
            if getattr(self, key) and not self.on_device:
                off = "0" if key == "cutout" else "false"
                raise ConfigError(
                    f"data.{key}: is done where the model is; set data.on_device=true or data.{key}={off}"
                )
        for key in ("crop_scale", "rand_augment", "erase"):
            if getattr(self, key) and self.on_device:
                raise ConfigError(
                    f"data.{key}: is done by loading processes; with data.on_device=true there are crop_padding, flip, "
                    f"trivial_augment and cutout, so set data.{key}={'0' if key == 'erase' else 'null'}"
                )
        if self.cutout < 0:
            raise ConfigError(f"data.cutout: expected at least 0, got {self.cutout}")
        for key in ("flip", "erase"):
            if not 0 <= (value := getattr(self, key)) <= 1:
                raise ConfigError(f"data.{key}: expected a probability, got {value}")


@dataclass
class VisionTaskConfig(ClassifierConfig):
    """How labels are softened and images mixed while training."""

    mixup: float = 0.0  # α of mixup's Beta(α, α); 0: off
    cutmix: float = 0.0  # α of CutMix; with both on, each batch takes one of them, evenly
    mixup_prob: float = 1.0  # probability that a batch is mixed

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        super().__post_init__()
        for key in ("mixup", "cutmix"):
            if (value := getattr(self, key)) < 0:
                raise ConfigError(f"task.{key}: expected at least 0, got {value}")
        if not 0 <= self.mixup_prob <= 1:
            raise ConfigError(f"task.mixup_prob: expected a probability, got {self.mixup_prob}")
