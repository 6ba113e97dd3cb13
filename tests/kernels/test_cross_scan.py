"""Promises of cross_scan and cross_merge: the four orders, each the other's gradient, in every dtype and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.cross_scan import cross_merge, cross_scan
from mambaverse.kernels.cross_scan.cases import TESTED, Case, make_inputs, run
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients
from mambaverse.testing.subject import same

BACKENDS = ["cpu", "reference"]


def call(**inputs: Any) -> Any:
    return run(inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_four_orders_of_a_small_grid(backend: str) -> None:
    x = torch.arange(6.0).view(1, 2, 3, 1)  # 0 1 2 / 3 4 5
    with use_backend(backend):
        orders = cross_scan(x)[0, :, :, 0].tolist()
        merged = cross_merge(cross_scan(x), (2, 3))
    assert orders == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    assert torch.equal(merged, 4 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", TESTED, ids=lambda case: case.reason)
def test_outputs_and_gradients_are_within_tolerance(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype=dtype)
    expected = outputs_and_gradients(call, {k: v.double() for k, v in inputs.items()}, cotangents_as=[dtype, dtype])
    with nan_filled_empty():
        actual = outputs_and_gradients(call, inputs)
    for name, value in expected.items():
        assert_close(name, actual[name], value, dtype)
    assert torch.equal(actual["out0"].double(), expected["out0"])  # copies


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    inputs = make_inputs(TESTED[0])
    x, y = inputs["x"], inputs["y"]
    with use_backend(backend):
        expected = run(inputs)
        strided = run({"x": x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0), "y": y.mT.contiguous().mT})
        wide = run({"x": torch.cat([x, x], 3)[..., : x.shape[3]], "y": torch.cat([y, y], 1)[:, :4]})
    for results in (strided, wide):
        for actual, value in zip(results, expected, strict=True):
            same("of another layout", actual, value, 0.0)
            assert actual.is_contiguous()


def test_gradients_of_gradients() -> None:
    inputs = make_inputs(Case(1, 2, 3, 2, "for gradcheck"), dtype=torch.float64)
    leaves = tuple(value.requires_grad_() for value in inputs.values())
    assert torch.autograd.gradcheck(lambda x, y: run({"x": x, "y": y}), leaves)
    assert torch.autograd.gradgradcheck(lambda x, y: run({"x": x.square(), "y": y.square()}), leaves)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 2, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_nothing_out(backend: str, shape: tuple[int, ...]) -> None:
    batch, height, width, dim = shape
    with use_backend(backend):
        y = cross_scan(torch.empty(shape))
        assert y.shape == (batch, 4, height * width, dim)
        assert cross_merge(y, (height, width)).shape == shape


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ops_pass_opcheck(dtype: torch.dtype) -> None:
    inputs = make_inputs(TESTED[0], dtype=dtype)
    x, y = (value.requires_grad_() for value in inputs.values())
    torch.library.opcheck(torch.ops.mambaverse.cross_scan.default, (x, "auto"))
    torch.library.opcheck(torch.ops.mambaverse.cross_merge.default, (y, x.shape[1], x.shape[2], "auto"))


def test_compiles_whole() -> None:
    inputs = make_inputs(TESTED[1])
    for actual, expected in zip(torch.compile(run, backend="eager", fullgraph=True)(inputs), run(inputs), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: cross_scan(torch.ones(2, 6, 4)), r"x has shape \(2, 6, 4\); expected \(B, H, W, D\)"),
        (lambda: cross_scan(torch.ones(2, 3, 2, 4, dtype=torch.int64)), "expected a real floating dtype"),
        (lambda: cross_merge(torch.ones(2, 6, 4), (2, 3)), r"expected \(B, 4, L, D\)"),
        (lambda: cross_merge(torch.ones(2, 2, 6, 4), (2, 3)), "one sequence an order"),
        (lambda: cross_merge(torch.ones(2, 4, 6, 4), 6), r"spatial_shape is 6; expected \(H, W\)"),  # type: ignore[arg-type]
        (lambda: cross_merge(torch.ones(2, 4, 6, 4), (2, 4)), r"spatial_shape is \(2, 4\); .* L = 6"),
    ],
)
def test_wrong_arguments(action: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        action()
