"""What training with CUDA graphs needs beside the compiled model: the optimizer's step as a graph, gradients that stay.

torch.compile with CUDA graphs replays a model's kernels and leaves the optimizer's, which on a small model take longer
than all else: Muon launches about 28 for every matrix. An optimizer that is `capturable` reads its learning rates from
the GPU and keeps its counts there, so that its step can be captured as it is
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # steps taken as they are: libraries and the optimizer's state are set up in them


class GraphedStep:
    """Callable () -> None: `optimizer.step()`, from the fourth one on as a replay.

    Gradients are copied to where the graph reads them, rates at every step; a step in which other parameters than in
    the captured one have gradients is taken without the graph.

    Args:
        optimizer: Capturable in all its groups, on one GPU.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_load_state_dict_post_hook(self._forget)
        self._forget()

    def _forget(self, *_: Any) -> None:
        """Capture anew: the state is in other places now."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0

    def __call__(self) -> None:
        """Take a step."""
        learnt = [p for p in self.parameters if p.grad is not None]
        if self._graph is None and self._steps >= WARM_UP:
            self._capture(learnt)
        if self._graph is None or len(learnt) != len(self._learnt) or any(map(_differ, learnt, self._learnt)):
            self._steps += 1
            self.optimizer.step()
            return
        torch._foreach_copy_(self._gradients, [p.grad for p in learnt])
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._graph.replay()

    def _capture(self, learnt: list[Tensor]) -> None:
        groups = self.optimizer.param_groups
        given, gradients = [group["lr"] for group in groups], [p.grad for p in learnt]
        self._learnt = learnt
        self._gradients = [torch.empty_like(g) for g in gradients if g is not None]
        self._rates = [torch.empty((), device=learnt[0].device) for _ in groups]
        graph = torch.cuda.CUDAGraph()
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
            for p, place in zip(learnt, self._gradients, strict=True):
                p.grad = place
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads load batches meanwhile
                self.optimizer.step()
        finally:
            for group, lr in zip(groups, given, strict=True):
                group["lr"] = lr
            for p, gradient in zip(learnt, gradients, strict=True):
                p.grad = gradient
        self._graph = graph


def keep_gradients(parameters: Iterable[Tensor]) -> None:
    """Copy gradients from where a compiled model's graph leaves them, and its next backward pass overwrites them."""
    for p in parameters:
        if p.grad is not None:
            p.grad = p.grad.clone()


def _differ(a: Tensor, b: Tensor) -> bool:
    return a is not b
