"""Promises of causal_conv1d's Triton kernels, kept in Triton's interpreter on the CPU, a process of its own."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import pytest
import torch

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from mambaverse.kernels.causal_conv1d.cases import TESTED, Case
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_all_of_this_file_passes_in_the_interpreter")
USUAL = Case(2, 37, 33, 4, "more than one chunk, channels beside every block")


@pytest.mark.skipif(INTERPRETED, reason="starts that process")
def test_all_of_this_file_passes_in_the_interpreter(passes_in_the_interpreter):
    passes_in_the_interpreter()


def draw(case: Case, dtype: torch.dtype = torch.float32, *, num_states: int | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(case.length)
    state = (case.batch if num_states is None else num_states, case.width - 1, case.dim)
    shapes = {
        "x": (case.batch, case.length, case.dim),
        "weight": (case.dim, case.width),
        "bias": (case.dim,),
        "initial_state": state,
    }
    return {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for k, s in shapes.items()}


def check(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, **flags: Any) -> None:
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    with use_backend("triton"), nan_filled_empty():
        actual = outputs_and_gradients(causal_conv1d, inputs, return_final_state=True, **flags)
    for name, expected in outputs_and_gradients(causal_conv1d, wide, return_final_state=True, **flags).items():
        assert_close(name, actual[name], expected, dtype)


@interpreted
@pytest.mark.parametrize("case", [*TESTED[2:], USUAL], ids=lambda c: c.reason)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_output_and_gradient_is_within_tolerance(case, reverse):
    check(draw(case), activation="silu", reverse=reverse)
    check(draw(case) | {"bias": None, "initial_state": None}, reverse=reverse)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_tolerance(dtype):
    check(draw(USUAL) | {"x": draw(USUAL, dtype)["x"]}, dtype, activation="silu")


@interpreted
@pytest.mark.parametrize("bounds", [[0, 0, 2, 2, 36, 41, 41], [0, 1, 41]])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_equal_the_reference_and_separate_calls(bounds, reverse):
    inputs = draw(Case(1, 41, 5, 4, "packed"), num_states=len(bounds) - 1)
    flags: dict[str, Any] = {"activation": "silu", "reverse": reverse}
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    check(inputs, cu_seqlens=cu_seqlens, **flags)
    check(inputs | {"initial_state": None}, cu_seqlens=cu_seqlens.long(), **flags)
    with use_backend("triton"):
        y, state = causal_conv1d(**inputs, **flags, cu_seqlens=cu_seqlens, return_final_state=True)
        for s, (begin, end) in enumerate(pairwise(bounds)):
            one = inputs | {"x": inputs["x"][:, begin:end], "initial_state": inputs["initial_state"][s : s + 1]}
            expected_y, expected_state = causal_conv1d(**one, **flags, return_final_state=True)
            assert_close("y", y[:, begin:end], expected_y)
            assert torch.equal(state[s], expected_state[0])


@interpreted
def test_any_strides_of_x_and_its_gradient():
    inputs = {k: v.requires_grad_() for k, v in draw(USUAL).items()}
    x = inputs["x"].detach()
    with use_backend("triton"):
        y = causal_conv1d(**inputs)
        for layout in (torch.cat((x, x), -1).chunk(2, -1)[1], x.mT.contiguous().mT):
            assert torch.equal(causal_conv1d(**inputs | {"x": layout}), y)
        dy = torch.randn(y.shape)
        expected = torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True)
        for layout in (dy.mT.contiguous().mT, torch.cat((dy, dy), -1).chunk(2, -1)[1]):
            actual = torch.autograd.grad(y, list(inputs.values()), layout, retain_graph=True)
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@interpreted
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_empty_inputs(batch, length):
    inputs = draw(Case(batch, length, 3, 4, "empty"))
    with use_backend("triton"), nan_filled_empty():
        out = outputs_and_gradients(causal_conv1d, inputs, activation="silu", return_final_state=True)
    assert out["out0"].shape == (batch, length, 3)
    assert torch.equal(out["out1"], inputs["initial_state"])
    assert torch.equal(out["dweight"], torch.zeros(3, 4))
    assert out["dinitial_state"].isfinite().all()


@interpreted
def test_gradient_through_the_final_state_alone():
    leaves = {k: v.requires_grad_() for k, v in draw(USUAL).items()}
    with use_backend("triton"):
        state = causal_conv1d(**leaves, return_final_state=True)[1]
        (dx,) = torch.autograd.grad(state.sum(), leaves["x"])
    assert torch.equal(dx[:, -3:], torch.ones(2, 3, USUAL.dim))
    assert dx[:, :-3].count_nonzero() == 0


@interpreted
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_update_is_one_step_in_place(width):
    inputs = draw(Case(3, 5, 300, width, ""))
    x, weight, bias, initial = inputs.values()
    expected, final = causal_conv1d(**inputs, activation="silu", return_final_state=True)
    state = initial.mT.contiguous().mT
    with use_backend("triton"):
        steps = [causal_conv1d_update(x_t, state, weight, bias, "silu") for x_t in x.unbind(1)]
    assert_close("y", torch.stack(steps, 1), expected)
    assert torch.equal(state, final)


@interpreted
def test_what_cannot_run_is_named():
    x = torch.randn(1, 5, 3)
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="40 columns; backend 'triton' takes up to 32"):
            causal_conv1d(x, torch.randn(3, 40))
        with pytest.raises(ValueError, match="from 0 to 3; expected from 0 to the length 5"):
            causal_conv1d(x, torch.randn(3, 4), cu_seqlens=torch.tensor([0, 3]))
        with pytest.raises(ValueError, match="holds no sequence"):
            causal_conv1d(x, torch.randn(3, 4), cu_seqlens=torch.tensor([0]))
