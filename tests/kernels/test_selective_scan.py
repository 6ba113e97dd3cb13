"""The contract of selective_scan as a torch op and as a function: directions, steps, errors, capture, threads."""

import multiprocessing
import threading
from typing import Any

import pytest
import torch

from mambaverse.kernels.backend import BackendError, use_backend
from mambaverse.kernels.selective_scan import (
    bidirectional_selective_scan,
    selective_scan,
    selective_scan_update,
)
from mambaverse.kernels.selective_scan.cases import TESTED, Case, make_inputs
from mambaverse.kernels.testing import assert_close, outputs_and_gradients

SMALL = Case("small", "one block, one chunk, groups", 2, 9, 6, 3, groups=2)
COMPLEX = Case("complex", "the complex kernel", 2, 9, 6, 3, is_complex=True)
BLOCKS = Case("blocks", "several blocks, chunks and sequences: work for several threads", 5, 200, 200, 4)
PER_STEP = ("u", "delta", "B", "C", "z")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.ones(9, 6)}, r"u has shape \(9, 6\); expected \(B, L, D\)"),
        ({"u": torch.ones(2, 9, 6, dtype=torch.long)}, "u has dtype torch.int64; expected a real"),
        ({"delta": torch.ones(2, 8, 6)}, r"delta has shape \(2, 8, 6\); expected \(B, L, D\) = \(2, 9, 6\)"),
        ({"A": torch.ones(3, 6)}, r"A has shape \(3, 6\); expected \(D, N\) with D = 6"),
        ({"A": torch.ones(6, 0)}, "N >= 1"),
        ({"B": torch.ones(2, 9, 4)}, r"B has shape \(2, 9, 4\); expected \(B, L, N\) = \(2, 9, 3\)"),
        ({"B": torch.ones(2, 9, 4, 3)}, "B has 4 groups; expected a divisor of the 6 channels"),
        ({"B": torch.ones(2, 9, 2, 3, dtype=torch.complex64)}, "B has dtype torch.complex64; .* as that of A is"),
        ({"C": torch.ones(2, 9, 3)}, "C has shape .*; expected the shape of B"),
        ({"D": torch.ones(6, 1)}, r"D has shape \(6, 1\); expected \(D,\) = \(6,\)"),
        ({"z": torch.ones(2, 9, 6, device="meta")}, "z is on meta; expected cpu"),
        ({"delta_bias": torch.ones(5)}, "delta_bias has shape"),
        ({"initial_state": torch.ones(1, 6, 3)}, r"initial_state has shape \(1, 6, 3\); expected \(S, D, N\)"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "the batch is 2; expected 1"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "cu_seqlens has dtype torch.float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_error_names_argument_value_and_expectation(change, message):
    with pytest.raises(ValueError, match=f"selective_scan: .*{message}"):
        selective_scan(**make_inputs(SMALL) | change)


@pytest.mark.parametrize("offsets", [[1, 9], [0, 8], [0, 6, 5, 9]])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_offsets_are_checked_by_value(offsets, backend):
    inputs = make_inputs(Case("packed", "batch 1", 1, 9, 6, 3))
    inputs.pop("initial_state")
    with use_backend(backend), pytest.raises(ValueError, match="selective_scan: cu_seqlens"):
        selective_scan(**inputs, cu_seqlens=torch.tensor(offsets))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_no_sequences(backend, is_complex):
    inputs = make_inputs(Case("none", "offsets [0]", 1, 0, 6, 3, is_complex=is_complex))
    inputs["initial_state"] = inputs["initial_state"][:0]
    with use_backend(backend):
        results = outputs_and_gradients(
            selective_scan, inputs, cu_seqlens=torch.zeros(1, dtype=torch.int32), return_final_state=True
        )
    assert results["out1"].shape == (0, 6, 3)
    assert not results["dA"].any()


def test_double_precision_runs_the_reference():
    inputs = make_inputs(SMALL, dtype=torch.float64)
    y, state = selective_scan(**inputs, return_final_state=True)
    with use_backend("reference"):
        expected = selective_scan(**inputs)
    assert state.dtype == torch.float64
    assert torch.equal(y, expected)


def test_backend_without_a_kernel_says_so():
    with use_backend("triton"), pytest.raises(BackendError, match="selective_scan: backend 'triton' cannot run"):
        selective_scan(**make_inputs(SMALL))


@pytest.mark.parametrize("case", [SMALL, COMPLEX], ids=lambda case: case.name)
def test_update_equals_scan_step_by_step(case):
    inputs = make_inputs(case)
    y, final_state = selective_scan(**inputs, delta_softplus=True, return_final_state=True)
    state = inputs.pop("initial_state").clone()
    for t in range(case.length):
        step = {k: v[:, t] if k in PER_STEP else v for k, v in inputs.items()}
        y_t = selective_scan_update(state, **step, delta_softplus=True)
        assert_close(f"y[{t}]", y_t, y[:, t])
    assert_close("state", state, final_state)


def test_update_returns_the_dtype_of_u():
    inputs = make_inputs(SMALL, dtype=torch.bfloat16)
    state = inputs.pop("initial_state")
    step = {k: v[:, 0] if k in PER_STEP else v for k, v in inputs.items()}
    y = selective_scan_update(state, **step)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_update_refuses_a_state_in_16_bit():
    inputs = make_inputs(SMALL)
    state = inputs.pop("initial_state").half()
    step = {k: v[:, 0] if k in PER_STEP else v for k, v in inputs.items()}
    with pytest.raises(ValueError, match=r"state has dtype torch.float16; expected torch.float32"):
        selective_scan_update(state, **step)


def per_direction(inputs, names):
    """Stack two directions of the tensors in `names`; B and C that are grouped then have five axes."""
    other = make_inputs(SMALL, seed=1)
    return {k: torch.stack((v, other[k])) if k in names else v for k, v in inputs.items()}


@pytest.mark.parametrize("merge", ["add", "mean"])
@pytest.mark.parametrize(
    "names",
    [(), ("A",), ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state"), ("delta", "z"), ("B",), ("u", "C")],
    ids=str,
)
def test_bidirectional_equals_two_scans(names, merge):
    inputs = per_direction(make_inputs(SMALL), names)

    def two_scans(**tensors):
        pairs = [{k: v[i] if k in names else v for k, v in tensors.items()} for i in range(2)]
        y, state = selective_scan(**pairs[0], delta_softplus=True, return_final_state=True)
        y_back, state_back = selective_scan(**pairs[1], delta_softplus=True, reverse=True, return_final_state=True)
        total = y + y_back
        return (total if merge == "add" else total / 2), torch.stack((state, state_back))

    actual = outputs_and_gradients(
        bidirectional_selective_scan, inputs, merge=merge, delta_softplus=True, return_final_state=True
    )
    expected = outputs_and_gradients(two_scans, inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_bidirectional_takes_pairs():
    inputs = per_direction(make_inputs(SMALL), ("u", "A", "D", "B"))
    pairs = {k: tuple(v) if k in ("u", "A", "D", "B") else v for k, v in inputs.items()}
    assert torch.equal(*(bidirectional_selective_scan(**given, delta_softplus=True) for given in (inputs, pairs)))
    with pytest.raises(ValueError, match=r"u is \(torch.float32 .*, torch.float16 .*\); expected a pair"):
        bidirectional_selective_scan(**pairs | {"u": (pairs["u"][0], pairs["u"][1].half())})


def test_bidirectional_reads_four_axes_by_the_shape_of_u():
    u, delta = torch.randn(2, 3, 4), torch.rand(2, 3, 4)
    A, C = -torch.rand(4, 5), torch.randn(2, 3, 5)
    grouped = torch.randn(2, 3, 2, 5)  # (B, L, G, N): the second axis is L, not B
    y = bidirectional_selective_scan(u, delta, A, grouped, C.unsqueeze(2).expand_as(grouped))
    shared = torch.stack((grouped, grouped))
    assert torch.equal(y, bidirectional_selective_scan(u, delta, A, shared, C.unsqueeze(2).expand_as(grouped)))
    directed = torch.randn(2, 2, 3, 5)  # (2, B, L, N)
    y = bidirectional_selective_scan(u, delta, A, directed, C)
    forward, backward = (
        selective_scan(u, delta, A, directed[0], C),
        selective_scan(u, delta, A, directed[1], C, reverse=True),
    )
    assert torch.equal(y, forward + backward)


def test_bidirectional_refuses_what_reads_both_ways():
    u, A = torch.randn(2, 2, 4), -torch.rand(4, 5)
    B = torch.randn(2, 2, 2, 5)
    with pytest.raises(ValueError, match=r"B has shape \(2, 2, 2, 5\), that of both .* clear form"):
        bidirectional_selective_scan(u, u, A, B, B)
    five = B.unsqueeze(3)
    y = bidirectional_selective_scan(u, u, A, five, five)
    assert torch.equal(y, selective_scan(u, u, A, B[0], B[0]) + selective_scan(u, u, A, B[1], B[1], reverse=True))


def test_bidirectional_packed():
    inputs = make_inputs(Case("packed", "two sequences", 1, 9, 6, 3))
    inputs.pop("initial_state")
    flags: dict[str, Any] = {"delta_softplus": True, "return_final_state": True}
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    y, states = bidirectional_selective_scan(**inputs, cu_seqlens=cu_seqlens, **flags)
    assert states.shape == (2, 2, 6, 3)
    for s, span in enumerate((slice(0, 4), slice(4, 9))):
        one = {k: v[:, span] if k in PER_STEP else v for k, v in inputs.items()}
        y_one, states_one = bidirectional_selective_scan(**one, **flags)
        assert_close("y", y[:, span], y_one)
        assert_close("states", states[:, s : s + 1], states_one)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"merge": "concat"}, "merge is 'concat'; expected one of add, mean"), ({"D": torch.ones(3, 6)}, "D has shape")],
    ids=["merge", "D"],
)
def test_bidirectional_errors(change, message):
    with pytest.raises(ValueError, match=f"bidirectional_selective_scan: {message}"):
        bidirectional_selective_scan(**make_inputs(SMALL) | change)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
