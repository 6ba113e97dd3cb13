"""Promises of causal_conv1d: right in every flag, shape, dtype and layout, and a good citizen of torch."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update, reference
from mambaverse.kernels.causal_conv1d.cases import TESTED, Case
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients

SMALL = Case(2, 7, 3, 4, "for gradcheck")
USUAL = TESTED[0]


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


def run(inputs: dict[str, Any], **flags: Any) -> dict[str, Tensor]:
    return outputs_and_gradients(causal_conv1d, inputs, return_final_state=True, **flags)


def check(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, **flags: Any) -> None:
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    with nan_filled_empty():
        actual = run(inputs, **flags)
    for name, expected in run(wide, **flags).items():
        assert_close(name, actual[name], expected, dtype)


def test_reference_is_conv1d():
    inputs = draw(USUAL, torch.float64)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    p = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=USUAL.width - 1, groups=USUAL.dim)[..., : USUAL.length].mT
    assert_close("p", causal_conv1d(x, weight, bias), p)
    assert_close("y", causal_conv1d(x, weight, bias, activation="swish"), F.silu(p))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 2, 2, 7]])  # the second sequence is empty, the first shorter than W
def test_explicit_backward_is_the_derivative_of_the_reference(reverse, bounds):
    case = SMALL if bounds is None else Case(1, 7, 3, 4, "packed")
    inputs = draw(case, torch.float64, num_states=None if bounds is None else 3)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    leaves = [v.requires_grad_() for v in inputs.values()]
    arguments: list[Any] = [*leaves, cu_seqlens, True, reverse]
    y, state = reference.forward(*arguments)
    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    expected = torch.autograd.grad((y, state), leaves, (dy, dstate))
    with torch.no_grad():
        actual = reference.backward(dy, dstate, *arguments)
    for name, a, e in zip(inputs, actual, expected, strict=True):
        assert_close(name, a, e)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(activation):
    leaves = [v.requires_grad_() for v in draw(SMALL, torch.float64).values()]

    def call(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, activation=activation, initial_state=state, return_final_state=True)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.reason)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_output_and_gradient_is_within_tolerance(case, reverse):
    check(draw(case), activation="silu", reverse=reverse)
    check(draw(case) | {"bias": None, "initial_state": None}, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_tolerance(dtype):
    check(draw(USUAL, dtype), dtype, activation="silu")
    mixed = draw(USUAL) | {"x": draw(USUAL, dtype)["x"]}
    check(mixed, dtype, activation="silu")
    y, state = causal_conv1d(**mixed, return_final_state=True)
    assert y.dtype == state.dtype == dtype


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_reverse_is_the_flipped_op_on_flipped_inputs(backend):
    inputs = draw(USUAL)
    with use_backend(backend):
        y, state = causal_conv1d(**inputs, reverse=True, return_final_state=True)
        z, final = causal_conv1d(**inputs | {"x": inputs["x"].flip(1)}, return_final_state=True)
    assert_close("y", y, z.flip(1))
    assert torch.equal(state, final)


# empty sequences at both ends and inside, ones shorter than W - 1, one with more than a work item's 64 positions
@pytest.mark.parametrize("bounds", [[0, 0, 2, 2, 80, 83, 83], [0, 83], [0, 1, 83]])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_equal_separate_calls(bounds, reverse):
    case = Case(1, 83, 5, 4, "packed")
    inputs = draw(case, num_states=len(bounds) - 1)
    flags = {"activation": "silu", "reverse": reverse}
    for dtype in (torch.int32, torch.int64):
        check(inputs, cu_seqlens=torch.tensor(bounds, dtype=dtype), **flags)
    with nan_filled_empty():
        y, state = causal_conv1d(**inputs, **flags, cu_seqlens=torch.tensor(bounds), return_final_state=True)
    for s, (begin, end) in enumerate(pairwise(bounds)):
        one = inputs | {"x": inputs["x"][:, begin:end], "initial_state": inputs["initial_state"][s : s + 1]}
        expected_y, expected_state = causal_conv1d(**one, **flags, return_final_state=True)
        assert torch.equal(y[:, begin:end], expected_y)
        assert torch.equal(state[s], expected_state[0])


def test_state_carries_across_chunks():
    inputs = draw(USUAL)
    whole, final = causal_conv1d(**inputs, return_final_state=True)
    head, state = causal_conv1d(**inputs | {"x": inputs["x"][:, :2]}, return_final_state=True)
    tail, last = causal_conv1d(**inputs | {"x": inputs["x"][:, 2:], "initial_state": state}, return_final_state=True)
    assert torch.equal(torch.cat((head, tail), 1), whole)
    assert torch.equal(last, final)


@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.reason)
def test_update_is_one_step(case):
    inputs = draw(case)
    expected, final = causal_conv1d(**inputs, activation="silu", return_final_state=True)
    state = inputs["initial_state"].clone()
    steps = [
        causal_conv1d_update(x_t, state, inputs["weight"], inputs["bias"], "silu") for x_t in inputs["x"].unbind(1)
    ]
    assert_close("y", torch.stack(steps, 1), expected)
    assert torch.equal(state, final)


def test_any_strides():
    inputs = draw(USUAL)
    x = inputs["x"]
    layouts = {
        "slice of a wider tensor": torch.cat((x, x), -1).chunk(2, -1)[1],
        "time last": x.mT.contiguous().mT,
        "batch second": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every second row": x.repeat_interleave(2, 1)[:, ::2],
    }
    expected = causal_conv1d(**inputs)
    for layout in layouts.values():
        y = causal_conv1d(
            layout, inputs["weight"].t().contiguous().t(), inputs["bias"], initial_state=inputs["initial_state"]
        )
        assert torch.equal(y, expected)
        assert y.is_contiguous()
    same = inputs | {"x": x[:1, :1].expand_as(x), "bias": inputs["bias"][:1].expand(USUAL.dim)}
    assert torch.equal(causal_conv1d(**same), causal_conv1d(**{k: v.contiguous() for k, v in same.items()}))


def test_gradient_of_any_strides():
    inputs = {k: v.requires_grad_() for k, v in draw(USUAL).items()}
    y = causal_conv1d(**inputs)
    dy = torch.randn(y.shape)
    expected = torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True)
    for layout in (dy.mT.contiguous().mT, torch.cat((dy, dy), -1).chunk(2, -1)[1]):
        actual = torch.autograd.grad(y, list(inputs.values()), layout, retain_graph=True)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    ones = torch.autograd.grad(y.sum(), inputs["x"], retain_graph=True)[0]
    assert torch.equal(ones, torch.autograd.grad(y, inputs["x"], torch.ones_like(y))[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_empty_inputs(backend, batch, length):
    inputs = draw(Case(batch, length, 3, 4, "empty"))
    with use_backend(backend), nan_filled_empty():
        out = run(inputs, activation="silu")
    assert out["out0"].shape == (batch, length, 3)
    assert torch.equal(out["out1"], inputs["initial_state"])
    assert out["out1"].data_ptr() != inputs["initial_state"].data_ptr() or out["out1"].numel() == 0
    assert torch.equal(out["dweight"], torch.zeros(3, 4))
    assert out["dinitial_state"].isfinite().all()


def test_gradient_through_one_output_alone():
    inputs = draw(USUAL)
    y_only = outputs_and_gradients(lambda **kw: causal_conv1d(**kw), inputs)
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    state = causal_conv1d(**leaves, return_final_state=True)[1]
    dx = torch.autograd.grad(state.sum(), leaves["x"])[0]
    assert torch.equal(dx[:, -3:], torch.ones(2, 3, USUAL.dim))
    assert dx[:, :-3].count_nonzero() == 0
    assert y_only["dinitial_state"].count_nonzero() > 0


def test_nan_reaches_its_window_and_nothing_else():
    inputs = draw(USUAL)
    inputs["x"][0, 10, 2] = float("nan")
    y = causal_conv1d(**inputs, activation="silu")
    where = y.isnan().nonzero().tolist()
    assert where == [[0, t, 2] for t in range(10, 14)]


def test_bit_equal_for_any_number_of_threads():
    inputs = draw(Case(4, 700, 64, 4, "more calls than threads"))
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3, 2):
            torch.set_num_threads(num_threads)
            results.append(run(inputs, activation="silu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[k], v) for k, v in results[0].items())


def test_called_from_several_threads_at_once():
    inputs = draw(USUAL)
    expected = run(inputs, activation="silu")
    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(lambda _: run(inputs, activation="silu"), range(16)):
            assert all(torch.equal(actual[k], v) for k, v in expected.items())


def _in_child(queue, inputs):
    torch.set_num_threads(1)
    queue.put(causal_conv1d(**inputs).sum().item())


def test_runs_in_a_forked_process():
    inputs = draw(USUAL)
    expected = causal_conv1d(**inputs).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue, inputs))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == expected


def test_compiles_and_exports_as_one_node():
    inputs = draw(USUAL)

    class Conv(torch.nn.Module):
        def forward(self, x, weight, bias, initial_state):
            return causal_conv1d(
                x, weight, bias, activation="silu", initial_state=initial_state, return_final_state=True
            )

    compiled = torch.compile(Conv(), backend="eager", fullgraph=True)
    expected = run(inputs, activation="silu")
    actual = outputs_and_gradients(compiled, inputs)
    assert all(torch.equal(actual[k], v) for k, v in expected.items())
    program = torch.export.export(Conv(), tuple(inputs.values()))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and "mambaverse" in str(n.target)]
    assert calls == [torch.ops.mambaverse.causal_conv1d.default]
    assert torch.equal(program.module()(*inputs.values())[0], expected["out0"])


def _to_script(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.mambaverse.causal_conv1d(x, weight, bias, None, None, True, False, "auto")[0]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # timm's users still script their models
def test_scripts():
    inputs = draw(USUAL)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    assert torch.equal(torch.jit.script(_to_script)(x, weight, bias), causal_conv1d(x, weight, bias, activation="silu"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    case = Case(1, 9, 3, 4, "packed or not")
    inputs = {k: v.requires_grad_() for k, v in draw(case, num_states=2 if packed else None).items()}
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32) if packed else None
    arguments = (*inputs.values(), cu_seqlens, True, packed, "auto")
    torch.library.opcheck(torch.ops.mambaverse.causal_conv1d, arguments)
    torch.library.opcheck(torch.ops.mambaverse.causal_conv1d, (*arguments[:2], None, None, cu_seqlens, *arguments[5:]))


def test_meta_tensors_have_shapes():
    inputs = {k: v.to("meta") for k, v in draw(USUAL).items()}
    y, state = causal_conv1d(**inputs, return_final_state=True)
    assert y.device.type == "meta"
    assert y.shape == inputs["x"].shape
    assert state.shape == inputs["initial_state"].shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(7, 3)}, r"x has shape \(7, 3\); expected \(B, L, D\)"),
        ({"x": torch.ones(2, 7, 3, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"weight": torch.randn(4, 4)}, r"weight has shape \(4, 4\); expected \(D, W\) = \(3, 4\)"),
        ({"weight": torch.randn(3, 0)}, r"expected \(D, W\) with W >= 1"),
        ({"bias": torch.randn(4)}, r"bias has shape \(4,\); expected \(D,\) = \(3,\)"),
        ({"initial_state": torch.randn(2, 4, 3)}, r"initial_state has shape .* expected \(S, W-1, D\) = \(2, 3, 3\)"),
        ({"bias": torch.randn(3, device="meta")}, "bias is on meta; expected cpu"),
        ({"weight": torch.ones(3, 4, dtype=torch.complex64)}, "weight has dtype torch.complex64; expected a real"),
        ({"bias": torch.ones(3, dtype=torch.complex64)}, "bias has dtype torch.complex64; expected a real"),
        ({"initial_state": torch.ones(2, 3, 3, dtype=torch.complex64)}, "initial_state has dtype torch.complex64"),
        ({"activation": "relu"}, "unknown activation 'relu'"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "the batch is 2; expected 1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**draw(SMALL) | change)


def test_a_step_takes_real_tensors():
    x_t, state, weight = torch.randn(2, 3), torch.zeros(2, 3, 3, dtype=torch.complex64), torch.randn(3, 4)
    with pytest.raises(
        ValueError, match=r"causal_conv1d_update: conv_state has dtype torch\.complex64; expected a real"
    ):
        causal_conv1d_update(x_t, state, weight)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 3], "from 0 to 3; expected from 0 to the length 7"),
        ([1, 7], "from 1 to 7"),
        ([0, 5, 4, 7], "falls from 5 to 4 at index 2"),
        ([[0, 7]], r"shape \(1, 2\); expected \(S \+ 1,\)"),
        ([0.0, 7.0], "dtype torch.float32; expected int32"),
    ],
)
def test_bad_offsets_are_named(backend, cu_seqlens, message):
    x, weight = torch.randn(1, 7, 3), torch.randn(3, 4)
    with use_backend(backend), pytest.raises(ValueError, match=message):
        causal_conv1d(x, weight, cu_seqlens=torch.tensor(cu_seqlens))
