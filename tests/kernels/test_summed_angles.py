"""Promises of summed_angles: exact over long sequences, right in every shape and layout, one node when compiled.

Its Triton kernels keep them in Triton's interpreter, a process of its own, where a chunk has 16 tokens, and on a GPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.summed_angles import reference, summed_angles
from mambaverse.kernels.summed_angles.cases import TESTED, TIMED_GPU, Case, make_inputs
from mambaverse.kernels.testing import assert_captured, assert_close, nan_filled_empty, outputs_and_gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_the_interpreters_part_passes_there")
compiled = pytest.mark.skipif(INTERPRETED, reason="is of the other process")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PACKED = [[0, 0, 3, 3, 68, 70, 70], [0, 70], [0, 32, 70]]  # empty and short sequences, at and beside boundaries


@compiled
def test_the_interpreters_part_passes_there(passes_in_the_interpreter: Callable[[], None]) -> None:
    passes_in_the_interpreter()


def check(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, backend: str = "auto", **flags: Any) -> None:
    """Compare with float64. Angles are compared as points of the circle: one just below 2π is one just above 0."""
    with use_backend(backend), nan_filled_empty():
        actual = outputs_and_gradients(summed_angles, inputs, **flags)
    expected = outputs_and_gradients(
        summed_angles, {k: v.double() for k, v in inputs.items()}, cotangents_as=[torch.float32], **flags
    )
    for results in (actual, expected):
        angles = results["out0"]
        assert angles.numel() == 0 or (angles.min() >= 0 and angles.max() <= 2 * math.pi * (1 + 1e-6))
        results["out0"] = torch.stack([angles.cos(), angles.sin()])
    for name, value in expected.items():
        assert_close(name, actual[name], value, dtype if name != "out0" else torch.float32)


def check_all(backend: str, device: str = "cpu") -> None:
    for case in TESTED:
        inputs = make_inputs(case, device=device)
        check(inputs, backend=backend)
        check({k: v for k, v in inputs.items() if k != "initial"}, backend=backend)
    check(make_inputs(TESTED[0], dtype=torch.float16, device=device), torch.float16, backend)
    for bounds in PACKED:
        inputs = make_inputs(Case(1, 70, 3, 5, "packed"), device=device)
        inputs["initial"] = torch.rand(len(bounds) - 1, 3, 5, device=device)
        check(inputs, backend=backend, cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device))
    inputs = make_inputs(TESTED[1], device=device)
    check({k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in inputs.items()}, backend=backend)
    check_empty(backend, device)


def check_empty(backend: str, device: str) -> None:
    for batch, length, bounds in ((2, 0, None), (0, 5, None), (1, 0, [0, 0]), (1, 0, [0])):
        inputs = make_inputs(Case(batch, length, 2, 3, "empty"), device=device)
        cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)
        inputs["initial"] = torch.rand(batch if bounds is None else len(bounds) - 1, 2, 3, device=device)
        with use_backend(backend), nan_filled_empty():
            results = outputs_and_gradients(summed_angles, inputs, cu_seqlens=cu_seqlens)
        assert results["out0"].shape == (batch, length, 2, 3)
        assert not results["dinitial"].any()


def check_long(backend: str, device: str = "cpu", length: int = 20_000) -> None:
    """A sum in fp32 would be off by 1e-3 radians here."""
    dt = torch.rand(1, length, 1, generator=torch.Generator().manual_seed(0)).to(device)
    rate = torch.tensor([0.1, 0.07], device=device).expand(1, length, 2)
    with use_backend(backend):
        angles = summed_angles(dt, rate)
    truth = (dt[..., None].double() * rate[:, :, None].double() * math.pi).cumsum(1)
    assert ((angles.double() - truth + math.pi) % (2 * math.pi) - math.pi).abs().max() < 1e-6


def check_far(backend: str, device: str = "cpu") -> None:
    """Tokens so far apart that a few of them are more than 2^31 elements; memory between them is never touched."""
    length, step = 5, 2**29 + 8
    memory = torch.empty((length - 1) * step + 1, dtype=torch.float16, device=device)
    dt = memory.as_strided((1, length, 1), (1, step, 1))
    near = torch.rand(1, length, 1).to(dt)
    rate = torch.rand(1, length, 2, device=device)
    with use_backend(backend):
        assert torch.equal(summed_angles(dt.copy_(near), rate), summed_angles(near, rate))


@compiled
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_output_and_gradient_is_within_tolerance(backend: str) -> None:
    check_all(backend)
    check_long(backend)


@interpreted
def test_triton_is_within_tolerance() -> None:
    check_all("triton")
    check_long("triton", length=2000)
    check_far("triton")


@pytest.mark.gpu
@on_gpu
def test_a_gpu_is_within_tolerance() -> None:
    check_all("auto", "cuda")
    check_long("auto", "cuda", length=200_000)
    check_far("auto", "cuda")
    inputs = make_inputs(Case(3, 197, 6, 32, ""), dtype=torch.bfloat16, device="cuda")
    check(inputs, torch.bfloat16)


@pytest.mark.gpu
@on_gpu
def test_runs_on_a_gpu_are_bit_equal_and_can_be_captured() -> None:
    leaves: dict[str, Any] = {k: v.requires_grad_() for k, v in make_inputs(TIMED_GPU[1], device="cuda").items()}

    def step() -> tuple[Tensor, ...]:
        angles = summed_angles(**leaves)
        return angles.detach(), *torch.autograd.grad(angles, list(leaves.values()), angles.detach())

    assert_captured(step)


@compiled
def test_explicit_backward_is_the_derivative_of_the_reference() -> None:
    for bounds in (None, [0, 2, 2, 5]):
        inputs = make_inputs(Case(1 if bounds else 2, 5, 3, 2, "small"), dtype=torch.float64)
        if bounds:
            inputs["initial"] = torch.rand(3, 3, 2, dtype=torch.float64)
        leaves: Any = [v.requires_grad_() for v in inputs.values()]
        cu_seqlens = None if bounds is None else torch.tensor(bounds)
        angles = reference.forward(*[*leaves, cu_seqlens])
        seed = torch.randn_like(angles)
        expected = torch.autograd.grad(angles, leaves, seed)
        with torch.no_grad():
            actual = reference.backward(*[seed, *leaves, cu_seqlens])
        for a, e in zip(actual, expected, strict=True):
            assert_close("gradient", a, e)


@compiled
def test_packed_sequences_are_separate_calls() -> None:
    inputs: dict[str, Any] = make_inputs(Case(1, 70, 3, 5, "packed"))
    bounds = PACKED[0]
    initial = torch.rand(6, 3, 5)
    angles = summed_angles(inputs["dt"], inputs["rate"], initial=initial, cu_seqlens=torch.tensor(bounds))
    for s, (begin, end) in enumerate(pairwise(bounds)):
        one = summed_angles(inputs["dt"][:, begin:end], inputs["rate"][:, begin:end], initial=initial[s : s + 1])
        assert torch.equal(angles[:, begin:end], one)


class Angles(torch.nn.Module):
    def forward(self, dt: Tensor, rate: Tensor, initial: Tensor) -> Tensor:
        return summed_angles(dt, rate, initial=initial)


@compiled
def test_compiles_and_exports_as_one_node() -> None:
    inputs = make_inputs(TESTED[0])
    expected = Angles()(**inputs)
    assert torch.equal(torch.compile(Angles(), backend="eager", fullgraph=True)(**inputs), expected)
    program = torch.export.export(Angles(), tuple(inputs.values()))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and "mambaverse" in str(n.target)]
    assert calls == [torch.ops.mambaverse.summed_angles.default]


@compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [v.requires_grad_() for v in make_inputs(Case(1, 5, 3, 2, "small"), dtype=dtype).values()]
        torch.library.opcheck(torch.ops.mambaverse.summed_angles, (*leaves, torch.tensor([0, 5]), "auto"))
        torch.library.opcheck(torch.ops.mambaverse.summed_angles, (*leaves[:2], None, None, "auto"))


@compiled
def test_gradients_have_the_strides_of_the_fake() -> None:
    dt, rate = torch.rand(5, 2, 3).transpose(0, 1), torch.rand(5, 2, 4).transpose(0, 1)
    gradients = torch.ops.mambaverse.summed_angles_backward(torch.rand(2, 5, 3, 4), dt, rate, None, None, "auto")
    assert all(g.is_contiguous() for g in gradients)


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.randn(2, 70)}, r"dt has shape \(2, 70\); expected \(B, L, H\)"),
        ({"rate": torch.randn(2, 60, 8)}, r"rate has shape \(2, 60, 8\); expected \(B, L, S\) = \(2, 70, 8\)"),
        ({"initial": torch.randn(2, 4, 7)}, r"initial has shape .*; expected \(sequences, H, S\) = \(2, 4, 8\)"),
        ({"cu_seqlens": torch.tensor([0, 70])}, "the batch is 2; expected 1"),
        ({"rate": torch.randn(2, 70, 8, device="meta")}, "rate is on meta; expected cpu"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**make_inputs(TESTED[0]), **change}
    with pytest.raises(ValueError, match="summed_angles: " + message):
        summed_angles(**arguments)