@pytest.mark.parametrize("case", [SMALL, COMPLEX], ids=lambda case: case.name)
def test_opcheck(case):
    full = [v.requires_grad_() for v in make_inputs(case).values()]
    op = torch.ops.mambaverse.selective_scan.default
    torch.library.opcheck(op, (*full, None, True, False, "auto", True))
    torch.library.opcheck(op, (*full[:5], *[None] * 5, False, True, "auto", True))
    both = torch.ops.mambaverse.bidirectional_selective_scan.default
    own = [v.detach().clone().requires_grad_() for v in full]
    torch.library.opcheck(both, (*full, None, None, own[2], *[None] * 6, None, True, True, "auto", True))
    torch.library.opcheck(both, (*full, *own, None, True, False, "auto", True))


@pytest.mark.parametrize("function", [selective_scan, bidirectional_selective_scan], ids=lambda f: f.__name__)
def test_compiles_without_graph_breaks(function):
    inputs = make_inputs(TESTED[2])
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    flags: dict[str, Any] = {"delta_softplus": True, "return_final_state": True}
    expected = outputs_and_gradients(function, inputs, **flags)
    actual = outputs_and_gradients(compiled, inputs, **flags)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_exports_as_one_node():
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C, delta_softplus=True)

    example = tuple(make_inputs(SMALL)[name] for name in ("u", "delta", "A", "B", "C"))
    length = torch.export.Dim("length", min=2)
    shapes = {name: None if name == "A" else {1: length} for name in ("u", "delta", "A", "B", "C")}
    program = torch.export.export(Scan(), example, dynamic_shapes=shapes)
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and "mambaverse" in str(n.target)]
    assert calls == [torch.ops.mambaverse.selective_scan.default]
    longer = tuple(make_inputs(Case("longer", "another length", 2, 70, 6, 3, groups=2))[n] for n in shapes)
    assert torch.equal(program.module()(*longer), selective_scan(*longer, delta_softplus=True))


