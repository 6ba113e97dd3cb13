"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8, inside the package, so that there is always something.

Source: E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI 1998 (its test part), CC BY 4.0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset, register_dataset
from mambaverse.errors import UserError
from mambaverse.splits import refuse_drawn
from mambaverse.tasks.vision.images import ArrayImages, ImageSplits

LEVELS = 16  # the value of a full pixel


@register_dataset("vision/digits")
class Digits(Dataset):
    """Handwritten digits of 8 x 8 pixels; `train_test_split(test_size=0.2, stratify=labels, random_state=0)`."""

    summary = "handwritten digits: 1,437 + 360 grey images of 8 x 8, 10 classes (stratified split, seed 0)"
    needs = "scikit-learn, which comes with mambaverse"
    source = "UCI Optical Recognition of Handwritten Digits, CC BY 4.0"

    def places(self, root: str | None) -> list[Path]:
        """Return nothing: the images are inside scikit-learn, whatever `root` says."""
        return []

    def status(self, root: str | None = None) -> str:
        """Say that they are there."""
        return "found: inside scikit-learn"

    def open(self, config: DataConfig) -> ImageSplits:
        """Return the splits; pixels 0..16 are spread over 0..255.

        Raises:
            UserError: a `root` was given, whose images would not be read.
        """
        if config.root is not None:
            raise UserError(
                f"data.root={config.root}: {self.name} reads nothing from there, its images are inside scikit-learn; "
                "the config vision/folder trains on a folder of images"
            )
        refuse_drawn(config, self.name)
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        pixels = np.round(digits.images[:, None] * (255 / LEVELS)).astype(np.uint8)
        labels = digits.target.astype(np.int64)
        parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
        x_train, x_eval, y_train, y_eval = map(torch.from_numpy, parts)
        return ImageSplits(
            ArrayImages(x_train, y_train),
            ArrayImages(x_eval, y_eval),
            classes=[str(digit) for digit in range(10)],
            size=8,
            in_chans=1,
        )
