"""Portable forms: the operators' numbers from standard operations, in exported programs and in ONNX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.layers import set_exportable

from mambaverse.errors import UserError
from mambaverse.kernels.testing import assert_close
from mambaverse.mixers import MIXERS, _ops, _portable, create_mixer

DIM = 8
ARGUMENTS: dict[str, dict[str, Any]] = {
    "vim": {"d_state": 4}, "s6": {"d_state": 4}, "ssd": {"d_state": 4, "headdim": 8},
    "bissd": {"d_state": 4, "headdim": 8}, "ncssd": {"d_state": 4, "headdim": 8},
    "mamba3": {"d_state": 8, "headdim": 8},
    "bidirectional": {"mixer": "s6"},
}  # fmt: skip
COMPLEX = {"s4d"}
# one ONNX Scan for each direction of a recurrence
SCANS = {"s6": 1, "vim": 2, "ssd": 1, "ncssd": 0}

# the exporter's own, of torch 2.14 and onnxscript 0.7
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return create_mixer(name, DIM, **{**ARGUMENTS.get(name, {}), **more}).eval()


def operators(program: Any) -> set[str]:
    """Return the operators of ours in an exported program, the bodies of its scans included."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(n.target) for g in graphs for n in g.graph.nodes if "mambaverse" in str(n.target)}


@pytest.mark.parametrize("name", ["s6", "vim", "ssd"])
def test_exported_programs_keep_our_operators_unless_told(name: str) -> None:
    mixer, x = build(name), torch.randn(2, 6, DIM)
    assert operators(torch.export.export(mixer, (x,)))
    with set_exportable(True):
        program = torch.export.export(mixer, (x,))
    assert operators(program) == set()
    assert_close("y", program.module()(x), mixer(x))


@pytest.fixture
def eager_scan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Portable forms with torch's scan as a loop: what it means, without its compiler."""

    def loop(step: Any, h: Any, inputs: tuple[Any, ...], reverse: bool) -> tuple[Any, Any]:
        order = range(inputs[0].shape[1])
        ys = {}
        for t in reversed(order) if reverse else order:
            h, ys[t] = step(h, tuple(v[:, t] for v in inputs))
        return torch.stack([ys[t] for t in order], dim=1), h

    monkeypatch.setattr(_portable, "_run", loop)
    with set_exportable(True):
        yield


@pytest.mark.parametrize("name", sorted(set(MIXERS.list()) - COMPLEX))
@pytest.mark.parametrize("length", [1, 7])
def test_portable_forms_give_the_mixers_numbers(name: str, length: int, eager_scan: None) -> None:
    mixer, x = build(name), torch.randn(2, length, DIM)
    grid = (1, length) if mixer.needs_spatial_shape else None
    with set_exportable(False):
        expected = mixer(x, spatial_shape=grid)
    assert_close("y", mixer(x, spatial_shape=grid), expected)


@pytest.mark.parametrize("name", ["s6", "ssd"])
def test_states_carry_through_portable_forms(name: str, eager_scan: None) -> None:
    mixer, x = build(name), torch.randn(2, 7, DIM)
    y, state = mixer(x[:, :3], return_state=True)
    second = mixer(x[:, 3:], state=state)
    with set_exportable(False):
        assert_close("y", torch.cat([y, second], 1), mixer(x))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("reverse", [False, True])
def test_grouped_rows_and_reverse(groups: int, reverse: bool, eager_scan: None) -> None:
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, 2, 5, 8).unbind()
    B, C = torch.randn(2, 2, 5, groups, 3).unbind()
    A, D, bias = -torch.rand(8, 3), torch.randn(8), torch.randn(8)
    window = torch.randn(2, 3, 8)

    def run() -> list[torch.Tensor]:
        y, h = _ops.selective_scan(u, delta, A, B, C, D, z, bias, None, None, reverse)
        v, last = _ops.causal_conv1d(u, torch.linspace(-1, 1, 32).view(8, 1, 4), bias, window, None, reverse)
        x, z4, dt = u.unflatten(-1, (4, 2)), z.unflatten(-1, (4, 2)), delta[..., :4]
        limit = (0.1, 0.7)
        w, s = _ops.ssd(x, dt, A[:4, 0], B, C, D[:4], z4, bias[:4], limit, None, None, None, reverse)
        return [y, h, v, last, w, s]

    portable = run()
    with set_exportable(False):
        for name, got, expected in zip(["y", "h", "conv", "window", "ssd", "state"], portable, run(), strict=True):
            assert_close(name, got, expected)


@pytest.mark.parametrize("name", sorted(SCANS))
def test_onnx_gives_the_mixers_numbers_from_standard_nodes(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    mixer, x = build(name), torch.randn(2, 6, DIM)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.onnx.export(mixer, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
    assert program is not None
    proto = program.model_proto
    assert not proto.functions and {node.domain for node in proto.graph.node} == {""}
    assert Counter(node.op_type for node in proto.graph.node)["Scan"] == SCANS[name]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for tokens in (x, torch.randn(3, 6, DIM)):
        (y,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), mixer(tokens).detach(), atol=1e-5, rtol=0)


def test_what_has_no_portable_form_is_refused(eager_scan: None) -> None:
    x = torch.randn(1, 6, DIM)
    with pytest.raises(UserError, match="complex"):
        build("s4d")(x)
    with pytest.raises(UserError, match="complex"):
        build("s6", A_init="s4d_lin")(x)
    with pytest.raises(UserError, match="packed sequences"):
        build("s6")(x, cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32))
