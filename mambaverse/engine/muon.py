"""timm's Muon with the matrices of one shape orthogonalised together: the same steps in a fraction of the launches.

A model of equal blocks has few shapes of matrices. timm does about 40 small operations for each matrix, which on a GPU
take longer than what they compute; here each is done once a shape.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.optim import Muon
from timm.optim.muon import _COEFFICIENTS, get_lr_scale, resolve_ns_coefficients, zeropower_via_newtonschulz
from torch import Tensor

_ONE_BY_ONE = inspect.unwrap(Muon.step)  # without the hooks that torch puts around a step: ours has them already


class BatchedMuon(Muon):
    """Muon with batches of matrices; arguments and state are those of `timm.optim.Muon`.

    The first step of a parameter is timm's, which chooses there who takes AdamW's. So are all steps of AdamW, of
    AdaMuon, of convolutions orthogonalised position by position, and of distributed tensors.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # two in one
        """Take a step; returns what `closure`, if there is one, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken = [[p for p in group["params"] if self._is_batched(p, group)] for group in self.param_groups]
        with _without_gradients([p for parameters in taken for p in parameters]):
            _ONE_BY_ONE(self)
        for group, parameters in zip(self.param_groups, taken, strict=True):
            if parameters:
                self._update(group, parameters)
        return loss

    def _is_batched(self, p: Tensor, group: dict[str, Any]) -> bool:
        plain = group["algo"] == "muon" and (p.ndim == 2 or group["conv_mode"] == "flatten")
        return plain and type(p.grad) is Tensor and self.state.get(p, {}).get("use_muon", False)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Take the steps of `parameters`, all of one group."""
        gradients = [p.grad for p in parameters if p.grad is not None]  # all have one
        averages = [self.state[p]["momentum_buffer"] for p in parameters]
        rate, momentum = group["lr"], group["momentum"]  # a rate may be a tensor (): see graphed.py
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, averages, momentum) if group["nesterov"] else averages
        coefficients = resolve_ns_coefficients(group["ns_coefficients"], _COEFFICIENTS)
        alike: defaultdict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, update in zip(parameters, updates, strict=True):
            matrix = update.flatten(1)
            alike[matrix.shape, p.dtype, p.device].append((p, matrix))
        for pairs in alike.values():
            targets, matrices = zip(*pairs, strict=True)
            batch = zeropower_via_newtonschulz(
                torch.stack(matrices),
                group["ns_steps"],
                coefficients,
                eps=group["eps"],
                safety_factor=group["safety_factor"],
                scale_eps=group["scale_eps"],
            )
            scale = get_lr_scale(batch.shape, group["adjust_lr_fn"]) if group["adjust_lr_fn"] else 1.0
            # Tall ones come back transposed; laid out as their parameters are, all are added in one launch.
            steps = batch.to(targets[0].dtype, memory_format=torch.contiguous_format).mul_(-rate * scale)
            torch._foreach_add_(targets, [s.view_as(p) for s, p in zip(steps, targets, strict=True)])


@contextmanager
def _without_gradients(parameters: list[Tensor]) -> Iterator[None]:
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
