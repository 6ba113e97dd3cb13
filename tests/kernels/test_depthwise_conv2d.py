"""Promises of depthwise_conv2d: what conv2d and SiLU give, in every shape, layout and dtype, one node when compiled.

Its Triton kernels keep them in Triton's interpreter, a process of its own, and on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.depthwise_conv2d import depthwise_conv2d, reference
from mambaverse.kernels.depthwise_conv2d.cases import TESTED, TIMED_GPU, Case, make_inputs
from mambaverse.kernels.testing import assert_captured, assert_close, nan_filled_empty, outputs_and_gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_the_interpreters_part_passes_there")
compiled = pytest.mark.skipif(INTERPRETED, reason="is of the other process")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMALL = Case(2, 3, 4, 5, 3, 5, "small")


@compiled
def test_the_interpreters_part_passes_there(passes_in_the_interpreter: Callable[[], None]) -> None:
    passes_in_the_interpreter()


def check(
    inputs: dict[str, Any], dtype: torch.dtype = torch.float32, backend: str = "auto", activation: Any = "silu"
) -> None:
    with use_backend(backend), nan_filled_empty():
        actual = outputs_and_gradients(depthwise_conv2d, inputs, activation=activation)
    wide = {k: v.double() for k, v in inputs.items()}
    given = [inputs["x"].dtype]
    expected = outputs_and_gradients(depthwise_conv2d, wide, cotangents_as=given, activation=activation)
    assert actual["out0"].dtype == inputs["x"].dtype and actual["out0"].is_contiguous()
    for name, value in expected.items():
        assert_close(name, actual[name], value, dtype)


def check_strides(case: Case, backend: str, device: str) -> None:
    """The fakes declare the strides of contiguous tensors, which torch.compile's programs assert."""
    inputs = list(make_inputs(case, device=device).values())
    y = torch.ops.mambaverse.depthwise_conv2d(*inputs, True, backend)
    gradients = torch.ops.mambaverse.depthwise_conv2d_backward(y, *inputs, True, backend)
    for tensor in (y, *gradients):
        assert tensor.stride() == torch.empty(tensor.shape).stride()


def check_all(backend: str, device: str = "cpu") -> None:
    for case in TESTED:
        check(make_inputs(case, device=device), backend=backend)
        check_strides(case, backend, device)
    inputs = make_inputs(TESTED[0], device=device)
    check(inputs, backend=backend, activation=None)
    check({k: v for k, v in inputs.items() if k != "bias"}, backend=backend)
    check({k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in inputs.items()}, backend=backend)
    check({**inputs, "bias": inputs["bias"][:1].expand(33)}, backend=backend)
    wider = torch.cat([inputs["x"], inputs["x"]], 3)[..., 7 : 7 + 33]  # a part of a projection
    check({**inputs, "x": wider}, backend=backend)
    check(make_inputs(Case(1, 4, 6, 3, 3, 9, "more than Triton takes"), device=device), backend=backend)
    halves = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]  # the interpreter cuts bfloat16 off
    for dtype in halves:
        check(make_inputs(TESTED[0], dtype=dtype, device=device), dtype, backend)
        check({k: v.to(dtype) for k, v in inputs.items()}, dtype, backend)
    for batch, height, width, dim in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 2, 0)):
        with use_backend(backend), nan_filled_empty():
            nothing = make_inputs(Case(batch, height, width, dim, 3, 3, ""), device=device)
            results = outputs_and_gradients(depthwise_conv2d, nothing)
        assert results["out0"].shape == (batch, height, width, dim)
        assert not results["dweight"].any() and not results["dbias"].any()


@compiled
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_output_and_gradient_is_within_tolerance(backend: str) -> None:
    check_all(backend)


@interpreted
def test_triton_is_within_tolerance() -> None:
    check_all("triton")


@pytest.mark.gpu
@on_gpu
def test_a_gpu_is_within_tolerance() -> None:
    check_all("auto", "cuda")
    for case in (*TESTED, Case(3, 14, 14, 200, 3, 3, ""), Case(1, 40, 37, 64, 5, 5, ""), Case(2, 33, 8, 130, 7, 7, "")):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            check(make_inputs(case, dtype=dtype, device="cuda"), dtype)


