"""Real images teach a small Vim something within a minute: three times what chance gives, and no less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mambaverse.config import compose
from mambaverse.engine.run import train

SAMPLE = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "cifar10_jpeg75.npz"
TRAIN, TEST = 2_000, 500


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    if not SAMPLE.is_file():
        pytest.skip(f"no CIFAR-10 at {SAMPLE}")
    whole = np.load(SAMPLE)
    part: dict[str, np.ndarray] = {}
    for name, count in (("train", TRAIN), ("test", TEST)):
        offsets = whole[f"{name}_offset"][: count + 1]
        part |= {f"{name}_offset": offsets, f"{name}_label": whole[f"{name}_label"][:count]}
        part[f"{name}_jpeg"] = whole[f"{name}_jpeg"][: offsets[-1]]
    np.savez(path := tmp_path / "cifar10_sample.npz", allow_pickle=False, **part)
    return path


@pytest.mark.slow
def test_a_sample_of_cifar10_beats_chance_threefold(sample: Path, tmp_path: Path) -> None:
    options = (
        "model.name=vim_nano_patch4_32", "model.args.depth=2", "model.args.drop_path_rate=0",
        f"data.root={sample}", "data.batch_size=50", "data.trivial_augment=false", "data.cutout=0",
        "task.cutmix=0", "task.mixup=0", "optim.name=adamw", "optim.warmup_epochs=1", "trainer.epochs=5",
        "trainer.precision=fp32", "trainer.ema_decay=0.98", "trainer.select=last", "trainer.device=cpu",
        f"trainer.output_dir={tmp_path}",
    )  # fmt: skip
    result = train(compose("vision/cifar10", options), console=Console(quiet=True))
    assert result.metrics["accuracy"] > 0.3, result.metrics
