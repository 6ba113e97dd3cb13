"""The optimizer's groups and the schedule's rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mambaverse.config import ConfigError, OptimConfig
from mambaverse.engine.optim import ALWAYS, SCHEDULES, Schedule, create_optimizer
from mambaverse.engine.run import train
from mambaverse.errors import UserError
from mambaverse.models import create_model
from tests.engine.toy import Net, toy_config


def test_a_schedule_whose_rates_mean_nothing_is_refused(tmp_path: Path, quiet: Console) -> None:
    options = ("optim.schedule=step", "optim.schedule_args={decay_epochs: 1, decay_rate: -1}", "trainer.epochs=3")
    with pytest.raises(UserError, match=r"^optim: step has a learning rate of -.* steps; see optim\.schedule_args"):
        train(toy_config(tmp_path, *options), console=quiet)


def rates(schedule: str, **arguments: Any) -> list[float]:
    """Return the rates of 10 epochs of 6 steps, the first one and a half of them warm-up."""
    config = OptimConfig(schedule=schedule, lr=0.5, warmup_epochs=1.5, schedule_args=arguments)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    plan, found = Schedule(optimizer, config, epochs=10, epoch_updates=6), []
    for update in range(60):
        plan.step(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedules_argument_changes_its_rates_or_is_refused(schedule: str) -> None:
    given = {
        "cooldown_epochs": 2, "cycle_decay": 0.5, "cycle_limit": 3, "cycle_mul": 2.0, "decay_epochs": 3,
        "decay_fn": "cosine", "decay_milestones": [2, 5], "decay_rate": 0.7, "k_decay": 2.0, "min_lr": 0.01,
        "noise": [0.2, 0.9], "noise_pct": 0.3, "noise_seed": 7, "noise_std": 0.5, "patience_epochs": 3,
        "plateau_mode": "min", "stable_timescale": 2.5, "warmup_lr": 0.02, "warmup_prefix": True,
    }  # fmt: skip
    steps: dict[str, dict[str, Any]] = {"step": {"decay_epochs": 4}, "multistep": {"decay_milestones": [3, 6]}}
    for name, value in given.items():
        beside: dict[str, Any] = {"noise": [0.2, 0.9]} if name.startswith("noise_") else {}
        if name == "decay_rate":
            beside = steps.get(schedule, {})
        if name in (*SCHEDULES[schedule], *ALWAYS):
            assert rates(schedule, **{**beside, name: value}) != rates(schedule, **beside), name
        else:
            with pytest.raises(
                UserError, match=rf"optim\.schedule_args\.{name}=.* changes no rate of it(, did|; known)"
            ):
                rates(schedule, **{name: value})


@pytest.mark.parametrize(("epochs", "warned"), [(1, True), (2, False), (3, False)])
def test_a_warm_up_longer_than_training_is_warned_of(
    epochs: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = OptimConfig(warmup_epochs=2)
    Schedule(create_optimizer(Net(0.0), config), config, epochs, epoch_updates=6)
    said = capsys.readouterr().err
    assert said.count(f"warning: optim.warmup_epochs=2: longer than trainer.epochs={epochs}, so that the") == warned


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("muon", {"ns_steps": "a"}, "'<=' not supported"),
        ("muon", {"ns_coefficients": "quintc"}, "Unknown coefficients preset 'quintc'"),
        ("adopt", {"clip_exp": "a"}, "unsupported operand"),
        ("adamw", {"amsgrad": "yes"}, "invalid combination of arguments"),
    ],
)
def test_arguments_that_only_a_step_reads_are_refused_before_training(
    name: str, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=f"^optim: {name} refused its arguments: .*{reason}.*; optim.args={{") as error:
        create_optimizer(Net(0.0), OptimConfig(name=name, args=arguments))
    assert "\n" not in str(error.value)


def test_trying_arguments_draws_nothing_and_leaves_the_model_as_it_is() -> None:
    net, state = Net(0.0), torch.get_rng_state()
    before = [p.clone() for p in net.parameters()]
    create_optimizer(net, OptimConfig(args={"betas": [0.9, 0.95]}))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(net.parameters(), before, strict=True))


def test_a_layer_decay_above_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.layer_decay: expected at most 1, got 1\.5"):
        OptimConfig(layer_decay=1.5)


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
