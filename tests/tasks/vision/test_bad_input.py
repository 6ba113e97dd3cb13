"""Bad images, folders and sizes: one line with the file or argument and the remedy; a bulk job goes on if told to."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from mambaverse.cli import main
from mambaverse.errors import UserError
from mambaverse.tasks.vision import images
from mambaverse.tasks.vision.images import read_image
from mambaverse.tasks.vision.task import VisionTask

Make = Callable[..., VisionTask]
Save = Callable[..., Path]


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def as_floats(path: Path) -> Path:
    Image.fromarray(np.zeros((9, 9), np.float32)).save(path, format="TIFF")
    return path


def as_nothing(path: Path) -> Path:
    path.write_bytes(b"")
    return path


BAD = {"truncated": truncate, "floats": as_floats, "empty": as_nothing}


@pytest.fixture
def train(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that trains the quick model on a folder, as runs/mine, without pictures: (status, out, err)."""

    def run(root: Path, *overrides: str) -> tuple[int, str, str]:
        given = ["data.name=folder", f"data.root={root}", "data.img_size=8", "data.batch_size=4", "trainer.epochs=2"]
        where = [f"trainer.output_dir={tmp_path / 'runs'}", "trainer.run_name=mine", "trainer.num_threads=1"]
        capsys.readouterr()
        status = main(["train", tiny, *given, *where, "trainer.pictures=false", *overrides])
        return status, *capsys.readouterr()

    return run


