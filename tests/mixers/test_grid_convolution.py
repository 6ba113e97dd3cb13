"""Promises of the mixers' convolution of a grid: the kernel runs where it does what the layer does, else the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.kernels.testing import assert_close
from mambaverse.mixers import _portable, create_mixer
from mambaverse.mixers._ops import silu_conv2d

D = 4


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * self._conv_forward(x, self.weight, self.bias)


def conv(width: int | tuple[int, int] = 3, kind: type[nn.Conv2d] = nn.Conv2d, **arguments: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return kind(D, D, width, **{"groups": D, "padding": "same", **arguments})


def with_a_forward_of_its_own() -> nn.Conv2d:
    layer = conv()
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)  # type: ignore[assignment, method-assign]
    return layer


PLAIN: dict[str, Callable[[], nn.Conv2d]] = {
    "3 x 3": lambda: conv(padding=1),
    "1 x 5": lambda: conv((1, 5)),
    "no bias": lambda: conv(bias=False),
}
OTHERS: dict[str, Callable[[], nn.Conv2d]] = {
    "reflected": lambda: conv(padding=1, padding_mode="reflect"),
    "spread out": lambda: conv(dilation=2),
    "of all channels": lambda: conv(groups=1),
    "of an even side": lambda: conv(4),
    "a subclass": lambda: conv(kind=Doubled),
    "a forward of its own": with_a_forward_of_its_own,
}


def run(build: Callable[[], nn.Conv2d], monkeypatch: pytest.MonkeyPatch) -> int:
    """Check the output against the layer's; return how often the kernel ran."""
    calls: list[Any] = []
    kernel = _portable.depthwise_conv2d

    def spy(*arguments: Any, **options: Any) -> Tensor:
        calls.append(arguments)
        return kernel(*arguments, **options)

    monkeypatch.setattr(_portable, "depthwise_conv2d", spy)
    layer, x = build(), torch.randn(2, 5, 6, D)
    assert_close("y", silu_conv2d(layer, x), F.silu(layer(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))
    return len(calls)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", PLAIN)
def test_the_kernel_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(PLAIN[name], monkeypatch) == 1


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", OTHERS)
def test_the_layer_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(OTHERS[name], monkeypatch) == 0


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("name", "arguments"), [("ss2d", {}), ("ncssd", {"conv": "grid"})])
def test_an_exported_program_keeps_the_operator(name: str, arguments: dict[str, Any], strict: bool) -> None:
    mixer, x = create_mixer(name, 16, d_state=4, **arguments), torch.randn(1, 6, 16)
    program = torch.export.export(mixer, (), {"x": x, "spatial_shape": (2, 3)}, strict=strict)
    assert torch.ops.mambaverse.depthwise_conv2d.default in {node.target for node in program.graph.nodes}


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@pytest.mark.parametrize("build", [conv, lambda: conv(kind=Doubled)])
def test_a_scripted_mixer_calls_the_layer(build: Callable[[], nn.Conv2d]) -> None:
    mixer: Any = create_mixer("ss2d", 2, d_state=4, expand=D / 2)
    mixer.conv2d = build()
    x = torch.randn(1, 6, 2)
    scripted: Any = torch.jit.script(mixer)
    assert_close("y", scripted(x=x, spatial_shape=(2, 3)), mixer(x=x, spatial_shape=(2, 3)))
