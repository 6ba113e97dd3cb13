"""CIFAR-10: 50,000 + 10,000 colour images of 32 x 32 in 10 classes."""

from __future__ import annotations

from mambaverse.datasets import register_dataset
from mambaverse.tasks.vision.datasets._cifar import Cifar


@register_dataset("vision/cifar10")
class CIFAR10(Cifar):
    """Ten kinds of animals and vehicles, 32 x 32, colour."""

    summary = "CIFAR-10: 50,000 + 10,000 colour images of 32 x 32, 10 classes"
    needs = "the folder cifar-10-batches-py or cifar-10-python.tar.gz (or an .npz of its images as JPEG)"
    source = "cs.toronto.edu/~kriz/cifar.html"
    fetches = "cifar-10-python.tar.gz (170 MB) with torchvision"

    folder = "cifar-10-batches-py"
    archive = "cifar-10-python.tar.gz"
    train_files = tuple(f"data_batch_{i}" for i in range(1, 6))
    test_file = "test_batch"
    meta_file = "batches.meta"
    label_key = "labels"
    names_key = "label_names"
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
