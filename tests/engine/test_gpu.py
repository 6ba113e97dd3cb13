"""The engine on a GPU: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from mambaverse.engine import trainer as trainer_module
from mambaverse.engine.evaluate import evaluate, predict
from mambaverse.engine.run import resume, train
from tests.engine.toy import Toy, numbers, toy_config

pytestmark = pytest.mark.gpu
CUDA = ("trainer.device=cuda", "trainer.ema_decay=0.9", "trainer.accumulate=2")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_that_was_stopped_and_resumed_ends_as_one_that_was_not(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    options = (*CUDA, f"trainer.precision={precision}")
    whole = train(toy_config(tmp_path, *options, name="whole"), console=quiet)
    monkeypatch.setattr(Toy, "signal_at", 9)
    cut = train(toy_config(tmp_path, *options, name="cut"), console=quiet)
    assert cut.signal is not None
    again = resume(cut.folder, quiet)
    assert again.metrics == whole.metrics
    assert numbers(again.history) == numbers(whole.history)
    left, right = (load_file(folder / "last.safetensors") for folder in (whole.folder, cut.folder))
    assert all(torch.equal(left[key], right[key]) for key in left)
    state: Any = cut.folder / "state"
    saved = torch.load(next(state.glob("*/training.pt")), weights_only=True)
    assert (saved["scaler"] is not None) == (precision == "fp16")


def test_a_gpu_learns_what_a_cpu_learns(tmp_path: Path, quiet: Console) -> None:
    exact = ("task.dropout=0",)
    gpu = train(toy_config(tmp_path, *CUDA, *exact, name="gpu"), console=quiet)
    cpu = train(toy_config(tmp_path, *CUDA, *exact, "trainer.device=cpu", name="cpu"), console=quiet)
    for left, right in zip(numbers(gpu.history), numbers(cpu.history), strict=True):
        assert left.pop("kind") == right.pop("kind")
        assert left == pytest.approx(right, rel=1e-3)
    assert evaluate(gpu.folder) == pytest.approx(evaluate(gpu.folder, ["trainer.device=cpu"]), rel=1e-4)
    assert next(predict(gpu.folder, ["2,0.1"])).label == "east"


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_update_never_waits_for_the_gpu(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    update = trainer_module.Trainer._update

    def watched(self: Any, *args: Any) -> None:
        if self.position.updates < 2:  # the first ones set up libraries
            return update(self, *args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return update(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer_module.Trainer, "_update", watched)
    train(toy_config(tmp_path, *CUDA, "trainer.log_every=5", f"data.num_workers={num_workers}"), console=quiet)


def test_a_loss_that_is_not_a_number_is_told_by_its_step(tmp_path: Path, quiet: Console) -> None:
    with pytest.raises(ValueError, match=r"the loss is nan at step 5 .*of epoch 2"):
        train(toy_config(tmp_path, "trainer.device=cuda", "task.nan_at=5", "data.batch_size=25"), console=quiet)
