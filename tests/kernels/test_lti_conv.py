"""Promises of lti_conv: right in every flag, shape, dtype and layout, and over long memories."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.lti_conv import cpu, discretize, lti_conv, lti_conv_update, reference, triton
from mambaverse.kernels.lti_conv.cases import LONG, TESTED, Case
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients

USUAL = TESTED[0]
SMALL = Case(2, 5, 3, 2, "for gradcheck")
METHODS = ["zoh", "bilinear"]


def draw(case: Case, dtype: torch.dtype = torch.float32, *, real: bool = False) -> dict[str, Any]:
    """S4D-Lin: A = -1/2 + π i n, steps spread from 1e-3 to 1e-1."""
    generator = torch.Generator().manual_seed(case.length)
    wide, dim = torch.float64, (case.dim,)
    system, state = (case.dim, case.num_states), (case.batch, case.dim, case.num_states)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=wide)

    def maybe_complex(*shape: int) -> Tensor:
        return normal(*shape) if real else torch.complex(normal(*shape), normal(*shape))

    n = torch.arange(case.num_states, dtype=wide).expand(system)
    inputs = {
        "u": normal(case.batch, case.length, case.dim),
        "A": -0.5 - n if real else torch.complex(torch.full(system, -0.5, dtype=wide), math.pi * n),
        "B": maybe_complex(*system),
        "C": maybe_complex(*system),
        "dt": torch.logspace(-1, -3, case.dim, dtype=wide),
        "D": normal(*dim),
        "initial_state": maybe_complex(*state),
    }
    return {k: cast(v, dtype) for k, v in inputs.items()}


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return it in `dtype`, a complex one in the complex type beside it (complex64 for what has none)."""
    if not tensor.is_complex():
        return tensor.to(dtype)
    return tensor.to(torch.complex128 if dtype == torch.float64 else torch.complex64)


def run(inputs: dict[str, Any], **flags: Any) -> dict[str, Tensor]:
    return outputs_and_gradients(lti_conv, inputs, return_final_state=True, **flags)


def check(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, **flags: Any) -> None:
    wide = {k: None if v is None else cast(v, torch.float64) for k, v in inputs.items()}
    with nan_filled_empty():
        actual = run(inputs, **flags)
    for name, expected in run(wide, **flags).items():
        assert_close(name, actual[name], expected, dtype)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_reference_is_the_convolution_with_the_kernel(real, method):
    inputs = draw(USUAL, torch.float64, real=real) | {"initial_state": None}
    A_bar, B_bar = discretize(inputs["A"], inputs["B"], inputs["dt"], method)
    lags = torch.arange(USUAL.length)
    K = (inputs["C"].unsqueeze(-1) * B_bar.unsqueeze(-1) * A_bar.unsqueeze(-1) ** lags).sum(1).real * (1 if real else 2)
    u = F.pad(inputs["u"].mT, (USUAL.length - 1, 0))
    expected = F.conv1d(u, K.flip(-1).unsqueeze(1), groups=USUAL.dim).mT + inputs["D"] * inputs["u"]
    assert_close("y", lti_conv(**inputs, discretization=method), expected)


def test_discretizations():
    A = torch.tensor([[-0.5 + 3j, -2.0 + 0j]], dtype=torch.complex128)
    B, dt = torch.tensor([[1.0 + 2j, 1.0 + 0j]], dtype=torch.complex128), torch.tensor([0.3], dtype=torch.float64)
    z = 0.3 * A
    A_bar, B_bar = discretize(A, B, dt, "zoh")
    assert_close("zoh A", A_bar, torch.exp(z))
    assert_close("zoh B", B_bar, (torch.exp(z) - 1) / A * B)
    A_bar, B_bar = discretize(A, B, dt, "bilinear")
    assert_close("bilinear A", A_bar, (1 + z / 2) / (1 - z / 2))
    assert_close("bilinear B", B_bar, 0.3 / (1 - z / 2) * B)


