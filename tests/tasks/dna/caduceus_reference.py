"""Caduceus in the plainest form, written from the description of its architecture: loops, no kernels, 2 D channels.

Weights are a dictionary under the names of its state dict. Where PS is meant (`rcps`), every tensor has 2 D channels:
those of the strand, and those of its reverse complement turned over along length and channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CMAP = torch.tensor([0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11, 12, 13, 14, 15])
Weights = dict[str, Tensor]
Function = Callable[[Tensor], Tensor]


def make_weights(dim: int, depth: int, *, rcps: bool, fused: bool, untied: bool = False) -> Weights:
    """Random weights under the original names; tied tensors are one and the same, as in the original."""
    inner, state, rank = 2 * dim, 16, -(-dim // 16)
    table = torch.randn(16, dim)
    sub, mid = ("submodule." if rcps else ""), ("submodule." if rcps and not fused else "")
    weights: Weights = {f"embeddings.word_embeddings.{'embedding.' if rcps else ''}weight": table}
    for i in range(depth):
        weights[f"layers.{i}.norm.{mid}weight"] = 1 + 0.3 * torch.randn(dim)
        tied = {
            "in_proj.weight": torch.randn(2 * inner, dim) / dim**0.5,
            "out_proj.weight": torch.randn(dim, inner) / inner,
        }
        for side in ("fwd", "rev"):
            own: Weights = {
                "A_log": torch.rand(inner, state),
                "D": torch.randn(inner),
                "conv1d.weight": torch.randn(inner, 1, 4) / 2,
                "conv1d.bias": torch.randn(inner) / 4,
                "x_proj.weight": torch.randn(rank + 2 * state, inner) / inner**0.5,
                "dt_proj.weight": torch.randn(inner, rank),
                "dt_proj.bias": torch.randn(inner) - 2,
            }
            if untied:
                tied = {name: torch.randn_like(value) / value.shape[1] ** 0.5 for name, value in tied.items()}
            for name, value in {**own, **tied}.items():
                weights[f"layers.{i}.mixer.{sub}mamba_{side}.{name}"] = value
    weights[f"norm_f.{mid}weight"] = 1 + 0.3 * torch.randn(dim)
    return weights


def as_saved(weights: Weights, *, rcps: bool) -> Weights:
    """What `CaduceusForMaskedLM` puts into its state dict: a prefix, the tied head, the complement."""
    saved = {f"caduceus.backbone.{name}": value for name, value in weights.items()}
    middle = "embedding." if rcps else ""
    table = weights[f"embeddings.word_embeddings.{middle}weight"]
    if not rcps:
        return saved | {"lm_head.weight": table}
    saved["caduceus.backbone.embeddings.word_embeddings.complement_map"] = CMAP
    return saved | {"lm_head.lm_head.weight": table, "lm_head.complement_map": CMAP}


def hidden(weights: Weights, ids: Tensor, *, rcps: bool, fused: bool) -> Tensor:
    """Tokens after the last norm: (B, L, D), of PS (B, L, 2 D)."""
    sub, mid = ("submodule." if rcps else ""), ("submodule." if rcps and not fused else "")
    table = weights[f"embeddings.word_embeddings.{'embedding.' if rcps else ''}weight"]
    x = table[ids]
    if rcps:
        x = torch.cat([x, turned(table[CMAP[ids.flip(1)]])], -1)
    residual = torch.zeros_like(x)
    depth = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    for i in range(depth):
        prefix = f"layers.{i}.mixer.{sub}"
        norm = weights[f"layers.{i}.norm.{mid}weight"]
        x, residual = add_norm(x, residual, norm, rcps=rcps, exchange=fused)
        x = on_both(lambda h, prefix=prefix: bimamba(weights, prefix, h), x) if rcps else bimamba(weights, prefix, x)  # type: ignore[misc]
    return add_norm(x, residual, weights[f"norm_f.{mid}weight"], rcps=rcps, exchange=False)[0]


def logits(weights: Weights, ids: Tensor, *, rcps: bool, fused: bool) -> Tensor:
    """Those of masked bases (B, L, 16), with the embedding as the head's weight."""
    table = weights[f"embeddings.word_embeddings.{'embedding.' if rcps else ''}weight"]
    h = hidden(weights, ids, rcps=rcps, fused=fused)
    if not rcps:
        return h @ table.T
    dim = h.shape[-1] // 2
    return h[..., :dim] @ table.T + h[..., dim:].flip(-1) @ table[CMAP].T


def class_scores(weights: Weights, score: Tensor, ids: Tensor, *, rcps: bool, fused: bool) -> Tensor:
    """Those of sequences (B, classes): both halves pooled by their means, scored, averaged."""
    h = hidden(weights, ids, rcps=rcps, fused=fused)
    if not rcps:
        return h.mean(1) @ score.T
    dim = h.shape[-1] // 2
    return (h[..., :dim].mean(1) @ score.T + turned(h[..., dim:]).mean(1) @ score.T) / 2


def turned(x: Tensor) -> Tensor:
    return x.flip(1, 2)


def on_both(f: Function, x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([f(a), turned(f(turned(b)))], -1)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, *, rcps: bool, exchange: bool) -> tuple[Tensor, Tensor]:
    total = x + residual
    if not rcps:
        return rms(total, weight), total
    if exchange:  # the halves of the fused path
        a, b = total.chunk(2, -1)
        total = torch.cat([b, a], -1)
    return on_both(lambda h: rms(h, weight), total), total


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def bimamba(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    return mamba(weights, f"{prefix}mamba_fwd.", x) + mamba(weights, f"{prefix}mamba_rev.", x.flip(1)).flip(1)


def mamba(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """S6 with its projections, token by token."""
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    u, z = (x @ own["in_proj.weight"].T).chunk(2, -1)
    width, padded = 4, F.pad(u, (0, 0, 3, 0))
    u = own["conv1d.bias"] + sum(padded[:, k : k + u.shape[1]] * own["conv1d.weight"][:, 0, k] for k in range(width))
    u = F.silu(u)
    rank = own["dt_proj.weight"].shape[1]
    delta, B, C = (u @ own["x_proj.weight"].T).split([rank, 16, 16], -1)
    dt = F.softplus(delta @ own["dt_proj.weight"].T + own["dt_proj.bias"])
    A, h, y = -own["A_log"].exp(), torch.zeros(x.shape[0], u.shape[2], 16), []
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1) + own["D"] * u[:, t])
    return (torch.stack(y, 1) * F.silu(z)) @ own["out_proj.weight"].T
