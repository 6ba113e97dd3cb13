"""retnet and linear_attention against the papers' parallel forms, written out over all pairs of tokens in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.errors import UserError
from mambaverse.kernels.testing import assert_close
from mambaverse.mixers import create_mixer
from mambaverse.mixers.linear_attention import _features
from mambaverse.testing.subject import seeded

LENGTH, DIM = 37, 24


def built(name: str, **arguments: Any) -> tuple[Any, Tensor]:
    with seeded(0):
        return create_mixer(name, DIM, **arguments), torch.randn(2, LENGTH, DIM)


def test_retnet_is_the_papers_multi_scale_retention():
    mixer, x = built("retnet", num_heads=3, expand=2)
    y = mixer(x=x)
    wide = mixer.double()
    q, k = (layer(x.double()).unflatten(-1, (3, 8)).transpose(1, 2) for layer in (wide.q_proj, wide.k_proj))
    v = wide.v_proj(x.double()).unflatten(-1, (3, 16)).transpose(1, 2)  # (B, H, L, P)
    n = torch.arange(LENGTH, dtype=torch.float64)
    angles = n[:, None] * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones_like(angles), angles)  # e^{i n θ}: pairs (i, i + 4) are complex numbers
    q, k = (torch.complex(*part.chunk(2, -1)) * turn for part in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64))
    decay = torch.tril(gamma[:, None, None] ** (n[:, None] - n).clamp(min=0))  # D of equation 5
    heads = ((q @ k.mH).real * 8**-0.5 * decay) @ v
    normed = F.layer_norm(heads, (16,), eps=mixer.norm_eps).transpose(1, 2).flatten(2)
    assert_close("y", y, wide.out_proj(F.silu(wide.g_proj(x.double())) * normed), torch.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_for_retnets_projections_changes_no_number(bias: bool) -> None:
    """Layers of a kind of their own, such as an adapter's, are called one by one, and v is centred after them."""
    mixer, x = built("retnet", num_heads=3, bias=bias)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mixer, x = mixer.double(), x.double().requires_grad_()
    leaves = [x, *mixer.parameters()]
    joined = mixer(x=x)
    of_joined = torch.autograd.grad(joined.square().sum(), leaves)
    assert mixer._joined(x) is not None
    mixer.q_proj.__class__ = type("Adapted", (torch.nn.Linear,), {})
    assert mixer._joined(x) is None
    apart = mixer(x=x)
    assert_close("y", joined, apart)
    for actual, expected in zip(of_joined, torch.autograd.grad(apart.square().sum(), leaves), strict=True):
        assert_close("gradient", actual, expected)


def test_an_exported_retnet_of_few_tokens_takes_any_batch() -> None:
    mixer, x = built("retnet", num_heads=3)
    x = x[:, : DIM // 4]  # two sequences have fewer tokens than channels, eight have more
    program = torch.export.export(mixer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},))
    for tokens in (x[:1], x.repeat(4, 1, 1)):
        assert_close("y", program.module()(tokens), mixer(x=tokens))


def test_linear_attention_is_attention_with_the_kernel_of_its_features():
    mixer, x = built("linear_attention", num_heads=3)
    y = mixer(x=x)
    wide = mixer.double()
    q, k, v = wide.qkv(x.double()).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)  # (B, H, L, P) each
    weights = torch.tril((F.elu(q) + 1) @ (F.elu(k) + 1).mT)
    heads = (weights @ v) / (weights.sum(-1, keepdim=True) + mixer.eps)
    assert_close("y", y, wide.out_proj(heads.transpose(1, 2).flatten(2)), torch.float32)


def test_the_features_of_linear_attention_lose_nothing_in_bfloat16():
    """exp(x) - 1 + 1 would be 0 below x = -6.2; autocast would make them float32. At 0 the slope is 1."""
    x = torch.cat([torch.linspace(-40, 40, 1001), torch.zeros(1)]).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = _features(x)
    assert y.dtype == torch.bfloat16
    exact = torch.where(x > 0, x.double() + 1, x.double().exp())
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=0)
    slopes = torch.autograd.grad(y.sum(), x)[0].double()
    torch.testing.assert_close(slopes, exact.clamp(max=1), rtol=2**-8, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_linear_attention_weighs_the_values_it_has_seen(seed):
    """Outputs are means of values: constant values come out as they went in, at any length, in half precision too."""
    mixer, _ = built("linear_attention", num_heads=3, bias=False)
    torch.nn.init.zeros_(mixer.qkv.weight[2 * DIM :])
    torch.nn.init.eye_(mixer.out_proj.weight)
    x = torch.randn(1, 3000, DIM, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = mixer(x=4 * x)
    assert_close("y", y, mixer.qkv.bias[2 * DIM :].double().expand(y.shape), torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("retnet", {"num_heads": 5}, "must be dim = 24, got 5 · 4"),
        ("retnet", {"headdim": 3}, "headdim must be even, got 3"),
        ("linear_attention", {"headdim": 7}, "must be dim = 24, got 3 · 7"),
        ("linear_attention", {"num_heads": 0}, "num_heads must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, arguments, words):
    with pytest.raises(UserError, match=words):
        create_mixer(name, DIM, **arguments)


def test_torch_func_sees_the_rotation() -> None:
    mixer, x = built("attention", num_heads=3, rotary=True)
    of_x = torch.func.grad(lambda x: mixer(x=x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    assert_close("dx", of_x, torch.autograd.grad(mixer(x=leaf).square().sum(), leaf)[0])
    mixer, x = built("retnet", num_heads=3)
    with pytest.raises(NotImplementedError, match=r"mambaverse::ssd has no torch\.func\.grad"):
        torch.func.grad(lambda x: mixer(x=x).square().sum())(x)
