"""The Triton kernels of selective_scan in Triton's interpreter, on small shapes: every option, forward and backward.

Triton reads TRITON_INTERPRET when it is imported, so these tests are a pytest process of their own, which the first
test starts. There a program has 8 threads, a tile 4 steps, a chunk 8, and the GPU one multiprocessor: a sequence of
more than 16 steps is split into segments if there are at most 3 programs, and backward cuts it into pieces of a chain
if there are 4 to 6.
"""

import os
from typing import Any

import pytest
import torch

from mambaverse.kernels.backend import BackendError, use_backend
from mambaverse.kernels.selective_scan import bidirectional_selective_scan, selective_scan
from mambaverse.kernels.selective_scan.cases import Case, make_inputs
from mambaverse.kernels.testing import assert_close, nan_filled_empty, outputs_and_gradients

inside = os.environ.get("TRITON_INTERPRET") == "1"
if inside:
    import triton
    import triton.language as tl

    from mambaverse.kernels.triton_math import softplus

    @triton.jit
    def softplus_of(x: Any, y: Any, N: tl.constexpr) -> None:
        place = tl.arange(0, N)
        tl.store(y + place, softplus(tl.load(x + place)))


interpreted = pytest.mark.skipif(not inside, reason="runs in the process that the first test starts")

SPLIT = Case("split", "two segments and a part of a tile; a part of a block", 1, 19, 9, 2)
WHOLE = Case("whole", "so many programs that nothing is split; a chunk boundary", 5, 10, 3, 2)
CHAIN = Case("chain", "three pieces of each of four chains, the last one shorter", 4, 37, 3, 2)
CHAIN_ALONE = Case("chain_alone", "one thread a channel", 4, 20, 3, 3)
CHAIN_OWN = Case("chain_own", "every channel of the chains has its own B and C", 5, 20, 2, 3, groups=2)
CHAIN_GROUPS = Case("chain_groups", "chains of two groups", 2, 20, 4, 3, groups=2)
CHAIN_BOTH = Case("chain_both", "two chains of each direction", 2, 37, 3, 2)
JOINED_BOTH = Case("joined_both", "segments of both directions", 1, 37, 3, 2)
RESTING = Case("resting", "states of chains that rest in memory between tiles", 4, 19, 2, 18)
GROUPS = Case("groups", "grouped B and C, not split", 3, 5, 6, 2, groups=2)
OWN = Case("own", "every channel has its own B and C", 1, 5, 3, 2, groups=3)
ONE_STATE = Case("one_state", "N = 1", 1, 5, 3, 1)
ONE_STEP = Case("one_step", "length 1", 2, 1, 3, 3)
CHAINS = CHAIN, RESTING, CHAIN_ALONE, CHAIN_OWN, CHAIN_GROUPS, CHAIN_BOTH
CASES = SPLIT, WHOLE, *CHAINS[:-1], GROUPS, OWN, ONE_STATE, ONE_STEP
PACKED = Case("packed", "see LENGTHS", 1, 3 + 0 + 8 + 1 + 10, 3, 2)
LENGTHS = (3, 0, 8, 1, 10)  # shorter than a tile, empty, a chunk, one step, past a chunk boundary


