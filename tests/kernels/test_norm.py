"""Promises of rms_norm, layer_norm and gated_rms_norm: right in every flag, shape, dtype and layout."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.norm import gated_rms_norm, layer_norm, reference, rms_norm
from mambaverse.kernels.norm.cases import TESTED, Case
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients

USUAL = TESTED[0]
SMALL = Case((3, 6), 3, "for gradcheck")
NORMS = [rms_norm, layer_norm]
EPS = 1e-3  # large enough to be seen


def draw(case: Case, dtype: torch.dtype = torch.float32, *, gated: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(case.shape))
    dim = case.shape[-1:]
    shapes = {"x": case.shape, "weight": dim} | ({"z": case.shape} if gated else {"bias": dim, "residual": case.shape})
    return {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for k, s in shapes.items()}


def check(function: Any, inputs: dict[str, Any], dtype: torch.dtype = torch.float32, **flags: Any) -> None:
    wide = {k: v.double() if v is not None else None for k, v in inputs.items()}
    with nan_filled_empty():
        actual = outputs_and_gradients(function, inputs, eps=EPS, **flags)
    for name, expected in outputs_and_gradients(function, wide, eps=EPS, **flags).items():
        assert_close(name, actual[name], expected, dtype)


def test_reference_is_torchs():
    inputs = draw(USUAL, torch.float64)
    x, weight, bias, residual = inputs.values()
    dim = (USUAL.shape[-1],)
    t = x + residual
    y, new_residual = layer_norm(**inputs, eps=EPS)
    assert_close("layer", y, F.layer_norm(t, dim, weight, bias, EPS))
    assert_close("sum", new_residual, t)
    assert_close("rms", rms_norm(**inputs, eps=EPS)[0], F.rms_norm(t, dim, weight, EPS) + bias)
    after = F.rms_norm(x, dim, weight, EPS) * F.silu(residual)
    assert_close("gate after", gated_rms_norm(x, weight, residual, norm_before_gate=True, eps=EPS), after)
    before = F.rms_norm(x * F.silu(residual), dim, weight, EPS)
    assert_close("gate before", gated_rms_norm(x, weight, residual, eps=EPS), before)
    groups = F.rms_norm((x * F.silu(residual)).unflatten(-1, (3, 11)), (11,), None, EPS).flatten(-2) * weight
    assert_close("groups", gated_rms_norm(x, weight, residual, group_size=11, eps=EPS), groups)


@pytest.mark.parametrize("function", NORMS)
@pytest.mark.parametrize("absent", [(), ("bias", "residual")])
def test_gradcheck_of_norms(function, absent):
    inputs = {k: v.requires_grad_() for k, v in draw(SMALL, torch.float64).items() if k not in absent}
    assert torch.autograd.gradcheck(
        lambda *leaves: function(**dict(zip(inputs, leaves, strict=True)), eps=EPS), tuple(inputs.values())
    )


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 3])
def test_gradcheck_of_gated_norm(norm_before_gate, group_size):
    leaves = tuple(v.requires_grad_() for v in draw(SMALL, torch.float64, gated=True).values())
    flags = {"norm_before_gate": norm_before_gate, "group_size": group_size, "eps": EPS}
    assert torch.autograd.gradcheck(partial(gated_rms_norm, **flags), leaves)


def test_explicit_backward_is_the_derivative_of_the_reference():
    x, weight, bias, residual = (v.requires_grad_() for v in draw(SMALL, torch.float64).values())
    dy, dt = torch.randn(2, *SMALL.shape, dtype=torch.float64)
    for center in (False, True):
        y, t = reference.forward(x, weight, bias, residual, EPS, center)
        expected = torch.autograd.grad((y, t), (x, weight, bias), (dy, dt))
        actual = reference.backward(dy, dt, t.detach(), weight, bias, EPS, center)
        for name, a, e in zip(("t", "weight", "bias"), actual, expected, strict=True):
            assert_close(name, a, e)
    for norm_before_gate in (False, True):
        flags = 3, norm_before_gate, EPS
        expected = torch.autograd.grad(reference.gated_forward(x, weight, residual, *flags), (x, weight, residual), dy)
        actual = reference.gated_backward(dy, x, weight, residual, *flags)
        for name, a, e in zip(("x", "weight", "z"), actual, expected, strict=True):
            assert_close(name, a, e)


@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.reason)
@pytest.mark.parametrize("function", NORMS)
def test_every_output_and_gradient_of_norms_is_within_tolerance(case, function):
    if case.shape[-1] == 1 and function is layer_norm:
        case = Case((3, 2), 1, "the layer norm of one channel is 0: no relative error to measure")
    inputs = draw(case)
    check(function, inputs)
    check(function, inputs | {"bias": None})
    check(function, inputs | {"residual": None})


@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.reason)
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_every_output_and_gradient_of_gated_norm_is_within_tolerance(case, norm_before_gate):
    inputs = draw(case, gated=True)
    check(gated_rms_norm, inputs, norm_before_gate=norm_before_gate)
    check(gated_rms_norm, inputs, norm_before_gate=norm_before_gate, group_size=case.group_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_tolerance(dtype):
    for function in NORMS:
        check(function, draw(USUAL, dtype), dtype)
        mixed = draw(USUAL) | {"x": draw(USUAL, dtype)["x"]}
        check(function, mixed, dtype)
        y, new_residual = function(**mixed)
        assert y.dtype == dtype
        assert new_residual.dtype == torch.float32
    for norm_before_gate in (False, True):
        check(gated_rms_norm, draw(USUAL, dtype, gated=True), dtype, norm_before_gate=norm_before_gate)
        mixed = draw(USUAL, gated=True) | {"x": draw(USUAL, dtype)["x"]}
        check(gated_rms_norm, mixed, dtype, norm_before_gate=norm_before_gate)


def test_a_large_mean_is_subtracted_before_squaring():
    inputs = draw(USUAL)
    inputs["x"] = inputs["x"] + 1e4
    wide = {k: v.double() for k, v in inputs.items()}
    y = layer_norm(**inputs)[0]
    assert_close("y", y, layer_norm(**wide)[0], torch.bfloat16)  # the sum x + residual has lost four digits


def test_without_residual_the_new_one_is_x():
    x, weight = torch.randn(2, 5, 8), torch.randn(8)
    assert rms_norm(x, weight)[1] is x
    assert layer_norm(x, weight, residual=torch.zeros_like(x))[1].data_ptr() != x.data_ptr()


def test_any_strides():
    inputs, gated = draw(USUAL), draw(USUAL, gated=True)
    x = inputs["x"]
    layouts = {
        "slice of a wider tensor": torch.cat((x, x), -1).chunk(2, -1)[1],
        "channels first": x.mT.contiguous().mT,
        "batch second": x.transpose(0, 1).contiguous().transpose(0, 1),
    }
    expected, expected_gated = layer_norm(**inputs), gated_rms_norm(**gated)
    for layout in layouts.values():
        y, new_residual = layer_norm(**inputs | {"x": layout})
        assert torch.equal(y, expected[0])
        assert torch.equal(new_residual, expected[1])
        assert y.is_contiguous()
        assert new_residual.is_contiguous()
        assert torch.equal(gated_rms_norm(**gated | {"x": layout}), expected_gated)
    y = layer_norm(**inputs | {"residual": layouts["channels first"]})[0]
    assert torch.equal(y, layer_norm(**inputs | {"residual": x})[0])
    same = {"x": x[:1, :1].expand_as(x), "weight": torch.ones(1).expand(33)}
    assert torch.equal(rms_norm(**same)[0], rms_norm(**{k: v.contiguous() for k, v in same.items()})[0])


@pytest.mark.parametrize("layout", ["channels first", "expanded"])
def test_gradient_of_any_strides(layout):
    for function, inputs in ((layer_norm, draw(USUAL)), (gated_rms_norm, draw(USUAL, gated=True))):
        leaves = {k: v.requires_grad_() for k, v in inputs.items()}
        out: Any = function(**leaves)
        y = out[0] if isinstance(out, tuple) else out
        dy = torch.randn(y.shape).mT.contiguous().mT if layout == "channels first" else torch.ones(1).expand(y.shape)
        actual = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
        expected = torch.autograd.grad(y, list(leaves.values()), dy.contiguous())
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_gradient_through_one_output_alone():
    inputs = {k: v.requires_grad_() for k, v in draw(USUAL).items()}
    dx, dresidual = torch.autograd.grad(rms_norm(**inputs)[1].sum(), (inputs["x"], inputs["residual"]))
    assert torch.equal(dx, torch.ones_like(dx))
    assert torch.equal(dresidual, torch.ones_like(dx))
    y = rms_norm(**inputs)[0]
    dx, dresidual = torch.autograd.grad(y, (inputs["x"], inputs["residual"]), torch.randn(y.shape))
    assert torch.equal(dx, dresidual)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_rows(backend):
    empty = Case((2, 0, 3), 3, "empty")
    with use_backend(backend), nan_filled_empty():
        for function, gated in ((rms_norm, False), (layer_norm, False), (gated_rms_norm, True)):
            out = outputs_and_gradients(function, draw(empty, gated=gated))
            assert out["out0"].shape == out["dx"].shape == (2, 0, 3)
            assert torch.equal(out["dweight"], torch.zeros(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_row_and_no_other(value):
    for function, gated in ((rms_norm, False), (layer_norm, False), (gated_rms_norm, True)):
        inputs = draw(USUAL, gated=gated)
        inputs["x"][1, 5, 2] = value
        out: Any = function(**inputs)
        y = out[0] if isinstance(out, tuple) else out
        assert y.isnan().any(-1).nonzero().tolist() == [[1, 5]]


def test_bit_equal_for_any_number_of_threads():
    case = Case((4, 700, 64), 16, "more calls than threads")
    threads = torch.get_num_threads()
    for function, gated in ((rms_norm, False), (layer_norm, False), (gated_rms_norm, True)):
        results = []
        try:
            for num_threads in (1, 2, 3, 2):
                torch.set_num_threads(num_threads)
                results.append(outputs_and_gradients(function, draw(case, gated=gated)))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(other[k], v) for k, v in results[0].items())


def test_called_from_several_threads_at_once():
    inputs = draw(USUAL)
    expected = outputs_and_gradients(layer_norm, inputs)
    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(lambda _: outputs_and_gradients(layer_norm, inputs), range(16)):
            assert all(torch.equal(actual[k], v) for k, v in expected.items())


class Both(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, new_residual = layer_norm(x, weight, bias, residual=residual)
        return gated_rms_norm(y, weight, new_residual, group_size=11), new_residual


def test_compiles_and_exports_as_one_node_each():
    inputs = draw(USUAL)
    expected = outputs_and_gradients(Both(), inputs)
    actual = outputs_and_gradients(torch.compile(Both(), backend="eager", fullgraph=True), inputs)
    assert all(torch.equal(actual[k], v) for k, v in expected.items())
    program = torch.export.export(Both(), tuple(inputs.values()))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and "mambaverse" in str(n.target)]
    assert calls == [torch.ops.mambaverse.norm.default, torch.ops.mambaverse.gated_rms_norm.default]


def _to_script(x: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    y = torch.ops.mambaverse.norm(x, weight, None, z, 1e-5, False, "auto")[0]
    return torch.ops.mambaverse.gated_rms_norm(y, weight, z, 11, False, 1e-5, "auto")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # timm's users still script their models
def test_scripts():
    x, weight, z = draw(USUAL, gated=True).values()
    expected = gated_rms_norm(rms_norm(x, weight, residual=z)[0], weight, z, group_size=11)
    assert torch.equal(torch.jit.script(_to_script)(x, weight, z), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
def test_opcheck():
    x, weight, bias, residual = (v.requires_grad_() for v in draw(SMALL).values())
    torch.library.opcheck(torch.ops.mambaverse.norm, (x, weight, bias, residual, EPS, True, "auto"))
    torch.library.opcheck(torch.ops.mambaverse.norm, (x, weight, None, None, EPS, False, "auto"))
    torch.library.opcheck(torch.ops.mambaverse.gated_rms_norm, (x, weight, residual, 3, False, EPS, "auto"))


def test_meta_tensors_have_shapes():
    inputs = {k: v.to("meta") for k, v in draw(USUAL).items()}
    assert [t.shape for t in layer_norm(**inputs)] == [USUAL.shape, USUAL.shape]
    gated = {k: v.to("meta") for k, v in draw(USUAL, gated=True).items()}
    assert gated_rms_norm(**gated).shape == USUAL.shape


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (rms_norm, {"weight": torch.randn(5)}, r"rms_norm: weight has shape \(5,\); expected \(D,\) = \(6,\)"),
        (layer_norm, {"bias": torch.randn(5)}, r"layer_norm: bias has shape \(5,\)"),
        (rms_norm, {"residual": torch.randn(2, 6)}, r"residual has shape \(2, 6\); expected \(..., D\) = \(3, 6\)"),
        (rms_norm, {"x": torch.ones(3, 6, dtype=torch.int64)}, "x is torch.int64"),
        (rms_norm, {"residual": torch.randn(3, 6, device="meta")}, "residual is on meta; expected cpu"),
        (rms_norm, {"residual": torch.ones(3, 6) + 1j}, "residual has dtype torch.complex64; expected a real"),
        (gated_rms_norm, {"z": torch.ones(3, 6) + 1j}, "z has dtype torch.complex64; expected a real"),
        (gated_rms_norm, {"z": torch.randn(3, 5)}, r"gated_rms_norm: z has shape \(3, 5\)"),
        (gated_rms_norm, {"group_size": 4}, "group_size is 4; expected a divisor of D = 6"),
        (gated_rms_norm, {"group_size": 0}, "group_size is 0"),
        (gated_rms_norm, {"group_size": "2"}, "group_size is '2'; expected a divisor"),
        (gated_rms_norm, {"group_size": 2.0}, "group_size is 2.0; expected a divisor"),
        (layer_norm, {"eps": None}, "layer_norm: eps is None; expected a finite number"),
        (rms_norm, {"eps": -1.0}, "rms_norm: eps is -1.0; expected a finite number of at least 0"),
        (gated_rms_norm, {"eps": float("nan")}, "gated_rms_norm: eps is nan"),
    ],
)
def test_bad_arguments_are_named(function, change, message):
    with pytest.raises(ValueError, match=message):
        function(**draw(SMALL, gated=function is gated_rms_norm) | change)
