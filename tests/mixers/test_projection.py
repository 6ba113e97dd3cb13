"""A layer whose output is cut has the outputs and gradients of torch's own, and is left alone where it is not plain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambaverse.kernels.testing import assert_close
from mambaverse.mixers import _projection
from mambaverse.mixers._projection import project

SIZES = [40, 3, 2, 40, 1]  # two wide parts, narrow neighbours, a narrow one alone


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor], given: list[int]) -> tuple[Tensor, ...]:
    seeds = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o) for i, o in enumerate(outputs)]
    return torch.autograd.grad([outputs[i] for i in given], leaves, [seeds[i] for i in given])


@pytest.mark.parametrize("given", [[0, 1, 2, 3, 4], [3], [1, 4]], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_those_of_a_split(dtype: torch.dtype, bias: bool, given: list[int]) -> None:
    layer, x = nn.Linear(16, sum(SIZES), bias, dtype=dtype), torch.randn(2, 7, 16, dtype=dtype, requires_grad=True)
    exact, wide_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()  # of what is rounded already
    expected = torch.split(exact(wide_x), SIZES, dim=-1)
    wide = gradients(expected, [wide_x, *exact.parameters()], given)
    actual = project(layer, x, SIZES)
    assert all("SplitLinear" in type(part.grad_fn).__name__ for part in actual)
    for name, a, e in zip("zxBCd", actual, expected, strict=True):
        assert_close(name, a, e)
    for a, e in zip(gradients(actual, [x, *layer.parameters()], given), wide, strict=True):
        assert_close("gradient", a, e)


@pytest.mark.parametrize("recorded", [True, False])
def test_rows_that_are_filled_up_change_nothing(monkeypatch: pytest.MonkeyPatch, recorded: bool) -> None:
    """As on a GPU, where rows of 16-bit numbers are."""
    monkeypatch.setattr(_projection, "_missing", lambda x, columns: -columns % 8)
    layer, x = nn.Linear(16, sum(SIZES)), torch.randn(2, 7, 16, requires_grad=True)
    with torch.set_grad_enabled(recorded):
        if not recorded:  # as a GPU does without a gradient
            parts = _projection._split_linear(x, layer.weight, layer.bias, tuple(SIZES))
        else:
            parts = project(layer, x, SIZES)
        expected = torch.split(layer(x), SIZES, dim=-1)
    assert [part.shape[-1] for part in parts] == SIZES and parts[0].stride(-2) == 88
    for a, e in zip(parts, expected, strict=True):
        assert_close("y", a, e)
    if recorded:
        leaves, every = [x, *layer.parameters()], list(range(len(SIZES)))
        for a, e in zip(gradients(parts, leaves, every), gradients(expected, leaves, every), strict=True):
            assert_close("gradient", a, e)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bias", [True, False])
def test_on_a_gpu_rows_are_filled_up(bias: bool) -> None:
    layer = nn.Linear(16, sum(SIZES), bias, device="cuda").bfloat16().float()  # what autocast rounds is round
    x = torch.randn(2, 7, 16, device="cuda").bfloat16().float().requires_grad_()
    every, leaves = list(range(len(SIZES))), [x, *layer.parameters()]
    wide = torch.split(nn.functional.linear(x.double(), *(p.double() for p in layer.parameters())), SIZES, dim=-1)
    with torch.autocast("cuda", torch.bfloat16):
        parts = project(layer, x, SIZES)
        with torch.no_grad():
            same = project(layer, x, SIZES)
    assert parts[0].stride(-2) == same[0].stride(-2) == 88
    for a, b, e in zip(parts, same, wide, strict=True):
        assert torch.equal(a, b)
        assert_close("y", a, e)
    for a, e in zip(gradients(parts, leaves, every), gradients(wide, leaves, every), strict=True):
        assert_close("gradient", a, e, torch.bfloat16)


def test_what_needs_no_gradient_gets_none() -> None:
    layer, x = nn.Linear(16, sum(SIZES)), torch.randn(7, 16)
    layer.weight.requires_grad_(False)
    project(layer, x, SIZES)[0].sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None


def test_autocast_casts_and_its_gradients_have_the_parameters_dtype() -> None:
    layer, x = nn.Linear(16, sum(SIZES)), torch.randn(2, 7, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = project(layer, x, SIZES), torch.split(layer(x), SIZES, dim=-1)
    assert all(a.dtype == torch.bfloat16 and torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    every = list(range(len(SIZES)))
    leaves = [x, *layer.parameters()]
    for a, e in zip(gradients(actual, leaves, every), gradients(expected, leaves, every), strict=True):
        assert a.dtype == torch.float32
        assert_close("gradient", a, e.double(), torch.bfloat16)


class Adapter(nn.Linear):
    """As an adapter of low rank is put into a model."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def _hooked() -> nn.Linear:
    layer = nn.Linear(16, sum(SIZES))
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


@pytest.mark.parametrize("layer", [Adapter(16, sum(SIZES)), _hooked()], ids=["a class of its own", "a hook"])
def test_a_layer_that_is_more_than_a_product_is_called(layer: nn.Linear) -> None:
    x = torch.randn(7, 16)
    plain = x @ layer.weight.T + layer.bias
    assert_close("y", torch.cat(project(layer, x, SIZES), -1), plain.double() + 1)


def test_no_copy_is_made_of_wide_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(16, sum(SIZES), bias=False), torch.randn(2, 7, 16, requires_grad=True)
    parts = project(layer, x, SIZES)
    joined: list[list[int]] = []
    cat = torch.cat

    def spy(tensors: Any, dim: int = 0) -> Tensor:
        if dim == 1:
            joined.append([tensor.shape[1] for tensor in tensors])
        return cat(tensors, dim)

    monkeypatch.setattr(_projection.torch, "cat", spy)
    torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])
    assert joined == [[3, 2]]


def test_a_second_derivative_is_refused_beside_another_way_to_the_inputs() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 24), torch.randn(2, 5, 8, requires_grad=True)

    def gradient(graph: bool) -> Tensor:
        y = x + sum(part.square() for part in project(layer, x, [8, 8, 8]))
        return torch.autograd.grad(y.square().sum(), x, create_graph=graph)[0]

    graph = gradient(True)
    assert torch.equal(graph, gradient(False))
    for wanted in (x, layer.weight):
        with pytest.raises(NotImplementedError, match="input projection has no second derivative"):
            torch.autograd.grad(graph.square().sum(), wanted, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):  # which makes a copy of the weight
        y = torch.cat(project(layer, x, [8, 8, 8]), -1)
    (graph,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="input projection has no second derivative"):
        torch.autograd.grad(graph.square().sum() + layer.weight.sum(), layer.weight)
