"""Small data sets in the formats of the real ones, and a model that is quick."""

from __future__ import annotations

import gzip
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mambaverse.config import RunConfig, compose
from mambaverse.engine.task import TASKS
from mambaverse.models import MODELS, register_model
from mambaverse.tasks.vision.task import VisionTask

Task = Callable[..., VisionTask]


class Tiny(nn.Module):
    """Mean colour of the halves of an image, then a linear layer."""

    def __init__(
        self, num_classes: int, in_chans: int, img_size: int, patch_size: int = 1, width: int = 2, mixer: Any = None
    ) -> None:
        super().__init__()
        self.expects, self.mixer, self.patch_size = (in_chans, img_size, img_size), mixer, patch_size
        self.pool = nn.AdaptiveAvgPool2d(width)
        self.head = nn.Linear(in_chans * width * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == self.expects
        return self.head(self.pool(x).flatten(1))


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[str]:
    """Register the model and return a config that trains it on digits."""

    @register_model(domain="vision", model=Tiny, overwrite=True)
    def tiny_vision_test(pretrained: bool = False, **overrides: Any) -> nn.Module:
        return Tiny(**overrides)

    config = tmp_path / "tiny.yaml"
    config.write_text(
        "defaults: [vision/_base]\nmodel: {name: tiny_vision_test, args: {patch_size: 2}}\ndata: {name: digits}\n"
    )
    yield str(config)
    del MODELS._entries["tiny_vision_test"]


@pytest.fixture
def make_task() -> Task:
    """Return the task that a shipped config and some overrides describe, set up."""

    def make(config: str, *overrides: str, setup: bool = True) -> VisionTask:
        run: RunConfig = compose(config, overrides)
        task = TASKS.get(run.task.name)(run)
        assert isinstance(task, VisionTask)
        if setup:
            task.setup()
        return task

    return make


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    data = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Fashion-MNIST's four .gz files: 20 + 10 images."""
    for part, n in (("train", 20), ("t10k", 10)):
        write_idx(tmp_path / f"fashion/{part}-images-idx3-ubyte.gz", noise(n, 28, 28, seed=n))
        write_idx(tmp_path / f"fashion/{part}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    return tmp_path / "fashion"


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """A folder with cifar-10-batches-py in it: five batches of 4, and 6 test images."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        n = 6 if name == "test_batch" else 4
        batch = {"data": noise(n, 3072, seed=i), "labels": [(i + j) % 10 for j in range(n)], "batch_label": name}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {"label_names": [f"kind{i}" for i in range(10)], "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return tmp_path


@pytest.fixture
def cifar100_archive(tmp_path: Path) -> Path:
    """cifar-100-python.tar.gz: 8 + 4 images."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, n in (("train", 8), ("test", 4)):
        batch = {"data": noise(n, 3072, seed=n), "fine_labels": list(range(n)), "coarse_labels": [0] * n}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"kind{i:02}" for i in range(100)]}, protocol=2))
    path = tmp_path / "archive/cifar-100-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    return path


@pytest.fixture
def save_image() -> Callable[..., Path]:
    """Return a function that writes an image of noise, of a mode and size, to a path."""

    def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (20, 16), seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(size[1], size[0], 3, seed=seed)).convert(mode).save(path)
        return path

    return save


@pytest.fixture
def photos(tmp_path: Path, save_image: Callable[..., Path]) -> Path:
    """A folder of three classes of 4, 6 and 10 images of several formats and sizes, and files that are no images."""
    root = tmp_path / "photos"
    for name, n in (("zebra", 4), ("ant", 6), ("Bee", 10)):
        for i in range(n):
            suffix = (".jpg", ".png", ".JPG")[i % 3]
            save_image(root / name / f"{i:02}{suffix}", "L" if i % 2 else "RGB", (20 + i, 16 + n), seed=10 * n + i)
    (root / "zebra/notes.txt").write_text("not an image, and not taken for one")
    save_image(root / "zebra/.hidden.jpg")
    save_image(root / ".cache/x/thumb.jpg")
    return root


def shared(name: str) -> Path:
    """Return a file of the data that are not in the repository; skips the test where it is not there."""
    import os

    folder = Path(os.environ.get("MAMBAVERSE_TEST_DATA") or Path(__file__).parents[4] / "shared/data")
    if not (folder / name).exists():
        pytest.skip(f"{name} is not in {folder}; MAMBAVERSE_TEST_DATA names another folder")
    return folder / name


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    return shared


@pytest.fixture
def draw() -> Callable[[int], torch.Generator]:
    return lambda seed: torch.Generator().manual_seed(seed)
