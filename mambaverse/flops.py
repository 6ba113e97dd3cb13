"""What a forward pass costs, the scans included: torch's flop counter, told by every operator what it does.

A multiplication, an addition and an exponential are one FLOP each, so a multiply-add is two; what papers call the FLOPs
of an image model are multiply-adds, half of this. What is counted is the recurrence as it is written down
(`mambaverse.kernels.library.define_flops`), whatever a backend computes twice. Of torch's own operators the counter
knows matrix products, convolutions and attention; activations and sums are not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from mambaverse.models import create_model

NAMESPACE = "mambaverse"  # of our operators


@dataclass(frozen=True)
class Cost:
    """What a forward pass costs.

    Attributes:
        flops: All that is counted; a multiply-add is two.
        operators: Of it, what our operators cost, by name: "selective_scan".
        uncounted: Our operators that were called and have no formula.
    """

    flops: int
    operators: dict[str, int]
    uncounted: tuple[str, ...] = ()

    @property
    def multiply_adds(self) -> int:
        """Half of the FLOPs: what papers on image models give."""
        return self.flops // 2

    @property
    def own_share(self) -> float:
        """Share of the FLOPs that our operators have: scans, convolutions along a sequence, norms."""
        return sum(self.operators.values()) / max(self.flops, 1)


def count_flops(run: Callable[[], Any]) -> Cost:
    """Return what `run()` costs, forward and without gradients."""
    with torch.no_grad(), _OurOperators() as ours, FlopCounterMode(display=False) as counter:
        run()
    counts = {str(name): int(count) for name, count in counter.get_flop_counts()["Global"].items()}
    own = {name.split(".")[1]: count for name, count in counts.items() if name.startswith(f"{NAMESPACE}.")}
    return Cost(counter.get_total_flops(), own, tuple(sorted(ours.uncounted)))


def model_cost(name: str, **overrides: Any) -> tuple[int, Cost | None]:
    """Return the number of parameters of a registered model, and what one input of its own size costs.

    The model is made of fake tensors, without memory or arithmetic. The cost is None where the model does not say how
    large its inputs are (as timm's do, in `pretrained_cfg["input_size"]`): sequences have any length.
    """
    with FakeTensorMode():
        model = create_model(name, **overrides).eval()
        size = _input_size(model)
        cost = None if size is None else count_flops(lambda: model(torch.empty(1, *size)))
    return sum(parameter.numel() for parameter in model.parameters()), cost


def _input_size(model: nn.Module) -> tuple[int, ...] | None:
    cfg: Any = getattr(model, "pretrained_cfg", None)
    return None if cfg is None else tuple(cfg["input_size"])


class _OurOperators(TorchDispatchMode):
    """Notes which operators of this package are called that torch has no formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if func.namespace == NAMESPACE and packet not in flop_registry:
            self.uncounted.add(packet.__name__)
        return func(*args, **(kwargs or {}))
