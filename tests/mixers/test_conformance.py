"""Every mixer keeps the contract of `Mixer`: the conformance kit over each of them, with arguments that matter."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from mambaverse.mixers import list_mixers
from mambaverse.testing import MIXER_CHECKS, check_mixer

CASES: dict[str, list[dict[str, Any]]] = {
    "s4d": [
        {"d_state": 8, "init": "legs"},  # complex A
        {"d_state": 3, "init": "real"},  # real A, an odd number of modes
        {"d_state": 8, "init": "lin", "discretization": "bilinear"},
    ],
    "s6": [
        {},
        {"d_state": 6, "A_init": "s4d_lin", "bias": True},  # complex A
        {"d_state": 3, "d_conv": 2, "selective_dt": False, "A_init": "random"},
        {"d_state": 3, "selective_B": False},  # every channel its own B, a group of its own
        {"d_state": 4, "selective_dt": False, "selective_B": False, "selective_C": False, "A_init": "s4d_lin"},
    ],
    "ssd": [
        {"d_state": 8},
        {"d_state": 5, "headdim": 4, "ngroups": 2, "D_has_hdim": True, "bias": True},
        {"d_state": 8, "headdim": 16, "rmsnorm": False, "conv_bias": False},
        {"d_state": 8, "headdim": 16, "norm_before_gate": True, "dt_limit": (0.001, 0.05)},
    ],
    "mamba3": [
        {"d_state": 8},
        {"d_state": 6, "headdim": 4, "ngroups": 2, "rope_fraction": 1.0, "is_mimo": True, "mimo_rank": 3},
        {"d_state": 7, "headdim": 16, "is_outproj_norm": True, "A_form": "softplus"},  # one channel has no partner
        {"d_state": 8, "is_mimo": True, "mimo_rank": 2, "rope_pairing": "interleaved", "is_outproj_norm": True},
    ],
    "vim": [
        {},
        {"d_state": 5, "merge": "add", "bias": True, "conv_bias": False},  # as Caduceus
        {"merge": "add", "shared": True},  # as Audio Mamba Fo-Bi
    ],
    "bissd": [
        {"d_state": 8},
        {"d_state": 5, "headdim": 4, "ngroups": 2, "merge": "add", "bias": True, "dt_limit": (0.001, 0.05)},
        {"d_state": 8, "headdim": 16, "shared": True, "norm_before_gate": True},
        {"d_state": 8, "headdim": 16, "rmsnorm": False, "conv_bias": False},
    ],
    "ncssd": [
        {"d_state": 8},
        {"d_state": 8, "conv": "grid", "conv_bias": False},
        {"d_state": 5, "headdim": 4, "ngroups": 2, "bias": True, "norm_before_gate": True, "d_conv": 3},
        {"d_state": 8, "recompute": True},
    ],
    "ss2d": [
        {},
        {"d_state": 3, "expand": 2.0, "gate": "silu", "conv_bias": True},  # as the first VMamba
        {"expand": 0.5, "d_conv": 1, "gate": "linear", "out_norm": False, "out_act": True, "bias": True},
    ],
    "bidirectional": [
        {"mixer": "s6", "merge": "add"},
        {"mixer": "ssd", "mixer_args": {"d_state": 8}, "merge": "concat"},
        {"mixer": "s4d", "mixer_args": {"d_state": 8}},  # packs by splitting
        {"mixer": "attention", "mixer_args": {"causal": True}, "merge": "ew_multiply"},
    ],
    "retnet": [
        {"headdim": 4, "norm_eps": 1e-3},  # outputs of narrow heads come near 0, where the norm is steep
        {"num_heads": 2, "expand": 1, "bias": True},
    ],
    "linear_attention": [
        {},
        {"num_heads": 4, "qkv_bias": False, "bias": False},
    ],
    "attention": [
        {"num_heads": 2},
        {"causal": True, "headdim": 8},
        {"causal": True, "rotary": True, "qkv_bias": False},
    ],
}
GRID = [(name, arguments) for name in list_mixers() for arguments in CASES.get(name, [{}])]


CHECKS = [pytest.param(name, marks=pytest.mark.gpu) if name == "cpu_gpu" else name for name in MIXER_CHECKS]


def _label(value: Any) -> str:
    name, arguments = value
    return "-".join([name, *(f"{k}={v}" for k, v in arguments.items())])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", GRID, ids=_label)
def test_a_mixer_keeps_its_contract(case: tuple[str, dict[str, Any]], check: str) -> None:
    name, arguments = case
    check_mixer(name, dim=16, checks=[check], **arguments)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings(
    "ignore:Torchinductor does not support code generation for complex:UserWarning"
)  # s4d: eager
@pytest.mark.parametrize("name", CASES)
def test_inductor_compiles_a_mixer(name: str) -> None:
    check_mixer(name, dim=16, checks=["compile"], inductor=True, **CASES[name][0])