@interpreted
@pytest.mark.parametrize(
    "case, how", [*((case, "chained") for case in CHAINS), (JOINED_BOTH, "joined"), (WHOLE, "not")]
)
def test_cases_are_split_as_they_say(case, how):
    from mambaverse.kernels.launch import Spec
    from mambaverse.kernels.selective_scan.triton_plan import plan

    inputs = make_inputs(case)
    specs = [Spec.of(inputs[name]) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")]
    cut = plan(2 if "both" in case.name else 1, True, None, torch.device("cpu"), *specs)
    assert (cut.split, cut.segments > 1) == {"not": (0, False), "joined": (1, True), "chained": (2, True)}[how]


@pytest.mark.skipif(inside, reason="this is that process")
def test_in_a_process_of_its_own(passes_in_the_interpreter):
    passes_in_the_interpreter()


def check_against_reference(inputs, dtype=torch.float32, op=selective_scan, **flags):
    flags = {"delta_softplus": True, **flags, "return_final_state": True}
    with use_backend("triton"), nan_filled_empty():
        actual = outputs_and_gradients(op, inputs, **flags)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = outputs_and_gradients(op, wide, **flags)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(name, actual[name], expected[name], dtype)


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_reference(case, reverse):
    check_against_reference(make_inputs(case), reverse=reverse)


@interpreted
def test_equals_reference_in_fp16():
    """Not bf16: the interpreter cuts a float off where a GPU rounds it."""
    check_against_reference(make_inputs(ONE_STEP, dtype=torch.float16), torch.float16)


@interpreted
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("present", [(), ("D", "initial_state"), ("z", "delta_bias")], ids=str)
def test_equals_reference_with_some_options(present, softplus):
    inputs = make_inputs(Case("options", "two tiles", 1, 6, 3, 2))
    inputs = {k: v for k, v in inputs.items() if k in (*"ABCu", "delta", *present)}
    if not softplus:  # Δ must be positive, or the states explode
        inputs |= {name: 0.3 * inputs[name].abs() for name in ("delta", "delta_bias") if name in inputs}
    check_against_reference(inputs, delta_softplus=softplus)


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_equals_reference(reverse):
    inputs = make_inputs(PACKED)
    inputs["initial_state"] = torch.cat([inputs["initial_state"] * (0.5 + s) for s in range(len(LENGTHS))])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    check_against_reference(inputs, cu_seqlens=cu_seqlens, reverse=reverse)


OWNED = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")


@interpreted
@pytest.mark.parametrize(
    "case, owned, merge",
    [
        (SPLIT, OWNED, "add"),
        (WHOLE, (), "add"),
        (CHAIN_BOTH, OWNED, "add"),
        (JOINED_BOTH, OWNED, "add"),
        (GROUPS, ("A",), "mean"),
        (OWN, OWNED, "add"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_both_directions_equal_reference(case, owned, merge):
    inputs, other = make_inputs(case), make_inputs(case, seed=1)
    inputs = {k: v.unsqueeze(2) if k in "BC" and v.ndim == 3 else v for k, v in inputs.items()}
    other = {k: v.unsqueeze(2) if k in "BC" and v.ndim == 3 else v for k, v in other.items()}
    inputs = {k: torch.stack((v, other[k])) if k in owned else v for k, v in inputs.items()}
    check_against_reference(inputs, op=bidirectional_selective_scan, merge=merge)


@interpreted
def test_both_directions_of_packed_sequences():
    inputs = make_inputs(PACKED) | {"A": torch.stack([make_inputs(PACKED, seed=s)["A"] for s in range(2)])}
    inputs["initial_state"] = torch.cat([inputs["initial_state"] * (0.5 + s) for s in range(len(LENGTHS))])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    check_against_reference(inputs, op=bidirectional_selective_scan, cu_seqlens=cu_seqlens)


@interpreted
def test_offsets_of_any_stride():
    inputs = make_inputs(PACKED)
    inputs.pop("initial_state")
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    with use_backend("triton"):
        results = [
            selective_scan(**inputs, delta_softplus=True, cu_seqlens=cu)
            for cu in (offsets, torch.stack((offsets, offsets + 1), 1)[:, 0])
        ]
    assert torch.equal(*results)


@interpreted
def test_directions_whose_strides_differ():
    one, two = make_inputs(ONE_STEP) | make_inputs(WHOLE), make_inputs(WHOLE, seed=1)["u"]
    turned = two.transpose(1, 2).contiguous().transpose(1, 2)
    with use_backend("triton"):
        results = [
            bidirectional_selective_scan(**one | {"u": (one["u"], u)}, delta_softplus=True) for u in (two, turned)
        ]
    assert torch.equal(*results)


@interpreted
def test_any_strides():
    inputs = make_inputs(ONE_STEP) | make_inputs(Case("strides", "two tiles", 2, 6, 3, 3))
    plain = {k: v.clone() for k, v in inputs.items()}
    inputs["u"], inputs["z"] = torch.cat((inputs["u"], inputs["z"]), -1).chunk(2, -1)
    inputs["delta"] = inputs["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["B"] = torch.stack((inputs["B"], inputs["B"]), -1)[..., 0]
    inputs["A"] = inputs["A"].T.contiguous().T
    inputs["initial_state"] = inputs["initial_state"].transpose(0, 2).contiguous().transpose(0, 2)
    with use_backend("triton"):
        results = [selective_scan(**x, delta_softplus=True) for x in (inputs, plain)]
    assert torch.equal(*results)


@interpreted
@pytest.mark.parametrize("batch, length", [(2, 0), (0, 5)])
def test_nothing_to_scan(batch, length):
    inputs = make_inputs(Case("empty", "no steps or no sequences", batch, length, 5, 3))
    with use_backend("triton"), nan_filled_empty():
        results = outputs_and_gradients(selective_scan, inputs, return_final_state=True)
    assert torch.equal(results["out1"], inputs["initial_state"])
    assert all(torch.count_nonzero(results[f"d{name}"]) == 0 for name in ("A", "D", "delta_bias"))


@interpreted
def test_complex_states_are_refused_clearly():
    inputs = make_inputs(Case("complex", "no kernel", 1, 3, 4, 2, is_complex=True))
    with use_backend("triton"), pytest.raises(BackendError, match=r"no kernel for a complex A; use_backend"):
        selective_scan(**inputs)


@interpreted
def test_too_many_states_are_refused_clearly():
    inputs = make_inputs(Case("wide", "N = 257", 1, 1, 1, 257))
    with use_backend("triton"), pytest.raises(BackendError, match="takes up to 256 states, not 257"):
        selective_scan(**inputs)


@interpreted
def test_softplus_of_small_steps_and_of_what_is_no_number():
    x = torch.cat([torch.linspace(-20, 20, 1021), torch.tensor([float("nan"), float("inf"), -float("inf")])])
    y = torch.empty_like(x)
    softplus_of[(1,)](x, y, 1024)
    expected = torch.log1p(x.double().exp())
    assert ((y - expected) / expected)[:1021].abs().max() < 1e-6
    assert y[1021].isnan() and y[1022] == float("inf") and y[1023] == 0
