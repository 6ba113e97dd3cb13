"""What training with CUDA graphs needs beside the compiled model: the optimizer's step as a graph, gradients that stay.

torch.compile with CUDA graphs replays a model's kernels and leaves the optimizer's, which on a small model take longer
than all else: Muon launches about 28 for every matrix. An optimizer that is `capturable` reads its learning rates from
the GPU and keeps its counts there, so that its step can be captured as it is
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mambaverse.errors import UserError

WARM_UP = 3  # steps taken as they are: libraries and the optimizer's state are set up in them


class GraphedStep:
    """Callable () -> None: `optimizer.step()`, from the fourth one on as a replay.

    Gradients are copied to where the graph reads them, rates at every step. A step in which other parameters than in
    the captured one have gradients is taken without the graph, and nothing is captured before each that has one has its
    state: a graph would begin it anew at every replay.

    Args:
        optimizer: Capturable in all its groups, on one GPU.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._rates = [torch.empty((), device=self.parameters[0].device) for _ in optimizer.param_groups]
        optimizer.register_load_state_dict_post_hook(self._forget)
        self._forget()

    def _forget(self, *_: Any) -> None:
        """Capture anew: the state is in other places now."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0

    def __call__(self) -> None:
        """Take a step.

        Raises:
            UserError: the optimizer's step cannot be captured after all.
        """
        learnt = [p for p in self.parameters if p.grad is not None]
        if self._graph is None and self._steps >= WARM_UP and all(self.optimizer.state.get(p) for p in learnt):
            self._capture(learnt)
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self._graph is None or [id(p) for p in learnt] != self._learnt:
            self._steps += 1
            with self._rates_on_the_gpu():  # as in the graph: a number would be rounded otherwise than a tensor
                self.optimizer.step()
            return
        torch._foreach_copy_(self._gradients, [p.grad for p in learnt])
        self._graph.replay()

    @contextmanager
    def _rates_on_the_gpu(self) -> Iterator[None]:
        groups = self.optimizer.param_groups
        given = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
            yield
        finally:
            for group, lr in zip(groups, given, strict=True):
                group["lr"] = lr

    def _capture(self, learnt: list[Tensor]) -> None:
        gradients = [p.grad for p in learnt]
        self._learnt = [id(p) for p in learnt]
        self._gradients = [torch.empty_like(g) for g in gradients if g is not None]
        graph = torch.cuda.CUDAGraph()
        try:
            for p, place in zip(learnt, self._gradients, strict=True):
                p.grad = place
            # Other threads load batches meanwhile.
            with self._rates_on_the_gpu(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.optimizer.step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            name = type(self.optimizer).__name__
            raise UserError(
                f"optim: {name} cannot be captured as a CUDA graph ({error}); trainer.compile=default does without"
            ) from error
        finally:
            for p, gradient in zip(learnt, gradients, strict=True):
                p.grad = gradient
        self._graph = graph


def keep_gradients(parameters: Iterable[Tensor], kept: set[Tensor]) -> None:
    """Copy gradients from where a compiled model's graph leaves them, and its next backward pass overwrites them.

    Args:
        parameters: Those whose gradients are wanted.
        kept: Of these, the ones whose gradients were copied since they began; added to.
    """
    for p in parameters:
        if p.grad is not None and p not in kept:
            p.grad = p.grad.clone()
            kept.add(p)
