"""Keys and queries of Mamba-3 on the GPU: one Triton kernel forward, one backward and sums of its parts.

Same equations, arguments and results as `reference`, with everything inside in float32. Deterministic: sums over tokens
are partial, a row for each block of tokens, and added in a fixed order. Strides are read as they are, and offsets are
64-bit. docs/gpu_ssd.md counts the bytes that it moves.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from mambaverse.kernels.backend import BackendError
from mambaverse.kernels.launch import Spec, launch, memo_of, on_device, power_of_2
from mambaverse.kernels.turned_qk import triton_kernels as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_CHANNELS = 1024
# Elements of a tile of B, 32 a thread of four warps; runs of rows in which backward's parts are added up first.
_TILE, _RUNS = (256, 2) if INTERPRETED else (4096, 16)
_HEADS = 8  # that a program of forward has


def forward(
    B: Tensor, C: Tensor, B_weight: Tensor, C_weight: Tensor, B_bias: Tensor, C_bias: Tensor, angles: Tensor,
    interleaved: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return k and q, as `reference.forward`."""
    batch, length, rank, groups, size = B.shape
    heads, tokens = B_bias.shape[0], batch * length
    pairs, rows = _tile(size)
    k, q = (torch.empty((batch, length, rank, heads, size), dtype=t.dtype, device=t.device) for t in (B, C))
    if tokens:
        inputs = B, C, B_weight, C_weight, B_bias, C_bias, angles
        per_group = heads // groups
        with on_device(B):
            launch(
                memo_of("turned_qk", B.device, *map(Spec.of, inputs), interleaved), "forward", kernels.forward,
                (-(-tokens // rows), rank * groups * -(-per_group // _HEADS)),
                (*inputs, k, q, tokens, length, rank, heads, per_group, eps, *_strides(inputs)),
                lambda: {
                    "N": size, "S": angles.shape[3], "M": pairs, "BT": rows, "HEADS": _HEADS,
                    "INTERLEAVED": interleaved, "FAST": not INTERPRETED, "num_warps": 4,
                },
            )  # fmt: skip
    return k, q


def backward(
    dk: Tensor | None, dq: Tensor | None, B: Tensor, C: Tensor, B_weight: Tensor, C_weight: Tensor, B_bias: Tensor,
    C_bias: Tensor, angles: Tensor, interleaved: bool, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of B, C, both weights, both biases and the angles, as `reference.backward`."""
    batch, length, rank, groups, size = B.shape
    heads, turned, tokens = B_bias.shape[0], angles.shape[3], batch * length
    pairs, rows = _tile(size)
    blocks = -(-tokens // rows)
    shape = batch, length, rank, heads, size
    dk, dq = (
        torch.zeros((), dtype=t.dtype, device=t.device).expand(shape) if d is None else d for d, t in ((dk, B), (dq, C))
    )
    inputs = B, C, B_weight, C_weight, B_bias, C_bias, angles
    dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (B, C))
    dangles = torch.empty(
        (rank, *angles.shape), dtype=angles.dtype if rank == 1 else torch.float32, device=angles.device
    )
    sizes = [t.numel() for t in (B_bias, C_bias)] + [rank * groups * size] * 2
    runs = _RUNS if blocks >= 2 * _RUNS else 1
    parts = torch.empty((-(-blocks // runs) * runs, sum(sizes)), dtype=torch.float32, device=B.device)
    parts[blocks:].zero_()  # of both biases and both weights, a row a block; whole runs
    if tokens:
        tensors = dk, dq, *inputs
        with on_device(B):
            launch(
                memo_of("turned_qk", B.device, *map(Spec.of, tensors), interleaved), "backward", kernels.backward,
                (blocks, rank * groups),
                (*tensors, dB, dC, dangles, parts, tokens, length, rank, heads, groups,
                *(heads // groups, eps, *_strides(tensors)),),
                lambda: {
                    "N": size, "S": turned, "M": pairs, "BT": rows, "INTERLEAVED": interleaved,
                    "FAST": not INTERPRETED, "num_warps": 4,
                },
            )  # fmt: skip
    if runs > 1:  # all rows at once, few multiprocessors would have work
        parts = parts.unflatten(0, (runs, -1)).sum(1)
    dB_bias, dC_bias, dB_weight, dC_weight = parts.sum(0).split(sizes)  # views, which no operator may return
    return (
        dB, dC, *(d.view(-1, size).sum(0).to(w.dtype) for d, w in ((dB_weight, B_weight), (dC_weight, C_weight))),
        *(d.view(b.shape).to(b.dtype, copy=True) for d, b in ((dB_bias, B_bias), (dC_bias, C_bias))),
        dangles[0] if rank == 1 else dangles.sum(0).to(angles.dtype),
    )  # fmt: skip


def _strides(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(step for tensor in tensors for step in tensor.stride())


def _tile(size: int) -> tuple[int, int]:
    """Return the pairs of channels and the tokens of a tile.

    Raises:
        BackendError: for more channels than a program holds.
    """
    if size > MAX_CHANNELS:
        raise BackendError(
            f"turned_qk: backend 'triton' takes up to {MAX_CHANNELS} channels, not {size}; "
            'use_backend("reference") runs anywhere'
        )
    pairs = power_of_2((size + 1) // 2)
    return pairs, max(1, _TILE // (2 * pairs))
