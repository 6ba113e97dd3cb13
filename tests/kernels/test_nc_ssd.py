"""Promises of nc_ssd: right in every shape, layout and dtype, blind to the order of tokens, one node when compiled.

Its Triton kernels keep them in Triton's interpreter, a process of its own, and on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambaverse.kernels.backend import BackendError, use_backend
from mambaverse.kernels.nc_ssd import nc_ssd, reference
from mambaverse.kernels.nc_ssd.cases import TESTED, TIMED_GPU, Case, make_inputs
from mambaverse.kernels.testing import assert_captured, assert_close, nan_filled_empty, outputs_and_gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_the_interpreters_part_passes_there")
compiled = pytest.mark.skipif(INTERPRETED, reason="is of the other process")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMALL = Case(2, 5, 4, 3, 2, 6, "small")


@compiled
def test_the_interpreters_part_passes_there(passes_in_the_interpreter: Callable[[], None]) -> None:
    passes_in_the_interpreter()


def check(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, backend: str = "auto", **flags: Any) -> None:
    flags = {"dt_softplus": True} | flags
    with use_backend(backend), nan_filled_empty():
        actual = outputs_and_gradients(nc_ssd, inputs, **flags)
    wide = {k: v.double() for k, v in inputs.items()}
    expected = outputs_and_gradients(nc_ssd, wide, cotangents_as=[inputs["x"].dtype], **flags)
    assert actual["out0"].dtype == inputs["x"].dtype
    for name, value in expected.items():
        assert_close(name, actual[name], value, dtype)


def check_all(backend: str, device: str = "cpu") -> None:
    for case in TESTED:
        check(make_inputs(case, device=device), backend=backend)
    inputs = make_inputs(TESTED[0], device=device)
    check({k: v for k, v in inputs.items() if k not in ("D", "dt_bias")}, backend=backend, dt_softplus=False)
    check({k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in inputs.items()}, backend=backend)
    for name in ("A", "D", "dt_bias"):  # every other one of twice as many, and one for all
        check({**inputs, name: inputs[name].repeat_interleave(2)[::2]}, backend=backend)
        check({**inputs, name: inputs[name][:1].expand(4)}, backend=backend)
    check({**inputs, "A": -inputs["A"]}, backend=backend)  # weights below 0
    halves = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]  # the interpreter cuts bfloat16 off
    for dtype in halves:
        check(make_inputs(TESTED[0], dtype=dtype, device=device), dtype, backend)
        check({k: v.to(dtype) if k in ("B", "C", "dt") else v for k, v in inputs.items()}, dtype, backend)
    for batch, length in ((2, 0), (0, 5)):
        with use_backend(backend), nan_filled_empty():
            results = outputs_and_gradients(nc_ssd, make_inputs(Case(batch, length, 2, 4, 1, 4, ""), device=device))
        assert results["out0"].shape == (batch, length, 2, 4)
        assert not results["dA"].any() and not results["dD"].any()
    with use_backend(backend), nan_filled_empty():
        results = outputs_and_gradients(nc_ssd, make_inputs(Case(2, 5, 2, 0, 1, 4, ""), device=device))
    assert not any(results[name].any() for name in ("ddt", "dA", "dB", "dC", "dD", "ddt_bias"))


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
    largest = Case(1, 5000, 2, 32, 1, 256, ""), Case(2, 300, 2, 128, 2, 64, ""), Case(2, 300, 2, 64, 1, 128, "")
    wide = Case(1, 300, 6, 65, 1, 32, ""), Case(2, 130, 4, 128, 1, 64, ""), Case(1, 70, 2, 16, 1, 512, "")
    cut = Case(1, 130, 4, 160, 2, 64, ""), Case(1, 70, 2, 64, 1, 256, "")
    for case in (Case(3, 197, 6, 64, 1, 64, ""), *largest, *wide, *cut, TESTED[3]):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            check(make_inputs(case, dtype=dtype, device="cuda"), dtype)


@pytest.mark.gpu
@on_gpu
def test_runs_on_a_gpu_are_bit_equal_and_can_be_captured() -> None:
    inputs = make_inputs(TIMED_GPU[0], dtype=torch.bfloat16, device="cuda")
    leaves: dict[str, Any] = {k: v.requires_grad_() for k, v in inputs.items()}

    def step() -> tuple[Tensor, ...]:
        y = nc_ssd(**leaves, dt_softplus=True)
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), y.detach())

    assert_captured(step)


@pytest.mark.gpu
@on_gpu
def test_offsets_past_2_to_the_31_on_a_gpu() -> None:
    """Rows of a projection 40,000 wide: what the last of them hold is that of a small call, since others write 0."""
    rows = 2**31 // 40_000 + 100
    wide = torch.zeros(1, rows, 40_000, dtype=torch.bfloat16, device="cuda")
    wide[:, -7:].normal_()
    x, m, dt = wide[..., 39_000:39_128].unflatten(-1, (2, 64)), wide[..., 39_128:39_192], wide[..., 39_192:39_194]
    A = torch.tensor([-1.0, -2.0], device="cuda")
    large, small = (nc_ssd(x[:, p], dt[:, p], A, m[:, p], m[:, p]) for p in (slice(None), slice(-7, None)))
    assert_close("y", large[:, -7:], small)


@compiled
@pytest.mark.parametrize("softplus", [True, False])
def test_explicit_backward_is_the_derivative_of_the_reference(softplus: bool) -> None:
    leaves: Any = [v.requires_grad_() for v in make_inputs(SMALL, dtype=torch.float64).values()]
    y, state = reference.forward(*(*leaves, softplus))
    seed: Any = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, seed)
    with torch.no_grad():
        actual = reference.backward(*(seed, *leaves, state, softplus))
    for a, e in zip(actual, expected, strict=True):
        assert_close("gradient", a, e)


@compiled
def test_it_is_attention_without_softmax() -> None:
    inputs: dict[str, Any] = make_inputs(SMALL, dtype=torch.float64)
    x, dt, A, B, C, D, bias = inputs.values()
    B, C = (m.repeat_interleave(2, dim=2) for m in (B, C))
    weight = torch.nn.functional.softplus(dt + bias) * -A
    scores = torch.einsum("bihn,bjhn->bhij", C, B) * weight.transpose(1, 2)[:, :, None]
    assert_close("y", nc_ssd(**inputs, dt_softplus=True), torch.einsum("bhij,bjhp->bihp", scores, x) + D[:, None] * x)


@compiled
def test_the_order_of_tokens_does_not_matter() -> None:
    inputs: dict[str, Any] = make_inputs(TESTED[0], dtype=torch.float64)
    order = torch.randperm(TESTED[0].length, generator=torch.Generator().manual_seed(0))
    moved: dict[str, Any] = {k: v[:, order] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
    assert_close("y", nc_ssd(**moved), nc_ssd(**inputs)[:, order])


@compiled
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_takes_no_bits(backend: str) -> None:
    inputs = make_inputs(TESTED[0])
    with torch.autocast("cpu", torch.bfloat16):
        check(inputs, backend=backend)


@compiled
def test_one_group_needs_no_axis() -> None:
    inputs: dict[str, Any] = make_inputs(TESTED[1])
    assert torch.equal(nc_ssd(**{**inputs, "B": inputs["B"][:, :, 0], "C": inputs["C"][:, :, 0]}), nc_ssd(**inputs))


class Operator(torch.nn.Module):
    def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return nc_ssd(x, dt, A, B, C, dt_softplus=True)


@compiled
def test_compiles_and_exports_as_one_node() -> None:
    inputs = [v for k, v in make_inputs(TESTED[0]).items() if k not in ("D", "dt_bias")]
    expected = Operator()(*inputs)
    assert torch.equal(torch.compile(Operator(), backend="eager", fullgraph=True)(*inputs), expected)
    program = torch.export.export(Operator(), tuple(inputs))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and "mambaverse" in str(n.target)]
    assert calls == [torch.ops.mambaverse.nc_ssd.default]


@compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [v.requires_grad_() for v in make_inputs(SMALL, dtype=dtype).values()]
        torch.library.opcheck(torch.ops.mambaverse.nc_ssd, (*leaves, True, "auto"))
        groups = [v.requires_grad_() for v in make_inputs(Case(2, 5, 3, 4, 3, 6, ""), dtype=dtype).values()]
        torch.library.opcheck(torch.ops.mambaverse.nc_ssd, (*groups, True, "auto"))
        torch.library.opcheck(torch.ops.mambaverse.nc_ssd, (*leaves[:5], None, None, False, "auto"))


@interpreted
def test_heads_that_a_tile_does_not_hold_are_cut() -> None:
    for case in (Case(1, 9, 2, 130, 1, 40, "128 and 2 columns"), Case(2, 3, 2, 20, 2, 300, "16 and 4")):
        check(make_inputs(case), backend="triton")


@interpreted
def test_more_states_than_a_tile_holds_are_refused() -> None:
    inputs: dict[str, Any] = make_inputs(Case(1, 2, 1, 3, 1, 513, ""))
    with use_backend("triton"), pytest.raises(BackendError, match="up to 512 states, not 513; use_backend"):
        nc_ssd(**inputs)


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 130, 64)}, r"x has shape \(2, 130, 64\); expected \(B, L, H, P\)"),
        ({"dt": torch.randn(2, 130, 3)}, r"dt has shape \(2, 130, 3\); expected \(B, L, H\) = \(2, 130, 4\)"),
        ({"B": torch.randn(2, 130, 3, 16)}, "B has 3 groups; expected a divisor of the 4 heads of x"),
        ({"C": torch.randn(2, 130, 2, 15)}, r"C has shape \(2, 130, 2, 15\); expected \(B, L, G, N\)"),
        ({"D": torch.randn(4, 16)}, r"D has shape \(4, 16\); expected \(H,\) = \(4,\)"),
        ({"dt_bias": torch.randn(4, device="meta")}, "dt_bias is on meta; expected cpu"),
        ({"A": torch.ones(4, dtype=torch.int64)}, "A has dtype torch.int64; expected a floating dtype"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**make_inputs(TESTED[0]), **change}
    with pytest.raises(ValueError, match="nc_ssd: " + message):
        nc_ssd(**arguments)
