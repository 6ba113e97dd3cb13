"""ss2d takes the parameters of VMamba's operator, gives its outputs, and reads a grid as the paper says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambaverse.kernels.cross_scan import cross_merge, cross_scan
from mambaverse.kernels.selective_scan import selective_scan
from mambaverse.kernels.testing import assert_close
from mambaverse.mixers import create_mixer
from mambaverse.testing import Subject
from tests.tasks.vision import vmamba_reference

DIM = 16
V0: dict[str, Any] = {"d_state": 3, "expand": 2.0, "gate": "silu", "conv_bias": True}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"in_proj.weight": (96, 96), "conv2d.weight": (96, 1, 3, 3), "x_proj_weight": (4, 8, 96),
              "dt_projs_weight": (4, 96, 6), "dt_projs_bias": (4, 96), "A_logs": (384, 1), "Ds": (384,),
              "out_norm.weight": (96,), "out_norm.bias": (96,), "out_proj.weight": (96, 96)}),
        (V0 | {"d_state": 16}, {"in_proj.weight": (384, 96), "conv2d.weight": (192, 1, 3, 3), "conv2d.bias": (192,),
              "x_proj_weight": (4, 38, 192), "dt_projs_weight": (4, 192, 6), "dt_projs_bias": (4, 192),
              "A_logs": (768, 16), "Ds": (768,), "out_norm.weight": (192,), "out_norm.bias": (192,),
              "out_proj.weight": (96, 192)}),
    ],
    ids=["v05_noz", "v0"],
)  # fmt: skip
def test_names_and_shapes_are_the_originals(arguments: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    mixer = create_mixer("ss2d", 96, device="meta", **arguments)
    assert {name: tuple(value.shape) for name, value in mixer.state_dict().items()} == expected


@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (1, 6), (7, 1)])
@pytest.mark.parametrize("arguments", [{}, V0], ids=["v05_noz", "v0"])
def test_equals_the_four_copies_of_the_original(arguments: dict[str, Any], grid: tuple[int, int]) -> None:
    mixer = Subject("ss2d", DIM, arguments).build()
    x = torch.randn(2, *grid, DIM, generator=torch.Generator().manual_seed(0))
    weights = {name: value.double() for name, value in mixer.state_dict().items()}
    expected = vmamba_reference.ss2d(weights, x.double(), arguments.get("gate", "none"))
    assert_close("y", mixer(x=x.flatten(1, 2), spatial_shape=grid), expected.flatten(1, 2))


def test_two_bidirectional_scans_are_cross_scan_scan_and_cross_merge() -> None:
    """The same sum by the general operators, with four copies and directions that go one way."""
    mixer: Any = Subject("ss2d", DIM, {"d_state": 2}).build()
    grid = torch.randn(2, 3, 5, DIM, generator=torch.Generator().manual_seed(0))
    A, D = -torch.exp(mixer.A_logs).view(4, DIM, 2), mixer.Ds.view(4, DIM)
    ys = []
    for k, u in enumerate(cross_scan(grid).unbind(1)):
        delta, B, C = (u @ mixer.x_proj_weight[k].T).split([mixer.dt_rank, 2, 2], -1)
        delta = delta @ mixer.dt_projs_weight[k].T
        ys.append(selective_scan(u, delta, A[k], B, C, D[k], delta_bias=mixer.dt_projs_bias[k], delta_softplus=True))
    expected = cross_merge(torch.stack(ys, 1), (3, 5))
    rows = mixer._scan_pair(grid.flatten(1, 2), A, D, 0).unflatten(1, (3, 5))
    columns = mixer._scan_pair(grid.transpose(1, 2).flatten(1, 2), A, D, 1).unflatten(1, (5, 3)).transpose(1, 2)
    assert_close("y", rows + columns, expected.double(), torch.float32)


def test_every_token_sees_every_other() -> None:
    mixer = Subject("ss2d", DIM, {"d_conv": 1}).build()
    x = torch.randn(1, 12, DIM, requires_grad=True)
    y = mixer(x=x, spatial_shape=(3, 4))
    for t in range(12):
        seen = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)[0][0].abs().sum(-1)
        assert (seen > 0).all()


def test_a_grid_and_its_transpose_differ() -> None:
    mixer = Subject("ss2d", DIM).build()
    x = torch.randn(1, 12, DIM)
    assert not torch.allclose(mixer(x=x, spatial_shape=(3, 4)), mixer(x=x, spatial_shape=(4, 3)))


@pytest.mark.parametrize("shape", [(12,), (2, 6, 1), (3, 5), (-3, -4)])
def test_a_shape_that_is_no_grid_of_the_tokens_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"SS2D: spatial_shape .* does not hold L = 12 tokens; expected \(H, W\)"):
        create_mixer("ss2d", 8)(torch.randn(1, 12, 8), spatial_shape=shape)
