"""The Triton kernels of selective_scan on a GPU: every dtype, option and gradient against the float64 reference."""

from typing import Any

import pytest
import torch

from mambaverse.kernels.backend import BackendError
from mambaverse.kernels.selective_scan import bidirectional_selective_scan, selective_scan
from mambaverse.kernels.selective_scan.cases import TESTED, Case, make_inputs
from mambaverse.kernels.testing import assert_captured, assert_close, nan_filled_empty, outputs_and_gradients

pytestmark = pytest.mark.gpu

CASES = (
    *(case for case in TESTED if not case.is_complex),
    Case("tiles", "whole tiles, a part of one, and a channel more than a block", 2, 77, 33, 16),
    Case("many", "so many programs that nothing is split", 160, 70, 264, 4),
    Case("long", "so few programs that the length is split", 1, 1333, 40, 8),
    Case("own", "every channel has its own B and C", 2, 41, 37, 3, groups=37),
    Case("wide_groups", "groups wider than a block", 1, 50, 132, 5, groups=2),
    Case("largest_state", "N = 256, the most there may be", 1, 35, 33, 256),
)
CHAINS = (
    Case("narrow", "programs of one warp; the last piece is shorter", 50, 200, 48, 8),
    Case("wide", "programs of four warps, which add up dB and dC of both pieces in one place", 70, 150, 128, 16),
    Case("resting", "states that rest in memory between tiles", 50, 141, 40, 20),
    Case("alone", "one thread a channel, programs of two warps", 150, 141, 64, 3),
)
ONE_ROW = Case("one row", "a size of 1 is a constant to Triton", 1, 1, 40, 16)
PACKED = Case("packed", "see LENGTHS", 1, 3 + 0 + 64 + 1 + 130 + 65, 70, 4)
LENGTHS = (3, 0, 64, 1, 130, 65)
FLAGS: dict[str, Any] = {"delta_softplus": True, "return_final_state": True}  # a negative Δ would let states explode
OPTIONAL = ("D", "z", "delta_bias", "initial_state")
PER_STEP = ("u", "delta", "B", "C", "z")


def gpu_inputs(case, dtype=torch.float32, **more):
    return {k: v.cuda() for k, v in make_inputs(case, dtype=dtype, **more).items()}


def check_against_reference(inputs, dtype=torch.float32, **flags):
    flags = {"delta_softplus": True, **flags, "return_final_state": True}
    with nan_filled_empty():
        actual = outputs_and_gradients(selective_scan, inputs, **flags)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = outputs_and_gradients(selective_scan, wide, **flags)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(name, actual[name], expected[name], dtype)


def packed_inputs(dtype=torch.float32):
    inputs = gpu_inputs(PACKED, dtype)
    state = inputs["initial_state"]
    inputs["initial_state"] = torch.cat([state * (0.5 + s) for s in range(len(LENGTHS))])
    return inputs, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_reference(case, reverse, dtype):
    check_against_reference(gpu_inputs(case, dtype), dtype, reverse=reverse)


@pytest.fixture
def chained(monkeypatch):
    """Backward in pieces of a chain of what is too small for it: as if a multiprocessor held one warp."""
    from mambaverse.kernels.selective_scan import triton, triton_plan

    splits = []

    def plan(*given):
        splits.append(triton_plan.plan(*given).split)
        return triton_plan.plan(*given)

    few = {"BACKWARD_WARPS": 1, "LEAST_PIECE": 64, "LEAST_SEGMENTS": 10**6, "num_multiprocessors": lambda device: 132}
    for name, value in few.items():
        monkeypatch.setattr(triton_plan, name, value)
    monkeypatch.setattr(triton, "plan", plan)
    triton_plan.plan.cache_clear()
    yield
    triton_plan.plan.cache_clear()
    assert triton.CHAINED.value in splits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.name)
def test_chains_equal_reference(case, reverse, dtype, chained):
    check_against_reference(gpu_inputs(case, dtype), dtype, reverse=reverse)


