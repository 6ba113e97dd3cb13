"""What a model costs is what a count by hand gives, the scans included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mambaverse
from mambaverse.cli import main
from mambaverse.flops import count_flops, model_cost


def test_a_vim_costs_what_a_count_by_hand_gives() -> None:
    D, E, N, R, W, L, layers, classes = 16, 32, 4, 1, 4, 17, 3, 10  # R = ceil(D / 16); 16 patches and a cls token
    arguments: dict[str, Any] = {
        "embed_dim": D,
        "depth": layers,
        "img_size": 16,
        "mixer_args": {"vim": {"d_state": N, "d_conv": W}},
    }
    model = mambaverse.create_model("vim_nano_patch4_32", num_classes=classes, **arguments).eval()
    cost = count_flops(lambda: model(torch.zeros(1, 3, 16, 16)))
    matrices = 2 * L * (D * 2 * E + E * D)  # in_proj and out_proj; a multiply-add is two
    matrices += 2 * 2 * L * (E * (R + 2 * N) + R * E)  # x_proj and dt_proj, of two directions
    convolutions = 2 * L * E * (2 * W + 5)  # a multiply-add a tap, the bias, SiLU
    scans = 2 * L * E * (7 * N + 10) + L * E  # exp(Δ A), Δ u B, a h + x, y + C h; and the sum of the directions
    norms = 6 * L * D
    assert cost.operators == {
        "causal_conv1d": layers * convolutions,
        "bidirectional_selective_scan": layers * scans,
        "norm": (layers + 1) * norms,
    }
    stem, head = 2 * 16 * (3 * 16) * D, 2 * D * classes
    assert cost.flops == stem + layers * (matrices + convolutions + scans) + (layers + 1) * norms + head
    assert cost.multiply_adds == cost.flops // 2 and not cost.uncounted
    assert cost.own_share == pytest.approx(sum(cost.operators.values()) / cost.flops)


def test_a_registered_model_is_counted_at_its_own_size_without_arithmetic() -> None:
    parameters, cost = model_cost("vmamba_tiny_s1l8_224")
    assert parameters == 30_249_064 and cost is not None
    assert cost.multiply_adds / 1e9 == pytest.approx(4.9, rel=0.01)  # the authors' figure
    assert cost.operators["bidirectional_selective_scan"] > 0 and not cost.uncounted
    parameters, cost = model_cost("dna_mamba_d64_n2")
    assert parameters > 50_000 and cost is None  # sequences have any length


def test_twice_the_depth_is_twice_the_scans() -> None:
    one, two = (model_cost("vim_nano_patch4_32", depth=depth, mixer="ssd")[1] for depth in (2, 4))
    assert one is not None and two is not None
    assert two.operators["ssd"] == 2 * one.operators["ssd"]


def test_the_list_of_models_says_what_they_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list", "models", "vmamba_tiny_s1l8_224", "-v"]) == 0
    out = capsys.readouterr().out
    assert "multiply-adds" in out and "30.25 M" in out and "4.88 G" in out
