"""Small clips in many formats, and models that are quick."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mambaverse.config import RunConfig, compose
from mambaverse.engine.task import TASKS
from mambaverse.models import MODELS, register_model
from mambaverse.tasks.audio.task import AudioTask
from mambaverse.tasks.audio.wav import write_wav

Make = Callable[..., AudioTask]


def tone(hz: float, seconds: float = 0.3, rate: int = 16_000, level: float = 0.3, seed: int = 0) -> np.ndarray:
    """Return a sine with a little noise, float32 (L,)."""
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(t))
    return (level * np.sin(2 * np.pi * hz * t) + 0.003 * noise).astype(np.float32)


def raw_wav(
    frames: bytes, *, bits: int = 16, channels: int = 1, rate: int = 16_000, code: int = 1, size: int | None = None
) -> bytes:
    """Return a WAV file of any header; `size` is what it says of its samples."""
    width = channels * bits // 8
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, code, channels, rate, rate * width % 2**32, width, bits)
    data = struct.pack("<4sI", b"data", len(frames) if size is None else size) + frames
    return b"RIFF" + struct.pack("<I", 4 + len(fmt) + len(data)) + b"WAVE" + fmt + data


class MeanModel(nn.Module):
    """Mean of the valid frames of a spectrogram, then a linear layer."""

    def __init__(self, num_classes: int, bins: int, frames: int = 0, mixer: Any = None) -> None:
        super().__init__()
        self.frames, self.mixer = frames, mixer
        self.head = nn.Linear(bins, num_classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
        inside = torch.arange(x.shape[1]) < lengths[:, None]
        return self.head((x * inside[..., None]).sum(1) / lengths[:, None])


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[str]:
    """Register the model and return a config that trains it on the embedded clips."""

    @register_model(domain="audio", model=MeanModel, overwrite=True)
    def tiny_audio_test(pretrained: bool = False, **overrides: Any) -> nn.Module:
        return MeanModel(**overrides)

    config = tmp_path / "tiny.yaml"
    config.write_text(
        "defaults: [audio/_base]\nmodel: {name: tiny_audio_test}\n"
        "data: {name: mandarin_tones, group: syllable, bins: 32}\n"
    )
    yield str(config)
    del MODELS._entries["tiny_audio_test"]


@pytest.fixture(autouse=True)
def no_data_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets that this machine has built are not there: the embedded clips are read."""
    monkeypatch.setenv("MAMBAVERSE_DATA", str(tmp_path_factory.mktemp("data")))


@pytest.fixture
def make_task() -> Make:
    """Return the task that a config and some overrides describe, set up."""

    def make(config: str, *overrides: str, setup: bool = True) -> AudioTask:
        run: RunConfig = compose(config, overrides)
        task = TASKS.get(run.task.name)(run)
        assert isinstance(task, AudioTask)
        if setup:
            task.setup()
        return task

    return make


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of two classes, low and high, of 6 clips of several lengths and rates each, and files that are none."""
    root = tmp_path / "clips"
    for name, hz in (("low", 300), ("high", 3000)):
        (root / name).mkdir(parents=True)
        for i in range(6):
            rate = (16_000, 8_000, 44_100)[i % 3]
            samples = tone(hz, 0.1 + 0.05 * i, rate, seed=i)
            write_wav(root / name / f"{'ab'[i % 2]}_{i}.wav", samples, rate)
    (root / "low/notes.txt").write_text("not audio, and not taken for it")
    write_wav(root / "low/.hidden.wav", tone(300), 16_000)
    return root


@pytest.fixture
def draw() -> Callable[[int], torch.Generator]:
    return lambda seed: torch.Generator().manual_seed(seed)


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Return a function that returns a file which is not in the repository, or skips the test."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("MAMBAVERSE_TEST_DATA") or Path(__file__).parents[4] / "shared/data")
        if not (folder / name).exists():
            pytest.skip(f"{name} is not in {folder}; MAMBAVERSE_TEST_DATA names another folder")
        return folder / name

    return find
