"""TorchScript compiles every built-in mixer, and what it saves and loads gives the same numbers and gradients."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from mambaverse.testing import Subject

CASES: list[tuple[str, dict[str, Any]]] = [
    ("s4d", {"d_state": 8}),
    ("s4d", {"d_state": 3, "init": "real"}),
    ("s6", {}),
    ("s6", {"A_init": "s4d_lin", "selective_dt": False, "selective_B": False}),
    ("ssd", {"d_state": 8}),
    ("ssd", {"d_state": 8, "rmsnorm": False, "D_has_hdim": True}),
    ("mamba3", {"d_state": 8}),
    ("mamba3", {"d_state": 8, "is_mimo": True, "is_outproj_norm": True}),
    ("vim", {}),
    ("vim", {"shared": True}),
    ("bissd", {"d_state": 8}),
    ("bissd", {"d_state": 8, "shared": True, "rmsnorm": False}),
    ("ncssd", {"d_state": 8}),
    ("ncssd", {"d_state": 8, "conv": "grid"}),
    ("ss2d", {}),
    ("ss2d", {"gate": "silu", "d_state": 2, "d_conv": 1, "out_norm": False}),
    ("bidirectional", {"mixer": "s6"}),
    ("attention", {"causal": True, "rotary": True}),
]


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.*` is deprecated:FutureWarning"
)  # timm's contract asks for it all the same
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
def test_torchscript_compiles_saves_and_loads_a_mixer(name: str, arguments: dict[str, Any]) -> None:
    subject = Subject(name, 16, arguments)
    mixer, x = subject.build(), subject.tokens()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(mixer), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    results = []
    for module in (mixer, loaded):
        y = module(x, spatial_shape=(3, 4)) if mixer.needs_spatial_shape else module(x)
        y.sum().backward()
        results.append([y, *(p.grad for p in module.parameters())])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected)
