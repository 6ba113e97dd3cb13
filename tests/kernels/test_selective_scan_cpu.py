"""The CPU kernels of selective_scan against the float64 reference: every output and gradient, every option."""

from typing import Any

import pytest
import torch

from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.selective_scan import selective_scan, selective_scan_update
from mambaverse.kernels.selective_scan.cases import TESTED, Case, make_inputs
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients

CHUNKS = next(case for case in TESTED if case.name == "chunks")
PACKED = Case("packed", "three chunks in all; see LENGTHS", 1, 3 + 0 + 64 + 1 + 130 + 65, 70, 4)
LENGTHS = (3, 0, 64, 1, 130, 65)  # shorter than a chunk, empty, a chunk, one step, two chunk boundaries, just past one
COMPLEX_PACKED = Case("complex_packed", "the other kernel", 1, PACKED.length, 6, 2, is_complex=True)
OPTIONAL = ("D", "z", "delta_bias", "initial_state")


def widened(inputs):
    """The same numbers in double precision: the dtype that the reference runs in."""

    def widen(v):
        return v.to(torch.complex128 if v.is_complex() else torch.float64) if torch.is_tensor(v) else v

    return {name: widen(v) for name, v in inputs.items()}


def check_against_reference(inputs, dtype=torch.float32, **flags):
    flags = {"delta_softplus": True, **flags, "return_final_state": True}
    with nan_filled_empty():
        actual = outputs_and_gradients(selective_scan, inputs, **flags)
    expected = outputs_and_gradients(selective_scan, widened(inputs), **flags)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(name, actual[name], expected[name], dtype)


def packed_inputs(case):
    inputs = make_inputs(case)
    state = inputs["initial_state"]
    inputs["initial_state"] = torch.cat([state * (0.5 + s) for s in range(len(LENGTHS))])
    return inputs, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", TESTED, ids=lambda case: case.name)
def test_equals_reference(case, reverse):
    check_against_reference(make_inputs(case), reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CHUNKS, TESTED[-1]], ids=lambda case: case.name)
def test_equals_reference_in_16_bit(case, dtype):
    check_against_reference(make_inputs(case, dtype=dtype), dtype)


def test_gradients_have_the_dtypes_of_the_inputs():
    inputs = make_inputs(CHUNKS, dtype=torch.bfloat16) | {"delta": make_inputs(CHUNKS)["delta"]}
    results = outputs_and_gradients(selective_scan, inputs, return_final_state=True)
    assert results["out0"].dtype == torch.bfloat16
    assert results["out1"].dtype == torch.float32
    assert {name: results[f"d{name}"].dtype for name in inputs} == {name: v.dtype for name, v in inputs.items()}


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("present", [(), ("D",), ("z",), ("delta_bias",), ("initial_state",)], ids=str)
def test_equals_reference_with_each_option_alone(present, softplus):
    inputs = make_inputs(CHUNKS)
    inputs = {k: v for k, v in inputs.items() if k not in OPTIONAL or k in present}
    if not softplus:  # Δ must be positive, or the states explode
        inputs |= {name: 0.3 * inputs[name].abs() for name in ("delta", "delta_bias") if name in inputs}
    check_against_reference(inputs, delta_softplus=softplus)


@pytest.mark.parametrize("case", [CHUNKS, TESTED[-1]], ids=lambda case: case.name)
def test_growing_states_equal_reference(case):
    """Nothing in the op demands that A is negative or Δ positive."""
    inputs = make_inputs(case)
    inputs["A"] = inputs["A"] / 500
    check_against_reference(inputs | {"delta": inputs["delta"] - 0.5}, delta_softplus=False)


def test_huge_steps_forget_everything():
    """Where Δ A leaves the range of exponents the states are exactly forgotten, and the steps around them are not."""
    inputs = make_inputs(CHUNKS)
    inputs["delta"][:, 40:90:7] = 1e4
    inputs["A"][1] = 0
    inputs["delta"][:, :, 1] = 0.1
    check_against_reference(inputs)


