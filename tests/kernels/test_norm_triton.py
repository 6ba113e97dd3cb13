"""Promises of the norms' and of selective_scan_update's Triton kernels, kept in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.norm import gated_rms_norm, layer_norm, rms_norm
from mambaverse.kernels.norm.cases import TESTED, Case
from mambaverse.kernels.selective_scan.update import selective_scan_update
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_all_of_this_file_passes_in_the_interpreter")
EPS = 1e-3  # large enough to be seen
CASES = (*TESTED, Case((5, 1030), 515, "two warps a row, several tiles of it"))


@pytest.mark.skipif(INTERPRETED, reason="starts that process")
def test_all_of_this_file_passes_in_the_interpreter(passes_in_the_interpreter):
    passes_in_the_interpreter()


def draw(case: Case, dtype: torch.dtype = torch.float32, *, gated: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(case.shape))
    dim = case.shape[-1:]
    shapes = {"x": case.shape, "weight": dim} | ({"z": case.shape} if gated else {"bias": dim, "residual": case.shape})
    return {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for k, s in shapes.items()}


def check(
    function: Callable[..., Any], inputs: dict[str, Any], dtype: torch.dtype = torch.float32, **flags: Any
) -> None:
    wide = {k: v.double() if v is not None else None for k, v in inputs.items()}
    with use_backend("triton"), nan_filled_empty():
        actual = outputs_and_gradients(function, inputs, eps=EPS, **flags)
    for name, expected in outputs_and_gradients(function, wide, eps=EPS, **flags).items():
        assert_close(name, actual[name], expected, dtype)


def check_norms(case: Case) -> None:
    for function in (rms_norm, layer_norm):
        if case.shape[-1] == 1 and function is layer_norm:
            continue  # is 0: no relative error to measure
        inputs = draw(case)
        check(function, inputs)
        check(function, inputs | {"bias": None, "residual": None})


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.reason)
def test_norms_are_within_tolerance(case):
    check_norms(case)


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.reason)
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gated_norm_is_within_tolerance(case, norm_before_gate):
    for group_size in {case.shape[-1], case.group_size}:
        check(gated_rms_norm, draw(case, gated=True), norm_before_gate=norm_before_gate, group_size=group_size)


@interpreted
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_rows_too_wide_for_registers_are_within_tolerance(norm_before_gate, monkeypatch):
    import mambaverse.kernels.norm.triton as backend

    monkeypatch.setattr(backend, "MAX_IN_REGISTERS", 8)
    monkeypatch.setattr(backend, "_WIDE_BLOCK", 16)
    case = Case((3, 33), 11, "as if it were wide")
    check_norms(case)
    check(gated_rms_norm, draw(case, gated=True), norm_before_gate=norm_before_gate, group_size=11)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_within_tolerance(dtype):
    case = TESTED[1]
    mixed = draw(case) | {"x": draw(case, dtype)["x"]}
    for function in (rms_norm, layer_norm):
        check(function, mixed, dtype)
    check(gated_rms_norm, draw(case, gated=True) | {"x": mixed["x"]}, dtype)
    with use_backend("triton"):
        y, new_residual = rms_norm(**mixed)
    assert (y.dtype, new_residual.dtype) == (dtype, torch.float32)


@interpreted
def test_any_strides_and_no_rows():
    inputs = draw(TESTED[0])
    x = inputs["x"]
    with use_backend("triton"):
        expected = layer_norm(**inputs)
        for layout in (torch.cat((x, x), -1).chunk(2, -1)[1], x.mT.contiguous().mT):
            y, new_residual = layer_norm(**inputs | {"x": layout})
            assert torch.equal(y, expected[0])
            assert torch.equal(new_residual, expected[1])
        for function, gated in ((rms_norm, False), (gated_rms_norm, True)):
            with nan_filled_empty():
                out = outputs_and_gradients(function, draw(Case((2, 0, 3), 3, "empty"), gated=gated))
            assert torch.equal(out["dweight"], torch.zeros(3))


@interpreted
@pytest.mark.parametrize(("dim", "size", "groups"), [(70, 16, 1), (6, 1, 3), (4, 256, 2), (7, 33, 1)])
def test_scan_update_is_one_step_in_place(dim, size, groups):
    generator = torch.Generator().manual_seed(size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shared = (2, size) if groups == 1 else (2, groups, size)
    inputs: dict[str, Any] = {
        "u": normal(2, dim), "delta": 5 * normal(2, dim), "A": -normal(dim, size).exp(), "B": normal(*shared),
        "C": normal(*shared), "D": normal(dim), "z": normal(2, dim), "delta_bias": normal(dim) - 4,
    }  # fmt: skip
    state = normal(2, size, dim).mT
    wide_state = state.double()
    bare = {"D": None, "z": None, "delta_bias": None}
    for options in (inputs, inputs | bare):
        for softplus in (True, False):
            options = options if softplus else options | {"delta": options["delta"].abs() / 5}
            wide: dict[str, Any] = {k: None if v is None else v.double() for k, v in options.items()}
            expected = selective_scan_update(wide_state, **wide, delta_softplus=softplus)
            with use_backend("triton"):
                y = selective_scan_update(state, **options, delta_softplus=softplus)
            assert_close("y", y, expected)
            assert_close("state", state, wide_state, torch.float32)