def test_zoh_of_tiny_steps_keeps_its_digits():
    values = [0.0, 1e-12, 1e-6 + 1e-6j, 0.029j, 0.0299, 0.0301, -0.031, 0.09j, 0.1001]
    A = torch.tensor([values], dtype=torch.complex128, requires_grad=True)
    B, dt = torch.ones_like(A), torch.ones(1, dtype=torch.float64)
    B_bar = discretize(A, B, dt, "zoh")[1]
    z = A.detach()
    series = torch.stack([z**i / math.factorial(i + 1) for i in range(14)]).sum(0)
    assert_close("B_bar", B_bar.detach(), series)
    (gradient,) = torch.autograd.grad(B_bar.real.sum(), A)
    derivative = torch.stack([i * z ** (i - 1) / math.factorial(i + 1) for i in range(1, 14)]).sum(0)
    assert_close("gradient", gradient, derivative.conj(), torch.float64)


@pytest.mark.parametrize("reverse", [False, True])
def test_explicit_backward_is_the_derivative_of_the_reference(reverse):
    u, A, B, C, dt, D, state = draw(SMALL, torch.float64).values()
    leaves = [v.detach().requires_grad_() for v in (u, *discretize(A, B, dt, "zoh"), C, D, state)]
    arguments: list[Any] = [*leaves, reverse]
    y, final = reference.forward(*arguments)
    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    expected = torch.autograd.grad((y, final), leaves, (dy, dfinal))
    with torch.no_grad():
        actual = reference.backward(dy, dfinal, *arguments)
    for name, a, e in zip(("u", "A_bar", "B_bar", "C", "D", "state"), actual, expected, strict=True):
        assert_close(name, a, e)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(real, method):
    inputs = {k: v.requires_grad_() for k, v in draw(SMALL, torch.float64, real=real).items()}

    def call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        named: dict[str, Any] = dict(zip(inputs, leaves, strict=True))
        return lti_conv(**named, discretization=method, return_final_state=True)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.reason)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_output_and_gradient_is_within_tolerance(case, reverse):
    check(draw(case), reverse=reverse)
    check(draw(case, real=True), reverse=reverse, discretization="bilinear")
    check(draw(case) | {"D": None, "initial_state": None}, reverse=reverse)


@pytest.mark.parametrize("case", LONG, ids=lambda c: c.reason)
def test_long_memories_are_within_tolerance(case):
    check(draw(case))


def test_a_constant_input_over_a_long_memory_is_within_tolerance():
    # In float32 the same rounding would act at every step: 3e-5.
    case = Case(1, 4000, 8, 1, "the slowest pole")
    inputs = draw(case) | {"initial_state": None, "u": torch.ones(1, 4000, 8)}
    inputs["dt"] = torch.full((8,), 1e-3) * torch.arange(1, 9)
    check(inputs)