@pytest.mark.gpu
@on_gpu
def test_runs_on_a_gpu_are_bit_equal_and_can_be_captured() -> None:
    inputs = make_inputs(TIMED_GPU[1], dtype=torch.bfloat16, device="cuda")
    leaves: dict[str, Any] = {k: v.requires_grad_() for k, v in inputs.items()}

    def step() -> tuple[Tensor, ...]:
        y = depthwise_conv2d(**leaves, activation="silu")
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), y.detach())

    assert_captured(step)


@pytest.mark.gpu
@on_gpu
def test_offsets_past_2_to_the_31_on_a_gpu() -> None:
    """Rows of a projection 40,000 wide: what the last of them hold is that of a small call."""
    rows = 2**31 // (2 * 40_000) + 100
    wide = torch.zeros(1, rows, 2, 40_000, dtype=torch.bfloat16, device="cuda")
    wide[:, -7:].normal_()
    x = wide[..., 39_000:39_064]
    weight = torch.randn(64, 3, 3, device="cuda")
    large, small = depthwise_conv2d(x, weight), depthwise_conv2d(x[:, -7:].contiguous(), weight)
    assert torch.equal(large[:, -7:], small)


@compiled
@pytest.mark.parametrize("silu", [True, False])
def test_explicit_backward_is_the_derivative_of_the_reference(silu: bool) -> None:
    leaves: Any = [v.requires_grad_() for v in make_inputs(SMALL, dtype=torch.float64).values()]
    y = reference.forward(*(*leaves, silu))
    seed: Any = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, seed)
    with torch.no_grad():
        actual = reference.backward(*(seed, *leaves, silu))
    for a, e in zip(actual, expected, strict=True):
        assert_close("gradient", a, e)


@compiled
def test_it_is_conv2d_and_silu() -> None:
    x, weight, bias = make_inputs(SMALL, dtype=torch.float64).values()
    p = F.conv2d(x.permute(0, 3, 1, 2), weight[:, None], bias, padding=[1, 2], groups=5).permute(0, 2, 3, 1)
    assert_close("p", depthwise_conv2d(x, weight, bias), p)
    assert_close("y", depthwise_conv2d(x, weight, bias, activation="swish"), F.silu(p))


@compiled
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_takes_no_bits(backend: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check(make_inputs(TESTED[0]), backend=backend)


class Operator(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, bias, activation="silu")


@compiled
def test_compiles_and_exports_as_one_node() -> None:
    inputs = tuple(make_inputs(TESTED[0]).values())
    assert torch.equal(torch.compile(Operator(), backend="eager", fullgraph=True)(*inputs), Operator()(*inputs))
    program = torch.export.export(Operator(), inputs)
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and "mambaverse" in str(n.target)]
    assert calls == [torch.ops.mambaverse.depthwise_conv2d.default]


@compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [v.requires_grad_() for v in make_inputs(SMALL, dtype=dtype).values()]
        torch.library.opcheck(torch.ops.mambaverse.depthwise_conv2d, (*leaves, True, "auto"))
        torch.library.opcheck(torch.ops.mambaverse.depthwise_conv2d, (*leaves[:2], None, False, "auto"))


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 35, 33)}, r"x has shape \(2, 35, 33\); expected \(B, H, W, D\)"),
        ({"weight": torch.randn(33, 3)}, r"weight has shape \(33, 3\); expected \(D, K, K'\), D = 33, K and K' odd"),
        ({"weight": torch.randn(33, 3, 4)}, r"weight has shape \(33, 3, 4\); expected .* K and K' odd"),
        ({"weight": torch.randn(32, 3, 3)}, r"weight has shape \(32, 3, 3\); expected \(D, K, K'\) = \(33, 3, 3\)"),
        ({"bias": torch.randn(33, device="meta")}, "bias is on meta; expected cpu"),
        ({"bias": torch.ones(33, dtype=torch.int64)}, "bias has dtype torch.int64; expected a floating dtype"),
        ({"activation": "relu"}, 'unknown activation \'relu\'; expected None, "silu" or "swish"'),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**make_inputs(TESTED[0]), **change}
    with pytest.raises(ValueError, match="depthwise_conv2d: " + message):
        depthwise_conv2d(**arguments)
