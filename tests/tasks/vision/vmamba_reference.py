"""VMamba as its paper and its checkpoints describe it, in plain PyTorch with loops and copies.

What ours is held against: a function each, of parameters under the names of the original's state dict, sharing nothing
with the package.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def below(weights: Weights, prefix: str) -> Weights:
    """The parameters of a module, under their own names."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """h[t] = exp(Δ A) h[t-1] + Δ B u, y = C·h + D u, of u and Δ (B, D, L), A (D, N), B and C (B, N, L)."""
    h = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype)
    y = []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
        y.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(y, -1)


def ss2d(w: Weights, x: Tensor, gate: str = "none") -> Tensor:
    """The block's operator on x (B, H, W, C): four flattened copies of the grid, scanned, put back and added."""
    batch, height, width, _ = x.shape
    x = x @ w["in_proj.weight"].T
    if gate != "none":
        x, z = x.chunk(2, -1)
    x = x.permute(0, 3, 1, 2)  # (B, E, H, W)
    if "conv2d.weight" in w:
        x = F.conv2d(x, w["conv2d.weight"], w.get("conv2d.bias"), padding=1, groups=x.shape[1])
    x = x * torch.sigmoid(x)
    inner, rank = w["dt_projs_weight"].shape[1:]
    N = w["A_logs"].shape[1]
    by_rows, by_columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    copies = [by_rows, by_columns, by_rows.flip(-1), by_columns.flip(-1)]
    grids = []
    for k, u in enumerate(copies):
        projected = torch.einsum("cd,bdl->bcl", w["x_proj_weight"][k], u)
        dt, B, C = projected[:, :rank], projected[:, rank : rank + N], projected[:, rank + N :]
        delta = torch.einsum("dr,brl->bdl", w["dt_projs_weight"][k], dt) + w["dt_projs_bias"][k][:, None]
        delta = torch.log1p(torch.exp(delta))
        part = slice(k * inner, (k + 1) * inner)
        y = scan(u, delta, -torch.exp(w["A_logs"][part]), B, C, w["Ds"][part])
        y = y.flip(-1) if k >= 2 else y
        rows = k % 2 == 0
        grid = y.view(batch, inner, height, width) if rows else y.view(batch, inner, width, height).transpose(2, 3)
        grids.append(grid)
    y = norm(below(w, "out_norm."), sum(grids, torch.zeros_like(x)).permute(0, 2, 3, 1))
    if gate == "silu":
        y = y * z * torch.sigmoid(z)
    return y @ w["out_proj.weight"].T


def norm(w: Weights, x: Tensor) -> Tensor:
    """LayerNorm over the last axis."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["weight"] + w["bias"]


def linear(w: Weights, x: Tensor) -> Tensor:
    y = x @ w["weight"].T
    return y + w["bias"] if "bias" in w else y


def conv(w: Weights, x: Tensor, stride: int, padding: int) -> Tensor:
    """Convolve x (B, H, W, C), channels last."""
    y = F.conv2d(x.permute(0, 3, 1, 2), w["weight"], w["bias"], stride=stride, padding=padding)
    return y.permute(0, 2, 3, 1)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def vmamba(w: Weights, images: Tensor, depths: tuple[int, ...]) -> Tensor:
    """Version 2 ("v05_noz", stem and downsampling by convolutions): logits (B, classes) of images (B, 3, H, W)."""
    x = images.permute(0, 2, 3, 1)
    x = gelu(norm(below(w, "patch_embed.2."), conv(below(w, "patch_embed.0."), x, 2, 1)))
    x = norm(below(w, "patch_embed.7."), conv(below(w, "patch_embed.5."), x, 2, 1))
    for i, depth in enumerate(depths):
        stage = below(w, f"layers.{i}.")
        for j in range(depth):
            block = below(stage, f"blocks.{j}.")
            x = x + ss2d(below(block, "op."), norm(below(block, "norm."), x))
            hidden = gelu(linear(below(block, "mlp.fc1."), norm(below(block, "norm2."), x)))
            x = x + linear(below(block, "mlp.fc2."), hidden)
        if i < len(depths) - 1:
            x = norm(below(stage, "downsample.3."), conv(below(stage, "downsample.1."), x, 2, 1))
    return linear(below(w, "classifier.head."), norm(below(w, "classifier.norm."), x).mean((1, 2)))


def vmamba_v0(w: Weights, images: Tensor, depths: tuple[int, ...]) -> Tensor:
    """Version 0: patches of 4 pixels, gated operators without an MLP, 2 x 2 tokens merged between stages."""
    x = norm(below(w, "patch_embed.2."), conv(below(w, "patch_embed.0."), images.permute(0, 2, 3, 1), 4, 0))
    for i, depth in enumerate(depths):
        stage = below(w, f"layers.{i}.")
        for j in range(depth):
            block = below(stage, f"blocks.{j}.")
            x = x + ss2d(below(block, "op."), norm(below(block, "norm."), x), "silu")
        if i < len(depths) - 1:
            corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]  # down, then across
            x = linear(below(stage, "downsample.2."), norm(below(stage, "downsample.1."), torch.cat(corners, -1)))
    return linear(below(w, "classifier.head."), norm(below(w, "classifier.norm."), x).mean((1, 2)))
