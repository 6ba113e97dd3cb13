"""Promises of causal_conv1d and the norms on a GPU: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.causal_conv1d import cases as conv_cases
from mambaverse.kernels.causal_conv1d import causal_conv1d
from mambaverse.kernels.norm import cases as norm_cases
from mambaverse.kernels.norm import gated_rms_norm, layer_norm, rms_norm
from mambaverse.kernels.testing import assert_close, nan_filled_empty

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONV = (
    *conv_cases.TESTED,
    conv_cases.Case(3, 197, 384, 4, "vim_tiny: a length that no chunk divides"),
    conv_cases.Case(1, 1030, 200, 3, "channels beside the blocks of 128"),
    conv_cases.Case(2, 300, 64, 5, "five taps, narrow"),
    conv_cases.Case(1, 40, 24, 32, "the widest filter"),
)
NORM = (
    *norm_cases.TESTED,
    norm_cases.Case((515, 192), 64, "vim_tiny"),
    norm_cases.Case((300, 384), 384, "its inner width"),
    norm_cases.Case((257, 1024), 128, "one warp a row"),
    norm_cases.Case((70, 1030), 515, "two warps a row, nearly half of them idle"),
    norm_cases.Case((33, 5000), 2500, "eight warps a row"),
    norm_cases.Case((9, 16384), 16384, "the widest in registers"),
    norm_cases.Case((5, 20000), 20000, "too wide for registers"),
)
EPS = 1e-3


def in_turn(cases: tuple[Any, ...], flags: tuple[Any, ...], *thorough: str) -> list[Any]:
    """Return (case, flag, dtype): dtypes take turns, but for the cases named `thorough`, which have every one."""
    rows = []
    for i, case in enumerate(cases):
        for j, flag in enumerate(flags):
            chosen = DTYPES if case.reason.startswith(thorough) else [DTYPES[(i + j) % 3]]
            rows += [pytest.param(case, flag, dtype, id=f"{case.reason}-{j}-{str(dtype)[6:]}") for dtype in chosen]
    return rows


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cuda").to(dtype)


def conv_inputs(case: Any, dtype: torch.dtype = torch.float32, num_states: int | None = None) -> dict[str, Any]:
    rows = case.batch if num_states is None else num_states
    return {
        "x": normal(case.batch, case.length, case.dim, dtype=dtype),
        "weight": normal(case.dim, case.width, dtype=dtype, seed=1),
        "bias": normal(case.dim, dtype=dtype, seed=2),
        "initial_state": normal(rows, case.width - 1, case.dim, dtype=dtype, seed=3),
    }


def norm_inputs(case: Any, dtype: torch.dtype = torch.float32, gated: bool = False) -> dict[str, Any]:
    dim = case.shape[-1]
    inputs = {"x": normal(*case.shape, dtype=dtype), "weight": normal(dim, dtype=dtype, seed=1)}
    if gated:
        return inputs | {"z": normal(*case.shape, dtype=dtype, seed=2)}
    return inputs | {"bias": normal(dim, dtype=dtype, seed=3), "residual": normal(*case.shape, dtype=dtype, seed=4)}


def run(
    function: Callable[..., Any], inputs: dict[str, Any], dtype: torch.dtype = torch.float32, **flags: Any
) -> dict[str, Tensor]:
    """Return all outputs and gradients; the gradients that flow in are those of any precision, rounded to `dtype`."""
    leaves = {
        k: v.detach().clone().requires_grad_() if v is not None and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    out = function(**leaves, **flags)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    cotangents = [normal(*o.shape, dtype=dtype, seed=20 + i).to(o.dtype) for i, o in enumerate(outs)]
    torch.autograd.backward(outs, cotangents)
    gradients = {f"d{k}": v.grad for k, v in leaves.items() if v is not None and v.is_floating_point()}
    return {f"out{i}": o.detach() for i, o in enumerate(outs)} | gradients


def check(function: Callable[..., Any], inputs: dict[str, Any], dtype: torch.dtype, **flags: Any) -> None:
    """Hold every output and gradient against the reference in float64, and a second run against the first."""
    with nan_filled_empty():
        actual = run(function, inputs, dtype, **flags)
        again = run(function, inputs, dtype, **flags)
    rounded = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    for name, expected in run(function, rounded, dtype, **flags).items():
        assert_close(name, actual[name], expected, dtype)
        assert torch.equal(actual[name], again[name]), f"{name} differs between two runs"


@pytest.mark.parametrize(("case", "reverse", "dtype"), in_turn(CONV, (False, True), "two work items", "vim_tiny"))
def test_conv_is_within_tolerance_and_bit_equal_when_repeated(case, reverse, dtype):
    inputs = conv_inputs(case, dtype)
    check(causal_conv1d, inputs, dtype, activation="silu", reverse=reverse, return_final_state=True)
    bare = inputs | {"bias": None, "initial_state": None}
    check(causal_conv1d, bare, dtype, reverse=reverse, return_final_state=True)


@pytest.mark.parametrize("width", range(1, 10))
def test_conv_of_every_width(width):
    case = conv_cases.Case(2, 50, 72, width, "")
    mixed = conv_inputs(case) | {"x": conv_inputs(case, torch.bfloat16)["x"]}
    check(causal_conv1d, mixed, torch.bfloat16, activation="silu", return_final_state=True)


@pytest.mark.parametrize(("reverse", "dtype"), [(False, DTYPES[0]), (True, DTYPES[1]), (True, DTYPES[2])])
@pytest.mark.parametrize("bounds", [[0, 0, 2, 2, 80, 83, 83], [0, 83], [0, 1, 83], list(range(84))])
def test_packed_conv_equals_the_reference_and_separate_calls(bounds, reverse, dtype):
    inputs = conv_inputs(conv_cases.Case(1, 83, 72, 4, "packed"), dtype, len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    flags: dict[str, Any] = {"activation": "silu", "reverse": reverse, "return_final_state": True}
    check(causal_conv1d, inputs, dtype, cu_seqlens=cu_seqlens, **flags)
    check(causal_conv1d, inputs | {"initial_state": None}, dtype, cu_seqlens=cu_seqlens.long(), **flags)
    with nan_filled_empty():
        y, state = causal_conv1d(**inputs, cu_seqlens=cu_seqlens, **flags)
        for s, (begin, end) in enumerate(pairwise(bounds)):
            one = inputs | {"x": inputs["x"][:, begin:end], "initial_state": inputs["initial_state"][s : s + 1]}
            expected_y, expected_state = causal_conv1d(**one, **flags)
            assert torch.equal(y[:, begin:end], expected_y)
            assert torch.equal(state[s], expected_state[0])


def test_wrong_offsets_stay_inside_the_tensors():
    inputs = conv_inputs(conv_cases.Case(1, 83, 72, 4, "packed"), num_states=3)
    for bounds in ([-5, 900, 3, 83], [50, 40, 30, 20], [2**31 - 1, -(2**31), 0, 1]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        run(causal_conv1d, inputs, cu_seqlens=cu_seqlens, activation="silu", return_final_state=True)
    torch.cuda.synchronize()


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_empty_conv(batch, length):
    inputs = conv_inputs(conv_cases.Case(batch, length, 8, 4, "empty"))
    with nan_filled_empty():
        out = run(causal_conv1d, inputs, activation="silu", return_final_state=True)
    assert out["out0"].shape == (batch, length, 8)
    assert torch.equal(out["out1"], inputs["initial_state"])
    assert torch.equal(out["dweight"], torch.zeros_like(inputs["weight"]))
    assert out["dinitial_state"].isfinite().all()


def layouts(x: Tensor) -> list[Tensor]:
    return [
        torch.cat((x, x), -1).chunk(2, -1)[1],
        x.mT.contiguous().mT,
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat((x.new_zeros(*x.shape[:2], 1), x), -1)[..., 1:],  # rows that begin at odd addresses
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    inputs, norms = conv_inputs(CONV[0], dtype), norm_inputs(NORM[0], dtype)
    gated = norm_inputs(NORM[0], dtype, gated=True)
    for x in layouts(inputs["x"]):
        assert torch.equal(causal_conv1d(**inputs | {"x": x}), causal_conv1d(**inputs))
    for x in layouts(norms["x"]):
        assert torch.equal(layer_norm(**norms | {"x": x})[0], layer_norm(**norms)[0])
        assert torch.equal(rms_norm(**norms | {"residual": x})[0], rms_norm(**norms | {"residual": norms["x"]})[0])
        assert torch.equal(gated_rms_norm(**gated | {"z": x}), gated_rms_norm(**gated | {"z": norms["x"]}))
    for function, arguments in ((causal_conv1d, inputs), (layer_norm, norms), (gated_rms_norm, gated)):
        leaves = {k: v.clone().requires_grad_() for k, v in arguments.items()}
        out: Any = function(**leaves)
        y = out[0] if isinstance(out, tuple) else out
        dy = torch.randn_like(y)
        expected = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
        for layout in layouts(dy):
            actual = torch.autograd.grad(y, list(leaves.values()), layout, retain_graph=True)
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        torch.autograd.grad(y.sum(), list(leaves.values()))


@pytest.mark.parametrize(("case", "function", "dtype"), in_turn(NORM, (rms_norm, layer_norm), "vim_tiny"))
def test_norms_are_within_tolerance_and_bit_equal_when_repeated(function, case, dtype):
    if case.shape == (3, 1) and function is layer_norm:
        pytest.skip("the layer norm of one channel is 0: no relative error to measure")
    inputs = norm_inputs(case, dtype)
    check(function, inputs, dtype, eps=EPS)
    check(function, inputs | {"bias": None}, dtype, eps=EPS)
    check(function, inputs | {"residual": None}, dtype, eps=EPS)
    wide = norm_inputs(case)
    check(function, wide | {"x": inputs["x"]}, dtype, eps=EPS)
    with torch.no_grad():
        y, new_residual = function(**wide | {"x": inputs["x"]})
    assert (y.dtype, new_residual.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize(("case", "norm_before_gate", "dtype"), in_turn(NORM, (False, True), "vim_tiny"))
def test_gated_norm_is_within_tolerance_and_bit_equal_when_repeated(norm_before_gate, case, dtype):
    inputs = norm_inputs(case, dtype, gated=True)
    for group_size in (None, case.group_size):
        check(gated_rms_norm, inputs, dtype, group_size=group_size, norm_before_gate=norm_before_gate, eps=EPS)


def test_no_rows():
    for function, gated in ((rms_norm, False), (layer_norm, False), (gated_rms_norm, True)):
        inputs = norm_inputs(norm_cases.Case((2, 0, 3), 3, "empty"), gated=gated)
        with nan_filled_empty():
            out = run(function, inputs)
        assert torch.equal(out["dweight"], torch.zeros(3, device="cuda"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(value):
    inputs = conv_inputs(CONV[0])
    inputs["x"][0, 10, 2] = value
    y = causal_conv1d(**inputs)
    assert y.isfinite().logical_not().nonzero().tolist() == [[0, t, 2] for t in range(10, 14)]
    for function, gated in ((rms_norm, False), (layer_norm, False), (gated_rms_norm, True)):
        arguments = norm_inputs(NORM[0], gated=gated)
        arguments["x"][1, 5, 2] = value
        out: Any = function(**arguments)
        y = out[0] if isinstance(out, tuple) else out
        assert y.isnan().any(-1).nonzero().tolist() == [[1, 5]]


class All(torch.nn.Module):
    """Every operator once, as a block has them."""

    def forward(self, x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, residual = rms_norm(x, scale, residual=residual)
        u, state = causal_conv1d(y * 2, weight, activation="silu", return_final_state=True)
        return gated_rms_norm(u, scale, residual.to(u.dtype), group_size=32) + 1, state


def all_inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {
        "x": normal(2, 130, 96, dtype=dtype),
        "weight": normal(96, 4, seed=1),
        "scale": normal(96, seed=2),
        "residual": normal(2, 130, 96, seed=3),
    }


def test_compiles_as_one_graph():
    expected = run(All(), all_inputs())
    actual = run(torch.compile(All(), fullgraph=True), all_inputs())
    for name, value in expected.items():
        assert_close(name, actual[name], value, torch.bfloat16)


def test_a_captured_step_replays_on_new_inputs():
    inputs = {k: v.requires_grad_() for k, v in all_inputs().items()}
    cu_seqlens = torch.tensor([0, 60, 260], dtype=torch.int32, device="cuda")

    def step() -> list[Tensor]:
        out, _ = All()(**inputs)
        packed = causal_conv1d(out.reshape(1, 260, 96), inputs["weight"], activation="silu", cu_seqlens=cu_seqlens)
        return [packed, *torch.autograd.grad(packed.float().square().sum(), list(inputs.values()))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs["x"].normal_()
        cu_seqlens.copy_(torch.tensor([0, 101, 260]))
    graph.replay()
    assert all(torch.equal(a, e) for a, e in zip(captured, step(), strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
def test_opcheck():
    conv = [v.requires_grad_() for v in conv_inputs(CONV[0]).values()]
    torch.library.opcheck(torch.ops.mambaverse.causal_conv1d, (*conv, None, True, False, "auto"))
    x, weight, bias, residual = (v.requires_grad_() for v in norm_inputs(NORM[0]).values())
    torch.library.opcheck(torch.ops.mambaverse.norm, (x, weight, bias, residual, EPS, True, "auto"))
    half = x.detach().bfloat16().requires_grad_()
    torch.library.opcheck(torch.ops.mambaverse.norm, (half, weight, bias, residual, EPS, True, "auto"))
    torch.library.opcheck(torch.ops.mambaverse.gated_rms_norm, (x, weight, residual, 11, False, EPS, "auto"))
    with torch.no_grad():
        state = normal(2, 3, 33)
        arguments = (normal(2, 33), state, conv[1].detach(), None, True, "auto")
        torch.library.opcheck(torch.ops.mambaverse.causal_conv1d_update, arguments)


def test_offsets_past_two_to_the_31():
    length, dim = 2**20 + 70, 2080
    x = torch.empty((1, length, dim), dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    weight, scale = normal(dim, 4).requires_grad_(), normal(dim, seed=1)
    assert x.numel() > 2**31
    tail = 100
    y = causal_conv1d(x, weight, activation="silu")
    expected = causal_conv1d(x[:, -tail - 3 :].detach().double(), weight.double(), activation="silu")[:, 3:]
    assert_close("y", y[:, -tail:], expected, torch.bfloat16)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    leaf = x[:, -tail - 3 :].detach().double().requires_grad_()
    out = causal_conv1d(leaf, weight.double(), activation="silu")
    (wanted,) = torch.autograd.grad(out, leaf, y[:, -tail - 3 :].detach().double())
    assert_close("dx", dx[:, -tail:], wanted[:, -tail:], torch.bfloat16)
    del y, dx
    y = rms_norm(x, scale, residual=x.detach())[0]
    assert_close("norm", y[:, -tail:], rms_norm(2 * x[:, -tail:].double(), scale.double())[0], torch.bfloat16)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    leaf = x[:, -tail:].detach().double().requires_grad_()
    out = rms_norm(leaf, scale.double(), residual=x[:, -tail:].detach().double())[0]
    (wanted,) = torch.autograd.grad(out, leaf, y[:, -tail:].detach().double())
    assert_close("dx of norm", dx[:, -tail:], wanted, torch.bfloat16)


def test_a_backend_that_cannot_says_so():
    x, weight = normal(1, 5, 3), normal(3, 40)
    with pytest.raises(RuntimeError, match="40 columns; backend 'triton' takes up to 32"):
        causal_conv1d(x, weight)
    with use_backend("reference"):
        causal_conv1d(x, weight)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="CPU tensors only"):
        causal_conv1d(x, weight[:, :4])
