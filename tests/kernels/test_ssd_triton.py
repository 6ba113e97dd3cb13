"""The Triton kernels of ssd in Triton's interpreter, on small shapes: every option, forward and backward.

Triton reads TRITON_INTERPRET when it is imported, so these tests are a pytest process of their own, which the first
test starts. There a chunk has 16 positions, and the GPU has four multiprocessors: a sequence is split into segments if
there are at most 4 programs, a group's heads if there are less than 4 chunks and groups. A state is kept every 16
positions, from a length of 70 on every 32, and backward takes such a sequence in pieces of 32 kB of states. Heads of
more than 48 columns, three tiles, are cut.
"""

import os
from typing import Any

import pytest
import torch

from mambaverse.kernels.backend import BackendError, use_backend
from mambaverse.kernels.ssd import ssd, ssd_update
from mambaverse.kernels.ssd.cases import Case, make_inputs, make_weights
from mambaverse.kernels.ssd.layout import TRITON_KEEP
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients

inside = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not inside, reason="runs in the process that the first test starts")

CASES = {
    "split": Case(1, 60, 2, 5, 1, 7, "three segments of a head, the last short; both heads share a group"),
    "long": Case(2, 103, 2, 5, 1, 7, "few states are kept; the last piece and its last chunk are short"),
    "long_whole": Case(3, 70, 1, 20, 1, 3, "the same, unsplit in forward, two tiles a head"),
    "whole": Case(2, 20, 4, 16, 2, 16, "so many programs that nothing is split; two heads a group; full tiles"),
    "boundary": Case(1, 32, 5, 3, 5, 4, "the length is a multiple of what is kept; multi-input: a group for each head"),
    "shared": Case(1, 17, 6, 4, 1, 33, "multi-value: one B and C for all heads, which are split among programs"),
    "wide": Case(1, 40, 1, 80, 1, 20, "cut into 48 and 32 columns, of three and two tiles"),
    "one_step": Case(2, 1, 3, 5, 3, 7, "as in decoding"),
    "scalar": Case(1, 33, 1, 1, 1, 1, "one scalar recurrence; one position in the last chunk"),
}
PER_STEP = ("x", "dt", "B", "C", "z", "weight", "own_weight")
OPTIONAL = ("D", "z", "dt_bias", "initial_state")
PACKED = [[0, 0, 3, 3, 68, 70, 70], [0, 70], [0, 32, 70]]  # empty and short sequences, at and beside boundaries


@pytest.mark.skipif(inside, reason="this is that process")
def test_in_a_process_of_its_own(passes_in_the_interpreter):
    passes_in_the_interpreter()


def check(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, *, final: bool = True, **flags: Any) -> None:
    flags = {"dt_softplus": True, **flags, "return_final_state": final}
    with use_backend("triton"), nan_filled_empty():
        actual = outputs_and_gradients(ssd, inputs, **flags)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = outputs_and_gradients(ssd, wide, **flags)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(name, actual[name], expected[name], dtype)


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, reverse):
    inputs = make_inputs(CASES[name])
    check(inputs, reverse=reverse)
    check({k: v for k, v in inputs.items() if k not in OPTIONAL}, reverse=reverse)


@interpreted
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_reference_without_states(name, reverse, gated):
    """No state is given, nor a gradient of the last: dx may come from the walk of the gradients of states."""
    inputs = make_inputs(CASES[name]) | make_weights(CASES[name])
    inputs = {k: v for k, v in inputs.items() if k != "initial_state" and (gated or k != "z")}
    check(inputs, final=False, reverse=reverse)
    check({k: v for k, v in inputs.items() if k not in ("weight", "own_weight", "D")}, final=False, reverse=reverse)


