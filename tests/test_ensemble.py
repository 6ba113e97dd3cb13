"""Promises of ensembles: each member learns as it would alone, and their mean probability is what counts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambaverse.config import ConfigError, compose
from mambaverse.engine.folder import make_task
from mambaverse.ensemble import Ensemble, joined, members_of, shrunk


def test_members_get_the_gradients_that_each_would_get_alone() -> None:
    torch.manual_seed(0)
    members = [nn.Linear(5, 3) for _ in range(3)]
    x, targets = torch.randn(8, 5), torch.randint(3, (8,))
    expected = [torch.autograd.grad(F.cross_entropy(member(x), targets), member.weight)[0] for member in members]
    scores = Ensemble(members)(x)
    assert scores.shape == (8, 3, 3)
    F.cross_entropy(scores.flatten(0, 1), targets.repeat_interleave(3)).backward()
    for member, gradient in zip(members, expected, strict=True):
        torch.testing.assert_close(member.weight.grad, gradient)


def test_the_probabilities_are_the_members_mean() -> None:
    members = [nn.Linear(5, 3) for _ in range(2)]
    model, x = Ensemble(members).eval(), torch.randn(8, 5)
    expected = (members[0](x).softmax(-1) + members[1](x).softmax(-1)) / 2
    torch.testing.assert_close(model(x).softmax(-1), expected)
    torch.testing.assert_close(model(x).exp(), expected)
    far = joined([torch.tensor([[0.0, -1e4]]), torch.tensor([[0.0, -1e4]])], training=False)
    assert far.isfinite().all()


def test_the_gradient_of_a_shrunk_weight_is_that_of_its_penalty() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x, decay = torch.randn(6, 4, dtype=torch.float64), 0.3
    loss = (x @ weight).square().mean() + decay / 2 * weight.square().sum()
    (expected,) = torch.autograd.grad(loss, weight)
    (gradient,) = torch.autograd.grad((x @ shrunk(weight, decay)).square().mean(), weight)
    torch.testing.assert_close(gradient, expected)


def test_weight_decay_leaves_out_what_it_leaves_out_in_a_member() -> None:
    class Member(nn.Linear):
        def no_weight_decay(self) -> set[str]:
            return {"weight"}

    assert Ensemble([Member(2, 2), nn.Linear(2, 2)]).no_weight_decay() == {"members.0.weight"}


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("vision/digits", []),
        ("dna/rrna16s", []),
        ("audio/mandarin_tones", ["model.args.wide=4"]),
    ],
)
def test_members_of_any_domain_learn_together(config: str, overrides: list[str]) -> None:
    task = make_task(compose(config, ["model.members=2", *overrides]))
    task.setup()
    model = task.build_model()
    assert len(members_of(model)) == 2
    samples = [task.train_set.sample(i, None) for i in range(4)]
    batch = task.collate(samples, None)
    step: dict[str, Any] = task.step(model.train(), batch)
    step["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    result = task.step(model.eval(), batch)
    assert result["output"].shape == (4, len(task.classes))


def test_members_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"model.members: expected 1 or more, got 0"):
        compose("vision/digits", ["model.members=0"])
