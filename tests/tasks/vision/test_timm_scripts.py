"""`python -m mambaverse.timm SCRIPT` runs scripts, timm's own among them, with our models registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from tests.tasks.vision.timm_contract.suite import environment, unpacked_sdist

SCRIPTS = "MAMBAVERSE_TIMM_SCRIPTS"
SCRIPT = """
import sys, timm
import beside
assert __name__ == "__main__" and __file__ == sys.argv[0]
model = timm.create_model(sys.argv[1], num_classes=3)
print(type(model).__name__, model.num_classes, sys.argv[2:], beside.VALUE)
"""


def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mambaverse.timm", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


def test_a_script_finds_our_models_its_arguments_and_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/mine.py").write_text(SCRIPT)
    (tmp_path / "scripts/beside.py").write_text("VALUE = 7")
    done = call("scripts/mine.py", "test_vim", "--flag", "1", cwd=tmp_path)
    assert done.stdout.strip() == "Vim 3 ['--flag', '1'] 7", done.stderr


def test_a_missing_script_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    done = call("trian.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no script 'trian.py', did you mean 'train.py'?")
    assert "pytorch-image-models" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def timm_scripts(request: pytest.FixtureRequest) -> Path:
    folder = Path(os.environ[SCRIPTS]) if SCRIPTS in os.environ else unpacked_sdist(request.config.cache)
    if not (folder / "train.py").is_file():
        pytest.skip(
            f"no train.py in {folder.name}: timm's releases hold its tests but not its scripts; clone "
            f"https://github.com/huggingface/pytorch-image-models and run with {SCRIPTS}=that folder"
        )
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of two classes, two images each, to train on and to validate with."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        for label in ("a", "b"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(2):
                pixels = torch.randint(256, (3, 64, 64), generator=generator, dtype=torch.uint8)
                to_pil_image(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_timms_scripts_train_and_validate(timm_scripts: Path, images: Path, tmp_path: Path) -> None:
    common = ["--model", "test_vim", "--num-classes", "2", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    data = ["--data-dir", str(images)]
    trained = call(
        str(timm_scripts / "train.py"), *data, *common, "--epochs", "1", "--output", str(tmp_path / "out"),
        "--experiment", "one", cwd=tmp_path,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-3000:]
    (weights,) = (tmp_path / "out/one").glob("last*")
    validated = call(
        str(timm_scripts / "validate.py"), *data, *common, "--split", "validation", "--checkpoint", str(weights),
        cwd=tmp_path,
    )  # fmt: skip
    assert validated.returncode == 0, validated.stderr[-3000:]
    assert "top1" in validated.stdout
