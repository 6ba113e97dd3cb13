"""The engine on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from mambaverse.config import OptimConfig
from mambaverse.engine import trainer as trainer_module
from mambaverse.engine.evaluate import evaluate, predict
from mambaverse.engine.graphed import GraphedStep
from mambaverse.engine.optim import create_optimizer
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


@pytest.mark.parametrize("name", ["adamw", "nmuon", "lion", "adamuon", "adopt", "nadamw", "radam", "rmsprop"])
def test_a_captured_step_is_the_optimizers_own(name: str) -> None:
    """Rates that change, a parameter without a gradient in some steps, and a state that is loaded in between."""
    config = OptimConfig(name=name, weight_decay=0.1)
    ends = []
    for captured in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.LayerNorm(48), torch.nn.Linear(48, 24)).cuda()
        optimizer = create_optimizer(net, config, capturable=True)
        assert bool(optimizer.defaults.get("capturable")) == (name != "lion")
        step = GraphedStep(optimizer) if captured and name != "lion" else optimizer.step
        for number in range(24):
            for group in optimizer.param_groups:
                lr = 1e-3 * (1 + number % 5)  # a tensor, as in a graph: timm's Muon then rounds its update to bfloat16
                group["lr"] = lr if captured or name == "lion" else torch.tensor(lr, device="cuda")
            net(torch.randn(16, 24, device="cuda")).square().mean().backward()
            if number in (0, 1, 2, 3, 7, 8):
                net[2].bias.grad = None
            step()
            optimizer.zero_grad()
            if number == 12:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        ends.append([p.detach().clone() for p in net.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "nmuon"])
def test_a_compiled_run_with_cuda_graphs_is_resumed_like_any_other(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = (*CUDA, "trainer.compile=reduce-overhead", f"optim.name={name}", "trainer.epochs=4")
    whole = train(toy_config(tmp_path, *options, name="whole"), console=quiet)
    monkeypatch.setattr(Toy, "signal_at", 9)
    cut = train(toy_config(tmp_path, *options, name="cut"), console=quiet)
    assert cut.signal is not None
    again = resume(cut.folder, quiet)
    for left, right in zip(numbers(again.history), numbers(whole.history), strict=True):
        assert left.pop("kind") == right.pop("kind")
        assert left == pytest.approx(right, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "nmuon"])
def test_a_compiled_run_learns_what_an_eager_one_learns(tmp_path: Path, quiet: Console, name: str) -> None:
    same = (*CUDA, f"optim.name={name}", "trainer.epochs=4", "task.dropout=0")  # it would be drawn otherwise
    eager = train(toy_config(tmp_path, *same, name="eager"), console=quiet)
    graphs = train(toy_config(tmp_path, *same, "trainer.compile=reduce-overhead", name="graphs"), console=quiet)
    for left, right in zip(numbers(eager.history), numbers(graphs.history), strict=True):
        assert left.pop("kind") == right.pop("kind")
        assert left == pytest.approx(right, rel=1e-3)
    assert not torch.backends.cuda.matmul.allow_tf32  # Accelerate turns it on
