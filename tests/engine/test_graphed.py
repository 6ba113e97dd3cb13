"""The captured step's bookkeeping, with a tape in the place of a CUDA graph; test_gpu.py has the graph itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mambaverse.engine.graphed import WARM_UP, GraphedStep, keep_gradients
from mambaverse.errors import UserError


class Tape:
    """What a step did while it was captured, to be done again."""

    capturing = False
    replays = 0
    last: Callable[[], None]

    def replay(self) -> None:
        Tape.replays += 1
        Tape.last()


class Descent(torch.optim.Optimizer):
    """Gradient descent that, captured, keeps the places of its gradients and rates, as kernels do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, no loss
        work = [(p, p.grad, g["lr"]) for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p, *_ in work:
            if Tape.capturing:
                assert self.state[p], "a state that begins in a graph begins anew at every replay"
            self.state[p]["step"] = torch.zeros(())

        def run() -> None:
            for p, gradient, lr in work:
                p.data.sub_(lr * gradient)

        if Tape.capturing:
            Tape.last = run
        else:
            run()


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Tape]]:
    @contextmanager
    def graph(to: Tape, **options: Any) -> Iterator[None]:
        Tape.capturing = True
        yield
        Tape.capturing = False

    Tape.replays = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    yield Tape


def _train(captured: bool, missing: tuple[int, ...] = (), loaded_at: int = -1) -> list[torch.Tensor]:
    """Return the weights after 12 steps, in some of which the bias has no gradient."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    groups: list[dict[str, Any]] = [{"params": [net.weight]}, {"params": [net.bias]}]
    optimizer = Descent(groups, {"lr": 0.0})
    step = GraphedStep(optimizer) if captured else optimizer.step
    for number in range(12):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.1 / (1 + number), 0.01 * number
        net(torch.randn(4, 3)).square().mean().backward()
        if number in missing:
            net.bias.grad = None
        step()
        assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)  # as the schedule left them
        optimizer.zero_grad()
        if number == loaded_at:
            optimizer.load_state_dict(optimizer.state_dict())
    return [net.weight.detach(), net.bias.detach()]


@pytest.mark.parametrize(
    ("missing", "loaded_at", "replays"),
    [
        ((), -1, 12 - WARM_UP),
        ((5, 6), -1, 12 - WARM_UP - 2),
        ((0, 1, 2), -1, 12 - WARM_UP - 1),
        ((), 5, 12 - 2 * WARM_UP),
    ],
    ids=["plain", "a gradient is missing", "a gradient comes late", "a state is loaded"],
)
def test_replays_take_the_steps_of_the_optimizer(
    tape: type[Tape], missing: tuple[int, ...], loaded_at: int, replays: int
) -> None:
    for ours, theirs in zip(_train(True, missing, loaded_at), _train(False, missing, loaded_at), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert tape.replays == replays


def test_a_failed_capture_leaves_gradients_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def graph(to: Any, **options: Any) -> Iterator[None]:
        raise RuntimeError("no graph today")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    net = torch.nn.Linear(2, 1)
    optimizer = Descent(net.parameters(), {"lr": 0.5})
    step = GraphedStep(optimizer)
    for _ in range(WARM_UP):
        net(torch.ones(1, 2)).sum().backward()
        step()
    gradient = net.weight.grad
    with pytest.raises(UserError, match=r"Descent cannot be captured.*no graph today.*trainer\.compile=default"):
        step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert net.weight.grad is gradient


def test_kept_gradients_are_in_places_of_their_own() -> None:
    net = torch.nn.Linear(2, 1)
    kept: set[torch.Tensor] = set()
    net.weight.grad = pool = torch.ones(1, 2)
    keep_gradients(net.parameters(), kept)
    pool.fill_(7)  # what the next backward pass of a graph does
    mine, net.bias.grad = net.weight.grad, torch.ones(1)  # which gives the bias its first
    keep_gradients(net.parameters(), kept)
    assert net.weight.grad is mine
    assert mine.tolist() == [[1, 1]]
    assert kept == {net.weight, net.bias}