@interpreted
@pytest.mark.parametrize("offsets", PACKED, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_packed_equals_reference_without_states(groups, offsets):
    inputs = make_inputs(Case(1, 70, 4, 5, groups, 7, "packed"))
    del inputs["initial_state"]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    check(inputs, final=False, cu_seqlens=cu_seqlens)
    check({k: v for k, v in inputs.items() if k != "z"}, final=False, cu_seqlens=cu_seqlens, reverse=True)


@interpreted
def test_half_precision_and_mixed_dtypes():
    """fp16, whose products are float32 here. Not bf16: the interpreter cuts a float off where a GPU rounds it."""
    half, single = make_inputs(CASES["split"], dtype=torch.float16), make_inputs(CASES["split"])
    check(half, torch.float16)
    check(single | {k: half[k] for k in ("dt", "B", "C")}, torch.float16)  # x and z alike: dy is gated once
    mixed = single | {k: half[k] for k in ("x", "B")} | {"D": half["D"].half()}
    check(mixed, torch.float16)
    with use_backend("triton"):
        results = outputs_and_gradients(ssd, mixed, return_final_state=True)
    assert (results["out0"].dtype, results["out1"].dtype) == (torch.float16, torch.float32)
    assert {name: results[f"d{name}"].dtype for name in mixed} == {name: v.dtype for name, v in mixed.items()}


@interpreted
@pytest.mark.parametrize("present", OPTIONAL)
def test_each_option_alone(present):
    inputs = make_inputs(CASES["split"])
    check({k: v for k, v in inputs.items() if k not in OPTIONAL or k == present})


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_weights_equal_reference(name, reverse):
    check(make_inputs(CASES[name]) | make_weights(CASES[name]), reverse=reverse)


@interpreted
@pytest.mark.parametrize("given", ["weight", "own_weight"])
def test_each_weight_alone(given):
    bare = {k: v for k, v in make_inputs(CASES["split"]).items() if k not in OPTIONAL}
    check(bare | {given: make_weights(CASES["split"])[given]})


@interpreted
def test_weights_beside_steps_of_no_size():
    """Δ = 0: nothing decays, and what enters does not depend on it."""
    inputs, weights = make_inputs(CASES["long"]), make_weights(CASES["long"])
    del inputs["dt_bias"]
    inputs["dt"] = torch.where(inputs["dt"] > 0, 0.3 * inputs["dt"], 0.0)
    check(inputs | weights, dt_softplus=False)


@interpreted
def test_weights_of_half_precision_and_of_any_strides():
    inputs = make_inputs(CASES["split"], dtype=torch.float16)
    weights = make_weights(CASES["split"], dtype=torch.float16)
    check(inputs | weights, torch.float16)
    weights = {k: v.mT.contiguous().mT for k, v in make_weights(CASES["split"]).items()}
    check(make_inputs(CASES["split"]) | weights)
    check(make_inputs(CASES["split"]) | {k: v[:, :, :1].expand_as(v) for k, v in weights.items()})


@interpreted
@pytest.mark.parametrize("limits", [(0.1, 0.15), (0.0, 0.2), (0.05, float("inf"))])
@pytest.mark.parametrize("softplus", [False, True])
def test_limits_of_the_step_size(limits, softplus):
    inputs = make_inputs(CASES["split"])
    if not softplus:
        inputs |= {"dt": 0.1 * inputs["dt"], "dt_bias": 0.1 * (inputs["dt_bias"] + 3)}
    check(inputs, dt_limit=limits, dt_softplus=softplus)


@interpreted
def test_skip_per_channel():
    for name in ("split", "wide", "scalar", "long"):
        inputs = make_inputs(CASES[name])
        check(inputs | {"D": inputs["z"][0, 0].clone()})


@interpreted
def test_strong_and_weak_decays_side_by_side():
    """Decays from nothing to e^-60 a step in one chunk: sums of logs lose the weak ones."""
    inputs = {k: v for k, v in make_inputs(Case(1, 70, 4, 8, 2, 8, "")).items() if k not in OPTIONAL}
    inputs["dt"] = torch.where(torch.arange(70)[:, None] % 7 < 3, 3.0, 1e-3) * (inputs["dt"] - 2).exp()
    inputs["A"] = torch.tensor([-1e-3, -1.0, -16.0, -160.0])
    for final in (False, True):
        check(inputs, final=final, dt_softplus=False)
        strong = {"A": torch.full((4,), -40.0), "dt": inputs["dt"].clamp(0.5)}
        check(inputs | strong, final=final, dt_softplus=False)
        check(inputs | {"A": torch.full((4,), -1e30)}, final=final, dt_softplus=False)


@interpreted
def test_growing_states():
    inputs = make_inputs(CASES["split"])
    check(inputs | {"A": 0.1 * inputs["A"].abs()})


@interpreted
@pytest.mark.parametrize("bounds", PACKED)
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_equals_reference(bounds, reverse):
    inputs = make_inputs(Case(1, bounds[-1], 2, 8, 1, 8, "packed"))
    scales = torch.arange(1.0, len(bounds)).view(-1, 1, 1, 1)
    inputs["initial_state"] = inputs["initial_state"] * scales
    check(inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), reverse=reverse)
    weights = make_weights(Case(1, bounds[-1], 2, 8, 1, 8, "packed"))
    check(inputs | weights, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), reverse=reverse)


