"""The image task: what it makes of a config and of data, what it draws, and what it refuses."""

import csv
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mambaverse.config import compose, to_yaml
from mambaverse.engine.run import train
from mambaverse.errors import UserError
from mambaverse.tasks.vision.figures import label_sheet
from mambaverse.tasks.vision.task import VisionTask

Make = Callable[..., VisionTask]
Draw = Callable[[int], torch.Generator]


def fails(make: Make, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        make(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def batch_of(task: VisionTask, n: int, draw: Draw | None = None) -> dict[str, Tensor]:
    rows = [task.train_set.sample(i, None if draw is None else draw(i)) for i in range(n)]
    return dict(task.collate(rows, None if draw is None else draw(99)))


def test_a_batch_is_normalised_by_the_training_images(make_task: Make) -> None:
    task = make_task("vision/digits")
    batch = batch_of(task, len(task.train_set))
    assert batch["image"].shape == (1437, 1, 8, 8) and batch["image"].dtype == torch.float32
    assert abs(batch["image"].mean().item()) < 1e-3 and batch["image"].std().item() == pytest.approx(1, abs=1e-3)
    assert batch["target"].dtype == torch.int64


def test_the_same_draws_make_the_same_batch(make_task: Make, draw: Draw) -> None:
    overrides = ("task.mixup=0.8", "task.cutmix=1.0", "data.rand_augment=rand-m9-mstd0.5-inc1", "data.erase=0.5")
    first, second = (batch_of(make_task("vision/digits", *overrides), 9, draw) for _ in range(2))
    assert first["image"].equal(second["image"]) and first["target"].equal(second["target"])
    assert first["target"].shape == (9, 10)
    assert not first["image"].equal(batch_of(make_task("vision/digits", *overrides), 9)["image"])


def test_a_worker_process_makes_the_same_batch(make_task: Make, draw: Draw) -> None:
    task = make_task("vision/digits", "task.mixup=0.8", "data.rand_augment=rand-m9-mstd0.5-inc1")
    samples, collate = pickle.loads(pickle.dumps((task.train_set, task.collate)))
    batch = collate([samples.sample(i, draw(i)) for i in range(6)], draw(99))
    assert batch["image"].equal(batch_of(task, 6, draw)["image"])


@pytest.mark.parametrize(("in_chans", "img_size"), [(1, 8), (3, 8), (1, 16), (3, 11)])
def test_images_come_in_the_size_and_channels_that_are_set(make_task: Make, in_chans: int, img_size: int) -> None:
    task = make_task("vision/digits", f"data.in_chans={in_chans}", f"data.img_size={img_size}")
    assert batch_of(task, 4)["image"].shape == (4, in_chans, img_size, img_size)
    assert f"{img_size} x {img_size}" in task.describe()["data"]


def test_the_model_gets_what_the_data_and_the_config_say(make_task: Make, tiny: str) -> None:
    task = make_task(tiny, "model.args={width: 3}", "model.mixer=[ssd,attention]")
    model: Any = task.build_model()
    assert (model.expects, model.head.out_features, model.mixer) == ((1, 8, 8), 10, ["ssd", "attention"])
    assert (model.head.in_features, model.patch_size) == (9, 2)  # the config's own argument stands


def test_null_takes_an_argument_out(make_task: Make, tiny: str) -> None:
    model: Any = make_task(tiny, "model.args.patch_size=null").build_model()
    assert model.patch_size == 1


@pytest.mark.parametrize(
    ("config", "shallow", "in_chans", "img_size"),
    [
        ("digits", "depth=1", 1, 8),
        ("fashion_mnist", "depth=1", 1, 28),
        ("cifar10", "depths=[1]", 3, 32),
        ("cifar100", "depth=1", 3, 32),
        ("folder", "depth=1", 3, 224),
    ],
)
def test_the_model_of_each_shipped_config_takes_its_images(
    make_task: Make, config: str, shallow: str, in_chans: int, img_size: int
) -> None:
    task = make_task(f"vision/{config}", f"model.args.{shallow}", setup=False)
    facts = {"classes": ["a", "b"], "in_chans": in_chans, "img_size": img_size}
    task.restore(facts | {"mean": [0.5] * in_chans, "std": [0.2] * in_chans})
    output = task.forward(task.build_model(), {"image": torch.zeros(1, in_chans, img_size, img_size)})
    assert output.shape == (1, 2) and output.isfinite().all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.args={num_classes: 3}", "model.args.num_classes cannot be set: it is the number of the data's classes"),
        ("model.args={img_size: 32}", "model.args.img_size cannot be set: set data.img_size"),
        ("model.args={features_only: true}", "model.args.features_only cannot be set: a classifier is trained"),
        ("model.args={pretrained_cfg: in1k}", "model.args.pretrained_cfg cannot be set: set model.checkpoint"),
        ("model.args={in_chans: 3}", "model.args.in_chans cannot be set: set data.in_chans"),
        ("model.args={widht: 3}", "unknown argument 'widht', did you mean 'width'"),
        ("model.name=tiny_vision", "unknown model 'tiny_vision', did you mean 'tiny_vision_test'"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line(make_task: Make, tiny: str, override: str, message: str) -> None:
    task = make_task(tiny, override)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        task.build_model()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.name=digit", "unknown dataset 'vision/digit', did you mean 'vision/digits'"),
        ("data.in_chans=2", "data.in_chans: expected 1 (grey) or 3 (RGB), got 2"),
        ("data.img_size=0", "data.img_size: expected at least 1, got 0"),
        ("data.img_size=big", "data.img_size"),
        ("data.flip=2", "data.flip: expected a probability, got 2.0"),
        ("data.crop_padding=-1", "data.crop_padding: expected at least 0, got -1"),
        ("data.crop_padding=8", "data.crop_padding: 8 is too much for images of 8 pixels"),
        ("data.crop_scale=[0.5]", "data.crop_scale: expected [smallest, largest] in (0, 1], got [0.5]"),
        ("data.crop_scale=[0.5,1.0]", "data.crop_padding and data.crop_scale are two ways to crop"),
        ("data.mean=[0.5,0.5]", "data.mean: expected 1 values, one a channel, got [0.5, 0.5]"),
        ("data.std=[0.0]", "data.std: expected positive values, got [0.0]"),
        ("data.val_fraction=1", "data.val_fraction: expected a number between 0 and 1, got 1.0"),
        ("data.on_error=ignore", "data.on_error: expected raise or skip, got 'ignore'"),
        ("data.rand_augment=rnd", "data.rand_augment: 'rnd' is not a timm RandAugment"),
        ("data.imgsize=8", "unknown key 'data.imgsize', did you mean 'img_size'"),
        ("task.label_smoothing=1", "task.label_smoothing: expected a number in [0, 1), got 1.0"),
        ("task.mixup=-1", "task.mixup: expected at least 0, got -1.0"),
        ("task.mixup_prob=1.5", "task.mixup_prob: expected a probability, got 1.5"),
    ],
)
def test_a_wrong_value_is_one_line(make_task: Make, override: str, message: str) -> None:
    assert message in fails(make_task, "vision/digits", override)


def test_images_without_a_size_of_their_own_need_one(make_task: Make, photos: Path) -> None:
    error = fails(make_task, "vision/folder", f"data.root={photos}", "data.img_size=null")
    assert "data.img_size is not set; the images of vision/folder have no size of their own" in error


def test_labels_are_smoothed_while_training_only(make_task: Make, tiny: str) -> None:
    task = make_task(tiny, "task.label_smoothing=0.2")
    model, batch = task.build_model(), batch_of(task, 16)
    log_p = task.forward(model, batch).log_softmax(-1)
    hard = -log_p.gather(1, batch["target"][:, None]).mean()
    assert task.step(model.eval(), batch)["loss"].item() == pytest.approx(hard.item(), rel=1e-5)
    smooth = 0.8 * hard - 0.2 * log_p.mean()
    assert task.step(model.train(), batch)["loss"].item() == pytest.approx(smooth.item(), rel=1e-5)


def test_metrics_count_the_best_and_the_best_five(make_task: Make) -> None:
    task = make_task("vision/digits")
    metrics = task.metrics()
    targets = torch.arange(10)
    logits = torch.arange(10.0).expand(10, 10).clone()  # 9 first, then 8, 7, ...
    task.update(metrics, logits, {"target": targets})
    assert {name: value.item() for name, value in metrics.compute().items()} == pytest.approx(
        {"accuracy": 0.1, "top5": 0.5}
    )
    task.classes = task.classes[:5]
    assert set(task.metrics()) == {"accuracy"}


def test_a_run_keeps_what_its_data_told_it(make_task: Make, tiny: str, tmp_path: Path) -> None:
    task = make_task(tiny)
    facts = json.loads(json.dumps(task.facts()))
    other = make_task(tiny, setup=False)
    other.restore(facts)
    Image.new("L", (8, 8), 128).save(tmp_path / "x.png")
    ((_, load),) = other.load_inputs([str(tmp_path / "x.png")])
    batch = other.collate([load()], None)
    assert batch["image"][0, 0, 0, 0].item() == pytest.approx((128 / 255 - 0.3054) / 0.376, abs=1e-3)
    assert other.forward(other.build_model(), batch).shape == (1, 10)


def test_the_normalisation_is_part_of_the_resolved_config(make_task: Make, photos: Path, tmp_path: Path) -> None:
    task = make_task("vision/folder", f"data.root={photos}", "data.img_size=16")
    (tmp_path / "config.yaml").write_text(to_yaml(task.config))
    again = compose(str(tmp_path / "config.yaml"))
    assert again == task.config
    assert (again.data.mean, again.data.std) == (task.data.mean, task.data.std) and task.data.mean is not None  # type: ignore[attr-defined]


def test_the_split_of_a_folder_is_written_down_with_hashes(make_task: Make, photos: Path, tmp_path: Path) -> None:
    (photos / "ant/00.jpg").write_bytes(b"broken")
    overrides = (f"data.root={photos}", "data.img_size=16", "data.on_error=skip")
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = make_task("vision/folder", *overrides).save_split(tmp_path / name)
        assert path == tmp_path / name / "split.csv"
        written.append(path.read_text())
    assert written[0] == written[1]
    rows = list(csv.DictReader(written[0].splitlines()))
    assert [row["set"] for row in rows].count("eval") == 4 and rows[-1]["set"] == "skipped"
    assert len(rows) == 20
    for row in rows:
        data = (photos / row["name"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest() and int(row["bytes"]) == len(data)
        assert row["class"] in row["name"]
    (photos / "Bee/03.jpg").write_bytes((photos / "Bee/06.jpg").read_bytes())
    path = make_task("vision/folder", *overrides).save_split(tmp_path / "two")
    assert path is not None and path.read_text() != written[0]


def test_very_large_folders_are_listed_without_hashes(
    make_task: Make, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mambaverse.splits.HASH_LIMIT_BYTES", 100)
    path = make_task("vision/folder", f"data.root={photos}", "data.img_size=16").save_split(tmp_path)
    assert path is not None
    assert {row["sha256"] for row in csv.DictReader(path.read_text().splitlines())} == {""}


def test_data_that_come_split_are_not_written_down(make_task: Make, tmp_path: Path) -> None:
    assert make_task("vision/digits").save_split(tmp_path) is None


def test_the_head_of_a_run_describes_the_data(make_task: Make, photos: Path) -> None:
    task = make_task("vision/folder", f"data.root={photos}", "data.img_size=16", "task.mixup=0.2")
    assert task.describe() == {
        "data": "folder, 16 + 4 RGB images of 16 x 16, 3 classes (20% of each class held out, seed 0)",
        "augmentation": "crop of [0.3, 1.0] of the area, flip 0.5, mixup 0.2",
    }


class TestInputs:
    def test_files_and_folders_are_fitted_to_the_model(self, make_task: Make, photos: Path) -> None:
        task = make_task("vision/digits")
        inputs = task.load_inputs([str(photos / "zebra/00.jpg"), str(photos / "ant")])
        names = [name for name, _ in inputs]
        assert names[0].endswith("zebra/00.jpg") and len(names) == 7 and names[1:] == sorted(names[1:])
        batch = task.collate([load() for _, load in inputs], None)
        assert batch["image"].shape == (7, 1, 8, 8) and "target" not in batch

    def test_a_bad_file_is_named(self, make_task: Make, tmp_path: Path, save_image: Callable[..., Path]) -> None:
        task = make_task("vision/digits")
        cut = save_image(tmp_path / "cut.png", size=(64, 64))
        cut.write_bytes(cut.read_bytes()[:500])
        (tmp_path / "text.jpg").write_text("hello")
        for name, reason in (
            ("cut.png", "cannot be decoded"),
            ("text.jpg", "not an image"),
            ("no.jpg", "no such file"),
        ):
            ((_, load),) = task.load_inputs([str(tmp_path / name)])
            with pytest.raises(UserError, match=rf"{name}: .*{reason}"):
                load()

    def test_a_folder_without_images_is_named(self, make_task: Make, tmp_path: Path) -> None:
        (tmp_path / "bare").mkdir()
        with pytest.raises(UserError, match="bare: a folder without images"):
            make_task("vision/digits").load_inputs([str(tmp_path / "bare")])


class TestContactSheet:
    def test_wrong_predictions_are_marked(self, make_task: Make, tmp_path: Path) -> None:
        task = make_task("vision/digits")
        targets = torch.tensor([task.eval_set.sample(i, None)["target"] for i in range(len(task.eval_set))])
        outputs = torch.nn.functional.one_hot(targets, 10).float() * 5
        right = task.figures(tmp_path, torch.nn.Identity(), outputs, targets)
        assert right == [tmp_path / "predictions.png"]
        with Image.open(right[0]) as image:
            without, height = red_pixels(image), image.height
        outputs[::20] = outputs[::20].roll(1, dims=1)
        with Image.open(task.figures(tmp_path, torch.nn.Identity(), outputs, targets)[0]) as image:
            assert red_pixels(image) > without + 1000 and image.height > height

    def test_few_colour_images_of_few_classes_are_enough(self, make_task: Make, photos: Path, tmp_path: Path) -> None:
        task = make_task("vision/folder", f"data.root={photos}", "data.img_size=16")
        (path,) = task.figures(tmp_path, torch.nn.Identity(), torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 0, 1, 2]))
        assert path.stat().st_size > 3000


def red_pixels(image: Image.Image) -> int:
    red, green, blue = (
        torch.frombuffer(bytearray(c.tobytes()), dtype=torch.uint8).int() for c in image.convert("RGB").split()
    )
    return int(((red > 150) & (green < 90) & (blue < 90)).sum())


@pytest.mark.parametrize(
    ("images", "total", "title"), [(1, 1, "1 image,"), (2, 2, "2 images,"), (2, 1500, "the first 2 of 1,500 images,")]
)
def test_the_sheet_counts_its_images(
    images: int, total: int, title: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("mambaverse.tasks.vision.figures.write_figure", lambda figure, path, dpi: drawn.append(figure))
    pictures = [torch.zeros(1, 8, 8, dtype=torch.uint8)] * images
    label_sheet(tmp_path / "sheet.png", pictures, ["a"] * images, [0.5] * images, total)
    assert drawn[0].get_suptitle().startswith(title)


def test_a_model_that_scores_tokens_is_refused_before_it_trains(tmp_path: Path) -> None:
    here = ["model.args.depth=1", f"trainer.output_dir={tmp_path}", "trainer.run_name=tokens"]
    with pytest.raises(UserError, match=r"returns \(1, 17, 10\) for a batch of 1, expected \(1, 10\)"):
        train(compose("vision/digits", ["model.args.global_pool=''", *here]))
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize(("wrapped", "kind"), [(lambda y: (y, y), "a tuple"), (lambda y: {"logits": y}, "a dict")])
def test_a_model_that_returns_no_tensor_is_told_so(
    make_task: Make, tiny: str, wrapped: Callable[[torch.Tensor], Any], kind: str
) -> None:
    task = make_task(tiny)
    batch = batch_of(task, 2)
    with pytest.raises(UserError, match=rf"returns {kind} for a batch of 2, expected \(2, 10\), a score for each"):
        task.check_output(wrapped(task.forward(task.build_model(), batch)), batch)
