"""Promises of ssd as an operator of torch: threads, processes, compile, export, scripting, memory, errors."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from mambaverse.kernels.backend import BackendError, use_backend
from mambaverse.kernels.ssd import ssd, ssd_update
from mambaverse.kernels.testing import outputs_and_gradients

INF = float("inf")


def draw(
    batch: int = 2, length: int = 70, heads: int = 4, head_dim: int = 8, groups: int = 2, state_dim: int = 8
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens = batch, length
    shapes = {
        "x": (*tokens, heads, head_dim),
        "dt": (*tokens, heads),
        "A": (heads,),
        "B": (*tokens, groups, state_dim),
        "C": (*tokens, groups, state_dim),
        "D": (heads,),
        "z": (*tokens, heads, head_dim),
        "dt_bias": (heads,),
        "initial_state": (batch, heads, head_dim, state_dim),
    }
    inputs = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    return inputs | {"A": -inputs["A"].exp()}


def run(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return outputs_and_gradients(ssd, inputs, dt_softplus=True, return_final_state=True)


def test_bit_equal_for_any_number_of_threads():
    inputs = draw(3, 300, 4, 64, 2, 64)  # more calls than threads in every kernel, work beyond torch's own grain
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3, 2):
            torch.set_num_threads(num_threads)
            results.append(run(inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[k], v) for k, v in results[0].items())


def test_called_from_several_threads_at_once():
    inputs = draw()
    expected = run(inputs)
    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(lambda _: run(inputs), range(16)):
            assert all(torch.equal(actual[k], v) for k, v in expected.items())


def _in_child(queue, inputs):
    torch.set_num_threads(1)
    queue.put(run(inputs)["dx"].numpy().sum())


def test_runs_in_a_forked_process():
    inputs = draw(4, 300)
    expected = run(inputs)["dx"].numpy().sum()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue, inputs))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == expected


def test_denormal_numbers_stay_as_they_were_outside():
    run(draw())
    assert torch.tensor(1e-40).mul(0.5).item() > 0


class Mixer(torch.nn.Module):
    def forward(self, x, dt, A, B, C, D, z, dt_bias, initial_state):
        flags: dict[str, Any] = {"dt_softplus": True, "return_final_state": True}
        return ssd(x, dt, A, B, C, D, z=z, dt_bias=dt_bias, initial_state=initial_state, **flags)


def test_compiles_as_one_graph():
    inputs = draw()
    compiled = torch.compile(Mixer(), backend="eager", fullgraph=True)
    actual = outputs_and_gradients(compiled, inputs)
    assert all(torch.equal(actual[k], v) for k, v in run(inputs).items())


@pytest.mark.parametrize("grad", [False, True])
def test_exports_as_one_node_for_any_length(grad, tmp_path):
    inputs = {k: v.requires_grad_(grad) for k, v in draw().items()}
    over_time = ("x", "dt", "B", "C", "z")
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {k: {1: length} if k in over_time else None for k in inputs}
    program = torch.export.export(Mixer(), tuple(inputs.values()), dynamic_shapes=shapes)
    calls = [n.target for n in program.graph.nodes if n.op == "call_function" and "mambaverse" in str(n.target)]
    assert calls == [torch.ops.mambaverse.ssd.default]
    torch.export.save(program, tmp_path / "ssd.pt2")  # the limit inf survives the file
    loaded = torch.export.load(tmp_path / "ssd.pt2").module()
    longer = draw(length=130)
    expected = ssd(**longer, dt_softplus=True, return_final_state=True)
    assert all(torch.equal(a, e) for a, e in zip(loaded(*longer.values()), expected, strict=True))


def _to_script(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return torch.ops.mambaverse.ssd(
        x, dt, A, B, C, None, None, None, None, None, True, 0.0, float("inf"), False, 0, "auto", False
    )[0]


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")  # timm's users still script their models
def test_scripts_and_differentiates_without_saved_states(tmp_path):
    inputs = [v.requires_grad_() for v in list(draw().values())[:5]]
    script: Any = torch.jit.script(_to_script)
    script.save(str(tmp_path / "ssd.pt"))
    scripted = torch.jit.load(str(tmp_path / "ssd.pt"))
    y, expected = scripted(*inputs), ssd(*inputs, dt_softplus=True)
    assert torch.equal(y, expected)
    for actual, e in zip(
        torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        assert torch.equal(actual, e)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(dtype, packed):
    inputs = draw(1, 9, 2, 3, 1, 2)
    if packed:
        inputs["initial_state"] = inputs["initial_state"].repeat(2, 1, 1, 1)
    tensors = [v.to(dtype).requires_grad_() for v in inputs.values()]
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32) if packed else None
    flags = cu_seqlens, True, 0.0, INF, packed, 4, "auto"
    torch.library.opcheck(torch.ops.mambaverse.ssd, (*tensors, *flags, True))
    weight, own_weight = torch.rand(2, 1, 9, 2, dtype=dtype).unbind()
    for weights in ((weight.requires_grad_(), own_weight.requires_grad_()), (None, own_weight)):
        torch.library.opcheck(torch.ops.mambaverse.ssd, (*tensors, *flags, True, *weights))
    torch.library.opcheck(torch.ops.mambaverse.ssd, (*tensors[:5], None, None, None, None, *flags, False))


def test_meta_tensors_have_shapes():
    inputs = {k: v.to("meta") for k, v in draw().items()}
    y, state = ssd(**inputs, return_final_state=True)
    assert y.device.type == "meta"
    assert (y.shape, state.shape) == (inputs["x"].shape, inputs["initial_state"].shape)


def test_states_are_saved_only_where_backward_may_come():
    tensors = list(draw().values())
    call = torch.ops.mambaverse.ssd.default
    shapes = [call(*tensors, None, True, 0.0, INF, False, 16, "auto", save)[2].shape for save in (True, False)]
    assert shapes == [(8, 4, 16, 16), (0, 4, 16, 16)]  # 70 positions in 5 chunks: 4 boundaries a sequence


def test_backward_needs_little_memory():
    x = torch.randn(1, 4096, 8, 64, requires_grad=True)
    dt, B = torch.rand(1, 4096, 8, requires_grad=True), torch.randn(1, 4096, 1, 64, requires_grad=True)
    y = ssd(x, dt, -torch.ones(8), B, B, z=x)
    inputs_and_gradients = 4 * 2 * (2 * x.numel() + 2 * B.numel() + dt.numel())
    with torch.profiler.profile(profile_memory=True) as profile:
        y.backward(torch.ones_like(y))
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    gradients = 4 * (2 * x.numel() + 2 * B.numel() + dt.numel())
    assert sizes.cumsum(0).max() - gradients < 1.5 * inputs_and_gradients


def test_backend_is_remembered_for_backward():
    inputs = {k: v.requires_grad_() for k, v in draw().items()}
    with use_backend("reference"):
        y = ssd(**inputs)
        expected = torch.autograd.grad(y.sum(), inputs["x"], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), inputs["x"])[0], expected)


def test_a_backend_that_is_not_there_is_named():
    with use_backend("triton"), pytest.raises(BackendError, match="ssd: backend 'triton' cannot run"):
        ssd(**draw())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 70, 32)}, r"x has shape \(2, 70, 32\); expected \(B, L, H, P\)"),
        ({"x": torch.ones(2, 70, 4, 8, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"dt": torch.randn(2, 70, 2)}, r"dt has shape \(2, 70, 2\); expected \(B, L, H\) = \(2, 70, 4\)"),
        ({"A": torch.randn(4, 8)}, r"A has shape \(4, 8\); expected \(H,\) = \(4,\)"),
        ({"A": torch.randn(4, dtype=torch.complex64)}, "A has dtype torch.complex64; expected a real floating dtype"),
        ({"B": torch.randn(2, 70, 3, 8)}, "B has 3 groups; expected a divisor of the 4 heads of x"),
        ({"B": torch.randn(2, 70, 8)}, r"B has shape \(2, 70, 8\); expected \(B, L, G, N\)"),  # C has its axis
        ({"B": torch.randn(2, 8, 2, 70)}, r"B has shape .*; expected \(B, L, G, N\), .* with \(B, L\) = \(2, 70\) as"),
        ({"C": torch.randn(2, 70, 2, 9)}, r"C has shape .*; expected \(B, L, G, N\) = \(2, 70, 2, 8\)"),
        ({"D": torch.randn(4, 9)}, r"D has shape \(4, 9\); expected \(H,\) or \(H, P\) = \(4, 8\)"),
        ({"D": torch.tensor(1.0)}, r"D has shape \(\); expected \(H,\) or \(H, P\)$"),
        ({"z": torch.randn(2, 70, 32)}, r"z has shape .*; expected \(B, L, H, P\)"),
        ({"dt_bias": torch.randn(8)}, r"dt_bias has shape \(8,\)"),
        ({"dt_bias": torch.randn(4, device="meta")}, "dt_bias is on meta; expected cpu"),
        ({"initial_state": torch.randn(2, 4, 8, 9)}, r"initial_state has shape .*; expected \(S, H, P, N\)"),
        ({"weight": torch.randn(2, 70)}, r"weight has shape \(2, 70\); expected \(B, L, H\) = \(2, 70, 4\)"),
        ({"own_weight": torch.ones(2, 70, 4, dtype=torch.int64)}, "own_weight has dtype torch.int64"),
        ({"own_weight": torch.randn(2, 70, 4, device="meta")}, "own_weight is on meta; expected cpu"),
        ({"dt_limit": (0.2, 0.1)}, r"dt_limit is \(0.2, 0.1\); expected \(least, greatest\)"),
        ({"dt_limit": (0.0,)}, r"dt_limit is \(0.0,\); expected \(least, greatest\), two numbers"),
        ({"dt_limit": None}, r"dt_limit is None; expected \(least, greatest\), two numbers"),
        ({"dt_limit": ("a", "1")}, r"dt_limit is \('a', '1'\); expected \(least, greatest\), two numbers"),
        ({"dt_limit": ("0", "1")}, r"dt_limit is \('0', '1'\); expected \(least, greatest\), two numbers"),
        ({"chunk_size": "8"}, "chunk_size is '8'; expected at least 1, a whole number"),
        ({"chunk_size": 2.5}, "chunk_size is 2.5; expected at least 1, a whole number"),
        ({"chunk_size": 0}, "chunk_size is 0; expected at least 1"),
        ({"cu_seqlens": torch.tensor([0, 70])}, "the batch is 2; expected 1"),
        ({"x": torch.randn(2, 70, 4, 8, device="meta")}, "dt is on cpu; expected meta"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match="ssd: " + message):
        ssd(**draw() | change)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("bounds", "message"), [([0, 30], "from 0 to 30; expected from 0 to the length 70"), ([0, 50, 40, 70], "falls")]
)
def test_bad_offsets_are_named(backend, bounds, message):
    inputs = draw(1) | {"initial_state": None}
    with use_backend(backend), pytest.raises(ValueError, match=message):
        ssd(**inputs, cu_seqlens=torch.tensor(bounds))


def test_update_names_bad_arguments():
    inputs = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in draw().items()}
    state = inputs.pop("initial_state")
    with pytest.raises(ValueError, match=r"ssd_update: dt has shape \(2, 3\); expected \(B, H\) = \(2, 4\)"):
        ssd_update(state, **inputs | {"dt": torch.randn(2, 3)})
    with pytest.raises(ValueError, match=r"ssd_update: state has dtype torch\.float16; expected torch\.float32"):
        ssd_update(state.half(), **inputs)
    with pytest.raises(ValueError, match=r"ssd_update: state has shape .*; expected \(B, H, P, N\) = \(2, 4, 8, 8\)"):
        ssd_update(state[:1], **inputs)
    with pytest.raises(ValueError, match=r"ssd_update: weight has shape \(2,\); expected \(B, H\) = \(2, 4\)"):
        ssd_update(state, **inputs, weight=torch.randn(2))
    with pytest.raises(ValueError, match=r"ssd_update: D has shape \(\); expected \(H,\) or \(H, P\)$"):
        ssd_update(state, **inputs | {"D": torch.tensor(1.0)})
    with pytest.raises(
        ValueError, match=r"ssd_update: B has shape .*; expected \(B, G, N\), .* with \(B\) = \(2,\) as of"
    ):
        ssd_update(state, **inputs | {"B": torch.randn(3, 2, 8)})
