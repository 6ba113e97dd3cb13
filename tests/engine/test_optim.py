"""The optimizer's groups and the schedule's rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mambaverse.config import OptimConfig
from mambaverse.engine.optim import Schedule, create_optimizer
from mambaverse.engine.run import train
from mambaverse.errors import UserError
from mambaverse.models import create_model
from tests.engine.toy import Net, toy_config


def test_a_schedule_whose_rates_mean_nothing_is_refused(tmp_path: Path, quiet: Console) -> None:
    options = ("optim.schedule=step", "optim.schedule_args={decay_epochs: 1, decay_rate: -1}", "trainer.epochs=3")
    with pytest.raises(UserError, match=r"^optim: step has a learning rate of -.* steps; see optim\.schedule_args"):
        train(toy_config(tmp_path, *options), console=quiet)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "multistep", "poly", "rsqrt", "step", "tanh", "wsd"])
def test_every_schedule_steps_by_update_and_warms_up(tmp_path: Path, schedule: str) -> None:
    config = toy_config(tmp_path, f"optim.schedule={schedule}", "optim.warmup_epochs=1").optim
    optimizer = create_optimizer(Net(0.0), config)
    rates = []
    plan = Schedule(optimizer, config, epochs=10, epoch_updates=6)
    for update in range(1, 61):
        rates.append(optimizer.param_groups[0]["lr"])
        plan.step(update)
    assert rates[0] == pytest.approx(config.warmup_lr)
    assert rates[6] == pytest.approx(config.lr, rel=0.1)
    assert rates[:7] == sorted(set(rates[:7]))


def test_weight_decay_leaves_out_vectors_and_what_the_model_names(tmp_path: Path) -> None:
    model = Net(0.0)
    groups = create_optimizer(model, toy_config(tmp_path).optim).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model.head.weight)}


def test_layer_decay_slows_the_lower_layers(tmp_path: Path) -> None:
    class Layered(Net):
        def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
            return {"stem": r"^stem", "blocks": r"^norm|^head"}

    config = toy_config(tmp_path, "optim.layer_decay=0.5", "optim.warmup_epochs=0").optim
    model = Layered(0.0)
    optimizer = create_optimizer(model, config)
    Schedule(optimizer, config, epochs=1, epoch_updates=1)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[id(model.stem.weight)] == pytest.approx(0.5 * rate[id(model.head.weight)])


def test_what_has_no_weight_decay_is_left_out_of_muon() -> None:
    model = create_model("vim_nano_patch4_32", num_classes=2, embed_dim=32, depth=1)
    optimizer = create_optimizer(model, OptimConfig(name="muon"))
    by_muon = {id(p) for group in optimizer.param_groups if not group.get("use_fallback") for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in by_muon}
    assert "layers.0.mixer.in_proj.weight" in names
    assert not {"layers.0.mixer.A_log", "layers.0.mixer.A_b_log"} & names
