"""lti_conv's GPU path: its functions on any device, here too; the operator with `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambaverse.kernels.lti_conv import lti_conv, reference, triton
from mambaverse.kernels.lti_conv.cases import LONG, TESTED, Case, make_inputs
from mambaverse.kernels.lti_conv.discretize import discretize
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients

OUTPUTS = ("y", "final_state", "du", "dA_bar", "dB_bar", "dC", "dD", "dinitial_state")
FLAGS = {"all": (True, True, True), "alone": (False, True, False), "only the state": (True, False, True)}


def arguments(
    case: Case, flags: str, reverse: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, Any, Any]:
    """Return what forward takes, and gradients of its outputs; see FLAGS."""
    with_state, with_dy, with_dfinal = FLAGS[flags]
    inputs = make_inputs(case, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(1)
    shape = case.batch, case.dim, case.num_states
    h0, dfinal = (torch.randn(shape, generator=generator, dtype=torch.complex64, device=device) for _ in range(2))
    dy = torch.randn(inputs["u"].shape, generator=generator, device=device).to(dtype)
    A_bar, B_bar = discretize(inputs["A"], inputs["B"], inputs["dt"], "zoh")
    given = [inputs["u"], A_bar, B_bar, inputs["C"].to(torch.complex128), inputs["D"] if with_state else None]
    return [*given, h0 if with_state else None, reverse], dy if with_dy else None, dfinal if with_dfinal else None


def wide(tensor: Any) -> Any:
    return (
        tensor
        if tensor is None or isinstance(tensor, bool)
        else tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    )


def check(case: Case, flags: str, reverse: bool, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    given, dy, dfinal = arguments(case, flags, reverse, dtype, device)
    with nan_filled_empty():
        actual = *triton.forward(*given), *triton.backward(dy, dfinal, *given)
    exact: Any = [wide(t) for t in given]
    expected = *reference.forward(*exact), *reference.backward(wide(dy), wide(dfinal), *exact)
    narrow = *reference.forward(*given), *reference.backward(dy, dfinal, *given)
    for name, value, wanted, fake in zip(OUTPUTS, actual, expected, narrow, strict=True):
        assert (value.dtype, value.shape) == (fake.dtype, fake.shape), name
        assert value.is_contiguous(), name
        if wanted.abs().sum() > 0:
            assert_close(name, value, wanted, dtype)
        else:
            assert not value.any(), name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.reason)
def test_equals_reference(case, flags, reverse):
    check(case, flags, reverse)


@pytest.mark.parametrize("case", LONG, ids=lambda c: c.reason)
def test_long_memories(case):
    check(case, "all", reverse=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(TESTED[0], "all", reverse=True, dtype=dtype)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_to_do(shape):
    check(Case(shape[0], shape[1], 3, 4, ""), "all", reverse=False)


def test_channels_are_taken_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(triton, "MAX_TEMPORARY", 100)
    check(TESTED[0], "all", reverse=False)


def test_a_pole_at_zero():
    """Which the bilinear rule can give, and whose powers are 1, 0, 0, ..."""
    given, dy, dfinal = arguments(Case(2, 9, 3, 4, ""), "all", reverse=False)
    given[1][:, 1] = 0
    exact: Any = [wide(t) for t in given]
    actual = *triton.forward(*given), *triton.backward(dy, dfinal, *given)
    expected = *reference.forward(*exact), *reference.backward(wide(dy), wide(dfinal), *exact)
    for name, value, wanted in zip(OUTPUTS, actual, expected, strict=True):
        assert_close(name, value, wanted, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*TESTED, *LONG], ids=lambda c: c.reason)
def test_on_a_gpu(case, dtype, reverse):
    check(case, "all", reverse, dtype, "cuda")
    inputs = make_inputs(case, dtype=dtype, device="cuda")
    exact = {k: wide(v) for k, v in inputs.items()}
    actual = outputs_and_gradients(lti_conv, inputs, reverse=reverse, return_final_state=True)
    rounded = [actual["out0"].dtype, actual["out1"].dtype]  # sums that cancel: those of dy's rounding are not ours
    expected = outputs_and_gradients(lti_conv, exact, cotangents_as=rounded, reverse=reverse, return_final_state=True)
    for name, value in actual.items():
        assert_close(name, value, expected[name], dtype)
    again = outputs_and_gradients(lti_conv, inputs, reverse=reverse, return_final_state=True)
    assert all(torch.equal(again[name], value) for name, value in actual.items())
