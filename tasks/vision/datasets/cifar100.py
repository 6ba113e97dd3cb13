"""CIFAR-100: 50,000 + 10,000 colour images of 32 x 32 in 100 classes."""

from __future__ import annotations

from mambaverse.datasets import register_dataset
from mambaverse.tasks.vision.datasets._cifar import Cifar


@register_dataset("vision/cifar100")
class CIFAR100(Cifar):
    """A hundred kinds of things, 32 x 32, colour, by their fine labels."""

    summary = "CIFAR-100: 50,000 + 10,000 colour images of 32 x 32, 100 classes (the fine labels)"
    needs = "the folder cifar-100-python or cifar-100-python.tar.gz"
    source = "cs.toronto.edu/~kriz/cifar.html"
    fetches = "cifar-100-python.tar.gz (170 MB) with torchvision"

    folder = "cifar-100-python"
    archive = "cifar-100-python.tar.gz"
    train_files = ("train",)
    test_file = "test"
    meta_file = "meta"
    label_key = "fine_labels"
    names_key = "fine_label_names"
