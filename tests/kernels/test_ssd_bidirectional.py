"""Promises of bidirectional_ssd: two calls of ssd, whose tensors are shared or one for each direction."""

from typing import Any

import pytest
import torch

from mambaverse.kernels.ssd import bidirectional_ssd, ssd
from mambaverse.kernels.ssd.cases import Case, make_inputs, make_weights
from mambaverse.kernels.testing import outputs_and_gradients

SMALL = Case(2, 9, 4, 3, 2, 5, "")
ALL = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "weight", "own_weight")
FLAGS: dict[str, Any] = {"dt_softplus": True, "dt_limit": (0.05, 0.5), "return_final_state": True}


@pytest.mark.parametrize("merge", ["add", "mean"])
@pytest.mark.parametrize("names", [(), ("A",), ALL, ("x", "z"), ("D", "B"), ("own_weight",)], ids=str)
def test_is_two_calls(names, merge):
    inputs, other = (make_inputs(SMALL, seed=seed) | make_weights(SMALL, seed=seed) for seed in range(2))
    inputs = {k: torch.stack((v, other[k])) if k in names else v for k, v in inputs.items()}

    def two_calls(**tensors):
        pairs = [{k: v[i] if k in names else v for k, v in tensors.items()} for i in range(2)]
        y, state = ssd(**pairs[0], **FLAGS)
        y_back, state_back = ssd(**pairs[1], **FLAGS, reverse=True)
        total = y + y_back
        return (total if merge == "add" else total / 2), torch.stack((state, state_back))

    actual = outputs_and_gradients(bidirectional_ssd, inputs, merge=merge, **FLAGS)
    expected = outputs_and_gradients(two_calls, inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_takes_pairs():
    names = ("x", "A", "B", "D")
    inputs, other = make_inputs(SMALL), make_inputs(SMALL, seed=1)
    pairs: dict[str, Any] = {k: (v, other[k]) if k in names else v for k, v in inputs.items()}
    stacked: dict[str, Any] = {k: torch.stack(v) if k in names else v for k, v in pairs.items()}
    assert torch.equal(*(bidirectional_ssd(**given, dt_softplus=True) for given in (stacked, pairs)))
    with pytest.raises(ValueError, match=r"bidirectional_ssd: A is \(torch.float32 \(4,\), torch.float64 .* a pair"):
        bidirectional_ssd(**pairs | {"A": (pairs["A"][0], pairs["A"][1].double())})


def test_reads_axes_by_the_shape_of_x():
    x, dt, A, C = torch.randn(2, 3, 4, 6), torch.rand(2, 3, 4), -torch.rand(4), torch.randn(2, 3, 5)
    grouped = torch.randn(2, 3, 2, 5)  # (B, L, G, N): the second axis is L, not B
    shared = C.unsqueeze(2).expand_as(grouped)
    y = bidirectional_ssd(x, dt, A, grouped, shared)
    assert torch.equal(y, bidirectional_ssd(x, dt, A, torch.stack((grouped, grouped)), shared))
    directed = torch.randn(2, 2, 3, 5)  # (2, B, L, N)
    for D in (torch.randn(4, 6), torch.randn(2, 4), torch.randn(2, 4, 6)):
        y = bidirectional_ssd(x, dt, A, directed, C, D)
        forward, backward = D if D.shape[0] == 2 else (D, D)
        expected = ssd(x, dt, A, directed[0], C, forward) + ssd(x, dt, A, directed[1], C, backward, reverse=True)
        assert torch.equal(y, expected)


def test_one_of_b_and_c_may_have_an_axis_of_groups():
    x, dt, A = torch.randn(2, 3, 4, 6), torch.rand(2, 3, 4), -torch.rand(4)
    B, C = torch.randn(2, 3, 5), torch.randn(2, 3, 1, 5)
    expected = bidirectional_ssd(x, dt, A, B.unsqueeze(2), C)
    assert torch.equal(bidirectional_ssd(x, dt, A, B, C), expected)
    assert torch.equal(bidirectional_ssd(x, dt, A, B, torch.stack((C, C))), expected)


def test_refuses_what_reads_both_ways():
    x, dt, A = torch.randn(2, 2, 2, 2), torch.rand(2, 2, 2), -torch.rand(2)
    B, D = torch.randn(2, 2, 2, 5), torch.randn(2, 2)
    with pytest.raises(ValueError, match=r"B has shape \(2, 2, 2, 5\), that of both .* clear form"):
        bidirectional_ssd(x, dt, A, B, B)
    with pytest.raises(ValueError, match=r"D has shape \(2, 2\), that of both \(2, H\) and \(H, P\)"):
        bidirectional_ssd(x, dt, A, B[:, :, 0], B[:, :, 0], D)
    five = B.unsqueeze(3)
    y = bidirectional_ssd(x, dt, A, five, five)
    assert torch.equal(y, ssd(x, dt, A, B[0], B[0]) + ssd(x, dt, A, B[1], B[1], reverse=True))


def test_packed():
    inputs: dict[str, Any] = make_inputs(Case(1, 9, 4, 3, 2, 5, "two sequences"))
    inputs.pop("initial_state")
    y, states = bidirectional_ssd(**inputs, cu_seqlens=torch.tensor([0, 4, 9]), **FLAGS)
    assert states.shape == (2, 2, 4, 3, 5)
    for s, span in enumerate((slice(0, 4), slice(4, 9))):
        one = {k: v[:, span] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
        y_one, states_one = bidirectional_ssd(**one, **FLAGS)
        assert torch.equal(y[:, span], y_one)
        assert torch.equal(states[:, s : s + 1], states_one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge": "concat"}, "merge is 'concat'; expected one of add, mean"),
        ({"x": torch.ones(2, 9, 12)}, r"x has shape \(2, 9, 12\); expected \(B, L, H, P\)"),
        ({"A": torch.ones(3, 4)}, "A has shape .*; expected 1 axes, or 2 of which the first is the 2 directions"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments: dict[str, Any] = make_inputs(SMALL) | change
    with pytest.raises(ValueError, match=f"bidirectional_ssd: {message}"):
        bidirectional_ssd(**arguments)
