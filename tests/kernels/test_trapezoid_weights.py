"""Promises of trapezoid_weights: right in every shape, layout and form, one node when compiled.

Its Triton kernels keep them in Triton's interpreter, a process of its own, and on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.testing import assert_captured, assert_close, nan_filled_empty, outputs_and_gradients
from mambaverse.kernels.trapezoid_weights import reference, trapezoid_weights
from mambaverse.kernels.trapezoid_weights.cases import TESTED, TIMED_GPU, Case, make_inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_the_interpreters_part_passes_there")
compiled = pytest.mark.skipif(INTERPRETED, reason="is of the other process")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PACKED = [[0, 0, 3, 3, 68, 70, 70], [0, 70], [0, 64, 70]]  # empty and short sequences, at and beside blocks' ends
FORMS = ["heavy_tail", "softplus"]


@compiled
def test_the_interpreters_part_passes_there(passes_in_the_interpreter: Callable[[], None]) -> None:
    passes_in_the_interpreter()


def check(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, backend: str = "auto", **flags: Any) -> None:
    with use_backend(backend), nan_filled_empty():
        actual = outputs_and_gradients(trapezoid_weights, inputs, **flags)
    wide = {k: v.double() for k, v in inputs.items()}
    expected = outputs_and_gradients(trapezoid_weights, wide, cotangents_as=[torch.float32] * 4, **flags)
    for name, value in expected.items():
        is_output = name.startswith("out")
        assert_close(name, actual[name], value, torch.float32 if is_output else dtype)


def check_all(backend: str, device: str = "cpu") -> None:
    for case in TESTED:
        for form in FORMS:
            check(make_inputs(case, device=device), backend=backend, A_form=form)
    check(make_inputs(TESTED[0], dtype=torch.float16, device=device), torch.float16, backend)
    check(make_inputs(TESTED[0], device=device), backend=backend, A_floor=0.7)
    inputs = make_inputs(Case(1, 70, 3, "packed"), device=device)
    for bounds in PACKED:
        check(inputs, backend=backend, cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device))
    inputs = make_inputs(TESTED[1], device=device)
    check({k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in inputs.items()}, backend=backend)
    for batch, length, heads, offsets in ((2, 0, 3, None), (0, 5, 3, None), (1, 0, 3, [0, 0]), (1, 0, 3, [0])):
        inputs = make_inputs(Case(batch, length, heads, "empty"), device=device)
        cu_seqlens = None if offsets is None else torch.tensor(offsets, device=device)
        with use_backend(backend), nan_filled_empty():
            results = outputs_and_gradients(trapezoid_weights, inputs, cu_seqlens=cu_seqlens)
        assert results["out0"].shape == (batch, length, heads)
        assert not results["ddt_bias"].any()


def check_extremes(backend: str, device: str = "cpu") -> None:
    """Far from 0 nothing overflows, a small β keeps its digits, and what is not a number stays none."""
    far = torch.tensor([-200.0, -30.0, 30.0, 200.0], device=device)
    dt, a, trap = (t.flatten()[None, :, None] for t in torch.meshgrid(far, far, far, indexing="ij"))
    check({"dt": dt, "a": a, "trap": trap, "dt_bias": torch.zeros(1, device=device)}, backend=backend)
    late = torch.full((1, 2, 1), 12.0, device=device)
    with use_backend(backend):
        weight = trapezoid_weights(late, late, late + torch.tensor([[[-100.0], [0.0]]], device=device), late[0, 0])[2]
        broken = trapezoid_weights(late, late * float("nan"), late, late[0, 0])[1]
    truth = 24 * torch.sigmoid(torch.tensor(-12.0, dtype=torch.float64)).item()  # β of the second token, where γ is 0
    assert abs(weight[0, 0, 0].item() / truth - 1) < 1e-6
    assert broken.isnan().all()


@compiled
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_output_and_gradient_is_within_tolerance(backend: str) -> None:
    check_all(backend)
    check_extremes(backend)


@interpreted
def test_triton_is_within_tolerance() -> None:
    check_all("triton")
    check_extremes("triton")


@interpreted
def test_a_gradient_that_is_not_there_is_0() -> None:
    leaves: dict[str, Any] = {k: v.requires_grad_() for k, v in make_inputs(TESTED[0]).items()}
    for which in range(4):
        gradients = []
        for backend in ("triton", "reference"):
            with use_backend(backend):
                output = trapezoid_weights(**leaves)[which]
            gradients.append(torch.autograd.grad(output, list(leaves.values()), torch.ones(()).expand_as(output)))
        for actual, expected in zip(*gradients, strict=True):
            assert_close("gradient", actual, expected)


@pytest.mark.gpu
@on_gpu
def test_a_gpu_is_within_tolerance() -> None:
    check_all("auto", "cuda")
    check_extremes("auto", "cuda")
    check(make_inputs(Case(3, 197, 6, ""), dtype=torch.bfloat16, device="cuda"), torch.bfloat16)
    check(make_inputs(Case(1, 3000, 257, "more heads than a tile's"), device="cuda"))


@pytest.mark.gpu
@on_gpu
def test_runs_on_a_gpu_are_bit_equal_and_can_be_captured() -> None:
    inputs = make_inputs(TIMED_GPU[1], dtype=torch.bfloat16, device="cuda")
    leaves: dict[str, Any] = {k: v.requires_grad_() for k, v in inputs.items()}

    def step() -> tuple[Tensor, ...]:
        outputs = trapezoid_weights(**leaves)
        detached = [output.detach() for output in outputs]
        return *detached, *torch.autograd.grad(outputs, list(leaves.values()), detached)

    assert_captured(step)


@pytest.mark.gpu
@on_gpu
def test_offsets_past_2_to_the_31_on_a_gpu() -> None:
    """Rows of a projection 40,000 wide: what the last of them hold is that of a small call."""
    rows = 2**31 // 40_000 + 100
    wide = torch.zeros(1, rows, 40_000, dtype=torch.bfloat16, device="cuda")
    wide[:, -7:].normal_()
    dt, a, trap = (wide[..., i : i + 3] for i in (39_000, 39_003, 39_006))
    bias = torch.zeros(3, device="cuda")
    large, small = (trapezoid_weights(dt[:, p], a[:, p], trap[:, p], bias) for p in (slice(None), slice(-7, None)))
    for actual, expected in zip(large, small, strict=True):
        assert torch.equal(actual[:, -7:], expected)


@compiled
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bounds", [None, [0, 2, 2, 5]])
def test_explicit_backward_is_the_derivative_of_the_reference(bounds: list[int] | None, form: str) -> None:
    inputs = make_inputs(Case(1 if bounds else 2, 5, 3, "small"), dtype=torch.float64)
    leaves: Any = [v.requires_grad_() for v in inputs.values()]
    flags: Any = (None if bounds is None else torch.tensor(bounds), 0.3, form == "heavy_tail")
    outputs = reference.forward(*leaves, *flags)
    seeds: Any = [torch.randn_like(output) for output in outputs]
    expected = torch.autograd.grad(outputs, leaves, seeds)
    with torch.no_grad():
        actual = reference.backward(*seeds, *leaves, *flags)
    for a, e in zip(actual, expected, strict=True):
        assert_close("gradient", a, e)


@compiled
def test_packed_sequences_are_separate_calls() -> None:
    inputs: dict[str, Any] = make_inputs(Case(1, 70, 3, "packed"))
    bounds = PACKED[0]
    packed = trapezoid_weights(**inputs, cu_seqlens=torch.tensor(bounds))
    for begin, end in pairwise(bounds):
        cut = {k: v if k == "dt_bias" else v[:, begin:end] for k, v in inputs.items()}
        for whole, one in zip(packed, trapezoid_weights(**cut), strict=True):
            torch.testing.assert_close(whole[:, begin:end], one, rtol=1e-6, atol=0)  # SIMD by how many there are


class Weights(torch.nn.Module):
    def forward(self, dt: Tensor, a: Tensor, trap: Tensor, dt_bias: Tensor) -> tuple[Tensor, ...]:
        return trapezoid_weights(dt, a, trap, dt_bias)


@compiled
def test_compiles_and_exports_as_one_node() -> None:
    inputs = make_inputs(TESTED[0])
    expected = Weights()(**inputs)
    actual = torch.compile(Weights(), backend="eager", fullgraph=True)(**inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    program = torch.export.export(Weights(), tuple(inputs.values()))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and "mambaverse" in str(n.target)]
    assert calls == [torch.ops.mambaverse.trapezoid_weights.default]


@compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [v.requires_grad_() for v in make_inputs(Case(1, 5, 3, "small"), dtype=dtype).values()]
        for cu_seqlens in (None, torch.tensor([0, 2, 5])):
            torch.library.opcheck(torch.ops.mambaverse.trapezoid_weights, (*leaves, cu_seqlens, 1e-4, True, "auto"))


@compiled
def test_gradients_have_the_strides_of_the_fake() -> None:
    dt = torch.rand(5, 2, 3).transpose(0, 1)
    seed = torch.rand(2, 5, 3)
    gradients = torch.ops.mambaverse.trapezoid_weights_backward(
        seed, None, seed, None, dt, dt, dt, dt[0, 0], None, 1e-4, True, "auto"
    )
    assert all(g.is_contiguous() for g in gradients)


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.randn(2, 70)}, r"dt has shape \(2, 70\); expected \(B, L, H\)"),
        ({"a": torch.randn(2, 60, 4)}, r"a has shape \(2, 60, 4\); expected \(B, L, H\) = \(2, 70, 4\)"),
        ({"trap": torch.ones(2, 70, 4, dtype=torch.int64)}, "trap has dtype torch.int64; expected a floating dtype"),
        ({"dt_bias": torch.randn(3)}, r"dt_bias has shape \(3,\); expected \(H,\) = \(4,\)"),
        ({"cu_seqlens": torch.tensor([0, 70])}, "the batch is 2; expected 1"),
        ({"a": torch.randn(2, 70, 4, device="meta")}, "a is on meta; expected cpu"),
        ({"A_form": "heavy"}, "A_form is 'heavy'; expected one of 'heavy_tail', 'softplus'"),
        ({"A_floor": float("nan")}, "A_floor is nan; expected a finite number of at least 0"),
        ({"A_floor": None}, "A_floor is None; expected a finite number"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**make_inputs(TESTED[0]), **change}
    with pytest.raises(ValueError, match="trapezoid_weights: " + message):
        trapezoid_weights(**arguments)