def test_real_b_and_c_beside_a_complex_a():
    inputs = draw(USUAL)
    check(inputs | {"B": inputs["B"].real.contiguous(), "C": inputs["C"].real.contiguous()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_tolerance(dtype):
    check(draw(USUAL, dtype), dtype)
    check(draw(USUAL, dtype, real=True), dtype)
    mixed = draw(USUAL) | {"u": draw(USUAL, dtype)["u"]}
    check(mixed, dtype)
    y, state = lti_conv(**mixed, return_final_state=True)
    assert y.dtype == dtype
    assert state.dtype == torch.complex64
    assert lti_conv(**draw(USUAL, real=True), return_final_state=True)[1].dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_reverse_is_the_flipped_op_on_flipped_inputs(backend):
    inputs = draw(USUAL)
    with use_backend(backend):
        y, state = lti_conv(**inputs, reverse=True, return_final_state=True)
        z, final = lti_conv(**inputs | {"u": inputs["u"].flip(1)}, return_final_state=True)
    assert_close("y", y, z.flip(1))
    assert torch.equal(state, final)


def test_state_carries_across_chunks():
    inputs = draw(USUAL)
    whole, final = lti_conv(**inputs, return_final_state=True)
    head, state = lti_conv(**inputs | {"u": inputs["u"][:, :31]}, return_final_state=True)
    tail, last = lti_conv(**inputs | {"u": inputs["u"][:, 31:], "initial_state": state}, return_final_state=True)
    assert_close("y", torch.cat((head, tail), 1), whole)
    assert_close("state", last, final)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_update_is_one_step(real, method):
    inputs = draw(USUAL, real=real)
    expected, final = lti_conv(**inputs, discretization=method, return_final_state=True)
    u, state = inputs.pop("u"), inputs.pop("initial_state").clone()
    steps = [lti_conv_update(state, u_t, **inputs, discretization=method) for u_t in u.unbind(1)]
    assert_close("y", torch.stack(steps, 1), expected)
    assert_close("state", state, final)


def test_a_state_of_16_bits_is_refused() -> None:
    u, A = torch.ones(1, 2), -torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=r"lti_conv_update: state has dtype torch\.bfloat16; expected one of at least 32"
    ):
        lti_conv_update(torch.zeros(1, 2, 3, dtype=torch.bfloat16), u, A, A, A, torch.ones(2))


def test_any_strides():
    inputs = draw(USUAL)
    u = inputs["u"]
    layouts = (
        torch.cat((u, u), -1).chunk(2, -1)[1],
        u.mT.contiguous().mT,
        u.transpose(0, 1).contiguous().transpose(0, 1),
    )
    expected = lti_conv(**inputs)
    strided = {k: v.mT.contiguous().mT for k, v in inputs.items() if k in ("A", "B", "C", "initial_state")}
    conjugate = {"C": inputs["C"].conj().resolve_conj().conj()}  # a lazy conjugate
    for layout in layouts:
        y = lti_conv(**inputs | strided | conjugate | {"u": layout})
        assert torch.equal(y, expected)
        assert y.is_contiguous()
    same = inputs | {"u": u[:1, :1].expand_as(u)}
    assert torch.equal(lti_conv(**same), lti_conv(**same | {"u": same["u"].contiguous()}))


def test_gradient_of_any_strides():
    inputs = {k: v.requires_grad_() for k, v in draw(USUAL).items()}
    y = lti_conv(**inputs)
    dy = torch.randn(y.shape)
    expected = torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True)
    for layout in (dy.mT.contiguous().mT, torch.cat((dy, dy), -1).chunk(2, -1)[1]):
        actual = torch.autograd.grad(y, list(inputs.values()), layout, retain_graph=True)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_gradient_through_one_output_alone():
    inputs = {k: v.requires_grad_() for k, v in draw(USUAL).items()}
    state = lti_conv(**inputs, return_final_state=True)[1]
    dfinal = torch.randn_like(state)
    (actual,) = torch.autograd.grad(state, inputs["initial_state"], dfinal)
    A_bar = discretize(inputs["A"], inputs["B"], inputs["dt"], "zoh")[0].detach()
    assert_close("dinitial_state", actual, (A_bar**USUAL.length).conj() * dfinal)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_empty_inputs(backend, batch, length):
    inputs = draw(Case(batch, length, 3, 4, "empty"))
    with use_backend(backend), nan_filled_empty():
        out = run(inputs)
    assert out["out0"].shape == (batch, length, 3)
    assert torch.equal(out["out1"], inputs["initial_state"])
    for name in ("dA", "dB", "dC", "ddt", "dD"):
        assert out[name].count_nonzero() == 0


def test_nan_reaches_what_follows_and_nothing_else():
    inputs = draw(USUAL)
    inputs["u"][0, 10, 2] = float("nan")
    where = lti_conv(**inputs).isnan().nonzero().tolist()
    assert where == [[0, t, 2] for t in range(10, USUAL.length)]


def test_bit_equal_for_any_number_of_threads():
    inputs = draw(Case(5, 50, 40, 4, "several groups of partial sums"))
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3, 2):
            torch.set_num_threads(num_threads)
            results.append(run(inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[k], v) for k, v in results[0].items())


def test_called_from_several_threads_at_once():
    inputs = draw(USUAL)
    expected = run(inputs)
    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(lambda _: run(inputs), range(8)):
            assert all(torch.equal(actual[k], v) for k, v in expected.items())


