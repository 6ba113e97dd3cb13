"""Promises of the one-step updates on a GPU, in CUDA graphs too: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambaverse.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from mambaverse.kernels.selective_scan.update import selective_scan_update
from mambaverse.kernels.ssd.update import ssd_update
from mambaverse.kernels.testing import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cuda").to(dtype)


def captured(step: Callable[[], Tensor], state: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of three replays of a graph of `step`, and the state after them."""
    before = state.clone()
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    state.copy_(before)
    outs = []
    for _ in range(3):
        graph.replay()
        outs.append(out.clone())
    return outs, state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_conv_update_is_one_step_also_in_a_graph(width, dtype):
    x, bias = normal(3, 5, 300, dtype=dtype), normal(300, dtype=dtype, seed=2)
    weight, initial = normal(300, width, dtype=dtype, seed=1), normal(3, width - 1, 300, dtype=dtype, seed=3)
    inputs: dict[str, Any] = {"weight": weight, "bias": bias, "initial_state": initial, "activation": "silu"}
    expected, final = causal_conv1d(x, **inputs, return_final_state=True)
    state = initial.mT.contiguous().mT  # any strides, and stays where it is
    place = state.data_ptr()
    steps = [causal_conv1d_update(x_t, state, weight, bias, "silu") for x_t in x.unbind(1)]
    assert_close("y", torch.stack(steps, 1), expected, dtype)
    assert torch.equal(state, final)
    assert state.data_ptr() == place
    state = initial.clone()
    outs, _ = captured(lambda: causal_conv1d_update(x[:, 0], state, weight, bias, "silu"), state)
    repeated = causal_conv1d(x[:, :1].expand(-1, 3, -1), **inputs)
    assert_close("replays", torch.stack(outs, 1), repeated, dtype)


def scan_inputs(batch: int, dim: int, size: int, groups: int, dtype: torch.dtype) -> dict[str, Any]:
    shared = (batch, size) if groups == 1 else (batch, groups, size)
    return {
        "u": normal(batch, dim, dtype=dtype),
        "delta": 4 * normal(batch, dim, dtype=dtype, seed=1),
        "A": -normal(dim, size, seed=2).exp(),
        "B": normal(*shared, dtype=dtype, seed=3),
        "C": normal(*shared, dtype=dtype, seed=4),
        "D": normal(dim, seed=5),
        "z": normal(batch, dim, dtype=dtype, seed=6),
        "delta_bias": normal(dim, seed=7) - 4,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "dim", "size", "groups"), [(3, 300, 16, 1), (2, 96, 1, 3), (1, 10, 256, 2), (2, 7, 33, 1)]
)
def test_scan_update_is_one_step_also_in_a_graph(batch, dim, size, groups, dtype):
    inputs, state = scan_inputs(batch, dim, size, groups, dtype), normal(batch, dim, size, seed=8)
    wide, wide_state = {k: v.double() for k, v in inputs.items()}, state.double()
    before = state.clone()
    for flags in ({"delta_softplus": True}, {"delta_softplus": True, "D": None, "z": None, "delta_bias": None}):
        expected = selective_scan_update(wide_state, **wide | flags)
        assert_close("y", selective_scan_update(state, **inputs | flags), expected, dtype)
        assert_close("state", state, wide_state, torch.float32)

    def step() -> Tensor:
        return selective_scan_update(before, **inputs, delta_softplus=True)

    start = before.clone().double()
    outs, _ = captured(step, before)
    for out in outs:
        assert_close("replay", out, selective_scan_update(start, **wide, delta_softplus=True), dtype)
    assert_close("state after replays", before, start, torch.float32)


def test_scan_update_keeps_a_nan_and_gives_it_to_no_other_channel():
    inputs, state = scan_inputs(2, 6, 4, 1, torch.float32), normal(2, 6, 4, seed=8)
    inputs["delta"][0, 3] = float("nan")
    y = selective_scan_update(state, **inputs, delta_softplus=True)
    for result in (y, state[..., 0]):
        assert result.isnan().nonzero().tolist() == [[0, 3]]


def test_scan_update_of_a_complex_state_is_torchs():
    inputs = scan_inputs(2, 6, 4, 1, torch.float32)
    inputs["A"] = torch.complex(inputs["A"], normal(6, 4, seed=9))
    state = torch.complex(normal(2, 6, 4, seed=8), normal(2, 6, 4, seed=10))
    on_cpu = state.cpu()
    y = selective_scan_update(state, **inputs)
    assert_close("y", y.cpu(), selective_scan_update(on_cpu, **{k: v.cpu() for k, v in inputs.items()}))
    assert_close("state", state.cpu(), on_cpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "head", "groups", "size"),
    [(2, 8, 32, 2, 64), (3, 4, 64, 1, 128), (1, 3, 5, 3, 7), (2, 2, 128, 1, 256)],
)
def test_ssd_update_is_one_step_also_in_a_graph(batch, heads, head, groups, size, dtype):
    inputs: dict[str, Any] = {
        "x": normal(batch, heads, head, dtype=dtype),
        "dt": normal(batch, heads, dtype=dtype, seed=2),
        "A": -normal(heads, seed=3).exp(),
        "B": normal(batch, groups, size, dtype=dtype, seed=4),
        "C": normal(batch, groups, size, dtype=dtype, seed=5),
        "D": normal(heads, head, seed=6),
        "z": normal(batch, heads, head, dtype=dtype, seed=1),
        "dt_bias": normal(heads, seed=7) - 2,
    }
    state = normal(batch, heads, head, size, seed=8)
    wide, wide_state = {k: v.double() for k, v in inputs.items()}, state.double()
    before = state.clone()
    for more in ({}, {"D": None, "z": None, "dt_bias": None}, {"D": inputs["D"][:, 0]}):
        flags: dict[str, Any] = {"dt_softplus": True, "dt_limit": (0.05, 1.0)} | more
        wide_flags = {k: v.double() if isinstance(v, Tensor) else v for k, v in flags.items()}
        expected = ssd_update(wide_state, **wide | wide_flags)
        assert_close("y", ssd_update(state, **inputs | flags), expected, dtype)
        assert_close("state", state, wide_state, torch.float32)
    start = before.double()
    outs, _ = captured(lambda: ssd_update(before, **inputs, dt_softplus=True), before)
    for out in outs:
        assert_close("replay", out, ssd_update(start, **wide, dt_softplus=True), dtype)
    assert_close("state after replays", before, start, torch.float32)


def test_updates_compile_as_one_graph():
    inputs = scan_inputs(2, 96, 16, 1, torch.float32)
    weight = normal(96, 4, seed=11)

    def step(conv_state: Tensor, state: Tensor, u: Tensor) -> Tensor:
        u = causal_conv1d_update(u * 1.5, conv_state, weight, None, "silu")
        others = {k: v for k, v in inputs.items() if k != "u"}
        return selective_scan_update(state, u, **others, delta_softplus=True) + 1

    def states() -> tuple[Tensor, Tensor]:
        return normal(2, 3, 96, seed=12), normal(2, 96, 16, seed=13)

    eager, compiled = states(), states()
    function = torch.compile(step, fullgraph=True)
    for _ in range(2):
        assert_close("y", function(*compiled, inputs["u"]), step(*eager, inputs["u"]))
    for name, actual, expected in zip(("conv_state", "state"), compiled, eager, strict=True):
        assert_close(name, actual, expected)
