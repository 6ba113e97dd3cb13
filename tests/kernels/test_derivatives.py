"""Promises of the operators' derivatives: of those that they do not have, they say so, and are not 0 in silence."""

import importlib
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

OPERATORS = [
    "causal_conv1d", "depthwise_conv2d", "lti_conv", "nc_ssd", "norm", "selective_scan", "ssd", "summed_angles",
    "turned_qk",
]  # fmt: skip


def leaves_and_outputs(op: str) -> tuple[list[torch.Tensor], Any, dict[str, Any]]:
    cases = importlib.import_module(f"mambaverse.kernels.{op}.cases")
    inputs = cases.make_inputs(cases.TESTED[0])
    floats = [v for v in inputs.values() if torch.is_tensor(v) and v.is_floating_point()]
    return [leaf.requires_grad_() for leaf in floats], cases.run, inputs


def first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("op", OPERATORS)
def test_a_second_derivative_is_refused_and_the_first_of_a_graph_is_right(op: str) -> None:
    leaves, run, inputs = leaves_and_outputs(op)
    plain = torch.autograd.grad(first(run(inputs)).square().sum(), leaves, allow_unused=True)
    graph = torch.autograd.grad(first(run(inputs)).square().sum(), leaves, allow_unused=True, create_graph=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, graph, strict=True))
    total = torch.stack([g.square().sum() for g in graph if g is not None]).sum()
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(total, leaves, allow_unused=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's own, at the first dual tensor
@pytest.mark.parametrize("op", OPERATORS)
def test_a_forward_mode_derivative_is_refused(op: str) -> None:
    _, run, inputs = leaves_and_outputs(op)
    name = next(n for n, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point())
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs[name].detach(), torch.ones_like(inputs[name]))
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            run({**inputs, name: dual})
        run({k: v.detach() if torch.is_tensor(v) else v for k, v in inputs.items()})  # what has no tangent is as ever


@pytest.mark.parametrize("op", OPERATORS)
def test_what_torch_func_cannot_differentiate_is_named(op: str) -> None:
    _, run, inputs = leaves_and_outputs(op)
    name = next(n for n, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point())
    with pytest.raises(NotImplementedError, match=r"has no torch\.func\.grad"):
        torch.func.grad(lambda x: first(run({**inputs, name: x})).sum())(inputs[name].detach())


@pytest.mark.parametrize("op", [*OPERATORS, "cross_scan", "trapezoid_weights"])
def test_outputs_may_be_changed_in_place(op: str) -> None:
    leaves, run, inputs = leaves_and_outputs(op)
    plain = torch.autograd.grad((first(run(inputs)) * 2).square().sum(), leaves, allow_unused=True)
    y = first(run(inputs)).mul_(2)  # of a view that came out of an autograd.Function, torch refuses it
    changed = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, changed, strict=True))