@pytest.mark.parametrize("function", [selective_scan, bidirectional_selective_scan], ids=lambda f: f.__name__)
def test_chains_of_a_size_that_takes_them(function, monkeypatch):
    """More pieces than the GPU holds at once, on a GPU of 132 multiprocessors; sums of chains are grouped otherwise."""
    from mambaverse.kernels.selective_scan import triton_plan

    inputs = gpu_inputs(Case("size", "320 programs of a direction, or of both", 8, 520, 2560, 16), torch.bfloat16)
    inputs = {k: v[:4] if function is not selective_scan and v.shape[0] == 8 else v for k, v in inputs.items()}
    results = []
    for filled in (triton_plan.FILLED, 0.0):
        monkeypatch.setattr(triton_plan, "FILLED", filled)
        triton_plan.plan.cache_clear()
        results.append(outputs_and_gradients(function, inputs, **FLAGS))
    triton_plan.plan.cache_clear()
    chained, whole = results
    for name in whole:
        if name in ("dA", "dD", "ddelta_bias"):
            assert (chained[name] - whole[name]).norm() <= 1e-5 * whole[name].norm()
        else:
            assert torch.equal(chained[name], whole[name]), name


def test_chains_of_both_directions(chained):
    inputs = gpu_inputs(Case("both", "programs of both directions are more than multiprocessors", 27, 200, 48, 8))
    inputs["A"] = torch.stack((inputs["A"], 0.5 * inputs["A"]))
    actual = outputs_and_gradients(bidirectional_selective_scan, inputs, delta_softplus=True)
    wide = {k: v.double() for k, v in inputs.items()}
    expected = outputs_and_gradients(bidirectional_selective_scan, wide, delta_softplus=True)
    for name in expected:
        assert_close(name, actual[name], expected[name])


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.name)
def test_chains_are_bit_equal_and_captured(case, chained):
    inputs = gpu_inputs(case, torch.bfloat16)
    runs = [outputs_and_gradients(selective_scan, inputs, **FLAGS) for _ in range(4)]
    assert all(torch.equal(run[k], runs[0][k]) for run in runs[1:] for k in run)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}

    def step():
        y = selective_scan(**leaves, delta_softplus=True)
        return (y.detach(), *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y)))

    assert_captured(step)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("present", [(), ("D",), ("z",), ("delta_bias",), ("initial_state",)], ids=str)
def test_equals_reference_with_each_option_alone(present, softplus):
    inputs = {k: v for k, v in gpu_inputs(CASES[2]).items() if k not in OPTIONAL or k in present}
    if not softplus:  # Δ must be positive, or the states explode
        inputs |= {name: 0.3 * inputs[name].abs() for name in ("delta", "delta_bias") if name in inputs}
    check_against_reference(inputs, delta_softplus=softplus)


def test_mixed_dtypes():
    inputs = gpu_inputs(CASES[2], torch.bfloat16)
    inputs |= {"delta": inputs["delta"].float(), "C": inputs["C"].half(), "D": inputs["D"].bfloat16()}
    check_against_reference(inputs, torch.bfloat16)
    results = outputs_and_gradients(selective_scan, inputs, return_final_state=True)
    assert {name: results[f"d{name}"].dtype for name in inputs} == {name: v.dtype for name, v in inputs.items()}


def test_small_steps_keep_their_precision():
    """Δ of 1e-4: log(1 + exp(x)) taken plainly would be off by 1e-3 of it."""
    inputs = gpu_inputs(CASES[2])
    check_against_reference(inputs | {"delta_bias": inputs["delta_bias"] - 7})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_equals_reference(reverse, dtype):
    inputs, cu_seqlens = packed_inputs(dtype)
    check_against_reference(inputs, dtype, cu_seqlens=cu_seqlens, reverse=reverse)


