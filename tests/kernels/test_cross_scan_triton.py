"""Promises of cross_scan's Triton kernels: in Triton's interpreter, a process of its own, and on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.cross_scan.cases import TESTED, Case, make_inputs, run
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_all_of_this_file_passes_in_the_interpreter")
CASES = (*TESTED, Case(2, 9, 10, 130, "more than one tile of tokens, more than one block of channels"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.skipif(INTERPRETED, reason="starts that process")
def test_all_of_this_file_passes_in_the_interpreter(passes_in_the_interpreter: Callable[[], None]) -> None:
    passes_in_the_interpreter()


def call(**inputs: Any) -> Any:
    return run(inputs)


def check(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    inputs = make_inputs(case, dtype=dtype, device=device)
    wide = {name: value.double() for name, value in inputs.items()}
    expected = outputs_and_gradients(call, wide, cotangents_as=[dtype, dtype])
    with use_backend("triton"), nan_filled_empty():
        actual = outputs_and_gradients(call, inputs)
    for name, value in expected.items():
        assert_close(name, actual[name], value, dtype)
    assert torch.equal(actual["out0"].double(), expected["out0"])  # copies


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_outputs_and_gradients_are_within_tolerance(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@interpreted
def test_strides_do_not_matter() -> None:
    inputs = make_inputs(TESTED[0])
    x, y = inputs["x"], inputs["y"]
    with use_backend("triton"):
        expected = run(inputs)
        strided = run({"x": x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0), "y": y.mT.contiguous().mT})
        empty = run({"x": x[:, :, :0], "y": y[:, :, :0]})
    for actual, value in zip(strided, expected, strict=True):
        assert torch.equal(actual, value)
    assert [tuple(t.shape) for t in empty] == [(2, 4, 0, 33), (2, 5, 0, 33)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_a_gpu_gives_the_same_numbers(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")
