"""Promises of rotary: turns of pairs, exact in every shape and layout, undone by its gradient, one node when compiled.

Its Triton kernel keeps them in Triton's interpreter, a process of its own, and on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.rotary import reference, rotary
from mambaverse.kernels.rotary.cases import TESTED, TIMED_GPU, Case, make_inputs
from mambaverse.kernels.testing import assert_captured, assert_close, nan_filled_empty, outputs_and_gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_the_interpreters_part_passes_there")
compiled = pytest.mark.skipif(INTERPRETED, reason="is of the other process")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@compiled
def test_the_interpreters_part_passes_there(passes_in_the_interpreter: Callable[[], None]) -> None:
    passes_in_the_interpreter()


def check(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, backend: str = "auto") -> None:
    tables = {name: inputs[name] for name in ("cos", "sin")}
    with use_backend(backend), nan_filled_empty():
        actual = outputs_and_gradients(lambda x: rotary(x, **tables), {"x": inputs["x"]})
    wide = {name: table.double() for name, table in tables.items()}
    expected = outputs_and_gradients(
        lambda x: rotary(x, **wide), {"x": inputs["x"].double()}, cotangents_as=[inputs["x"].dtype]
    )
    assert actual["out0"].dtype == inputs["x"].dtype and actual["out0"].is_contiguous()
    for name, value in expected.items():
        assert_close(name, actual[name], value, dtype)


def check_all(backend: str, device: str = "cpu") -> None:
    for case in TESTED:
        check(make_inputs(case, device=device), backend=backend)
    inputs = make_inputs(TESTED[1], device=device)
    check({k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in inputs.items()}, backend=backend)
    joined = torch.cat([inputs["x"], inputs["x"]], 3)[..., 3:11]  # a part of a projection
    check({**inputs, "x": joined}, backend=backend)
    halves = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]  # the interpreter cuts bfloat16 off
    for dtype in halves:
        check(make_inputs(TESTED[0], dtype=dtype, device=device), dtype, backend)
        check({k: v.to(dtype) for k, v in inputs.items()}, dtype, backend)
    for batch, length, heads, size in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 2, 0)):
        nothing = make_inputs(Case(batch, length, heads, size, False, ""), device=device)
        with use_backend(backend):
            assert rotary(**nothing).shape == (batch, length, heads, size)


@compiled
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_output_and_gradient_are_within_tolerance(backend: str) -> None:
    check_all(backend)


@interpreted
def test_triton_is_within_tolerance() -> None:
    check_all("triton")


@pytest.mark.gpu
@on_gpu
def test_a_gpu_is_within_tolerance() -> None:
    check_all("auto", "cuda")
    for case in (*TESTED, Case(3, 197, 3, 64, True, ""), Case(1, 300, 20, 130, False, "")):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            check(make_inputs(case, dtype=dtype, device="cuda"), dtype)


@pytest.mark.gpu
@on_gpu
def test_runs_on_a_gpu_are_bit_equal_and_can_be_captured() -> None:
    inputs: dict[str, Any] = make_inputs(TIMED_GPU[1], dtype=torch.bfloat16, device="cuda")
    x = inputs["x"].requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = rotary(**inputs)
        return y.detach(), *torch.autograd.grad(y, [x], y.detach())

    assert_captured(step)


@pytest.mark.gpu
@on_gpu
def test_offsets_past_2_to_the_31_on_a_gpu() -> None:
    """Tokens of a projection 40,000 wide: what the last of them hold is that of a small call."""
    tokens = 2**31 // 40_000 + 100
    wide = torch.zeros(1, tokens, 40_000, dtype=torch.bfloat16, device="cuda")
    wide[:, -7:].normal_()
    x = wide[..., 39_000:39_128].unflatten(-1, (2, 64))
    cos, sin = torch.rand(2, 1, tokens, 32, device="cuda").unbind(0)
    large, small = rotary(x, cos, sin), rotary(x[:, -7:].contiguous(), cos[:, -7:], sin[:, -7:])
    assert torch.equal(large[:, -7:], small)


@compiled
def test_it_is_a_product_of_complex_numbers_and_its_gradient_turns_back() -> None:
    inputs = make_inputs(Case(2, 3, 2, 6, False, "small"), dtype=torch.float64)
    x, cos, sin = inputs.values()
    a, b = x.requires_grad_().chunk(2, -1)
    turned = torch.complex(a, b) * torch.complex(cos, sin).unsqueeze(2)
    y = rotary(**inputs)
    assert_close("y", y, torch.cat([turned.real, turned.imag], -1))
    assert_close("back", torch.autograd.grad(y, x, y.detach())[0], x)
    assert torch.autograd.gradgradcheck(lambda x: rotary(x, cos, sin), x)


@compiled
def test_it_costs_three_operations_a_channel_each_way() -> None:
    inputs = make_inputs(TESTED[0])
    with FlopCounterMode(display=False) as counter:
        rotary(inputs["x"].requires_grad_(), inputs["cos"], inputs["sin"]).sum().backward()
    assert counter.get_total_flops() == 2 * 3 * inputs["x"].numel()


class Turned(torch.nn.Module):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotary(x, cos, sin)


@compiled
def test_compiles_and_exports_as_one_node() -> None:
    inputs = make_inputs(TESTED[0])
    expected = reference.forward(inputs["x"], inputs["cos"], inputs["sin"], False)
    assert torch.equal(torch.compile(Turned(), backend="eager", fullgraph=True)(**inputs), expected)
    program = torch.export.export(Turned(), tuple(inputs.values()))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and "mambaverse" in str(n.target)]
    assert calls == [torch.ops.mambaverse.rotary.default]


@compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, cos, sin = make_inputs(TESTED[0], dtype=dtype).values()
        torch.library.opcheck(torch.ops.mambaverse.rotary, (x.requires_grad_(), cos, sin, False, "auto"))


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 7, 30)}, r"x has shape \(2, 7, 30\); expected \(B, L, H, P\)"),
        ({"x": torch.randn(2, 7, 3, 9)}, "x has 9 channels a head; expected an even number"),
        ({"cos": torch.randn(1, 6, 5)}, r"cos has shape \(1, 6, 5\); expected \(B or 1, L, P/2\) = \(1, 7, 5\)"),
        ({"sin": torch.randn(3, 7, 5)}, r"sin has shape \(3, 7, 5\); expected \(B or 1, L, P/2\) = \(2, 7, 5\)"),
        ({"sin": torch.randn(1, 7, 5, requires_grad=True)}, "sin has no gradient here, and requires one"),
        ({"cos": torch.randn(1, 7, 5, device="meta")}, "cos is on meta; expected cpu"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**make_inputs(TESTED[0]), **change}
    with pytest.raises(ValueError, match="rotary: " + message):
        rotary(**arguments)