@pytest.mark.parametrize("offsets", [[0, 300], [-5, 3, 2**30], [7, 2, 9], [3, 9], [0], [0, 0, 0]], ids=str)
def test_wrong_offsets_stay_inside_and_leave_zeros(offsets):
    inputs = gpu_inputs(Case("packed", "batch 1", 1, 9, 6, 3))
    inputs["initial_state"] = inputs["initial_state"].expand(len(offsets) - 1, -1, -1)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32).cuda()
    results = outputs_and_gradients(selective_scan, inputs, cu_seqlens=cu_seqlens, delta_softplus=True)
    assert all(v.isfinite().all() for v in results.values())
    if offsets == [3, 9]:
        assert not results["out0"][:, :3].any() and not results["dB"][:, :3].any()


@pytest.mark.parametrize("name", ["many", "long"])
def test_any_strides(name):
    case = next(c for c in CASES if c.name == name)
    inputs = gpu_inputs(case)
    plain = outputs_and_gradients(selective_scan, inputs, delta_softplus=True, return_final_state=True)
    strided = dict(inputs)
    strided["u"], strided["z"] = torch.cat((inputs["u"], inputs["z"]), -1).chunk(2, -1)
    strided["delta"] = inputs["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["B"] = torch.stack((inputs["B"], inputs["B"]), -1)[..., 0]
    strided["C"] = inputs["C"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["A"] = inputs["A"].T.contiguous().T
    strided["initial_state"] = inputs["initial_state"].transpose(0, 2).contiguous().transpose(0, 2)
    leaves = {k: v.detach().requires_grad_() for k, v in strided.items()}
    y, state = selective_scan(**leaves, delta_softplus=True, return_final_state=True)
    assert torch.equal(y, plain["out0"]) and torch.equal(state, plain["out1"]) and y.is_contiguous()
    expanded = torch.ones(1, 1, 1, device="cuda").expand(y.shape)
    actual = torch.autograd.grad(y, list(leaves.values()), expanded, retain_graph=True)
    expected = torch.autograd.grad(y, list(leaves.values()), expanded.contiguous())
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("batch, length", [(2, 0), (0, 5), (0, 0)])
def test_nothing_to_scan(batch, length):
    inputs = gpu_inputs(Case("empty", "no steps or no sequences", batch, length, 5, 3))
    with nan_filled_empty():
        results = outputs_and_gradients(selective_scan, inputs, return_final_state=True)
    assert torch.equal(results["out1"], inputs["initial_state"])
    assert all(torch.count_nonzero(results[f"d{name}"]) == 0 for name in ("A", "D", "delta_bias"))


@pytest.mark.parametrize("index", [0, 1])
def test_gradient_of_one_output_alone(index):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        inputs = {k: v.to(dtype) for k, v in gpu_inputs(CASES[2]).items()}
        u = inputs["u"].requires_grad_()
        out = selective_scan(**inputs, delta_softplus=True, return_final_state=True)[index]
        gradients.append(torch.autograd.grad(out.abs().sum(), u)[0])
    assert_close(f"du of output {index}", *gradients)


def test_gradient_without_kept_states():
    inputs = gpu_inputs(CASES[2])
    gradients = []
    for save in (True, False):
        leaves = [v.detach().requires_grad_() for v in inputs.values()]
        y, _, chunk_states = torch.ops.mambaverse.selective_scan(*leaves, None, True, False, "auto", save)
        assert save or chunk_states.shape[0] == 0
        gradients.append(torch.autograd.grad(y.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nan_of_one_sequence_stays_there():
    inputs = gpu_inputs(Case("nan", "a part of a tile", 3, 21, 40, 4))
    inputs["B"][1, 20] = float("nan")
    results = outputs_and_gradients(selective_scan, inputs, delta_softplus=True, return_final_state=True)
    assert results["out0"][1, 20].isnan().all()
    for b in (0, 2):
        assert results["out0"][b].isfinite().all() and results["out1"][b].isfinite().all()
        assert results["du"][b].isfinite().all()


@pytest.mark.parametrize("name", ["many", "long"])
def test_two_runs_are_bit_equal(name):
    inputs = gpu_inputs(next(c for c in CASES if c.name == name), torch.bfloat16)
    runs = [outputs_and_gradients(selective_scan, inputs, **FLAGS) for _ in range(3)]
    assert all(torch.equal(run[k], runs[0][k]) for run in runs[1:] for k in run)


@pytest.mark.parametrize("name", ["many", "long"])
def test_captured_in_a_graph(name):
    inputs = gpu_inputs(next(c for c in CASES if c.name == name), torch.bfloat16)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}

    def step():
        y = selective_scan(**leaves, delta_softplus=True)
        return (y.detach(), *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y)))

    assert_captured(step)


@pytest.mark.parametrize("function", [selective_scan, bidirectional_selective_scan], ids=lambda f: f.__name__)
def test_compiles_without_graph_breaks(function):
    inputs = gpu_inputs(CASES[2])
    compiled = torch.compile(function, fullgraph=True)
    flags: dict[str, Any] = {"delta_softplus": True, "return_final_state": True}
    expected = outputs_and_gradients(function, inputs, **flags)
    actual = outputs_and_gradients(compiled, inputs, **flags)
    for name in expected:
        assert_close(name, actual[name], expected[name])


@pytest.mark.parametrize("merge", ["add", "mean"])
@pytest.mark.parametrize("names", [(), ("A",), ("u", "delta", "A", "B", "C", "D", "delta_bias"), ("z",)], ids=str)
@pytest.mark.parametrize("case", [CASES[2], ONE_ROW], ids=lambda case: case.name)
def test_bidirectional_equals_reference(case, names, merge):
    inputs, other = gpu_inputs(case), gpu_inputs(case, seed=1)
    inputs = {k: torch.stack((v, other[k])) if k in names else v for k, v in inputs.items()}
    inputs = {k: v.unsqueeze(-2) if k in ("B", "C") else v for k, v in inputs.items()}
    flags: dict[str, Any] = {"merge": merge, "delta_softplus": True, "return_final_state": True}
    with nan_filled_empty():
        actual = outputs_and_gradients(bidirectional_selective_scan, inputs, **flags)
    expected = outputs_and_gradients(bidirectional_selective_scan, {k: v.double() for k, v in inputs.items()}, **flags)
    for name in expected:
        assert_close(name, actual[name], expected[name])


def test_complex_states_are_refused_clearly():
    inputs = gpu_inputs(TESTED[-1])
    with pytest.raises(BackendError, match=r"no kernel for a complex A; use_backend\(.reference.\)"):
        selective_scan(**inputs)


def test_offsets_past_2_to_the_31():
    """The end of a long sequence equals a scan of the end alone, from the state that the rest leaves."""
    length, dim, state_dim, tail = (1 << 20) + 100, 2056, 2, 1000
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    leaves = {
        "u": draw(1, length, dim), "delta": draw(1, length, dim), "A": -0.5 - torch.rand(dim, state_dim, device="cuda"),
        "B": draw(1, length, state_dim), "C": draw(1, length, state_dim),
    }  # fmt: skip
    assert leaves["u"].numel() > 1 << 31
    y = selective_scan(**{k: v.requires_grad_() for k, v in leaves.items()}, delta_softplus=True)
    y[:, -tail:].sum().backward()
    spans = slice(-5000, -tail), slice(-tail, None)
    head, end = ({k: v if k == "A" else v[:, span] for k, v in leaves.items()} for span in spans)
    with torch.no_grad():  # what was 4000 steps before has decayed
        _, state = selective_scan(**head, delta_softplus=True, return_final_state=True)
    ends = {k: v.detach().requires_grad_() for k, v in end.items()}
    y_end = selective_scan(**ends, delta_softplus=True, initial_state=state)
    y_end.sum().backward()
    assert_close("y", y[:, -tail:], y_end)
    for name in ("u", "delta", "B", "C"):
        assert_close(f"d{name}", leaves[name].grad[:, -tail:], ends[name].grad)
