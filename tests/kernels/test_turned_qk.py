"""Promises of turned_qk: right in every shape, dtype and layout, one node when compiled, clear errors."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients
from mambaverse.kernels.turned_qk import reference, turned_qk
from mambaverse.kernels.turned_qk.cases import TESTED, Case, make_inputs

SMALL = Case(1, 3, 2, 1, 2, 6, 2, "for gradcheck")
BOTH = ["interleaved", "half_split"]


def pairings(case: Case) -> list[str]:
    return BOTH if case.state_dim % 2 == 0 else BOTH[:1]


def check(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, **flags: Any) -> None:
    wide = {k: v.double() for k, v in inputs.items()}
    with nan_filled_empty():
        actual = outputs_and_gradients(turned_qk, inputs, **flags)
    for name, expected in outputs_and_gradients(turned_qk, wide, cotangents_as=[dtype, dtype], **flags).items():
        assert_close(name, actual[name], expected, dtype)


@pytest.mark.parametrize("pairing", BOTH)
def test_reference_is_a_product_with_a_rotation(pairing: str) -> None:
    inputs: dict[str, Any] = make_inputs(TESTED[1], dtype=torch.float64)
    k, _ = turned_qk(**inputs, pairing=pairing)
    n = F.rms_norm(inputs["B"], [12], inputs["B_weight"], 1e-5)
    for head in range(6):
        expected = n[0, 4, :, head // 3] + inputs["B_bias"][head]
        z = torch.view_as_complex(
            expected.unflatten(-1, (6, 2))
            if pairing == "interleaved"
            else expected.unflatten(-1, (2, 6)).mT.contiguous()
        )
        turned = torch.view_as_real(z * torch.exp(1j * inputs["angles"][0, 4, head]))
        turned = turned if pairing == "interleaved" else turned.mT
        assert_close("k", k[0, 4, :, head], turned.flatten(-2))


@pytest.mark.parametrize("pairing", BOTH)
def test_gradcheck(pairing: str) -> None:
    leaves = [v.requires_grad_() for v in make_inputs(SMALL, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(partial(turned_qk, pairing=pairing), leaves)


@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.reason)
def test_explicit_backward_is_the_derivative_of_the_reference(case: Case) -> None:
    leaves: Any = [v.requires_grad_() for v in make_inputs(case, dtype=torch.float64).values()]
    for pairing in pairings(case):
        flags: Any = (pairing == "interleaved", 1e-3)
        outputs = reference.forward(*[*leaves, *flags])
        seeds: Any = [torch.randn_like(out) for out in outputs]
        expected = torch.autograd.grad(outputs, leaves, seeds, materialize_grads=True)
        with torch.no_grad():
            actual = reference.backward(*[*seeds, *leaves, *flags])
        for a, e in zip(actual, expected, strict=True):
            assert_close("gradient", a, e)


@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.reason)
def test_every_output_and_gradient_is_within_tolerance(case: Case) -> None:
    for pairing in pairings(case):
        check(make_inputs(case), pairing=pairing, eps=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_tolerance(dtype: torch.dtype) -> None:
    inputs: dict[str, Any] = make_inputs(TESTED[0], dtype=dtype)
    check(inputs, dtype)
    k, q = turned_qk(**inputs | {"C": inputs["C"].float()})
    assert (k.dtype, q.dtype) == (dtype, torch.float32)


def test_a_turn_and_back_is_nothing() -> None:
    inputs: dict[str, Any] = make_inputs(TESTED[0])
    for turns in (1, 100):
        k, _ = turned_qk(**inputs | {"angles": torch.full_like(inputs["angles"], 2 * math.pi * turns)})
        assert_close("k", k, turned_qk(**inputs | {"angles": torch.zeros_like(inputs["angles"])})[0], torch.float16)


def test_strides_do_not_matter() -> None:
    inputs: dict[str, Any] = make_inputs(TESTED[1])
    expected = turned_qk(**inputs)
    strided = {k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in inputs.items()}
    for actual, e in zip(turned_qk(**strided), expected, strict=True):
        assert torch.equal(actual, e)
        assert actual.is_contiguous()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(backend: str, output: int) -> None:
    leaves: dict[str, Any] = {k: v.requires_grad_() for k, v in make_inputs(TESTED[0]).items()}
    with use_backend(backend):
        out = turned_qk(**leaves)[output]
    unused = "C" if output == 0 else "B"
    gradients = torch.autograd.grad(out.sum(), list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert bool(gradient.any()) != name.startswith(unused)


def test_no_tokens() -> None:
    with nan_filled_empty():
        results = outputs_and_gradients(turned_qk, make_inputs(Case(2, 0, 1, 1, 2, 4, 1, "empty")))
    assert results["out0"].shape == (2, 0, 1, 2, 4)
    assert not results["dB_bias"].any() and not results["dC_weight"].any()


class Both(torch.nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        k, q = turned_qk(*tensors, pairing="half_split")
        return k + q


def test_compiles_and_exports_as_one_node() -> None:
    inputs = make_inputs(TESTED[0])
    expected = Both()(*inputs.values())
    assert torch.equal(torch.compile(Both(), backend="eager", fullgraph=True)(*inputs.values()), expected)
    program = torch.export.export(Both(), tuple(inputs.values()))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and "mambaverse" in str(n.target)]
    assert calls == [torch.ops.mambaverse.turned_qk.default]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
def test_opcheck() -> None:
    leaves = [v.requires_grad_() for v in make_inputs(SMALL, dtype=torch.bfloat16).values()]
    torch.library.opcheck(torch.ops.mambaverse.turned_qk, (*leaves, True, 1e-5, "auto"))


def test_gradients_are_tensors_of_their_own_with_the_strides_of_the_fake() -> None:
    inputs = list(make_inputs(SMALL).values())
    k, q = torch.ops.mambaverse.turned_qk(*inputs, True, 1e-5, "auto")
    gradients = torch.ops.mambaverse.turned_qk_backward(
        k, q, *(t.mT.contiguous().mT if t.ndim > 1 else t for t in inputs), True, 1e-5, "auto"
    )
    assert all(g.is_contiguous() and g.storage_offset() == 0 for g in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.randn(1, 3, 2, 6)}, r"B is torch.float32 of shape \(1, 3, 2, 6\); expected .*\(B, L, R, G, N\)"),
        ({"C": torch.randn(1, 3, 2, 1, 5)}, r"C has shape .*; expected \(B, L, R, G, N\) = \(1, 3, 2, 1, 6\)"),
        ({"B_weight": torch.randn(5)}, r"B_weight has shape \(5,\); expected \(N,\) = \(6,\)"),
        ({"B_bias": torch.randn(2, 6)}, r"B_bias has shape \(2, 6\); expected \(H, R, N\)"),
        ({"C_bias": torch.randn(3, 2, 6)}, r"C_bias has shape \(3, 2, 6\); expected \(H, R, N\) = \(2, 2, 6\)"),
        ({"angles": torch.randn(1, 3, 2, 4)}, "4 pairs of 6 channels cannot turn"),
        ({"angles": torch.randn(1, 3, 2)}, r"angles has shape \(1, 3, 2\); expected \(B, L, H, S\)"),
        ({"angles": torch.ones(1, 3, 2, 2, dtype=torch.int64)}, "angles has dtype torch.int64"),
        ({"eps": -1.0}, "eps is -1.0; expected a finite number of at least 0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"pairing": "halves"}, "pairing is 'halves'; expected one of interleaved, half_split"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**make_inputs(SMALL), **change}
    with pytest.raises(ValueError, match="turned_qk: " + message):
        turned_qk(**arguments)
