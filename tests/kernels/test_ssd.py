"""Promises of ssd about numbers: right in every flag, shape, dtype and layout. As a torch op: test_ssd_op.py."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.ssd import reference, ssd, ssd_update
from mambaverse.kernels.ssd.cases import TESTED, Case, make_weights
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients

SMALL = Case(2, 5, 4, 3, 2, 2, "for gradcheck")
USUAL = TESTED[0]
WEIGHTS = ("weight", "own_weight")
PACKED = [[0, 0, 2, 2, 147, 150, 150], [0, 150], [0, 65, 150]]  # empty and short sequences, chunks of several lengths


def draw(
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    optional: bool = True,
    num_states: int | None = None,
    weighted: bool = False,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(case.length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens, heads = (case.batch, case.length), case.heads
    weights = make_weights(case, dtype=dtype) if weighted else {}
    inputs = {
        "x": normal(*tokens, heads, case.head_dim),
        "dt": normal(*tokens, heads) - 2,  # after softplus 0.13 and about
        "A": -normal(heads).exp(),
        "B": normal(*tokens, case.groups, case.state_dim),
        "C": normal(*tokens, case.groups, case.state_dim),
    }
    if optional:
        inputs |= {
            "D": normal(heads, case.head_dim),
            "z": normal(*tokens, heads, case.head_dim),
            "dt_bias": 0.3 * normal(heads),
            "initial_state": normal(num_states or case.batch, heads, case.head_dim, case.state_dim),
        }
    return {k: v.to(dtype) for k, v in inputs.items()} | weights


def run(inputs: dict[str, Any], **flags: Any) -> dict[str, Tensor]:
    flags.setdefault("dt_softplus", True)
    return outputs_and_gradients(ssd, inputs, return_final_state=True, **flags)


def check(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, **flags: Any) -> None:
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    with nan_filled_empty():
        actual = run(inputs, **flags)
    for name, expected in run(wide, **flags).items():
        assert_close(name, actual[name], expected, dtype)


def test_reference_is_the_masked_matrix_of_the_paper():
    x, dt, A, B, C = draw(USUAL, torch.float64, optional=False).values()
    Δ = F.softplus(dt)
    log = (Δ * A).cumsum(1)
    lower = torch.ones(USUAL.length, USUAL.length).tril().bool()[..., None]
    L = torch.where(lower, (log[:, :, None] - log[:, None]).exp(), 0)  # (B, i, j, H)
    scores = torch.einsum("bign,bjgn->bijg", C, B).repeat_interleave(USUAL.heads // USUAL.groups, dim=-1)
    y = torch.einsum("bijh,bjh,bjhp->bihp", L * scores, Δ, x)
    assert_close("y", ssd(x, dt, A, B, C, dt_softplus=True), y)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 2, 2, 5]])  # the second sequence is empty
@pytest.mark.parametrize("limits", [(0.0, float("inf")), (0.1, 0.15)])
def test_explicit_backward_is_the_derivative_of_the_reference(reverse, bounds, limits):
    case = SMALL if bounds is None else Case(1, 5, 4, 3, 2, 2, "packed")
    inputs = draw(case, torch.float64, num_states=bounds and 3, weighted=True)
    leaves = [inputs[k].requires_grad_() for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")]
    arguments: list[Any] = [*leaves, None if bounds is None else torch.tensor(bounds)]
    flags: Any = (True, *limits, reverse)
    both = {k: inputs[k].requires_grad_() for k in ("weight", "own_weight")}
    for weights in ({}, both, {"weight": both["weight"]}, {"own_weight": both["own_weight"]}):
        y, state, chunk_states = reference.forward(*arguments, *flags, **weights)
        dy, dstate = torch.randn_like(y), torch.randn_like(state)
        expected = torch.autograd.grad((y, state), (*leaves, *weights.values()), (dy, dstate))
        with torch.no_grad():
            actual = reference.backward(dy, dstate, *[*arguments, chunk_states, *flags], **weights)
        actual = *actual[:9], *(g for g, k in zip(actual[9:], both, strict=True) if k in weights)
        for name, a, e in zip((*list(inputs)[:9], *weights), actual, expected, strict=True):
            assert_close(name, a, e)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_gradcheck(softplus, weighted):
    inputs = draw(SMALL, torch.float64, weighted=weighted)
    names = list(inputs)

    def call(*leaves):
        return ssd(**dict(zip(names, leaves, strict=True)), dt_softplus=softplus, return_final_state=True)

    if not softplus:
        inputs["dt"] = inputs["dt"].exp() + 1  # away from the limit 0
    assert torch.autograd.gradcheck(call, [v.requires_grad_() for v in inputs.values()], fast_mode=True)


@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.reason)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_output_and_gradient_is_within_tolerance(case, reverse):
    check(draw(case), reverse=reverse)
    check(draw(case, optional=False), reverse=reverse)


@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.reason)
@pytest.mark.parametrize("reverse", [False, True])
def test_weights_are_within_tolerance(case, reverse):
    inputs = draw(case, weighted=True)
    check(inputs, reverse=reverse)
    bare = draw(case, optional=False)
    for name in WEIGHTS:
        check(bare | {name: inputs[name]}, reverse=reverse)


def test_weights_of_one_step_size_are_the_step_size():
    inputs = draw(USUAL, torch.float64)
    Δ = F.softplus(inputs["dt"] + inputs["dt_bias"])
    expected = ssd(**inputs, dt_softplus=True)
    assert_close("both", ssd(**inputs, dt_softplus=True, weight=Δ, own_weight=Δ), expected)
    assert_close("own", ssd(**inputs, dt_softplus=True, own_weight=Δ), expected)


def test_weights_beside_steps_of_no_size():
    """Nothing decays where Δ is 0, and what enters does not depend on it."""
    inputs = draw(USUAL, weighted=True)
    del inputs["dt_bias"]
    inputs["dt"] = torch.where(inputs["dt"] > -2, 0.3 * (inputs["dt"] + 2), 0.0)
    check(inputs, dt_softplus=False)


@pytest.mark.parametrize("present", ["D", "z", "dt_bias", "initial_state"])
def test_each_optional_input_alone_is_within_tolerance(present):
    inputs = draw(USUAL)
    absent = {"D", "z", "dt_bias", "initial_state"} - {present}
    check({k: v for k, v in inputs.items() if k not in absent})


# one position; chunks beside the SIMD width; one register; a single chunk that is longer than the rule's
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 300])
def test_any_chunk_size_is_within_tolerance(chunk_size):
    check(draw(TESTED[3]), chunk_size=chunk_size)


@pytest.mark.parametrize("limits", [(0.1, 0.15), (0.0, 0.2), (0.05, float("inf"))])
@pytest.mark.parametrize("softplus", [False, True])
def test_limits_of_the_step_size(limits, softplus):
    inputs = draw(USUAL)
    if not softplus:
        inputs["dt"] = 0.1 * (inputs["dt"] + 2.5)
    check(inputs, dt_limit=limits, dt_softplus=softplus)


def test_skip_per_head():
    inputs = draw(USUAL)
    check(inputs | {"D": inputs["D"][:, 0].contiguous()})


def test_one_group_needs_no_axis():
    inputs = draw(Case(2, 70, 4, 16, 1, 16, "one group"))
    flat = inputs | {"B": inputs["B"][:, :, 0], "C": inputs["C"][:, :, 0]}
    assert torch.equal(ssd(**flat), ssd(**inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_tolerance(dtype):
    check(draw(USUAL, dtype), dtype)
    mixed = draw(USUAL) | {k: v for k, v in draw(USUAL, dtype).items() if k in ("x", "dt", "B", "z")}
    check(mixed, dtype)
    check(draw(USUAL, dtype) | make_weights(USUAL), dtype)
    y, state = ssd(**mixed, return_final_state=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)


def test_float64_states_are_float64():
    assert ssd(**draw(SMALL, torch.float64), return_final_state=True)[1].dtype == torch.float64


# decays from nothing to e^-60 a step in one chunk: sums of logs lose the weak ones, differences of sums lose gradients
def test_strong_and_weak_decays_side_by_side():
    inputs = draw(USUAL, optional=False)
    inputs["dt"] = torch.where(torch.arange(USUAL.length)[:, None] % 7 < 3, 3.0, 1e-3) * inputs["dt"].exp()
    inputs["A"] = torch.tensor([-1e-3, -1.0, -16.0, -160.0])
    check(inputs, dt_softplus=False)
    check(inputs | {"A": torch.full((4,), -40.0), "dt": inputs["dt"].clamp(0.5)}, dt_softplus=False)


def test_growing_states_are_within_tolerance():
    inputs = draw(USUAL)
    check(inputs | {"A": 0.5 * inputs["A"].abs()})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_reverse_is_the_flipped_op_on_flipped_inputs(backend):
    inputs = draw(USUAL)
    flipped = {k: v.flip(1) if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    with use_backend(backend):
        y, state = ssd(**inputs, reverse=True, return_final_state=True)
        y_flipped, final = ssd(**flipped, return_final_state=True)
    assert torch.equal(y, y_flipped.flip(1))
    assert torch.equal(state, final)


@pytest.mark.parametrize("bounds", PACKED)
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_equal_separate_calls(bounds, reverse):
    case = Case(1, 150, 2, 8, 1, 8, "packed")
    inputs = draw(case, num_states=len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    check(inputs, cu_seqlens=cu_seqlens, reverse=reverse)
    check(inputs | make_weights(case), cu_seqlens=cu_seqlens, reverse=reverse)
    with nan_filled_empty():
        y, state = ssd(**inputs, cu_seqlens=cu_seqlens.long(), reverse=reverse, return_final_state=True)
    for s, (begin, end) in enumerate(pairwise(bounds)):
        one = {k: v[:, begin:end] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
        one["initial_state"] = inputs["initial_state"][s : s + 1]
        expected_y, expected_state = ssd(**one, reverse=reverse, return_final_state=True)
        assert torch.equal(y[:, begin:end], expected_y)
        assert torch.equal(state[s], expected_state[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_state_carries_across_calls(backend):
    inputs = draw(TESTED[4])
    over_time = ("x", "dt", "B", "C", "z")
    with use_backend(backend):
        whole, final = ssd(**inputs, return_final_state=True)
        head, state = ssd(**{k: v[:, :5] if k in over_time else v for k, v in inputs.items()}, return_final_state=True)
        rest = {k: v[:, 5:] if k in over_time else v for k, v in inputs.items()} | {"initial_state": state}
        tail, last = ssd(**rest, return_final_state=True)
    assert_close("y", torch.cat((head, tail), 1), whole)
    assert_close("final_state", last, final)


@pytest.mark.parametrize("case", TESTED[:4], ids=lambda c: c.reason)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("weights", [(), ("weight",), ("own_weight",), WEIGHTS], ids=str)
def test_update_is_one_step(case, optional, weights):
    drawn = draw(case, optional=optional, weighted=True)
    inputs = {k: v for k, v in drawn.items() if k in weights or k not in WEIGHTS}
    flags: dict[str, Any] = {"dt_softplus": True, "dt_limit": (0.1, 0.5)}
    expected, final = ssd(**inputs, **flags, return_final_state=True)
    state = inputs.pop("initial_state", torch.zeros(final.shape)).clone()
    over_time = [k for k in ("x", "dt", "B", "C", "z", *WEIGHTS) if k in inputs]
    steps = [
        ssd_update(state, **{k: v[:, t] if k in over_time else v for k, v in inputs.items()}, **flags)
        for t in range(case.length)
    ]
    assert_close("y", torch.stack(steps, 1), expected)
    assert_close("state", state, final)


def test_any_strides():
    inputs = draw(USUAL)
    expected = run(inputs)

    def packed_columns(t: Tensor) -> Tensor:  # a slice of a projection, as in Mamba-2
        return torch.cat((t, t), -1).chunk(2, -1)[1]

    layouts = [
        packed_columns,
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: t.repeat_interleave(2, 0)[::2],
    ]
    for layout in layouts:
        actual = run({k: layout(v) for k, v in inputs.items()})
        assert all(torch.equal(actual[k], v) for k, v in expected.items())
        assert actual["out0"].is_contiguous()
    same = {k: v[:1].expand_as(v) for k, v in inputs.items()}
    assert torch.equal(ssd(**same), ssd(**{k: v.contiguous() for k, v in same.items()}))


def test_gradient_of_any_strides():
    inputs = {k: v.requires_grad_() for k, v in draw(USUAL).items()}
    y = ssd(**inputs)
    dy = torch.randn(y.shape)
    expected = torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True)
    actual = torch.autograd.grad(y, list(inputs.values()), dy.mT.contiguous().mT, retain_graph=True)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    ones = torch.autograd.grad(y.sum(), inputs["x"], retain_graph=True)[0]
    assert torch.equal(ones, torch.autograd.grad(y, inputs["x"], torch.ones_like(y))[0])


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_one_output_alone(output):
    inputs = draw(USUAL)

    def one(**leaves):
        outputs = ssd(**leaves, dt_softplus=True, return_final_state=True)
        return outputs[output] + 0 * outputs[1 - output].sum()  # what no output depends on has gradient 0, not None

    def alone(**leaves):
        return ssd(**leaves, dt_softplus=True, return_final_state=True)[output]

    expected = outputs_and_gradients(one, {k: v.double() for k, v in inputs.items()})
    for name, actual in outputs_and_gradients(alone, inputs).items():
        assert_close(name, actual, expected[name])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("batch", "length", "bounds"), [(2, 0, None), (0, 5, None), (1, 0, [0, 0, 0])])
def test_empty_inputs(backend, batch, length, bounds):
    inputs = draw(Case(batch, length, 4, 3, 2, 2, "empty"), num_states=bounds and 2)
    with use_backend(backend), nan_filled_empty():
        out = run(inputs, cu_seqlens=None if bounds is None else torch.tensor(bounds))
    assert out["out0"].shape == (batch, length, 4, 3)
    assert torch.equal(out["out1"], inputs["initial_state"])
    assert out["out1"].data_ptr() != inputs["initial_state"].data_ptr() or out["out1"].numel() == 0
    assert torch.equal(out["dA"], torch.zeros(4))
    assert out["dinitial_state"].isfinite().all()


def test_nan_stays_in_its_sequence_and_head():
    inputs = draw(USUAL)
    inputs["x"][0, 10, 1, 3] = float("nan")
    y, state = ssd(**inputs, dt_softplus=True, return_final_state=True)
    assert y[0, 10:, 1, 3].isnan().all()
    assert state[0, 1, 3].isnan().all()
    others = torch.ones(y.shape[:3], dtype=torch.bool)
    others[0, :, 1] = False
    assert y[others].isfinite().all()
    inputs["dt"][1, 20, 2] = float("nan")
    assert ssd(**inputs, dt_softplus=True)[1, 20:, 2].isnan().all()
