"""Promises of the operators' checks: what is no tensor is named, in one line, whichever argument it is."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from mambaverse.kernels.causal_conv1d import causal_conv1d_update
from mambaverse.kernels.checks import unshared
from mambaverse.kernels.lti_conv import lti_conv_update
from mambaverse.kernels.selective_scan import bidirectional_selective_scan, selective_scan_update
from mambaverse.kernels.selective_scan.cases import TESTED, make_inputs
from mambaverse.kernels.ssd import bidirectional_ssd, ssd_update
from mambaverse.kernels.ssd import cases as ssd_cases

OPERATORS = [
    "causal_conv1d", "cross_scan", "depthwise_conv2d", "lti_conv", "nc_ssd", "norm", "rotary", "selective_scan", "ssd",
    "summed_angles", "trapezoid_weights", "turned_qk",
]  # fmt: skip


def refused(run: Any, inputs: dict[str, Any], name: str) -> None:
    for wrong in (1.0, [1, 2], "x"):
        with pytest.raises(ValueError, match=rf"^\w+: {name} is .*; expected a tensor"):
            run({**inputs, name: wrong})


@pytest.mark.parametrize("op", OPERATORS)
def test_what_is_no_tensor_is_named(op: str) -> None:
    cases = importlib.import_module(f"mambaverse.kernels.{op}.cases")
    inputs = cases.make_inputs(cases.TESTED[0])
    for name in (name for name, value in inputs.items() if torch.is_tensor(value)):
        refused(cases.run, inputs, name)


def test_what_is_no_tensor_nor_a_pair_of_them_is_named() -> None:
    inputs: dict[str, Any] = make_inputs(TESTED[0])
    for name in inputs:
        refused(lambda given: bidirectional_selective_scan(**given), inputs, name)
    inputs = ssd_cases.make_inputs(ssd_cases.TESTED[0])
    for name in inputs:
        refused(lambda given: bidirectional_ssd(**given), inputs, name)
    arguments: Any = {**inputs, "D": (1, 2)}
    with pytest.raises(ValueError, match=r"D is \(1, 2\); expected a tensor, or a pair \(forward, backward\)"):
        bidirectional_ssd(**arguments)


def ssd_step(state: Tensor, x: Tensor, others: Tensor) -> Tensor:
    return ssd_update(state, x, others[..., 0], -others[0, 0], others, others, others[0, 0], z=x)


def scan_step(state: Tensor, x: Tensor, others: Tensor) -> Tensor:
    return selective_scan_update(state[0], x[0], x[0], -others[0], others[0], others[0], others[0, :, 0], z=x[0])


def conv_step(state: Tensor, x: Tensor, others: Tensor) -> Tensor:
    return causal_conv1d_update(x[0], state[0].mT, torch.cat([others[0], others[0, :, :1]], 1), others[0, :, 0])


def lti_step(state: Tensor, x: Tensor, others: Tensor) -> Tensor:
    return lti_conv_update(state[0], x[0], -others[0], others[0], others[0], others[0, :, 0], others[0, :, 1])


@pytest.mark.parametrize("step", [ssd_step, scan_step, conv_step, lti_step])
def test_inputs_in_the_state_are_read_before_it_changes(step: Any) -> None:
    size = 4  # of the batch of a scan, the channels and the states alike: any slice of the state is any input
    state = 0.1 + torch.rand(1, size, size, size)
    apart = state.clone()
    views = state[..., 0], state[:, :, 0]
    y = step(apart, *(view.clone() for view in views))
    assert torch.equal(step(state, *views), y) and torch.equal(state, apart)


def test_only_inputs_in_the_state_are_copied() -> None:
    state, apart = torch.rand(4, 4), torch.rand(4)
    inside, absent, outside = unshared(state, state[0], None, apart)
    assert torch.equal(inside, state[0]) and inside.data_ptr() != state.data_ptr()
    assert absent is None and outside is apart
