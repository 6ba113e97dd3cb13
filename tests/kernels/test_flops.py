"""Promises of the flop formulas: torch's counter knows every operator, forward and backward, without running it."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import mambaverse
from mambaverse.kernels.selective_scan import selective_scan

OPERATORS = [
    "causal_conv1d", "depthwise_conv2d", "lti_conv", "nc_ssd", "norm", "selective_scan", "ssd", "summed_angles",
    "trapezoid_weights", "turned_qk",
]  # fmt: skip


@pytest.mark.parametrize("op", OPERATORS)
def test_forward_and_backward_are_counted(op: str) -> None:
    cases = importlib.import_module(f"mambaverse.kernels.{op}.cases")
    inputs = cases.make_inputs(cases.TESTED[0])
    leaves = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        result = cases.run(leaves)
        outputs = [t for t in (result if isinstance(result, tuple) else (result,)) if t.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    mine = {name: count for name, count in counts.items() if "mambaverse" in name}
    assert any(name.endswith("_backward") for name in mine) and any(not name.endswith("_backward") for name in mine)
    assert all(count > 0 for count in mine.values())


def test_the_scan_costs_seven_operations_a_state() -> None:
    u, A, B = torch.ones(2, 3, 5), -torch.ones(5, 4), torch.ones(2, 3, 4)
    with FlopCounterMode(display=False) as counter:
        selective_scan(u, u, A, B, B)
    assert counter.get_total_flops() == 2 * 3 * 5 * (7 * 4 + 10)


def test_a_model_is_counted_without_memory_or_time() -> None:
    with FakeTensorMode():
        model = mambaverse.create_model("vim_tiny_patch16_224", depth=2)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(64, 3, 224, 224)).sum().backward()
    names = {str(name) for name in counter.get_flop_counts()["Global"]}
    scan = "mambaverse.bidirectional_selective_scan"
    assert {scan, f"{scan}_backward", "mambaverse.norm"} <= names
