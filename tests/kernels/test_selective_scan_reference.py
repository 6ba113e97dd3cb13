"""The reference of selective_scan against the definition, and its written-out gradient against autograd."""

import math
from typing import Any

import pytest
import torch

from mambaverse.kernels.selective_scan import reference, selective_scan
from mambaverse.kernels.selective_scan.cases import Case, make_inputs
from mambaverse.kernels.testing import assert_close

SMALL = (
    Case("real", "two channels a group, two steps", 2, 3, 4, 2),
    Case("groups", "the gradient of B sums over the channels of a group", 1, 3, 4, 2, groups=2),
    Case("complex", "conjugate pairs", 1, 3, 4, 2, groups=2, is_complex=True),
)


def inputs_of(case, num_sequences=None):
    inputs = make_inputs(case, dtype=torch.float64)
    if num_sequences is not None:
        state = inputs["initial_state"]
        inputs["initial_state"] = torch.cat([state * (s + 1) for s in range(num_sequences)])
    return inputs


def test_one_channel_by_hand():
    u, delta, A, B, C, D, z = 2.0, 0.5, -1.0, 3.0, 4.0, 0.25, 1.5
    t = lambda value, *shape: torch.full(shape, value, dtype=torch.float64)  # noqa: E731
    y, state = selective_scan(
        *(t(u, 1, 2, 1), t(delta, 1, 2, 1), t(A, 1, 1), t(B, 1, 2, 1), t(C, 1, 2, 1), t(D, 1)),
        z=t(z, 1, 2, 1),
        return_final_state=True,
    )
    h = delta * B * u
    gate = z / (1 + math.exp(-z))
    first = (C * h + D * u) * gate
    h = math.exp(delta * A) * h + delta * B * u
    torch.testing.assert_close(y.flatten(), torch.tensor([first, (C * h + D * u) * gate], dtype=torch.float64))
    torch.testing.assert_close(state.flatten(), torch.tensor([h], dtype=torch.float64))


def test_complex_state_is_a_conjugate_pair():
    """One complex state equals two of a scan whose A, B and C are conjugates, run in complex arithmetic."""
    inputs = make_inputs(SMALL[2], dtype=torch.float64)
    u, delta, A, B, C = (inputs[name] for name in ("u", "delta", "A", "B", "C"))
    y = selective_scan(u, delta, A, B, C)
    h = torch.zeros(2, *A.shape, dtype=torch.complex128)
    for t in range(u.shape[1]):
        total = torch.zeros(u.shape[2], dtype=torch.complex128)
        for pair, (a, b, c) in enumerate(((A, B, C), (A.conj(), B.conj(), C.conj()))):
            b_t, c_t = (v[0, t].repeat_interleave(2, 0) for v in (b, c))
            h[pair] = torch.exp(delta[0, t, :, None] * a) * h[pair] + (delta * u)[0, t, :, None] * b_t
            total += (h[pair] * c_t).sum(-1)
        torch.testing.assert_close(y[0, t].to(total), total)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_written_out_gradient_equals_autograd(case, packed, reverse):
    if packed and case.batch > 1:
        case = Case("packed", "batch 1", 1, 7, 4, 2)
    cu_seqlens = torch.tensor([0, 0, 2, case.length]) if packed else None
    inputs = {k: v.requires_grad_() for k, v in inputs_of(case, 3 if packed else None).items()}
    flags: dict[str, Any] = {"cu_seqlens": cu_seqlens, "delta_softplus": True, "reverse": reverse}
    y, state, chunk_states = reference.forward(**inputs, **flags, save=True)
    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    expected = torch.autograd.grad([y, state], list(inputs.values()), [dy, dstate])
    with torch.no_grad():
        actual = reference.backward(dy, dstate, **inputs, **flags, chunk_states=chunk_states)
    for name, a, e in zip(inputs, actual, expected, strict=True):
        assert a is not None
        assert_close(f"d{name}", a, e)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gradcheck_of_the_op_in_float64(case):
    ordered = [v.requires_grad_() for v in inputs_of(case).values()]

    def scan(u, delta, A, B, C, D, z, delta_bias, initial_state):
        options = {"z": z, "delta_bias": delta_bias, "initial_state": initial_state}
        return selective_scan(u, delta, A, B, C, D, **options, delta_softplus=True, return_final_state=True)

    assert torch.autograd.gradcheck(scan, ordered)


@pytest.mark.parametrize("missing", ["D", "z", "delta_bias", "initial_state"])
def test_gradient_without_an_optional_input(missing):
    inputs: dict[str, Any] = {k: v.requires_grad_() for k, v in inputs_of(SMALL[0]).items()} | {missing: None}
    flags: dict[str, Any] = {"cu_seqlens": None, "delta_softplus": False, "reverse": False}
    y, state, chunk_states = reference.forward(**inputs, **flags, save=True)
    expected = torch.autograd.grad([y.sum() + state.sum()], [v for v in inputs.values() if v is not None])
    with torch.no_grad():
        flags |= {"dy": torch.ones_like(y), "dfinal_state": torch.ones_like(state), "chunk_states": chunk_states}
        actual = reference.backward(**inputs, **flags)
    assert [a is None for a in actual] == [v is None for v in inputs.values()]
    for a, e in zip((a for a in actual if a is not None), expected, strict=True):
        assert_close("gradient", a, e)
