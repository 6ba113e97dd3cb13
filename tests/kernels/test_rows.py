"""Promises of the arrays that numba kernels get: a tensor's own memory, and a tensor that stays what it was."""

import importlib
from typing import Any

import pytest
import torch

from mambaverse.kernels.rows import as_array

OPERATORS = [
    "causal_conv1d", "cross_scan", "depthwise_conv2d", "lti_conv", "nc_ssd", "norm", "selective_scan", "ssd",
    "summed_angles", "trapezoid_weights", "turned_qk",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,), (0, 3)], ids=str)
def test_an_array_is_the_memory_of_its_tensor_and_keeps_it(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.ones(4, *shape, dtype=dtype)[2]
    array, other = as_array(x), x.numpy()
    assert array.shape == shape and array.dtype == other.dtype and array.flags.writeable and array.flags.c_contiguous
    array += 1
    assert (other == 2).all()
    del x, other
    torch.full((4, *shape), 5, dtype=dtype)  # would take the place of memory that nobody held
    assert (array == 2).all()


@pytest.mark.parametrize("op", OPERATORS)
def test_an_operator_leaves_storages_resizable(op: str) -> None:
    cases = importlib.import_module(f"mambaverse.kernels.{op}.cases")
    inputs: dict[str, Any] = {
        name: value.clone().requires_grad_(value.is_floating_point()) if torch.is_tensor(value) else value
        for name, value in cases.make_inputs(cases.TESTED[0]).items()
    }
    outputs = cases.run(inputs)
    y = outputs[0] if isinstance(outputs, tuple) else outputs
    leaves = [value for value in inputs.values() if torch.is_tensor(value)]
    y.sum().backward()
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert grads and all(tensor.untyped_storage().resizable() for tensor in (y, *leaves, *grads))
