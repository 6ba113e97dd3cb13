"""Every image data set opens from its standard files, and says in one line what is wrong with others."""

import gzip
import json
import pickle
import shutil
import struct
import tarfile
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mambaverse.config import DataConfig
from mambaverse.datasets import MissingDataError, describe_dataset, get_dataset
from mambaverse.errors import UserError
from mambaverse.tasks.vision.config import VisionDataConfig
from mambaverse.tasks.vision.images import ArrayImages, FileImages, ImageSplits


def opened(name: str, root: Path | None = None, **options: object) -> ImageSplits:
    config = VisionDataConfig(name=name, root=None if root is None else str(root), **options)  # type: ignore[arg-type]
    return get_dataset(name, "vision").open(config)


def fails(name: str, root: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        opened(name, root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestDigits:
    def test_are_split_as_anyone_can_repeat(self) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        splits = opened("digits")
        images, labels = load_digits(return_X_y=True)
        x_train, x_test, y_train, y_test = train_test_split(
            images, labels, test_size=0.2, stratify=labels, random_state=0
        )
        assert isinstance(splits.train, ArrayImages) and isinstance(splits.eval, ArrayImages)
        for part, x, y in ((splits.train, x_train, y_train), (splits.eval, x_test, y_test)):
            assert part.labels.tolist() == y.tolist()
            assert (part.images.flatten(1).double() / 255 - torch.from_numpy(x) / 16).abs().max() <= 0.5 / 255 + 1e-9
        assert (len(splits.train), len(splits.eval), splits.size, splits.in_chans) == (1437, 360, 8, 1)

    def test_are_always_there(self) -> None:
        assert describe_dataset("vision/digits")["status"] == "found: inside scikit-learn"


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("option", ["folds=5", "group=(.*)_", "val_fraction=0.3"])
def test_a_given_split_is_drawn_by_no_option(name: str, option: str) -> None:
    key, value = option.split("=")
    given: dict[str, Any] = {key: value if key == "group" else json.loads(value)}
    with pytest.raises(UserError, match=rf"^vision/{name}: comes split; data.{key}=.*: take data.{key} out$"):
        opened(name, None, **given)


class TestFashionMNIST:
    def test_opens_gz_files(self, fashion: Path) -> None:
        splits = opened("fashion_mnist", fashion)
        assert (len(splits.train), len(splits.eval), splits.size, splits.in_chans) == (20, 10, 28, 1)
        expected = np.random.default_rng(20).integers(0, 256, (20, 28, 28), dtype=np.uint8)
        assert splits.train.load(7).equal(torch.from_numpy(expected[7])[None])
        assert splits.train.labels.tolist() == [i % 10 for i in range(20)]
        assert splits.classes[9] == "ankle boot"

    def test_opens_plain_files_where_torchvision_puts_them(self, fashion: Path, tmp_path: Path) -> None:
        raw = tmp_path / "elsewhere/FashionMNIST/raw"
        raw.mkdir(parents=True)
        for path in fashion.iterdir():
            (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        assert len(opened("fashion_mnist", tmp_path / "elsewhere").train) == 20

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda data: gzip.compress(data[:-100]), "it is truncated"),
            (lambda data: gzip.compress(data)[:-100], "not readable as gzip"),
            (lambda data: data, "not readable as gzip"),
            (lambda data: gzip.compress(b"\0\0\x0d" + data[3:]), "not an idx file of unsigned bytes with 3 axes"),
            (lambda data: gzip.compress(b"\0\0"), "not an idx file"),
        ],
        ids=["short", "cut gzip", "no gzip", "of floats", "too small"],
    )
    def test_a_damaged_file_is_named(self, fashion: Path, damage: Callable[[bytes], bytes], message: str) -> None:
        path = fashion / "train-images-idx3-ubyte.gz"
        path.write_bytes(damage(gzip.decompress(path.read_bytes())))
        error = fails("fashion_mnist", fashion)
        assert "train-images-idx3-ubyte.gz" in error and message in error

    def test_files_that_do_not_belong_together_are_refused(self, fashion: Path) -> None:
        shutil.copy(fashion / "t10k-labels-idx1-ubyte.gz", fashion / "train-labels-idx1-ubyte.gz")
        assert "20 images, but 10 labels" in fails("fashion_mnist", fashion)
        head = struct.pack(">4BI", 0, 0, 8, 1, 20)
        (fashion / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + bytes([10] * 20)))
        assert "labels 10..10, expected 0..9" in fails("fashion_mnist", fashion)
        head = struct.pack(">4B3I", 0, 0, 8, 3, 1, 8, 8)
        (fashion / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(64)))
        assert "expected images of 28 x 28, got 8 x 8" in fails("fashion_mnist", fashion)

    def test_the_debian_package_is_looked_for(self) -> None:
        assert "/usr/share/datasets/fashion-mnist" in describe_dataset("vision/fashion_mnist")["looked in"]