@pytest.mark.parametrize("case", [CHUNKS, TESTED[-1]], ids=lambda case: case.name)
def test_reverse_equals_flipped_scan(case):
    inputs = make_inputs(case)
    flipped = {k: v.flip(1) if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    y, state = selective_scan(**inputs, delta_softplus=True, reverse=True, return_final_state=True)
    y_flipped, state_flipped = selective_scan(**flipped, delta_softplus=True, return_final_state=True)
    assert torch.equal(y, y_flipped.flip(1))
    assert torch.equal(state, state_flipped)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", [PACKED, COMPLEX_PACKED], ids=lambda case: case.name)
def test_packed_equals_reference(case, reverse):
    inputs, cu_seqlens = packed_inputs(case)
    check_against_reference(inputs, cu_seqlens=cu_seqlens, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", [PACKED, COMPLEX_PACKED], ids=lambda case: case.name)
def test_packed_equals_separate_calls(case, reverse):
    inputs, cu_seqlens = packed_inputs(case)
    flags: dict[str, Any] = {"delta_softplus": True, "reverse": reverse, "return_final_state": True}
    y, states = selective_scan(**inputs, cu_seqlens=cu_seqlens, **flags)
    for s, (start, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
        one = {k: v[:, start:end] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
        y_one, state_one = selective_scan(**one | {"initial_state": inputs["initial_state"][s : s + 1]}, **flags)
        assert_close("y", y[:, start:end], y_one)
        assert_close("state", states[s : s + 1], state_one)


@pytest.mark.parametrize("case", [CHUNKS, TESTED[-1]], ids=lambda case: case.name)
def test_state_carries_across_calls(case):
    inputs = make_inputs(case)
    flags: dict[str, Any] = {"delta_softplus": True, "return_final_state": True}
    y, state = selective_scan(**inputs, **flags)
    parts, carried = [], inputs["initial_state"]
    for span in (slice(0, case.length // 3), slice(case.length // 3, None)):
        part = {k: v[:, span] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
        y_part, carried = selective_scan(**part | {"initial_state": carried}, **flags)
        parts.append(y_part)
    assert_close("y", torch.cat(parts, 1), y)
    assert_close("state", carried, state)


def strided_inputs(case):
    """u and z as halves of one projection, the rest transposed, sliced, expanded, or with a step in memory."""
    inputs = make_inputs(case)
    both = torch.cat((inputs["u"], inputs["z"]), -1)
    inputs["u"], inputs["z"] = both.chunk(2, -1)
    inputs["delta"] = inputs["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["B"] = torch.stack((inputs["B"], inputs["B"]), -1)[..., 0]
    inputs["C"] = inputs["C"][:1, :1].expand_as(inputs["C"])
    inputs["A"] = inputs["A"].T.contiguous().T
    inputs["D"] = inputs["D"][:1].expand(case.dim)
    inputs["initial_state"] = inputs["initial_state"].transpose(0, 2).contiguous().transpose(0, 2)
    return inputs


@pytest.mark.parametrize("case", [CHUNKS, TESTED[-1]], ids=lambda case: case.name)
def test_any_strides(case):
    inputs = strided_inputs(case)
    assert not any(inputs[name].is_contiguous() for name in ("u", "z", "delta", "B", "C", "A", "initial_state"))
    results = {}
    for kind, values in (("strided", inputs), ("plain", {k: v.contiguous() for k, v in inputs.items()})):
        leaves = {k: v.detach().requires_grad_() for k, v in values.items()}
        y, state = selective_scan(**leaves, delta_softplus=True, return_final_state=True)
        dy = torch.ones(1, 1, 1).expand(y.shape) if kind == "strided" else torch.ones(y.shape)
        results[kind] = (
            y,
            state,
            *torch.autograd.grad([y, state], list(leaves.values()), [dy, torch.ones_like(state)]),
        )
    assert results["strided"][0].is_contiguous()
    for actual, expected in zip(results["strided"], results["plain"], strict=True):
        assert_close("result", actual, expected)


@pytest.mark.parametrize("batch, length", [(2, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_to_scan(batch, length, is_complex, backend):
    inputs = make_inputs(Case("empty", "no steps or no sequences", batch, length, 5, 3, is_complex=is_complex))
    with use_backend(backend), nan_filled_empty():
        results = outputs_and_gradients(selective_scan, inputs, return_final_state=True)
        _, state = selective_scan(**inputs, return_final_state=True)
    assert results["out0"].shape == (batch, length, 5)
    assert torch.equal(results["out1"], inputs["initial_state"])
    assert state.data_ptr() != inputs["initial_state"].data_ptr() or state.numel() == 0
    assert all(torch.count_nonzero(results[f"d{name}"]) == 0 for name in ("A", "D", "delta_bias"))


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "z", "initial_state"])
def test_nan_stays_nan(name, is_complex):
    inputs = make_inputs(Case("nan", "one step after it", 1, 2, 3, 2, is_complex=is_complex))
    inputs[name].view(-1)[0] = float("nan")
    assert selective_scan(**inputs, delta_softplus=True)[0, 0, 0].isnan()


@pytest.mark.parametrize("is_complex", [False, True])
def test_gradient_of_one_output_alone(is_complex):
    inputs = make_inputs(Case("alone", "a chunk boundary", 1, 70, 3, 2, is_complex=is_complex))
    for index in (0, 1):
        gradients = []
        for values in (inputs, widened(inputs)):
            u = values["u"].detach().requires_grad_()
            out = selective_scan(**values | {"u": u}, delta_softplus=True, return_final_state=True)[index]
            gradients.append(torch.autograd.grad(out.abs().sum(), u)[0])
        assert_close(f"du of output {index}", *gradients)


@pytest.mark.parametrize("case", [CHUNKS, TESTED[-1]], ids=lambda case: case.name)
def test_gradient_without_kept_states(case):
    """A caller of the op that passes save=False, as a scripted module might, still gets its gradient."""
    inputs = make_inputs(case)
    gradients = []
    for save in (True, False):
        leaves = [v.detach().requires_grad_() for v in inputs.values()]
        arguments = (*leaves[:6], leaves[6], leaves[7], leaves[8], None, True, False, "cpu", save)
        y, _, chunk_states = torch.ops.mambaverse.selective_scan(*arguments)
        assert save or chunk_states.shape[0] == 0
        gradients.append(torch.autograd.grad(y.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def parallel_scan(a, b):
    """h[t] = a[t] h[t-1] + b[t] over the first axis, by doubling: an oracle where the reference is too slow."""
    step = 1
    while step < len(a):
        b = torch.cat((b[:step], a[step:] * b[:-step] + b[step:]))
        a = torch.cat((a[:step], a[step:] * a[:-step]))
        step *= 2
    return b


def test_long_sequence_keeps_precision():
    """Sums over many steps are taken in two levels; taken one by one in float32 they would lose a digit."""
    inputs = make_inputs(Case("long", "1024 chunks", 1, 1 << 16, 2, 1))
    inputs |= {name: inputs[name].abs() for name in ("u", "B", "C", "z")}
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    y = selective_scan(**leaves, delta_softplus=True)
    y.backward(torch.ones_like(y))
    exact = {k: v.detach().double()[0] if k != "A" else v.detach().double() for k, v in inputs.items()}
    exact |= {k: inputs[k].detach().double() for k in ("D", "delta_bias")}
    exact = {k: v.requires_grad_() for k, v in exact.items()}
    dt = torch.nn.functional.softplus(exact["delta"] + exact["delta_bias"])
    a, b = torch.exp(dt * exact["A"].squeeze(-1)), dt * exact["B"] * exact["u"]
    h = parallel_scan(torch.cat((torch.ones_like(a[:1]), a)), torch.cat((exact["initial_state"].T, b)))[1:]
    expected = (exact["C"] * h + exact["D"] * exact["u"]) * torch.nn.functional.silu(exact["z"])
    expected.backward(torch.ones_like(expected))
    assert_close("y", y[0], expected)
    for name, leaf in leaves.items():
        shape = leaf.grad.shape
        assert_close(f"d{name}", leaf.grad, exact[name].grad.reshape(shape))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_step_compiles_in_one_graph():
    state, u, A, B = torch.randn(2, 4, 3), torch.randn(2, 4), -torch.rand(4, 3), torch.randn(2, 3)
    expected_state = state.clone()
    expected = selective_scan_update(expected_state, u, u.abs(), A, B, B)
    step = torch.compile(selective_scan_update, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(state, u, u.abs(), A, B, B), expected)
    torch.testing.assert_close(state, expected_state)