class Conv(torch.nn.Module):
    def forward(
        self, u: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, D: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        return lti_conv(u, A, B, C, dt, D, initial_state=initial_state, return_final_state=True)


def test_compiles_and_exports_as_one_node():
    inputs = draw(SMALL)
    expected = run(inputs)
    actual = outputs_and_gradients(torch.compile(Conv(), backend="eager", fullgraph=True), inputs)
    assert all(torch.equal(actual[k], v) for k, v in expected.items())
    program = torch.export.export(Conv(), tuple(inputs.values()))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and "mambaverse" in str(n.target)]
    assert calls == [torch.ops.mambaverse.lti_conv.default]


def _to_script(u: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, D: Tensor) -> Tensor:
    A_bar, B_bar = discretize(A, B, dt, "zoh")
    return torch.ops.mambaverse.lti_conv(u, A_bar, B_bar, 2 * C.to(torch.complex128), D, None, False, False, "auto")[0]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # timm's users still script their models
def test_scripts():
    inputs = draw(SMALL) | {"initial_state": None}
    tensors = [v for v in inputs.values() if v is not None]
    assert torch.equal(torch.jit.script(_to_script)(*tensors), lti_conv(**inputs))


@pytest.mark.parametrize("backend", [reference, cpu, triton], ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_state_that_nobody_wants_is_empty_and_changes_no_output(backend):
    u, A, B, C, dt, D, state = draw(SMALL).values()
    A_bar, B_bar = discretize(A, B, dt, "zoh")
    given = u, A_bar, B_bar, C.to(A_bar), D, state.to(A_bar), False
    y, final = backend.forward(*given)
    alone, nothing = backend.forward(*given, wants_state=False)
    assert torch.equal(alone, y)
    assert (nothing.numel(), nothing.dtype) == (0, final.dtype)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
def test_opcheck():
    u, A, B, C, dt, D, state = draw(SMALL).values()
    A_bar, B_bar = discretize(A, B, dt, "zoh")
    u, A_bar, B_bar, C, D, state = (v.requires_grad_() for v in (u, A_bar, B_bar, C.to(A_bar), D, state))
    torch.library.opcheck(torch.ops.mambaverse.lti_conv, (u, A_bar, B_bar, C, D, state, True, True, "auto"))
    torch.library.opcheck(torch.ops.mambaverse.lti_conv, (u, A_bar, B_bar, C, None, None, False, True, "auto"))
    torch.library.opcheck(torch.ops.mambaverse.lti_conv, (u, A_bar, B_bar, C, D, state, False, False, "auto"))


def test_meta_tensors_have_shapes():
    inputs = {k: v.to("meta") for k, v in draw(USUAL).items()}
    y, state = lti_conv(**inputs, return_final_state=True)
    assert y.shape == inputs["u"].shape
    assert state.shape == inputs["initial_state"].shape
    assert state.dtype == torch.complex64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.randn(5, 3)}, r"u has shape \(5, 3\); expected \(B, L, D\)"),
        ({"u": torch.zeros(2, 5, 3, dtype=torch.complex64)}, "u has dtype torch.complex64; expected a real"),
        ({"A": torch.randn(3)}, r"A has shape \(3,\); expected \(D, N\) with D = 3"),
        ({"A": torch.randn(4, 2)}, r"A has shape \(4, 2\); expected \(D, N\) = \(3, 2\)"),
        ({"B": torch.randn(3, 4)}, r"B has shape \(3, 4\); expected \(D, N\) = \(3, 2\)"),
        ({"A": -torch.rand(3, 2)}, "B is complex and A real; expected a real B"),
        ({"dt": torch.rand(3, 1)}, r"dt has shape \(3, 1\); expected \(D,\) = \(3,\)"),
        ({"dt": torch.zeros(3, dtype=torch.complex64)}, "dt has dtype torch.complex64; expected a real one"),
        ({"D": torch.randn(2)}, r"D has shape \(2,\)"),
        ({"initial_state": torch.randn(2, 3, 2)}, "initial_state has dtype torch.float32; expected a complex one"),
        ({"initial_state": torch.randn(1, 3, 2)}, r"initial_state has shape .* \(B, D, N\) = \(2, 3, 2\)"),
        ({"discretization": "euler"}, "unknown discretization 'euler'; expected one of zoh, bilinear"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        lti_conv(**draw(SMALL) | change)