@interpreted
def test_packed_sequences_are_bit_equal_to_separate_calls():
    inputs: dict[str, Any] = make_inputs(Case(1, 70, 2, 8, 1, 8, "packed"))
    del inputs["initial_state"]
    bounds = PACKED[0]
    with use_backend("triton"):
        y = ssd(**inputs, cu_seqlens=torch.tensor(bounds), dt_softplus=True)
        for begin, end in ((0, 3), (68, 70)):  # not split into segments alone either
            one: dict[str, Any] = {
                k: v[:, begin:end] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()
            }
            assert torch.equal(y[:, begin:end], ssd(**one, dt_softplus=True))


@interpreted
def test_any_strides():
    inputs = make_inputs(CASES["split"])
    plain = {k: v.clone() for k, v in inputs.items()}
    inputs["x"], inputs["z"] = torch.cat((inputs["x"], inputs["z"]), -1).chunk(2, -1)
    inputs["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["B"] = torch.stack((inputs["B"], inputs["B"]), -1)[..., 0]
    inputs["C"] = inputs["C"].transpose(1, 3).contiguous().transpose(1, 3)
    inputs["A"] = torch.stack((inputs["A"], inputs["A"]), -1)[..., 0]
    inputs["D"] = inputs["D"][:1].expand(2)
    plain["D"] = inputs["D"].clone()
    inputs["initial_state"] = inputs["initial_state"].transpose(1, 3).contiguous().transpose(1, 3)
    results = []
    for tensors in (inputs, plain):
        leaves = [v.requires_grad_() for v in tensors.values()]
        arguments: dict[str, Any] = dict(zip(inputs, leaves, strict=True))
        with use_backend("triton"):
            y, state = ssd(**arguments, dt_softplus=True, return_final_state=True)
        seeds = torch.ones(1, 1, 1, 1).expand(y.shape), torch.ones(1, 1, 1, 1).expand(state.shape)
        results.append((y, state, *torch.autograd.grad((y, state), leaves, seeds)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].is_contiguous()


@interpreted
@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_one_output_alone(output):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaves: dict[str, Any] = {k: v.to(dtype).requires_grad_() for k, v in make_inputs(CASES["split"]).items()}
        with use_backend("triton"):
            out = ssd(**leaves, return_final_state=True)[output]
        gradients.append(torch.autograd.grad(out.square().sum(), list(leaves.values()), materialize_grads=True))
    for actual, expected in zip(*gradients, strict=True):
        assert_close("gradient", actual, expected)


@interpreted
def test_gradient_without_kept_states():
    results = []
    for save in (True, False):
        leaves = [v.requires_grad_() for v in make_inputs(CASES["split"]).values()]
        call = torch.ops.mambaverse.ssd.default
        y, _, states = call(*leaves, None, True, 0.0, float("inf"), False, 0, "triton", save)
        assert states.shape == ((CASES["split"].length - 1) // TRITON_KEEP if save else 0, 2, 16, 16)
        results.append(torch.autograd.grad(y.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
def test_gradient_of_weights_without_kept_states():
    inputs, weights = make_inputs(CASES["split"]), make_weights(CASES["split"])
    leaves = [v.requires_grad_() for v in (inputs | weights).values()]
    call, results = torch.ops.mambaverse.ssd.default, []
    for save in (True, False):
        y = call(*leaves[:9], None, True, 0.0, float("inf"), False, 0, "triton", save, *leaves[9:])[0]
        results.append(torch.autograd.grad(y.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
@pytest.mark.parametrize(("batch", "length", "bounds"), [(2, 0, None), (0, 5, None), (1, 0, [0, 0, 0]), (1, 0, [0])])
def test_empty_inputs(batch, length, bounds):
    inputs = make_inputs(Case(batch, length, 4, 3, 2, 2, "empty"))
    if bounds is not None:
        inputs["initial_state"] = torch.randn(len(bounds) - 1, 4, 3, 2)
    with use_backend("triton"), nan_filled_empty():
        cu_seqlens = None if bounds is None else torch.tensor(bounds)
        out = outputs_and_gradients(ssd, inputs, cu_seqlens=cu_seqlens, return_final_state=True)
    assert out["out0"].shape == (batch, length, 4, 3)
    assert torch.equal(out["out1"], inputs["initial_state"])
    assert all(torch.count_nonzero(out[f"d{name}"]) == 0 for name in ("A", "D", "dt_bias"))
    assert out["dinitial_state"].isfinite().all()


@interpreted
def test_nan_stays_in_its_sequence_and_head():
    inputs = make_inputs(CASES["whole"])
    inputs["x"][0, 17, 1, 3] = float("nan")
    inputs["dt"][1, 17, 2] = float("nan")
    with use_backend("triton"):
        results = outputs_and_gradients(ssd, inputs, dt_softplus=True, return_final_state=True)
    y, state = results["out0"], results["out1"]
    assert y[0, 17:, 1, 3].isnan().all()
    assert state[0, 1, 3].isnan().all()
    assert y[1, 17:, 2].isnan().all()
    others = torch.ones(y.shape[:3], dtype=torch.bool)
    others[0, :, 1] = others[1, :, 2] = False
    assert y[others].isfinite().all()
    assert results["dx"][others].isfinite().all()


@interpreted
@pytest.mark.parametrize("groups", [1, 4])
def test_nan_stays_in_its_sequence_and_head_without_states(groups):
    inputs = make_inputs(Case(2, 40, 4, 5, groups, 7, "gradients are walked"))
    del inputs["initial_state"], inputs["z"]
    inputs["x"][0, 20, 1, 3] = inputs["dt"][1, 20, 2] = float("nan")
    with use_backend("triton"), nan_filled_empty():
        results = outputs_and_gradients(ssd, inputs, dt_softplus=True)
    others = torch.ones(2, 40, 4, dtype=torch.bool)
    others[0, :, 1] = others[1, :, 2] = False
    assert all(results[name][others].isfinite().all() for name in ("out0", "dx", "ddt"))
    assert all(results[name][[0, 3]].isfinite().all() for name in ("dA", "dD", "ddt_bias"))


@interpreted
def test_states_past_the_limit_are_refused_clearly():
    inputs: dict[str, Any] = make_inputs(Case(1, 1, 1, 8, 1, 257, "past the limit"))
    with use_backend("triton"), pytest.raises(BackendError, match="up to 256 states, not 257"):
        ssd(**inputs)


@interpreted
@pytest.mark.parametrize("state", [None, "initial", "final"])
@pytest.mark.parametrize("name", ["x", "packed", "D"])
def test_heads_of_many_columns_are_cut(name, state):
    case = Case(1, 40, 2, 100, 1, 6, "three calls of the kernels, the last with few columns")
    inputs: dict[str, Any] = make_inputs(case) | make_weights(case)
    if name == "D":
        inputs["D"] = torch.randn(2, 100)
    if name == "packed":
        inputs["cu_seqlens"] = torch.tensor([0, 7, 7, 40], dtype=torch.int32)
        inputs["initial_state"] = inputs["initial_state"].expand(3, -1, -1, -1).clone()
    if state != "initial":
        del inputs["initial_state"], inputs["z"]
    check(inputs, final=state == "final")


@interpreted
@pytest.mark.parametrize("name", ["split", "whole", "wide", "scalar"])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("weights", [(), ("weight",), ("own_weight",), ("weight", "own_weight")], ids=str)
def test_update_is_one_step(name, optional, weights):
    inputs: dict[str, Any] = make_inputs(CASES[name]) | make_weights(CASES[name])
    inputs = {k: v[:, :3] if k in PER_STEP else v for k, v in inputs.items()}
    state = inputs.pop("initial_state")
    inputs = {k: v for k, v in inputs.items() if optional or k not in OPTIONAL}
    inputs = {k: v for k, v in inputs.items() if k in weights or not k.endswith("weight")}
    wide = {k: v.double() for k, v in inputs.items()}
    flags: dict[str, Any] = {"dt_softplus": True, "dt_limit": (0.1, 0.5)}
    expected, final = ssd(**wide, initial_state=state.double(), return_final_state=True, **flags)
    state = state.mT.contiguous().mT  # any strides, and stays where it is
    place = state.data_ptr()
    with use_backend("triton"):
        steps = []
        for t in range(3):
            one: dict[str, Any] = {k: v[:, t] if k in PER_STEP else v for k, v in inputs.items()}
            steps.append(ssd_update(state, **one, **flags))
    assert_close("y", torch.stack(steps, 1), expected, torch.float32)
    assert_close("state", state, final, torch.float32)
    assert state.data_ptr() == place


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype):
    inputs = make_inputs(Case(1, 35, 2, 3, 1, 2, "a state is kept"), dtype=dtype)
    tensors = [v.requires_grad_() for v in inputs.values()]
    flags = None, True, 0.0, float("inf"), False, 0, "triton"
    torch.library.opcheck(torch.ops.mambaverse.ssd.default, (*tensors, *flags, True))