class TestCifar:
    def test_opens_a_folder_of_pickles(self, cifar10: Path) -> None:
        for root in (cifar10, cifar10 / "cifar-10-batches-py"):
            splits = opened("cifar10", root)
            assert (len(splits.train), len(splits.eval), splits.size, splits.in_chans) == (20, 6, 32, 3)
            assert splits.classes[3] == "kind3"
        second = np.random.default_rng(1).integers(0, 256, (4, 3072), dtype=np.uint8)
        assert splits.train.load(5).flatten().tolist() == second[1].tolist()  # batches come in order
        assert splits.train.labels.tolist()[4:8] == [1, 2, 3, 4]

    def test_opens_the_archive_as_it_was_fetched(self, cifar100_archive: Path) -> None:
        for root in (cifar100_archive, cifar100_archive.parent):
            splits = opened("cifar100", root)
            assert (len(splits.train), len(splits.eval), len(splits.classes)) == (8, 4, 100)
            assert splits.eval.labels.tolist() == [0, 1, 2, 3]

    def test_python_2_pickles_open(self, cifar10: Path) -> None:
        path = cifar10 / "cifar-10-batches-py/test_batch"
        data = path.read_bytes()
        path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        assert len(opened("cifar10", cifar10).eval) == 6

    def test_a_pickle_that_would_run_code_is_refused(self, cifar10: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple:
                return (Path.touch, (cifar10 / "ran",))

        (cifar10 / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(Evil()))
        error = fails("cifar10", cifar10)
        assert "test_batch: not readable as a pickle" in error and "only NumPy arrays are expected" in error
        assert not (cifar10 / "ran").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"garbage", "not readable as a pickle"),
            (pickle.dumps([1]), "expected a dictionary, got list"),
            (pickle.dumps({"data": np.zeros((4, 10), np.uint8), "labels": [0] * 4}), "expected rows of 3072 bytes"),
            (pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 3}), "4 images, but 3 labels"),
            (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}), "labels 10..10, expected 0..9"),
            (pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}), "holds no images"),
            (pickle.dumps({"data": np.zeros((1, 3072), np.uint8)}), "it has no 'labels'"),
        ],
        ids=["garbage", "list", "rows", "count", "label", "empty", "keys"],
    )
    def test_a_wrong_file_is_named(self, cifar10: Path, content: bytes, message: str) -> None:
        (cifar10 / "cifar-10-batches-py/data_batch_3").write_bytes(content)
        error = fails("cifar10", cifar10)
        assert message in error and ("data_batch_3" in error or "it has no" in error)

    def test_a_wrong_archive_is_named(self, cifar100_archive: Path) -> None:
        whole = cifar100_archive.read_bytes()
        cifar100_archive.write_bytes(whole[: len(whole) // 2])
        assert "not readable as a tar archive" in fails("cifar100", cifar100_archive)
        with tarfile.open(cifar100_archive, "w:gz"):
            pass
        assert "has no file 'train', which vision/cifar100 needs" in fails("cifar100", cifar100_archive)

    @staticmethod
    def write_npz(path: Path, size: int = 32, broken: bool = False) -> Path:
        arrays: dict[str, Any] = {}
        for split, n in (("train", 5), ("test", 3)):
            files = []
            for i in range(n):
                Image.new("RGB", (size, size), (i * 20, 0, 0)).save(buffer := BytesIO(), "JPEG")
                files.append(buffer.getvalue()[: 20 if broken else None])
            arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
            arrays[f"{split}_offset"] = np.cumsum([0, *map(len, files)])
            arrays[f"{split}_label"] = np.arange(n, dtype=np.uint8)
        np.savez(path, **arrays)
        return path

    def test_opens_jpeg_copies_and_says_so(self, tmp_path: Path) -> None:
        splits = opened("cifar10", self.write_npz(tmp_path / "jpeg.npz"))
        assert (len(splits.train), len(splits.eval), splits.note) == (5, 3, "JPEG copies")
        assert splits.classes[0] == "airplane" and splits.train.labels.tolist() == [0, 1, 2, 3, 4]
        assert abs(int(splits.train.load(4)[0, 0, 0]) - 80) <= 2

    def test_wrong_jpeg_copies_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "x.npz"
        assert "train image 0 cannot be decoded" in fails("cifar10", self.write_npz(path, broken=True))
        assert "train image 0 is 16 x 16, not 32 x 32" in fails("cifar10", self.write_npz(path, size=16))
        np.savez(path, x=np.zeros(3))
        assert "it has no array 'train_jpeg'" in fails("cifar10", path)
        path.write_bytes(b"PK\x03\x04 nothing")
        assert "not readable as .npz" in fails("cifar10", path)
        assert "vision/cifar100 is not here" in fails("cifar100", path)

    def test_the_real_images_decode(self, shared_data: Callable[[str], Path]) -> None:
        from mambaverse.tasks.vision.images import decode_image

        with np.load(shared_data("cifar10_jpeg75.npz")) as file:
            data, offset, labels = (file[f"test_{key}"] for key in ("jpeg", "offset", "label"))
        assert Counter(labels.tolist()) == dict.fromkeys(range(10), 1000)
        images = torch.stack([decode_image(data[offset[i] : offset[i + 1]].tobytes(), 3) for i in range(0, 10_000, 50)])
        assert (images.float().mean((0, 2, 3)) / 255).tolist() == pytest.approx([0.494, 0.485, 0.450], abs=0.03)


class TestFolder:
    def test_labels_are_numbered_by_sorted_name(self, photos: Path) -> None:
        splits = opened("folder", photos)
        assert list(splits.classes) == ["Bee", "ant", "zebra"]
        assert isinstance(splits.train, FileImages) and isinstance(splits.eval, FileImages)
        for part in (splits.train, splits.eval):
            assert [splits.classes[label] for label in part.labels] == [path.parent.name for path in part.paths]
        assert splits.size is None and splits.train.load(0).shape[0] == 3

    def test_a_split_is_stratified_disjoint_whole_and_seeded(self, photos: Path) -> None:
        one, same, other = (opened("folder", photos, split_seed=seed) for seed in (0, 0, 1))
        assert Counter(one.eval.labels.tolist()) == {0: 2, 1: 1, 2: 1}
        assert Counter(one.train.labels.tolist()) == {0: 8, 1: 5, 2: 3}

        def paths(splits: ImageSplits) -> tuple[list[Path], list[Path]]:
            assert isinstance(splits.train, FileImages) and isinstance(splits.eval, FileImages)
            return list(splits.train.paths), list(splits.eval.paths)

        assert paths(one) == paths(same) != paths(other)
        assert not set(paths(one)[0]) & set(paths(one)[1])
        assert len(paths(one)[0]) + len(paths(one)[1]) == 20
        assert one.note == "20% of each class held out, seed 0"

    @pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
    def test_an_evaluation_folder_is_used_as_it_is(self, photos: Path, tmp_path: Path, name: str) -> None:
        root = tmp_path / "pairs"
        shutil.copytree(photos, root / "train", ignore=shutil.ignore_patterns(".*"))
        shutil.copytree(photos / "zebra", root / name / "zebra")
        shutil.copytree(photos / "zebra", root / name / "ant")
        shutil.copytree(photos / "zebra", root / name / "Bee")
        splits = opened("folder", root)
        assert (len(splits.train), len(splits.eval), splits.note) == (20, 12, "")
        assert "pairs: comes split; data.folds=2 expects data that do not" in fails("folder", root, folds=2)

    def test_a_class_may_be_called_train(self, photos: Path) -> None:
        (photos / "zebra").rename(photos / "train")
        assert list(opened("folder", photos).classes) == ["Bee", "ant", "train"]

    def test_what_is_wrong_with_a_folder_is_named(self, photos: Path, tmp_path: Path, save_image: Callable) -> None:
        assert "needs data.root" in fails("folder", tmp_path / "nowhere")
        (tmp_path / "bare").mkdir()
        assert "bare: has no class folders" in fails("folder", tmp_path / "bare")
        (tmp_path / "bare/cat").mkdir()
        (tmp_path / "bare/dog").mkdir()
        assert "bare: has no images" in fails("folder", tmp_path / "bare")
        (photos / "empty").mkdir()
        assert f"{photos / 'empty'}: an empty class" in fails("folder", photos)
        save_image(photos / "empty/lonely.jpg")
        assert f"{photos / 'empty'}: 1 readable image; a class that is split needs two" in fails("folder", photos)
        save_image(tmp_path / "single/cat/1.jpg")
        assert "single: only one class, 'cat'" in fails("folder", tmp_path / "single")
        shutil.copytree(photos, tmp_path / "pairs/train")
        assert "pairs: has train/ but none of val/" in fails("folder", tmp_path / "pairs")
        shutil.copytree(photos / "zebra", tmp_path / "pairs/val/zebra")
        shutil.copytree(photos / "ant", tmp_path / "pairs/val/aunt")
        assert "pairs: class 'Bee' is in train/ and not in val/" in fails("folder", tmp_path / "pairs")

    def test_no_root_is_said(self) -> None:
        with pytest.raises(MissingDataError, match=r"data\.root is not set; say where it is with data\.root=PATH"):
            opened("folder")

    def test_a_broken_image_is_named_when_it_is_read(self, photos: Path) -> None:
        (photos / "ant/00.jpg").write_bytes(b"no image")
        splits = opened("folder", photos, split_seed=0)
        with pytest.raises(UserError, match=r"ant/00\.jpg: not an image"):
            for part in (splits.train, splits.eval):
                for i in range(len(part)):
                    part.load(i)

    def test_broken_images_can_be_skipped_and_are_counted(self, photos: Path) -> None:
        whole = (photos / "ant/02.JPG").read_bytes()
        (photos / "ant/02.JPG").write_bytes(whole[:-40])
        (photos / "Bee/00.jpg").write_bytes(b"")
        splits = opened("folder", photos, on_error="skip")
        assert len(splits.train) + len(splits.eval) == 18
        assert [path.name for path in splits.skipped] == ["00.jpg", "02.JPG"]
        assert splits.note.startswith("2 unreadable files skipped, 20%")
        for path in (photos / "zebra").glob("*.*"):
            path.write_bytes(b"")
        assert "zebra: an empty class: none of its images can be read" in fails("folder", photos, on_error="skip")


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100"])
class TestMissing:
    def test_one_line_says_what_is_needed_where_and_how(self, name: str, tmp_path: Path) -> None:
        error = fails(name, tmp_path / "nowhere")
        about = describe_dataset(f"vision/{name}")
        for part in (
            about["needs"],
            about["source"],
            str(tmp_path / "nowhere"),
            "data.root=PATH",
            "data.download=true",
        ):
            assert part in error

    def test_a_download_fetches_to_the_root_and_opens(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
    ) -> None:
        fixture = {"fashion_mnist": "fashion", "cifar10": "cifar10", "cifar100": "cifar100_archive"}[name]
        source = request.getfixturevalue(fixture)
        target = tmp_path / "fetched"

        def fetch(root: str, download: bool) -> None:
            assert download and Path(root) == target
            if source.is_file():
                shutil.copy(source, root)
            else:
                shutil.copytree(source, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("fetched"))

        import torchvision.datasets

        monkeypatch.setattr(torchvision.datasets, type(get_dataset(name, "vision")).__name__, fetch)
        assert len(opened(name, target, download=True).train)

    def test_a_failed_download_is_one_line(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torchvision.datasets

        def fetch(root: str, download: bool) -> None:
            raise OSError("no route to host")

        monkeypatch.setattr(torchvision.datasets, type(get_dataset(name, "vision")).__name__, fetch)
        assert "failed: no route to host" in fails(name, tmp_path / "x", download=True)
        monkeypatch.setattr(torchvision.datasets, type(get_dataset(name, "vision")).__name__, lambda *_, **__: None)
        assert "did not bring" in fails(name, tmp_path / "x", download=True)


def test_a_plain_data_config_is_enough_for_arrays(fashion: Path) -> None:
    dataset = get_dataset("vision/fashion_mnist")
    assert len(dataset.open(DataConfig(name="fashion_mnist", root=str(fashion))).train) == 20
