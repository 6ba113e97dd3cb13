"""The Triton kernels of ssd on a GPU: every dtype, option and gradient against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambaverse.kernels.backend import BackendError
from mambaverse.kernels.ssd import ssd
from mambaverse.kernels.ssd.cases import TESTED, Case, make_inputs, make_weights
from mambaverse.kernels.ssd.layout import TRITON_KEEP, TRITON_LONG
from mambaverse.kernels.testing import assert_captured, assert_close, nan_filled_empty, outputs_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "vision": Case(3, 197, 4, 64, 1, 64, "two chunks that are kept, the last not full; one group"),
    "language": Case(2, 300, 4, 64, 2, 128, "the usual sizes of Mamba-2; two heads a group"),
    "long": Case(1, 1333, 2, 64, 1, 32, "so few programs that the length is split"),
    "many": Case(40, 70, 8, 16, 1, 16, "so many programs that nothing is split; heads narrower than a tile"),
    "own": Case(2, 130, 5, 33, 5, 20, "a group for each head; tiles that are not full"),
    "each": Case(2, 300, 3, 64, 3, 128, "the usual sizes of Mamba-3: a group for each head"),
    "shared": Case(1, 65, 12, 32, 1, 48, "so few chunks that the heads of a group are split among programs"),
    "wide": Case(1, 150, 2, 128, 1, 128, "two tiles a head"),
    "odd": Case(2, 67, 2, 100, 1, 130, "two tiles a head, the second not full; more than 128 states"),
    "largest_state": Case(1, 140, 3, 64, 1, 256, "the most states there may be"),
    "largest": Case(1, 40, 2, 128, 2, 256, "the largest tiles there may be"),
    **{f"tested{i}": case for i, case in enumerate(TESTED)},
}
OPTIONAL = ("D", "z", "dt_bias", "initial_state")
WEIGHTS = ("weight", "own_weight")
PER_STEP = ("x", "dt", "B", "C", "z", *WEIGHTS)
LENGTHS = (3, 0, 64, 1, 130, 128, 65, 300)


def gpu_inputs(case: Case, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    return {k: v.cuda() for k, v in make_inputs(case, dtype=dtype, **more).items()}


def check(inputs: dict[str, Any], dtype: torch.dtype = torch.float32, *, final: bool = True, **flags: Any) -> None:
    flags = {"dt_softplus": True, **flags, "return_final_state": final}
    with nan_filled_empty():
        actual = outputs_and_gradients(ssd, inputs, **flags)
    wide = {k: v.double() for k, v in inputs.items()}
    rounded = [v.dtype for k, v in actual.items() if k.startswith("out")]  # dA cancels: of dy alone it moved by 2.6 %
    expected = outputs_and_gradients(ssd, wide, cotangents_as=rounded, **flags)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(name, actual[name], expected[name], dtype)


def weighted_inputs(case: Case, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    """Inputs, and float32 weights, as of a mixer whose projections are in `dtype`."""
    return gpu_inputs(case, dtype, **more) | {k: v.cuda() for k, v in make_weights(case).items()}


def packed_inputs(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], Tensor]:
    inputs = gpu_inputs(Case(1, sum(LENGTHS), 4, 64, 2, 64, "packed"), dtype)
    scales = 0.5 + torch.arange(len(LENGTHS), device="cuda").view(-1, 1, 1, 1)
    inputs["initial_state"] = inputs["initial_state"] * scales
    return inputs, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, reverse, dtype):
    check(gpu_inputs(CASES[name], dtype), dtype, reverse=reverse)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("name", "reverse", "dtype"),
    [*((name, False, torch.bfloat16) for name in [*CASES, "pieces"]),
     *((name, True, torch.bfloat16) for name in ["language", "each", "pieces"]),
     *((name, False, torch.float32) for name in ["vision", "own", "pieces"])],
    ids=str,
)  # fmt: skip
def test_equals_reference_without_states(name, gated, reverse, dtype):
    """No state is given, nor a gradient of the last: dx may come from the walk of the gradients of states."""
    case = CASES.get(name) or Case(1, TRITON_LONG + 100, 2, 64, 1, 64, "backward takes it in pieces")
    inputs = weighted_inputs(case, dtype, seed=2)  # seeds 0 and 1: a draw whose dA is a hundredth of its terms
    inputs = {k: v for k, v in inputs.items() if k != "initial_state" and (gated or k != "z")}
    check(inputs, dtype, final=False, reverse=reverse)
    check({k: v for k, v in inputs.items() if k not in WEIGHTS}, dtype, final=False, reverse=reverse)


@pytest.mark.parametrize(
    ("reverse", "dtype"), [(False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float32)]
)
@pytest.mark.parametrize("groups", [1, 32])
def test_packed_equals_reference_without_states(groups, reverse, dtype):
    """So many sequences and heads that gradients are walked, too."""
    inputs = gpu_inputs(Case(1, sum(LENGTHS), 32, 64, groups, 128, "packed"), dtype)
    del inputs["initial_state"]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).cuda()
    check(inputs, dtype, final=False, cu_seqlens=cu_seqlens, reverse=reverse)
    del inputs["z"]
    check(inputs, dtype, final=False, cu_seqlens=cu_seqlens, reverse=reverse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["language", "long", "wide"])
@pytest.mark.parametrize("present", [(), *((name,) for name in OPTIONAL)], ids=str)
def test_equals_reference_with_each_option_alone(present, name, dtype):
    inputs = gpu_inputs(CASES[name], dtype)
    check({k: v for k, v in inputs.items() if k not in OPTIONAL or k in present}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_weights_equal_reference(name, reverse, dtype):
    check(weighted_inputs(CASES[name], dtype), dtype, reverse=reverse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["language", "long", "own"])
@pytest.mark.parametrize("present", [("weight",), ("own_weight",), WEIGHTS, (*WEIGHTS, "z"), (*WEIGHTS, "D")], ids=str)
def test_weights_equal_reference_with_few_options(present, name, dtype):
    inputs = weighted_inputs(CASES[name], dtype)
    check({k: v for k, v in inputs.items() if k not in (*OPTIONAL, *WEIGHTS) or k in present}, dtype)


def test_weights_beside_steps_of_no_size():
    inputs = weighted_inputs(CASES["vision"])
    del inputs["dt_bias"]
    inputs["dt"] = torch.where(inputs["dt"] > 0, 0.3 * inputs["dt"], 0.0)
    check(inputs, dt_softplus=False)


@pytest.mark.parametrize("limits", [(0.1, 0.15), (0.0, 0.2), (0.05, float("inf"))])
@pytest.mark.parametrize("softplus", [False, True])
def test_limits_of_the_step_size(limits, softplus):
    inputs = gpu_inputs(CASES["vision"])
    if not softplus:
        inputs |= {"dt": 0.1 * inputs["dt"], "dt_bias": 0.1 * (inputs["dt_bias"] + 3)}
    check(inputs, dt_limit=limits, dt_softplus=softplus)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["vision", "wide", "own"])
def test_skip_per_channel(name, dtype):
    inputs = gpu_inputs(CASES[name], dtype)
    check(inputs | {"D": inputs["z"][0, 0].float()}, dtype)


def test_mixed_dtypes():
    inputs = gpu_inputs(CASES["language"], torch.bfloat16)
    inputs |= {"dt": inputs["dt"].float(), "C": inputs["C"].half(), "D": inputs["D"].bfloat16()}
    check(inputs, torch.bfloat16)
    inputs |= {"z": inputs["z"].float()}  # dy is not gated once then
    check(inputs, torch.bfloat16)
    results = outputs_and_gradients(ssd, inputs, return_final_state=True)
    assert {name: results[f"d{name}"].dtype for name in inputs} == {name: v.dtype for name, v in inputs.items()}
    half = gpu_inputs(CASES["language"], torch.float16)
    check(half | {"x": half["x"].float(), "B": half["B"].float()}, torch.float16)


def test_strong_and_weak_decays_side_by_side():
    inputs = {k: v for k, v in gpu_inputs(Case(1, 150, 4, 64, 2, 64, "")).items() if k not in OPTIONAL}
    strong = torch.arange(150, device="cuda")[:, None] % 7 < 3
    inputs["dt"] = torch.where(strong, 3.0, 1e-3) * (inputs["dt"] - 2).exp()
    inputs["A"] = torch.tensor([-1e-3, -1.0, -16.0, -160.0]).cuda()
    check(inputs, dt_softplus=False)
    check(inputs | {"A": torch.full((4,), -40.0).cuda(), "dt": inputs["dt"].clamp(0.5)}, dt_softplus=False)
    check(inputs | {"A": torch.full((4,), -1e30).cuda()}, dt_softplus=False)


def test_small_steps_keep_their_precision():
    inputs = gpu_inputs(CASES["vision"])
    check(inputs | {"dt_bias": inputs["dt_bias"] - 7})


def test_half_precision_has_the_range_of_float32_inside():
    """States past 65504, the most that float16 holds; outputs within it."""
    inputs = gpu_inputs(CASES["vision"], torch.float16)
    inputs |= {"x": 100 * inputs["x"], "B": 1000 * inputs["B"], "C": 1e-3 * inputs["C"]}
    with torch.no_grad():
        y, state = ssd(**inputs, dt_softplus=True, return_final_state=True)
        wide, wide_state = ssd(**{k: v.double() for k, v in inputs.items()}, dt_softplus=True, return_final_state=True)
    assert wide_state.abs().max() > 65504 > wide.abs().max()
    assert_close("y", y, wide, torch.float16)
    assert_close("state", state, wide_state, torch.float16)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_reference(reverse, dtype):
    inputs, cu_seqlens = packed_inputs(dtype)
    check(inputs, dtype, cu_seqlens=cu_seqlens, reverse=reverse)
    weights = make_weights(Case(1, sum(LENGTHS), 4, 64, 2, 64, "packed"))
    check(inputs | {k: v.cuda() for k, v in weights.items()}, dtype, cu_seqlens=cu_seqlens, reverse=reverse)


@pytest.mark.parametrize("offsets", [[0, 300], [-5, 3, 2**30], [7, 2, 9], [3, 9], [0], [0, 0, 0]], ids=str)
def test_wrong_offsets_stay_inside_and_leave_zeros(offsets):
    inputs = gpu_inputs(Case(1, 9, 6, 5, 2, 3, "packed"))
    inputs["initial_state"] = inputs["initial_state"].expand(len(offsets) - 1, -1, -1, -1)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32).cuda()
    results = outputs_and_gradients(ssd, inputs, cu_seqlens=cu_seqlens, dt_softplus=True)
    assert all(v.isfinite().all() for v in results.values())
    if offsets == [3, 9]:
        assert not results["out0"][:, :3].any() and not results["dB"][:, :3].any()


@pytest.mark.parametrize("name", ["many", "long", "own"])
def test_any_strides(name):
    inputs = gpu_inputs(CASES[name])
    plain = {k: v.clone() for k, v in inputs.items()}
    inputs["x"], inputs["z"] = torch.cat((inputs["x"], inputs["z"]), -1).chunk(2, -1)
    inputs["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["B"] = torch.stack((inputs["B"], inputs["B"]), -1)[..., 0]
    inputs["C"] = inputs["C"].transpose(1, 3).contiguous().transpose(1, 3)
    inputs["A"] = torch.stack((inputs["A"], inputs["A"]), -1)[..., 0]
    inputs["initial_state"] = inputs["initial_state"].transpose(1, 3).contiguous().transpose(1, 3)
    results = []
    for tensors in (inputs, plain):
        leaves: dict[str, Any] = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        y, state = ssd(**leaves, dt_softplus=True, return_final_state=True)
        ones = torch.ones((), device="cuda")
        seeds = (ones.expand(y.shape), ones.expand(state.shape)) if tensors is inputs else (y * 0 + 1, state * 0 + 1)
        results.append((y, state, *torch.autograd.grad((y, state), list(leaves.values()), seeds)))
    for actual, expected in zip(
        *results, strict=True
    ):  # Triton's layouts, and with them orders of sums, follow strides
        assert_close("strided", actual, expected)
    assert results[0][0].is_contiguous()


@pytest.mark.parametrize(("batch", "length", "bounds"), [(2, 0, None), (0, 5, None), (1, 0, [0, 0, 0]), (1, 0, [0])])
def test_empty_inputs(batch, length, bounds):
    inputs = gpu_inputs(Case(batch, length, 4, 3, 2, 2, "empty"))
    if bounds is not None:
        inputs["initial_state"] = torch.randn(len(bounds) - 1, 4, 3, 2, device="cuda")
    cu_seqlens = None if bounds is None else torch.tensor(bounds).cuda()
    with nan_filled_empty():
        out = outputs_and_gradients(ssd, inputs, cu_seqlens=cu_seqlens, return_final_state=True)
    assert torch.equal(out["out1"], inputs["initial_state"])
    assert all(torch.count_nonzero(out[f"d{name}"]) == 0 for name in ("A", "D", "dt_bias"))
    assert out["dinitial_state"].isfinite().all()


@pytest.mark.parametrize("index", [0, 1])
def test_gradient_of_one_output_alone(index):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaves: dict[str, Any] = {k: v.to(dtype).requires_grad_() for k, v in gpu_inputs(CASES["vision"]).items()}
        out = ssd(**leaves, dt_softplus=True, return_final_state=True)[index]
        gradients.append(torch.autograd.grad(out.square().sum(), list(leaves.values()), materialize_grads=True))
    for actual, expected in zip(*gradients, strict=True):
        assert_close(f"gradient of output {index}", actual, expected)


def test_gradient_without_kept_states():
    inputs = gpu_inputs(CASES["language"], torch.bfloat16)
    gradients = []
    for save in (True, False):
        leaves = [v.detach().requires_grad_() for v in inputs.values()]
        call = torch.ops.mambaverse.ssd.default
        y, _, states = call(*leaves, None, True, 0.0, float("inf"), False, 0, "auto", save)
        assert states.shape == (2 * (299 // TRITON_KEEP) if save else 0, 4, 64, 128)
        assert states.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(y.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nan_stays_in_its_sequence_and_head():
    inputs = gpu_inputs(CASES["vision"])
    inputs["x"][0, 100, 1, 3] = float("nan")
    inputs["dt"][1, 100, 2] = float("nan")
    results = outputs_and_gradients(ssd, inputs, dt_softplus=True, return_final_state=True)
    y, state = results["out0"], results["out1"]
    assert y[0, 100:, 1, 3].isnan().all()
    assert state[0, 1, 3].isnan().all()
    assert y[1, 100:, 2].isnan().all()
    others = torch.ones(y.shape[:3], dtype=torch.bool, device="cuda")
    others[0, :, 1] = others[1, :, 2] = False
    assert y[others].isfinite().all()
    assert results["dx"][others].isfinite().all()


@pytest.mark.parametrize("name", ["language", "long", "shared"])
def test_two_runs_are_bit_equal(name):
    inputs = gpu_inputs(CASES[name], torch.bfloat16)
    runs = [outputs_and_gradients(ssd, inputs, dt_softplus=True, return_final_state=True) for _ in range(3)]
    assert all(torch.equal(run[k], runs[0][k]) for run in runs[1:] for k in run)


@pytest.mark.parametrize("name", ["language", "long", "shared", "packed"])
def test_captured_in_a_graph(name):
    inputs, cu_seqlens = packed_inputs(torch.bfloat16) if name == "packed" else (None, None)
    inputs = inputs or gpu_inputs(CASES[name], torch.bfloat16)
    leaves: dict[str, Any] = {k: v.requires_grad_() for k, v in inputs.items()}

    def step() -> tuple[Tensor, ...]:
        y = ssd(**leaves, dt_softplus=True, cu_seqlens=cu_seqlens)
        return (y.detach(), *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y)))

    assert_captured(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_graph_breaks(dtype):
    inputs = gpu_inputs(CASES["vision"], dtype)
    compiled = torch.compile(ssd, fullgraph=True)
    flags: dict[str, Any] = {"dt_softplus": True, "return_final_state": True}
    expected = outputs_and_gradients(ssd, inputs, **flags)
    actual = outputs_and_gradients(compiled, inputs, **flags)
    for name in expected:
        assert_close(name, actual[name], expected[name], dtype)


def test_states_past_the_limit_are_refused_clearly():
    with pytest.raises(BackendError, match="up to 256 states, not 257"):
        ssd(**gpu_inputs(Case(1, 1, 1, 8, 1, 257, "past the limit")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("final", [True, False])
def test_heads_of_many_columns_are_cut(dtype, final):
    inputs = weighted_inputs(Case(2, 150, 2, 300, 1, 64, "three calls of the kernels"), dtype)
    check({k: v for k, v in inputs.items() if final or k not in ("initial_state", "z")}, dtype, final=final)


def test_offsets_past_2_to_the_31():
    """The end of a long sequence equals a call with the end alone, from the state that the rest leaves."""
    length, heads, head_dim, state_dim, tail = (1 << 20) + 100, 32, 65, 16, 1000
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    leaves: dict[str, Any] = {
        "x": draw(1, length, heads, head_dim), "dt": draw(1, length, heads),
        "A": -0.5 - torch.rand(heads, device="cuda"), "B": draw(1, length, state_dim), "C": draw(1, length, state_dim),
    }  # fmt: skip
    assert leaves["x"].numel() > 1 << 31
    y = ssd(**{k: v.requires_grad_() for k, v in leaves.items()}, dt_softplus=True)
    y[:, -tail:].sum().backward()
    spans = slice(-5000, -tail), slice(-tail, None)
    head, end = ({k: v if k == "A" else v[:, span] for k, v in leaves.items()} for span in spans)
    with torch.no_grad():  # what was 4000 steps before has decayed
        _, state = ssd(**head, dt_softplus=True, return_final_state=True)
    ends = {k: v.detach().requires_grad_() for k, v in end.items()}
    y_end = ssd(**ends, dt_softplus=True, initial_state=state)
    y_end.sum().backward()
    assert_close("y", y[:, -tail:], y_end)
    for name in ("x", "dt", "B", "C"):
        assert_close(f"d{name}", leaves[name].grad[:, -tail:], ends[name].grad)
