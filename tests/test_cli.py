"""The command line: what it prints, what it leaves behind, and one line with status 2 for whatever was given wrong."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits

from mambaverse.cli import main

SHORT = ["model.args.depth=1", "model.mixer_args.vim.d_state=4", "trainer.epochs=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one short epoch."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", "vision/digits", *SHORT, f"trainer.output_dir={folder}", "trainer.run_name=short"]) == 0
    return folder / "short"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for i, image in enumerate(load_digits().images[:3]):
        paths.append(folder / f"{i}.png")
        Image.fromarray((image * 15).astype("uint8")).save(paths[-1])
    return paths


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_a_run_leaves_everything(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {
        "config.yaml", "metrics.jsonl", "results.json", "best.safetensors", "last.safetensors", "curves.png",
        "confusion.png", "predictions.png",
    } <= names  # fmt: skip


def test_its_config_feeds_back_in(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(run / "config.yaml")]) == 0
    assert capsys.readouterr().out == (run / "config.yaml").read_text()


def test_eval_gives_the_accuracy_of_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run)]) == 0
    accuracy = json.loads((run / "results.json").read_text())["metrics"]["accuracy"]
    assert f"{accuracy:.4f}" in capsys.readouterr().out


def test_predict_in_every_format(run: Path, images: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(path) for path in images]
    assert main(["predict", str(run), *names]) == 0
    assert "0.png" in capsys.readouterr().out
    assert main(["predict", str(run), *names, "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [Path(row["input"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    assert main(["predict", str(run), *names, "--format", "json"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, item in zip(rows, objects, strict=True):
        assert row["input"] == item["name"] and row["label"] == item["label"]
        assert sum(item["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert float(row["probability"]) == pytest.approx(item["probability"], abs=1e-6)


def test_bad_images_stop_or_are_skipped(
    run: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("not an image")
    data = images[0].read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    assert str(text) in fails(capsys, "predict", str(run), str(text))
    assert str(cut) in fails(capsys, "predict", str(run), str(cut))
    assert "nowhere.png" in fails(capsys, "predict", str(run), str(tmp_path / "nowhere.png"))
    assert main(["predict", str(run), str(text), str(images[0]), "--format", "json", "--on-error", "skip"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1 and str(text) in captured.err
    assert main(["predict", str(run), str(text), str(cut), "--on-error", "skip"]) == 2
    assert capsys.readouterr().err.endswith("\nerror: 2 of 2 inputs skipped: none is left\n")


def test_predictions_as_a_sheet(
    run: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(path) for path in images]
    assert main(["predict", str(run), *names, "--sheet", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 800
    assert "no folder" in fails(capsys, "predict", str(run), *names, "--sheet", str(tmp_path / "no/sheet.png"))
    assert "unknown format '.gif'" in fails(capsys, "predict", str(run), *names, "--sheet", str(tmp_path / "x.gif"))
    (tmp_path / "bad.png").write_text("not an image")
    error = fails(capsys, "predict", str(run), names[0], str(tmp_path / "bad.png"), "--sheet", str(tmp_path / "2.pdf"))
    assert "--on-error skip" in error and (tmp_path / "2.pdf").is_file()  # of what was labelled before it


def test_explain_draws_what_a_run_looks_at(
    run: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(run), str(images[0]), str(images[1].parent), "--out", str(tmp_path)]) == 0
    written = capsys.readouterr().out.split()
    assert written == [str(tmp_path / name) for name in ("0.png", "0-2.png", "1.png", "2.png")]
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "0-2.png").read_bytes()
    (tmp_path / "bad.png").write_text("not an image")
    assert "bad.png: not an image" in fails(capsys, "explain", str(run), str(tmp_path / "bad.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "vision/digit"], "did you mean 'vision/digits'"),
        (["train"], "give a config"),
        (["train", "vision/digits", "model.name=vim_nano_patch4_33"], "did you mean 'vim_nano_patch4_32'"),
        (["train", "vision/digits", "model.mixer=sdd"], "did you mean 'ssd'"),
        (["train", "vision/digits", "model.mixer_args.vim.headdim=8"], "unknown argument 'headdim'"),
        (["train", "vision/digits", "model.mixer_args.vim.d_state=many"], "d_state"),
        (["train", "vision/digits", "model.args.dept=2"], "did you mean 'depth'"),
        (["train", "vision/digits", "data.name=digitz"], "did you mean 'vision/digits'"),
        (["train", "vision/digits", "data.sise=8"], "unknown key 'data.sise'"),
        (["train", "vision/digits", "data.root=photos"], "the config vision/folder trains on a folder of images"),
        (["train", "vision/digits", "model.mixer=torch.nn:Linear"], "expected a subclass of mambaverse.Mixer"),
        (["train", "vision/digits", "task.name=visoin"], "did you mean 'vision'"),
        (["train", "vision/digits", "trainer.epochs=ten"], "could not be converted to Integer"),
        (["train", "vision/digits", "model.args.patch_size=3"], "no multiple of patch_size 3"),
        (["train", "vision/digits", "plugins=[no_such_plugin]"], "no_such_plugin"),
        (["train", "vision/digits", "model.mixer=no_such.module:Class"], "cannot be imported"),
        (["train", "vision/digits", "optim.name=adamx"], "adamx"),
        (["train", "--resume", "no/such/run"], "no/such/run"),
        (["eval", "no/such/run"], "no/such/run"),
        (["list", "models", "resnet*"], "no models match 'resnet*'"),
        (["list", "models", "--config-dir", "."], "list models takes no --config-dir: that is for `list configs`"),
        (["list", "datasets", "-v"], "list datasets takes no -v: `mambaverse data NAME` says what one of them is"),
        (["list", "configs", "-v"], "list configs takes no -v: `mambaverse config NAME` says"),
        (["data", __file__, "--root", "."], "test_cli.py takes no --root: a genome is indexed where it is"),
        (["data", "vision/cifar10", "--root", "no.deb"], "--root no.deb: no such file or folder"),
        (["data", "dna/ecoli536", "--root", "no.deb"], "--root no.deb: no such file or folder"),
        (["data", "vision/digits", "--root", "."], "--root .: vision/digits reads nothing from there, it needs scikit"),
        (["data", "no.fa"], "data no.fa: no such file; expected a genome's, or a data set's name"),
        (["data", "vision/digitz"], "did you mean 'vision/digits'"),
        (["bench", "selective_scam"], "did you mean 'selective_scan'"),
        (["bench", "norm", "--case", "zzz"], "no case 'zzz'; known: 'shape (2048, 256), group_size 256', '"),
        (["config", "vision/digits", "--config-dir", "no/such/folder"], "no folder 'no/such/folder'"),
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, list) else "",
)
def test_what_was_given_wrong(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize(("command", "needed"), [("bench", "what"), ("config", "config"), ("eval", "RUN")])
def test_what_may_be_left_out_is_not_required(command: str, needed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command])
    assert capsys.readouterr().err.endswith(f"the following arguments are required: {needed}\n")


def test_large_images_are_predicted_without_a_warning(
    run: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # of the 64: Pillow warns up to twice as many
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert main(["predict", str(run), str(images[0])]) == 0
    assert not [warning for warning in seen if "pixels" in str(warning.message)]


def test_backend_of_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mambaverse.kernels.backend._default", "cuda")  # what MAMBAVERSE_BACKEND=cuda leaves there
    error = fails(capsys, "train", "vision/digits", *SHORT)
    assert "MAMBAVERSE_BACKEND" in error and "'cuda'" in error and "triton" in error


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)  # what Python makes of it: ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "mambaverse.engine.catalogue", raising=False)
    error = fails(capsys, "list", "mixers", "s6", "-v")
    assert "'rich.table'" in error and "pip check" in error


def test_a_missing_module_of_ours_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mambaverse.engine.catalogue", None)
    with pytest.raises(ModuleNotFoundError):
        main(["list", "mixers", "s6", "-v"])


def test_checkpoint_of_another_model(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    weights = run / "best.safetensors"
    error = fails(
        capsys, "train", "vision/digits", "trainer.epochs=1", f"model.checkpoint={weights}",
        f"trainer.output_dir={tmp_path}",
    )  # fmt: skip
    assert str(weights) in error and "layers.1" in error


def test_half_written_run(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "best.safetensors").unlink()
    assert str(copy) in fails(capsys, "eval", str(copy))
    (copy / "config.yaml").unlink()
    assert str(copy) in fails(capsys, "predict", str(copy), "x.png")


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    expected = {
        "mixers": {
            *(
                "attention",
                "bidirectional",
                "bissd",
                "linear_attention",
                "mamba3",
                "ncssd",
                "retnet",
                "s4d",
                "s6",
                "ssd",
                "vim",
            )
        },
        "models": {"vim_tiny_patch16_224", "vim_nano_patch4_32"},
        "datasets": {"vision/digits", "vision/cifar10", "vision/cifar100", "vision/fashion_mnist", "vision/folder"},
        "configs": {"vision/digits", "vision/cifar10", "vision/fashion_mnist", "vision/folder"},
    }
    for kind, names in expected.items():
        assert main(["list", kind]) == 0
        assert names <= set(capsys.readouterr().out.split())
    assert main(["list", "mixers", "s*", "-v"]) == 0
    assert "selective" in capsys.readouterr().out.lower()


def test_the_lists_can_be_read_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["list", "mixers", "-v"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out and "d_state=16" in out and len(out.splitlines()) < 100
    assert main(["list", "models", "test_*", "-v"]) == 0
    out = capsys.readouterr().out
    assert "mambaverse.tasks.vision.models.vmamba" in out and out.count("(img_size=") < 4
    assert max(map(len, out.splitlines())) <= 80


def test_summaries_that_python_stripped_are_said_to_be() -> None:
    command = [sys.executable, "-OO", "-m", "mambaverse", "list", "mixers", "s*", "-v"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "d_state=16" in out and "Python runs with -OO, which strips the docstrings" in out


def test_data_says_where_and_how(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "vision/cifar10", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path) in out and "status: missing" in out and "data.download=true: fetches" in out


def test_a_data_set_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    error = fails(capsys, "train", "vision/cifar10", f"data.root={tmp_path}", f"trainer.output_dir={tmp_path}")
    assert str(tmp_path) in error and "data.download=true" in error


def test_changes_may_stand_behind_an_option(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [vision/digits]\n")
    command = ["config", "mine", "optim.lr=0.5", "--config-dir", str(tmp_path), "optim.lr=0.25", "data.batch_size=7"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "lr: 0.25" in shown and "batch_size: 7" in shown
    for wrong in (["config", "mine", "--config-dir", str(tmp_path), "word"], ["list", "mixers", "--nope", "a=1"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_own_configs_come_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [vision/digits]\noptim: {lr: 0.25}\n")
    assert main(["config", "mine", "--config-dir", str(tmp_path)]) == 0
    assert "lr: 0.25" in capsys.readouterr().out


def test_bench_checks_and_times(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    assert main(["bench", "norm", "--case", "*2048*", "--repeat", "1", "--csv", str(path)]) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["backend"] for row in rows] == ["reference", "cpu"]
    assert all(float(row["error"]) < 1e-5 and float(row["step_ms"]) > 0 for row in rows)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupted_training_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mambaverse", "train", "vision/digits", *SHORT, "trainer.epochs=200",
               f"trainer.output_dir={tmp_path}", "trainer.run_name=stopped"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "stopped/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert f"mambaverse train --resume {tmp_path / 'stopped'}" in out


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_output_that_nobody_reads_or_that_has_no_room(tmp_path: Path) -> None:
    def ends(command: str, *arguments: str) -> tuple[int, str]:
        program = "import sys; from mambaverse.cli import main; sys.exit(main(sys.argv[1:]))"
        line = [sys.executable, "-c", program, *arguments]
        shell = ["bash", "-c", f'set -o pipefail; "$@" {command}', "bash", *line]
        done = subprocess.run(shell, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr

    assert ends("| true", "list", "configs") == (0, "")
    status, error = ends("> /dev/full", "list", "configs")
    assert (status, error) == (2, "error: [Errno 28] No space left on device\n")
    folder = (f"trainer.output_dir={tmp_path}", "trainer.run_name=run", "trainer.pictures=false")
    status, error = ends("| true", "train", "vision/digits", *SHORT, *folder)
    assert status == 0 and error == "warning: nobody reads the output any more; it goes on without\n"
    assert (tmp_path / "run/results.json").is_file()


def test_mixer_may_be_named_by_its_path(tmp_path: Path) -> None:
    overrides = [
        *SHORT[:1],
        "trainer.epochs=1",
        "trainer.pictures=false",
        "model.mixer=mambaverse.mixers.s6:S6",
        f"trainer.output_dir={tmp_path}",
    ]
    assert main(["train", "vision/digits", *overrides, "model.mixer_args[mambaverse.mixers.s6:S6].d_state=2"]) == 0


def test_a_config_of_mixers_that_alternate_trains_and_predicts(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "hybrid.yaml").write_text(
        "# Three blocks of two kinds, as Samba and Zamba are built.\n"
        "defaults: [vision/digits]\n"
        "model:\n"
        "  mixer: [ssd, ssd, attention]\n"
        "  mixer_args: {ssd: {d_state: 8}}\n"
        "  args: {depth: 3}\n"
        "trainer: {epochs: 2, num_threads: 1, pictures: false}\n"
    )
    where = [f"trainer.output_dir={tmp_path}", "trainer.run_name=hybrid", "--config-dir", str(tmp_path)]
    assert main(["train", "hybrid", *where]) == 0
    rows = [json.loads(line) for line in (tmp_path / "hybrid/metrics.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]
    with safe_open(tmp_path / "hybrid/best.safetensors", "pt") as weights:
        names = set(weights.keys())
    for layer, own in enumerate(("mixer.fwd.A_log", "mixer.fwd.A_log", "mixer.qkv.weight")):
        assert f"layers.{layer}.{own}" in names
    assert main(["predict", str(tmp_path / "hybrid"), *map(str, images)]) == 0
