"""Batched Muon beside timm's own, step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.optim import Muon
from torch import nn

from mambaverse.config import OptimConfig
from mambaverse.engine.muon import BatchedMuon
from mambaverse.engine.optim import create_optimizer


def make_model() -> nn.Sequential:
    """Return a model with shapes that repeat, lone ones, convolutions wide and tall, vectors, a matrix too small."""
    torch.manual_seed(0)
    blocks = [nn.Linear(24, 24) for _ in range(3)]
    return nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.Conv2d(3, 40, 3), *blocks, nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 2)
    )


def draw_gradients(*models: nn.Module, skip: str = "") -> None:
    for parameters in zip(*(model.named_parameters() for model in models), strict=True):
        gradient = torch.randn_like(parameters[0][1])
        for name, p in parameters:
            p.grad = None if skip and name.startswith(skip) else gradient.clone()


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    # Products are in bfloat16; one of a batch may be added up in another order.
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "scale_eps": True, "ns_coefficients": "polar_express", "ns_steps": 4},
        {"nesterov": True, "conv_mode": "batched", "adjust_lr_fn": "original"},
        {"adjust_lr_fn": None, "lr": 0.002},
        {"algo": "adamuon", "nesterov": True},
    ],
)
def test_it_takes_timms_steps(options: dict[str, Any]) -> None:
    ours = make_model()
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.01, **options}
    batched, single = BatchedMuon(ours.parameters(), **options), Muon(theirs.parameters(), **options)
    for step in range(4):
        draw_gradients(ours, theirs, skip="2." if step == 1 else "")  # one that has none in a step
        batched.step()
        single.step()
        assert_equal(ours, theirs)
    assert all(p.grad is not None for p in ours.parameters())


def test_a_rate_may_be_a_tensor() -> None:
    ours = make_model()
    theirs = copy.deepcopy(ours)
    batched, single = (BatchedMuon(m.parameters(), lr=0.01, weight_decay=0.1) for m in (ours, theirs))
    batched.param_groups[0]["lr"] = torch.tensor(0.01)
    for _ in range(3):
        draw_gradients(ours, theirs)
        batched.step()
        single.step()
        assert_equal(ours, theirs)


def test_states_are_exchanged_with_timms() -> None:
    ours = make_model()
    theirs = copy.deepcopy(ours)
    batched, single = BatchedMuon(ours.parameters(), nesterov=True), Muon(theirs.parameters(), nesterov=True)
    for _ in range(2):
        draw_gradients(theirs)
        single.step()
    ours.load_state_dict(theirs.state_dict())
    batched.load_state_dict(copy.deepcopy(single.state_dict()))  # which would share the tensors
    draw_gradients(ours, theirs)
    batched.step()
    single.step()
    assert_equal(ours, theirs)
    assert batched.state_dict()["state"].keys() == single.state_dict()["state"].keys()


def test_hooks_and_closures_are_called_once() -> None:
    Muon([nn.Parameter(torch.zeros(8, 8))])  # torch then puts hooks around timm's step as well
    model = make_model()
    optimizer = BatchedMuon(model.parameters())
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    draw_gradients(model)
    assert optimizer.step(lambda: called.append("closure") or 3.0) == 3.0  # type: ignore[func-returns-value]
    assert called == ["before", "closure", "after"]


@pytest.mark.parametrize(("name", "nesterov"), [("muon", False), ("nmuon", True)])
def test_configs_get_it_by_timms_names(name: str, nesterov: bool) -> None:
    optimizer = create_optimizer(make_model(), OptimConfig(name=name, args={"ns_steps": 3}))
    assert isinstance(optimizer, BatchedMuon)
    assert optimizer.defaults["nesterov"] is nesterov
    assert optimizer.param_groups[0]["ns_steps"] == 3
