"""Promises of turned_qk's Triton kernels: in Triton's interpreter, a process of its own, and on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mambaverse.kernels.backend import BackendError, use_backend
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients
from mambaverse.kernels.turned_qk import turned_qk
from mambaverse.kernels.turned_qk.cases import TESTED, TIMED_GPU, Case, make_inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_all_of_this_file_passes_in_the_interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.skipif(INTERPRETED, reason="starts that process")
def test_all_of_this_file_passes_in_the_interpreter(passes_in_the_interpreter: Callable[[], None]) -> None:
    passes_in_the_interpreter()


def check(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, **flags: Any) -> None:
    with use_backend("triton"), nan_filled_empty():
        actual = outputs_and_gradients(turned_qk, inputs, **flags)
    wide = {k: v.double() for k, v in inputs.items()}
    for name, expected in outputs_and_gradients(turned_qk, wide, cotangents_as=[dtype, dtype], **flags).items():
        assert_close(name, actual[name], expected, dtype)


def check_case(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    for pairing in ["interleaved", "half_split"][: 1 + (case.state_dim % 2 == 0)]:
        check(make_inputs(case, dtype=dtype, device=device), dtype, pairing=pairing)


def strided(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in inputs.items()}


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # bfloat16 is cut off there, not rounded
@pytest.mark.parametrize("case", TESTED, ids=lambda case: case.reason)
def test_outputs_and_gradients_are_within_tolerance(case: Case, dtype: torch.dtype) -> None:
    check_case(case, dtype)


@interpreted
def test_strides_do_not_matter() -> None:
    check(strided(make_inputs(TESTED[1])))
    leaves: dict[str, Any] = {k: v.requires_grad_() for k, v in make_inputs(TESTED[0]).items()}
    with use_backend("triton"):
        k, q = turned_qk(**leaves)
        one = torch.ones(())
        expanded = torch.autograd.grad((k, q), list(leaves.values()), [one.expand_as(k)] * 2, retain_graph=True)
        dense = torch.autograd.grad((k, q), list(leaves.values()), [torch.ones_like(k)] * 2, retain_graph=True)
        of_k = torch.autograd.grad(k.sum(), leaves["C_bias"])[0]
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))
    assert not of_k.any()


@interpreted
def test_large_angles_are_brought_into_one_turn_first() -> None:
    inputs = make_inputs(TESTED[0])
    check(inputs | {"angles": 100 * inputs["angles"]})


@interpreted
def test_no_tokens() -> None:
    with use_backend("triton"), nan_filled_empty():
        results = outputs_and_gradients(turned_qk, make_inputs(Case(2, 0, 1, 1, 2, 4, 1, "empty")))
    assert results["out0"].shape == (2, 0, 1, 2, 4)
    assert not results["dB_bias"].any() and not results["dC_weight"].any()


@interpreted
def test_too_many_channels_are_refused() -> None:
    inputs: dict[str, Any] = make_inputs(Case(1, 1, 1, 1, 1, 1026, 1, "too many"))
    with use_backend("triton"), pytest.raises(BackendError, match="up to 1024 channels, not 1026"):
        turned_qk(**inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    CASES = (
        *TESTED,
        Case(3, 197, 1, 1, 6, 128, 32, "tokens that no tile divides"),
        Case(2, 130, 4, 2, 8, 64, 16, "several vectors a token"),
        Case(1, 40, 1, 1, 20, 256, 128, "more heads than a program has"),
        Case(1, 5, 1, 1, 2, 1024, 100, "the most channels"),
        Case(2, 264, 1, 1, 2, 256, 32, "33 tiles: backward's parts are added up in runs of three"),
    )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
    def test_outputs_and_gradients_are_within_tolerance(self, case: Case, dtype: torch.dtype) -> None:
        check_case(case, dtype, "cuda")

    def test_strides_do_not_matter(self) -> None:
        check(strided(make_inputs(TESTED[1], device="cuda")))

    def test_large_angles(self) -> None:
        inputs = make_inputs(TESTED[0], device="cuda")
        check(inputs | {"angles": 100 * inputs["angles"]})

    def test_runs_are_bit_equal_and_can_be_captured(self) -> None:
        made = make_inputs(TIMED_GPU[1], dtype=torch.bfloat16, device="cuda")
        leaves: dict[str, Any] = {k: v.requires_grad_() for k, v in made.items()}

        def step() -> tuple[Any, ...]:
            k, q = turned_qk(**leaves)
            return k.detach(), q.detach(), *torch.autograd.grad((k, q), list(leaves.values()), (k.detach(), q.detach()))

        expected = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = step()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
