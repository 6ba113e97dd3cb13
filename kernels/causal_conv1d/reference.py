"""The causal depthwise convolution in plain PyTorch: the spec that every backend is held against.

    p[t] = bias + Σ_k weight[:, k] x[t - (W-1) + k],   k = 0 .. W-1;   y[t] = p[t], or silu(p[t]) = p[t] σ(p[t])

The inputs before the first are the rows of `initial_state`, oldest first (zero without it). Time runs backwards with
`reverse`. Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.4.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mambaverse.kernels.checks import sequence_bounds


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) and the final state (S, W-1, D), both in the dtype of x; differentiable.

    Args:
        x: (B, L, D).
        weight: (D, W).
        bias: (D,) or None.
        initial_state: (S, W-1, D) or None; S is B, or the number of sequences.
        cu_seqlens: (S+1,) or None.
        silu: Whether SiLU follows.
        reverse: Whether time runs backwards.
    """
    wide, width = _wide(x), weight.shape[1]
    ys = [x.new_empty((x.shape[0], 0, x.shape[2]), dtype=wide)]
    states = [x.new_empty((0, width - 1, x.shape[2]), dtype=wide)]
    for inputs in _sequences(x.to(wide), weight, initial_state, cu_seqlens, reverse):
        p = _taps(inputs, weight.to(wide))
        p = p if bias is None else p + bias.to(wide)
        y = p * torch.sigmoid(p) if silu else p
        ys.append(y.flip(1) if reverse else y)
        states.append(inputs[:, y.shape[1] :])
    return torch.cat(ys, 1).to(x.dtype), torch.cat(states).to(x.dtype)


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and dinitial_state for `dy` (B, L, D) and `dfinal_state` (S, W-1, D), None being zeros.

    The other arguments are those of `forward`. Each gradient has its input's dtype; one for an absent input is empty.
    """
    wide, (num_channels, width) = _wide(x), weight.shape
    w = weight.to(wide)
    dw, db = torch.zeros_like(w), w.new_zeros(num_channels)
    dxs, dstates, begin = [x.new_empty((x.shape[0], 0, num_channels))], [], 0
    for i, inputs in enumerate(_sequences(x.to(wide), weight, initial_state, cu_seqlens, reverse)):
        length = inputs.shape[1] - (width - 1)
        dinputs = torch.zeros_like(inputs)
        if dy is not None:
            g = dy[:, begin : begin + length].to(wide)
            g = g.flip(1) if reverse else g
            if silu:
                p = _taps(inputs, w)
                p = p if bias is None else p + bias.to(wide)
                s = torch.sigmoid(p)
                g = g * s * (1 + p * (1 - s))
            for k in range(width):
                dw[:, k] += (g * inputs[:, k : k + length]).sum((0, 1))
                dinputs[:, k : k + length] += g * w[:, k]
            db += g.sum((0, 1))
        if dfinal_state is not None:
            dinputs[:, length:] += dfinal_state[slice(None) if cu_seqlens is None else slice(i, i + 1)].to(wide)
        dx = dinputs[:, width - 1 :]
        dxs.append((dx.flip(1) if reverse else dx).to(x.dtype))
        dstates.append(dinputs[:, : width - 1])
        begin += length
    empty = x.new_empty(0)
    return (
        torch.cat(dxs, 1),
        dw.to(weight.dtype),
        empty if bias is None else db.to(bias.dtype),
        empty.clone()
        if initial_state is None
        else torch.cat([w.new_empty((0, width - 1, num_channels)), *dstates]).to(initial_state.dtype),
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sequences(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> list[Tensor]:
    """Return state and inputs (B, W-1 + length, D) in processing order: of the batch, or of each packed sequence."""
    batch, length, num_channels = x.shape
    bounds = None if cu_seqlens is None else sequence_bounds("causal_conv1d", cu_seqlens, length)
    num_states = batch if bounds is None else len(bounds) - 1
    state = x.new_zeros((num_states, weight.shape[1] - 1, num_channels))
    state = state if initial_state is None else initial_state.to(x)
    if bounds is None:
        parts, states = [x], [state]
    else:
        parts = [x[:, begin:end] for begin, end in pairwise(bounds)]
        states = [state[i : i + 1] for i in range(num_states)]
    return [torch.cat((s, p.flip(1) if reverse else p), 1) for s, p in zip(states, parts, strict=True)]


def _taps(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return Σ_k weight[:, k] inputs[:, t + k] (B, L, D)."""
    width = weight.shape[1]
    length = inputs.shape[1] - (width - 1)
    p = torch.zeros_like(inputs[:, :length])
    for k in range(width):
        p = p + weight[:, k] * inputs[:, k : k + length]
    return p
