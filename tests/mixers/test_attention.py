from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambaverse.mixers import create_mixer

DIM, TOKENS = 64, 64  # cuDNN's backward pass is wrong at 64 tokens, where half a tile of keys is empty


def _gradients(mixer: nn.Module, run: Callable[..., Any], x: Tensor) -> list[Tensor]:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        y = run(x=x)
    y.to(x.dtype).square().sum().backward()
    return [p.grad.double().cpu() for p in mixer.parameters() if p.grad is not None]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_where_every_score_is_very_negative(compiled: bool) -> None:
    torch.manual_seed(0)
    exact = create_mixer("attention", DIM, headdim=32, causal=False).double()
    with torch.no_grad():  # every query against every key: q · k / √P is near -34
        bias = exact.get_parameter("qkv.bias")
        bias[:DIM], bias[DIM : 2 * DIM] = 2.5, -2.5
    x = torch.randn(8, TOKENS, DIM, dtype=torch.float64)
    mixer = copy.deepcopy(exact).float().cuda()
    expected = _gradients(exact, exact, x)
    run = torch.compile(mixer) if compiled else mixer
    for got, wanted in zip(_gradients(mixer, run, x.float().cuda()), expected, strict=True):
        assert (got - wanted).norm() < 0.05 * wanted.norm()
