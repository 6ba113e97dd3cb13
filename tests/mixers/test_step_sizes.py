"""What a mixer tells of its Δ is what its scan is given, in the order of the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels import nc_ssd, ssd
from mambaverse.kernels import selective_scan as scan
from mambaverse.mixers import Mixer, create_mixer, list_mixers, mixer_class
from mambaverse.mixers import mamba3 as mamba3_module

HEIGHT, WIDTH, DIM = 3, 4, 16
WITHOUT = {"attention", "linear_attention", "retnet", "s4d"}  # no Δ, or the same one for all tokens


def prepared(name: str, **arguments: Any) -> Mixer:
    torch.manual_seed(0)
    mixer = create_mixer(name, DIM, **arguments)
    with torch.no_grad():
        for parameter in mixer.parameters():  # so that no two directions are alike
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def tokens() -> Tensor:
    return torch.randn(2, HEIGHT * WIDTH, DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the scans are given as Δ, one entry a direction, as they are called."""
    seen: list[Tensor] = []

    def spy(module: Any, name: str, read: Any) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.extend(read(args, kwargs))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    def both(args: Any, kwargs: Any) -> list[Tensor]:
        delta, bias = args[1], kwargs["delta_bias"]
        pairs = zip(delta, bias, strict=True) if isinstance(delta, tuple) else [(delta, bias)]
        return [F.softplus(d + b) for d, b in pairs]

    spy(scan, "selective_scan", lambda a, k: [F.softplus(a[1] + k["delta_bias"])])
    spy(scan, "bidirectional_selective_scan", both)
    spy(nc_ssd, "nc_ssd", lambda a, k: [F.softplus(a[1] + k["dt_bias"])])
    spy(ssd, "ssd", lambda a, k: [F.softplus(a[1] + k["dt_bias"]).clamp(*k["dt_limit"])])
    return seen


@pytest.mark.parametrize(
    ("name", "arguments", "scans"),
    [
        ("s6", {}, ["forward"]),
        ("ssd", {"d_state": 8, "dt_limit": (0.01, 0.5)}, ["forward"]),
        ("vim", {}, ["forward", "backward"]),
        ("vim", {"shared": True}, ["both directions"]),
        ("bissd", {"d_state": 8}, ["forward", "backward"]),
        ("ncssd", {"d_state": 8}, ["sum"]),
        ("bissd", {"d_state": 8, "shared": True}, ["forward", "backward"]),
    ],
    ids=lambda value: str(value),
)
def test_it_is_what_the_scan_is_given(name: str, arguments: Any, scans: list[str], given: list[Tensor]) -> None:
    mixer, x = prepared(name, **arguments), tokens()
    told = mixer.step_sizes(x)
    mixer(x=x)
    assert list(told) == scans and len(given) == len(scans)
    for one, other in zip(told.values(), given, strict=True):
        torch.testing.assert_close(one, other)


def test_orders_of_a_grid_are_told_at_the_places_of_the_tokens(given: list[Tensor]) -> None:
    mixer, x = prepared("ss2d", d_state=2), tokens()
    told = mixer.step_sizes(x, (HEIGHT, WIDTH))
    mixer(x=x, spatial_shape=(HEIGHT, WIDTH))
    rows, rows_back, columns, columns_back = given
    by_rows = lambda dt: dt.unflatten(1, (WIDTH, HEIGHT)).transpose(1, 2).flatten(1, 2)  # noqa: E731
    expected = [rows, by_rows(columns), rows_back, by_rows(columns_back)]
    assert list(told) == ["by rows", "by columns", "by rows, backwards", "by columns, backwards"]
    for one, other in zip(told.values(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_mixer_run_both_ways_tells_both(given: list[Tensor]) -> None:
    mixer, x = prepared("bidirectional", mixer="s6"), tokens()
    told = mixer.step_sizes(x)
    mixer(x=x)
    assert list(told) == ["forward", "backward"]
    torch.testing.assert_close(told["forward"], given[0])
    torch.testing.assert_close(told["backward"], given[1].flip(1))


def test_mamba3_tells_what_moves_its_angles_and_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = prepared("mamba3", d_state=8), tokens()
    weights: list[Tensor] = []
    real = mamba3_module.trapezoid_scan

    def spy(*args: Any) -> Any:
        weights.append(args[3])
        return real(*args)

    monkeypatch.setattr(mamba3_module, "trapezoid_scan", spy)
    mixer(x=x)
    torch.testing.assert_close(mixer.step_sizes(x)["forward"], weights[0])


@pytest.mark.parametrize("name", list_mixers())
def test_mixers_without_it_tell_none(name: str) -> None:
    mixer = create_mixer(name, DIM)
    told = mixer.step_sizes(tokens(), (HEIGHT, WIDTH))
    assert bool(told) is (type(mixer).step_sizes is not Mixer.step_sizes)
    assert not (told and name in WITHOUT)


def test_mixers_with_it_are_these_at_least() -> None:
    told = {name for name in list_mixers() if mixer_class(name).step_sizes is not Mixer.step_sizes}
    assert told >= {"bidirectional", "bissd", "mamba3", "ncssd", "s6", "ss2d", "ssd", "vim"}


def test_a_constant_step_is_none() -> None:
    assert prepared("s6", selective_dt=False).step_sizes(tokens()) == {}