def one_line(err: str) -> str:
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_stops_training_with_its_name_and_the_remedy(
    train: Callable[..., tuple[int, str, str]], photos: Path, kind: str
) -> None:
    bad = BAD[kind](photos / "Bee/00.jpg")
    status, _, err = train(photos)
    assert status == 2 and str(bad) in one_line(err) and "data.on_error=skip leaves such files out" in err


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_skipped_counted_and_listed(
    train: Callable[..., tuple[int, str, str]], photos: Path, tmp_path: Path, kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bad = [BAD[kind](photos / name) for name in ("Bee/00.jpg", "ant/01.png")]
    status, out, err = train(photos, "data.on_error=skip", "trainer.pictures=true")
    assert status == 0 and "2 unreadable files skipped" in re.sub(r"\s+", " ", out)
    assert "2 of 20 samples skipped: they cannot be read" in out
    assert f"warning: {photos}: 2 files skipped, the first: {bad[0]}: " in err and "split.csv lists them" in err
    run = tmp_path / "runs/mine"
    rows = list(csv.DictReader((run / "split.csv").read_text().splitlines()))
    assert [photos / row["name"] for row in rows if row["set"] == "skipped"] == bad
    assert json.loads((run / "results.json").read_text())["skipped"] == 2
    assert main(["eval", str(run)]) == 0
    assert "2 of 20 samples skipped" in capsys.readouterr().out


def test_a_run_that_loses_an_image_goes_on_once_it_is_restored(
    train: Callable[..., tuple[int, str, str]], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]")
    assert train(photos, *given)[0] == 0
    expected = json.loads((tmp_path / "runs/mine/results.json").read_text())["metrics"]
    lost, reads = photos / "Bee/00.jpg", 0

    def read(path: Path, in_chans: int) -> Tensor:
        nonlocal reads
        reads += path == lost
        if reads > 1:  # gone after the first epoch
            raise UserError(f"{path}: no such file or directory")
        return read_image(path, in_chans)

    with monkeypatch.context() as patch:
        patch.setattr(images, "read_image", read)
        status, _, err = train(photos, *given, "trainer.run_name=two")
    run = tmp_path / "runs/two"
    assert status == 2 and str(lost) in one_line(err) and "data.on_error=skip leaves such files out" in err
    assert err.rstrip().endswith(f"restore it and go on: mambaverse train --resume {run}")
    assert main(["train", "--resume", str(run)]) == 0
    assert json.loads((run / "results.json").read_text())["metrics"] == expected


class TestPredict:
    @pytest.fixture
    def run(self, train: Callable[..., tuple[int, str, str]], photos: Path, tmp_path: Path) -> Path:
        assert train(photos, "trainer.epochs=1")[0] == 0
        return tmp_path / "runs/mine"

    def test_bad_files_and_bare_folders_stop_or_are_counted(
        self, run: Path, photos: Path, tmp_path: Path, save_image: Save, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "bare").mkdir()
        bad = [BAD[kind](save_image(tmp_path / f"new/{kind}.tif")) for kind in BAD]
        good = [str(save_image(tmp_path / f"good/{mode}.tif", mode)) for mode in ("1", "L", "RGBA", "CMYK")]
        for path in (*bad, tmp_path / "bare", tmp_path / "nowhere.jpg"):
            capsys.readouterr()
            assert main(["predict", str(run), good[0], str(path), "--format", "json"]) == 2
            out, err = capsys.readouterr()
            assert str(path) in one_line(err) and "--on-error skip leaves such inputs out" in err
            assert json.loads(out)["name"] == good[0]  # what came before it is not lost
        inputs = [str(tmp_path / "bare"), good[0], str(tmp_path / "new"), *good[1:]]
        assert main(["predict", str(run), *inputs, "--format", "json", "--on-error", "skip"]) == 0
        out, err = capsys.readouterr()
        assert [json.loads(line)["name"] for line in out.splitlines()] == good
        assert f"{len(bad) + 1} of {len(bad) + 5} inputs skipped" in err and all(str(path) in err for path in bad)

    def test_the_runs_own_word_holds_unless_another_is_given(
        self, train: Callable[..., tuple[int, str, str]], photos: Path, tmp_path: Path, save_image: Save,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        assert train(photos, "trainer.epochs=1", "data.on_error=skip")[0] == 0
        inputs = [str(truncate(save_image(tmp_path / "x.png", size=(64, 64)))), str(photos / "ant")]
        assert main(["predict", str(tmp_path / "runs/mine"), *inputs]) == 0
        assert "1 of 7 inputs skipped" in capsys.readouterr().err
        assert main(["predict", str(tmp_path / "runs/mine"), *inputs, "--on-error", "raise"]) == 2

    def test_data_of_other_classes_are_refused_with_the_first_that_differs(
        self, run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = shutil.copytree(photos, tmp_path / "other")
        (other / "zebra").rename(other / "yak")
        capsys.readouterr()
        assert main(["eval", str(run), f"data.root={other}"]) == 2
        err = one_line(capsys.readouterr().err)
        assert "'yak' is none of the run's and the run's 'zebra' is not in the data" in err
        assert "data.root= must name data with the run's classes" in err
        assert main(["predict", str(run), str(other)]) == 0  # which needs no labels


class TestFolders:
    @pytest.mark.parametrize("on_error", ["raise", "skip"])
    def test_an_empty_class_folder(self, make_task: Make, photos: Path, on_error: str) -> None:
        (photos / "empty").mkdir()
        with pytest.raises(UserError, match=r"photos/empty: an empty class: no images .* or remove the folder"):
            make_task("vision/folder", f"data.root={photos}", f"data.on_error={on_error}")

    def test_one_class_only(self, make_task: Make, photos: Path) -> None:
        for name in ("ant", "Bee"):
            shutil.rmtree(photos / name)
        with pytest.raises(UserError, match="photos: only one class, 'zebra'; expected two or more class folders"):
            make_task("vision/folder", f"data.root={photos}")

    def test_a_class_of_bad_images_only(self, make_task: Make, photos: Path) -> None:
        for path in (photos / "ant").iterdir():
            as_nothing(path)
        with pytest.raises(UserError, match=r"photos/ant: an empty class: none of its images can be read; remove the"):
            make_task("vision/folder", f"data.root={photos}", "data.on_error=skip")


class TestSizes:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["data.img_size=30"], "data.img_size: 30 is no multiple of patch_size 4; the nearest is 32"),
            (["data.img_size=3"], "data.img_size: 3 is no multiple of patch_size 4; the nearest is 4"),
            (["model.args.patch_size=5"], "data.img_size: 32 is no multiple of patch_size 5; the nearest is 30"),
            (
                ["model.name=vmamba_tiny_v0_224", "data.img_size=3"],
                "data.img_size: 3 is smaller than a patch of 4; the least is 4",
            ),
        ],
    )
    def test_a_size_that_does_not_fit_the_patches_is_named_with_one_that_does(
        self, make_task: Make, photos: Path, overrides: list[str], message: str
    ) -> None:
        base = ["model.name=vim_nano_patch4_32", "data.img_size=32"]
        task = make_task("vision/folder", f"data.root={photos}", *base, *overrides)
        with pytest.raises(UserError, match=re.escape(f"{message}; set that, or another model.args.patch_size")):
            task.build_model()

    def test_images_smaller_than_the_model_and_very_long_ones_are_fitted(
        self, make_task: Make, save_image: Save, tmp_path: Path
    ) -> None:
        task = make_task("vision/digits")
        for i, size in enumerate([(1, 1), (2, 300), (300, 1), (7, 9)]):
            ((_, load),) = task.load_inputs([str(save_image(tmp_path / f"{i}.png", size=size))])
            assert load()["image"].shape == (1, 8, 8)
