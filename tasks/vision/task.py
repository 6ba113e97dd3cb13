"""Image classification: cross-entropy over images of one size, with timm's mixup and CutMix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

from mambaverse.config import ConfigError, RunConfig
from mambaverse.datasets import get_dataset
from mambaverse.engine.checkpoint import load_state, read_weights
from mambaverse.engine.classifier import Classifier
from mambaverse.engine.task import Batch, FactError, Prediction, Sample, SampleSet, fact, register_task
from mambaverse.ensemble import members_of
from mambaverse.errors import UserError
from mambaverse.splits import SplitRow, write_split
from mambaverse.tasks.vision.augment import Augment, fit, mix
from mambaverse.tasks.vision.config import VisionDataConfig, VisionTaskConfig
from mambaverse.tasks.vision.explain import explain_image
from mambaverse.tasks.vision.explain_figure import explain_sheet
from mambaverse.tasks.vision.figures import SHEET_SIZE, contact_sheet, label_sheet
from mambaverse.tasks.vision.fine_tune import adapted
from mambaverse.tasks.vision.images import (
    EXTENSIONS,
    ArrayImages,
    FileImages,
    Images,
    ImageSplits,
    list_images,
    read_image,
    statistics,
    with_channels,
)
from mambaverse.tasks.vision.on_device import DeviceAugment, DeviceImages, constant
from mambaverse.tasks.vision.vim import Vim
from mambaverse.tasks.vision.vim_checkpoints import load_vim
from mambaverse.tasks.vision.vmamba import VMamba
from mambaverse.tasks.vision.vmamba_weights import convert


class ImageSamples:
    """Images with their labels, augmented: uint8 "image" (C, H, W) and "target"."""

    def __init__(self, images: Images, augment: Augment) -> None:
        self.images, self.augment = images, augment
        self._targets = images.labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, generator: Generator | None) -> Sample:
        """Return image `index`; with a generator augmented by its draws, with None as it is."""
        return {"image": self.augment(self.images.load(index), generator), "target": self._targets[index]}


@register_task("vision")
class VisionTask(Classifier):
    """Image classification, of any data set "vision/..." and any model that takes (B, C, H, W)."""

    data_config = VisionDataConfig
    task_config = VisionTaskConfig
    scores = ("accuracy", "top5")
    sheet_size = SHEET_SIZE
    decided: ClassVar[Mapping[str, str]] = {
        **Classifier.decided,
        "in_chans": "set data.in_chans",
        "img_size": "set data.img_size",
        **dict.fromkeys(("features_only", "out_indices"), "a classifier is trained, which gives scores, no features"),
        **dict.fromkeys(("cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"), "set model.checkpoint"),
    }

    size: int  # side of the images that the model sees, in pixels
    in_chans: int

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert isinstance(config.data, VisionDataConfig) and isinstance(config.task, VisionTaskConfig)
        self.data, self.options = config.data, config.task
        self._splits: ImageSplits | None = None
        self._mixup: Any = None

    def setup(self) -> None:
        """Open the data set. Its mean and deviation are written into the config, so that a run keeps them."""
        dataset = get_dataset(self.data.name, "vision")
        splits = dataset.open(self.data)
        if (size := self.data.img_size or splits.size) is None:
            raise ConfigError(f"data.img_size is not set; the images of {dataset.name} have no size of their own")
        if self.data.crop_padding >= size:
            raise ConfigError(f"data.crop_padding: {self.data.crop_padding} is too much for images of {size} pixels")
        self.size, self.in_chans, self.classes = size, self.data.in_chans or splits.in_chans, list(splits.classes)
        train, held_out = (with_channels(images, self.in_chans) for images in (splits.train, splits.eval))
        data = self.data
        if data.mean is None or data.std is None:
            mean, std = statistics(train)
            data.mean, data.std = data.mean or mean, data.std or std
        self._set_normalisation(data.mean, data.std)
        if data.on_device:
            self.train_set, self.eval_set = self._device_sets(train, held_out)
        else:
            augment = Augment(
                size, data.mean, data.std, data.crop_padding, data.crop_scale, data.flip, data.rand_augment, data.erase
            )
            self.train_set, self.eval_set = ImageSamples(train, augment), ImageSamples(held_out, Augment(size))
        self._splits, self.skipped = splits, len(splits.skipped)
        self._set_mixup()

    def _device_sets(self, train: Images, held_out: Images) -> tuple[DeviceImages, DeviceImages]:
        data = self.data
        assert data.mean is not None
        augment = DeviceAugment(
            data.crop_padding, data.flip, data.trivial_augment, data.cutout, tuple(255 * m for m in data.mean)
        )
        sets = []
        for images in (train, held_out):
            if not isinstance(images, ArrayImages) or set(images.images.shape[2:]) != {self.size}:
                raise ConfigError(
                    f"data.on_device: {data.name} is not in memory at {self.size} x {self.size} pixels; set "
                    "data.on_device=false data.trivial_augment=false data.cutout=0"
                )
            sets.append(DeviceImages(images, augment if images is train else None, self._finish))
        return sets[0], sets[1]

    def facts(self) -> dict[str, Any]:
        """Return classes, size, channels, mean and deviation."""
        return {
            "classes": list(self.classes),
            "img_size": self.size,
            "in_chans": self.in_chans,
            "mean": self.data.mean,
            "std": self.data.std,
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take them over from a run."""
        super().restore(facts)
        self.size, self.in_chans = fact(facts, "img_size", int), fact(facts, "in_chans", int)
        try:
            self._set_normalisation(*(fact(facts, key, list[float]) for key in ("mean", "std")))
        except ConfigError as error:
            raise FactError(str(error)) from None

    def save_split(self, folder: Path) -> Path | None:
        """Write the files of a folder's sets to split.csv; data sets in arrays come split."""
        if self._splits is None or not isinstance(self._splits.train, FileImages):
            return None
        return write_split(folder / "split.csv", self._split_rows(self._splits))

    def _split_rows(self, splits: ImageSplits) -> Iterator[SplitRow]:
        assert self.data.root is not None
        root = Path(self.data.root).expanduser()
        for name, images in (("train", splits.train), ("eval", splits.eval)):
            assert isinstance(images, FileImages)
            for path, label in zip(images.paths, images.labels.tolist(), strict=True):
                yield SplitRow(name, splits.classes[label], path.relative_to(root).as_posix(), path)
        for path in splits.skipped:
            yield SplitRow("skipped", "", path.relative_to(root).as_posix(), path)

    def model_arguments(self) -> dict[str, Any]:
        """Return classes, channels and size."""
        return super().model_arguments() | {"in_chans": self.in_chans, "img_size": self.size}

    def build_model(self) -> nn.Module:
        """See `Classifier.build_model`; a size that does not fit the patches is named as the config spells it."""
        try:
            return super().build_model()
        except UserError as error:
            if not str(error).startswith("img_size: "):
                raise
            raise ConfigError(f"data.{error}; set that, or another model.args.patch_size") from None

    def load_checkpoint(self, model: nn.Module, path: Path) -> None:
        """Start from a weights file, ours or of Vim's or VMamba's authors; a head for other classes starts anew."""
        if isinstance(model, Vim):
            load_vim(model, path)
        else:
            fit_to = convert if isinstance(model, VMamba) else adapted
            load_state(model, fit_to(read_weights(path), model, str(path)), str(path))
        reset: Any = getattr(model, "reset_classifier", None)
        if self.knows_others(path, kept=reset is None) and reset is not None:
            reset(len(self.classes))

    def collate(self, samples: Sequence[Sample], generator: Generator | None) -> Batch:
        """Stack and normalise images (B, C, H, W) float32; with a generator, and mixup on, targets are (B, classes)."""
        images = torch.stack([sample["image"] for sample in samples]).float()
        if "target" not in samples[0]:
            return {"image": self._normalised(images)}
        return self._finish(images, torch.tensor([sample["target"] for sample in samples]), generator)

    def _finish(self, images: Tensor, targets: Tensor, generator: Generator | None) -> Batch:
        images = self._normalised(images)
        if generator is not None and self._mixup is not None:
            images, targets = mix(images, targets, self._mixup, generator)
        return {"image": images, "target": targets}

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = (constant(values, images.device) for values in self._normalisation)
        return images.sub(mean).div_(std)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (B, classes)."""
        return model(batch["image"])

    def labels_of(self, samples: SampleSet) -> np.ndarray:
        """Return the class numbers (N,) of a set, without decoding its images."""
        assert isinstance(samples, ImageSamples | DeviceImages)
        return samples.images.labels.numpy()

    def describe(self) -> dict[str, str]:
        """Return what the head of a run says of the images and of their augmentation."""
        assert self._splits is not None
        colour = "grey" if self.in_chans == 1 else "RGB"
        text = (
            f"{self.data.name}, {len(self.train_set):,} + {len(self.eval_set):,} {colour} images of "
            f"{self.size} x {self.size}, {len(self.classes)} classes"
        )
        described = {"data": f"{text} ({self._splits.note})" if self._splits.note else text}
        if parts := list(self._augmentations()):
            described["augmentation"] = ", ".join(parts)
        return described

    def figures(self, folder: Path, model: nn.Module, outputs: Tensor, targets: Tensor) -> list[Path]:
        """Draw the contact sheet, predictions.png."""
        return [contact_sheet(folder / "predictions.png", self.eval_set, outputs, targets, self.classes)]

    def sheet(self, path: Path, samples: Sequence[Sample], rows: Sequence[Prediction], total: int) -> None:
        """Draw the images with their labels and confidences."""
        images = [sample["image"] for sample in samples]
        label_sheet(path, images, [row.label for row in rows], [row.probability for row in rows], total)

    def explain(self, path: Path, model: nn.Module, name: str, sample: Sample) -> None:
        """Draw the image, its scores, what speaks for the first of them, the receptive field and Δ."""
        device = next(model.parameters()).device
        image = self.collate([sample], None)["image"].to(device)
        with torch.no_grad():
            probabilities = self.probabilities(model(image))[0].cpu()
        explanation = explain_image(model, members_of(model)[0], image[0], int(probabilities.argmax()))
        explain_sheet(path, name, sample["image"], probabilities, self.classes, explanation)

    def load_inputs(self, paths: Sequence[str]) -> Sequence[tuple[str, Callable[[], Sample]]]:
        """Return a loader for each image file, and for each image in a folder."""
        files: list[Path] = []
        for path in map(Path, paths):
            if path.is_dir():
                if not (found := list_images(path)):
                    raise UserError(f"{path}: a folder without images (of {', '.join(sorted(EXTENSIONS))})")
                files.extend(found)
            else:
                files.append(path)
        return [(str(file), partial(self._load, file)) for file in files]

    def _load(self, path: Path) -> Sample:
        return {"image": fit(read_image(path, self.in_chans), self.size)}

    def _set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        for key, values in (("mean", mean), ("std", std)):
            if len(values) != self.in_chans:
                raise ConfigError(f"data.{key}: expected {self.in_chans} values, one a channel, got {list(values)}")
        if min(std) <= 0:
            raise ConfigError(f"data.std: expected positive values, got {list(std)}")
        self._normalisation = tuple(tuple(255 * value for value in values) for values in (mean, std))

    def _set_mixup(self) -> None:
        options = self.options
        if options.mixup or options.cutmix:
            from timm.data.mixup import Mixup

            self._mixup = Mixup(
                mixup_alpha=options.mixup, cutmix_alpha=options.cutmix, prob=options.mixup_prob,
                label_smoothing=options.label_smoothing, num_classes=len(self.classes),
            )  # fmt: skip

    def _augmentations(self) -> Sequence[str]:
        data, options = self.data, self.options
        named = {
            f"crop after padding {data.crop_padding}": data.crop_padding,
            f"crop of {data.crop_scale} of the area": data.crop_scale,
            f"flip {data.flip:g}": data.flip,
            str(data.rand_augment): data.rand_augment,
            f"erase {data.erase:g}": data.erase,
            "TrivialAugment": data.trivial_augment,
            f"cutout {data.cutout}": data.cutout,
            f"mixup {options.mixup:g}": options.mixup,
            f"cutmix {options.cutmix:g}": options.cutmix,
            f"label smoothing {options.label_smoothing:g}": options.label_smoothing,
        }
        return [text for text, used in named.items() if used]
