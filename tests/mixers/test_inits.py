"""Parameters start where the papers say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mambaverse.mixers import create_mixer


def build(name: str, dim: int, **arguments: Any) -> Any:
    return create_mixer(name, dim, **arguments)


def test_s6_starts_at_s4d_real_with_dt_in_its_range() -> None:
    mixer = build("s6", 64, d_state=5, dt_min=0.01, dt_max=0.05)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 6.0).expand(128, 5))
    dt = F.softplus(mixer.dt_proj.bias)
    assert 0.01 * 0.999 <= dt.min() < 0.02 and 0.03 < dt.max() <= 0.05 * 1.001
    assert (mixer.D == 1).all()
    assert mixer.dt_rank == 4 and mixer.dt_proj.weight.abs().max() <= 4**-0.5
    assert mixer.in_proj.bias is None and mixer.conv1d.bias is not None


def test_s6_options_of_dt() -> None:
    mixer = build("s6", 16, dt_rank=4, dt_init="constant", dt_scale=0.5, dt_min=1e-9, dt_max=2e-9)
    assert (mixer.dt_proj.weight == 0.25).all()
    torch.testing.assert_close(F.softplus(mixer.dt_proj.bias), torch.full((32,), 1e-4))  # the floor


def test_s6_inits_of_a() -> None:
    lin = build("s6", 16, d_state=6, A_init="s4d_lin")
    torch.testing.assert_close(lin.A_log.exp(), torch.full((32, 3), 0.5))
    torch.testing.assert_close(lin.A_imag, (math.pi * torch.arange(3.0)).expand(32, 3))
    random = build("s6", 64, A_init="random").A_log
    assert abs(random.mean()) < 0.1 and abs(random.std() - 1) < 0.1


def test_ssd_starts_as_the_authors_code() -> None:
    mixer = build("ssd", 256, A_init_range=(2, 3))
    assert mixer.A_log.shape == (8,) and mixer.in_proj.weight.shape == (2 * 512 + 2 * 128 + 8, 256)
    assert (mixer.A_log.exp() >= 2).all() and (mixer.A_log.exp() <= 3).all()
    dt = F.softplus(mixer.dt_bias)
    assert (dt >= 0.001 * 0.999).all() and (dt <= 0.1 * 1.001).all()
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()


@pytest.mark.parametrize(("dim", "headdim"), [(192, 64), (96, 64), (48, 48), (16, 32), (118, 59)])
def test_the_default_headdim_of_ssd_is_the_largest_divisor_up_to_64(dim: int, headdim: int) -> None:
    assert build("ssd", dim, d_state=8, device="meta").headdim == headdim


def test_vim_starts_both_directions_alike_and_officially_with_zero_backward_dt_bias() -> None:
    mixer = build("vim", 64)
    for bias in (mixer.dt_proj.bias, mixer.dt_proj_b.bias):
        assert (F.softplus(bias) <= 0.1 * 1.001).all()
    torch.testing.assert_close(mixer.A_b_log, mixer.A_log)
    official = build("vim", 64, init="official")
    assert (official.dt_proj_b.bias == 0).all() and (official.dt_proj.bias != 0).all()


def test_vim_has_the_parameters_of_the_original() -> None:
    shapes = {name: tuple(value.shape) for name, value in build("vim", 192, device="meta").state_dict().items()}
    assert shapes == {
        "A_log": (384, 16),
        "A_b_log": (384, 16),
        "D": (384,),
        "D_b": (384,),
        "in_proj.weight": (768, 192),
        "conv1d.weight": (384, 1, 4),
        "conv1d.bias": (384,),
        "conv1d_b.weight": (384, 1, 4),
        "conv1d_b.bias": (384,),
        "x_proj.weight": (44, 384),
        "x_proj_b.weight": (44, 384),
        "dt_proj.weight": (384, 12),
        "dt_proj.bias": (384,),
        "dt_proj_b.weight": (384, 12),
        "dt_proj_b.bias": (384,),
        "out_proj.weight": (192, 384),
    }


def test_parameters_without_weight_decay() -> None:
    expected = {"A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias"}
    assert build("vim", 16).no_weight_decay() == expected
    assert build("s6", 16, selective_dt=False).no_weight_decay() == {"A_log", "D", "dt_bias"}
    assert build("ssd", 16).no_weight_decay() == {"A_log", "D", "dt_bias"}
    both = build("bidirectional", 16, mixer="ssd").no_weight_decay()
    assert both == {f"{side}.{name}" for side in ("fwd", "bwd") for name in ("A_log", "D", "dt_bias")}


def legs(n: int) -> torch.Tensor:
    """HiPPO-LegS plus its rank-1 correction: normal, with eigenvalues of real part -1/2."""
    A = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            if i >= j:
                A[i, j] = -math.sqrt((2 * i + 1) * (2 * j + 1)) if i > j else -(i + 1)
    p = torch.sqrt(torch.arange(n, dtype=torch.float64) + 0.5)
    return A + torch.outer(p, p)


def test_s4d_inits_of_a() -> None:
    n = torch.arange(4.0)
    eigenvalues = torch.linalg.eigvals(legs(8))
    expected = {
        "legs": eigenvalues[eigenvalues.imag > 0].imag.sort().values.float(),
        "lin": math.pi * n,
        "inv": 8 / math.pi * (8 / (2 * n + 1) - 1),
    }
    for init, imag in expected.items():
        mixer = build("s4d", 4, d_state=8, init=init)
        torch.testing.assert_close(mixer.A_imag, imag.expand(4, 4))
        torch.testing.assert_close(mixer.A_log.exp(), torch.full((4, 4), 0.5))
    real = build("s4d", 4, d_state=3, init="real")
    torch.testing.assert_close(real.A_log.exp(), torch.tensor([1.0, 2.0, 3.0]).expand(4, 3))
    assert real.A_imag is None
    dt = mixer.log_dt.exp()
    assert (dt >= 0.001 * 0.999).all() and (dt <= 0.1 * 1.001).all()