def _to_script(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    y, _, _ = torch.ops.mambaverse.selective_scan(
        u, delta, A, B, C, None, None, None, None, None, True, False, "auto", True
    )
    return y


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # timm's users still script their models
def test_scripts():
    leaves = [make_inputs(SMALL)[name].requires_grad_() for name in ("u", "delta", "A", "B", "C")]
    y = torch.jit.script(_to_script)(*leaves)
    expected = selective_scan(*leaves, delta_softplus=True)
    assert torch.equal(y, expected)
    actual = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, torch.autograd.grad(expected.sum(), leaves), strict=True))


@pytest.mark.parametrize("case", [SMALL, COMPLEX], ids=lambda case: case.name)
def test_meta_tensors_have_shapes(case):
    inputs = {k: v.to("meta").requires_grad_() for k, v in make_inputs(case).items()}
    y, state = selective_scan(**inputs, return_final_state=True)
    y.sum().backward()
    assert (y.shape, state.shape) == (inputs["u"].shape, inputs["initial_state"].shape)
    assert state.dtype == inputs["initial_state"].dtype
    assert inputs["A"].grad.shape == inputs["A"].shape


@pytest.mark.parametrize("is_complex", [False, True])
def test_results_do_not_depend_on_threads_or_runs(is_complex):
    inputs = make_inputs(Case("blocks", BLOCKS.reason, 5, 200, 200, 4, is_complex=is_complex))
    before = torch.get_num_threads()
    try:
        runs = []
        for num_threads in (1, 1, 2, 7):
            torch.set_num_threads(num_threads)
            runs.append(outputs_and_gradients(selective_scan, inputs, delta_softplus=True, return_final_state=True))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


def test_runs_in_several_threads_at_once():
    inputs = make_inputs(BLOCKS)
    expected = outputs_and_gradients(selective_scan, inputs, delta_softplus=True)
    results = {}

    def work(i):
        results[i] = outputs_and_gradients(selective_scan, inputs, delta_softplus=True)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    assert all(torch.equal(run[name], expected[name]) for run in results.values() for name in expected)


def _in_child(queue, inputs):
    torch.set_num_threads(2)
    queue.put(selective_scan(**inputs, delta_softplus=True).sum().item())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")  # the point of the test
def test_runs_in_a_forked_process():
    inputs = make_inputs(SMALL)
    expected = selective_scan(**inputs, delta_softplus=True).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue, inputs))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == expected
