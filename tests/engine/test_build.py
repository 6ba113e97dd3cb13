"""What a config does to a model beside its arguments: activations that are computed twice rather than kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mambaverse
from mambaverse.config import ConfigError, ModelConfig, RunConfig, TrainerConfig
from mambaverse.engine.build import set_checkpointing
from mambaverse.ensemble import Ensemble
from mambaverse.errors import UserError

TINY = {"vim": {"d_state": 2}}


def run(chunk: int | None = None, *, on: bool = True) -> RunConfig:
    trainer = TrainerConfig(grad_checkpointing=on, checkpoint_chunk=chunk)
    return RunConfig(model=ModelConfig(name="of_the_test"), trainer=trainer)


def vision() -> Any:
    return mambaverse.create_model("vim_nano_patch4_32", depth=2, embed_dim=32, mixer_args=TINY)


def test_any_model_that_can_is_switched_and_its_gradients_stay() -> None:
    torch.manual_seed(0)
    model = vision()
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for config in (run(on=False), run()):
        set_checkpointing(model, config)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert model.grad_checkpointing
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
    both = Ensemble([mambaverse.create_model("dna_mamba_d64_n2", dim=32), mambaverse.create_model("dna_mamba_d64_n2")])
    set_checkpointing(both, run(16))
    assert [member.chunk_size for member in both.members] == [16, 16]


def test_a_model_that_cannot_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.grad_checkpointing: the model of_the_test keeps its activations"):
        set_checkpointing(nn.Linear(2, 2), run())
    with pytest.raises(ConfigError, match=r"trainer\.checkpoint_chunk: the model of_the_test is not trained in chunks"):
        set_checkpointing(vision(), run(8))
    both_ways = mambaverse.create_model("caduceus_ph_d32_n2")
    with pytest.raises(UserError, match=r"trainer\.checkpoint_chunk: the model of_the_test: .* needs a causal model"):
        set_checkpointing(both_ways, run(8))
    set_checkpointing(nn.Linear(2, 2), run(on=False))
