"""Rotary positions in plain PyTorch: the equation, in float64 if x is, else in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Return x (B, L, H, P) turned, or with `back` turned back; differentiable by autograd."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide).unsqueeze(2), sin.to(wide).unsqueeze(2)
    sin = -sin if back else sin
    a, b = x.to(wide).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
