"""Causal depthwise convolution over time with a carried state, as Mamba puts before its scan.

    y[t] = act(bias + Σ_k weight[:, k] x[t - (W-1) + k]),   k = 0 .. W-1

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.4.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.causal_conv1d.op import causal_conv1d_forward, causal_conv1d_step, step
from mambaverse.kernels.checks import (
    check_activation,
    check_dims,
    check_offsets,
    check_real_tensor,
    check_tensors,
    num_sequences,
    unshared,
)

_OP = "causal_conv1d"


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, activation: str | None = ...,
    initial_state: Tensor | None = ..., cu_seqlens: Tensor | None = ..., reverse: bool = ...,
    return_final_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, activation: str | None = ...,
    initial_state: Tensor | None = ..., cu_seqlens: Tensor | None = ..., reverse: bool = ...,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel of x with its own filter over the present and the W-1 inputs before it.

    Args:
        x: (B, L, D), any strides; with `cu_seqlens` (1, L, D). float32, bfloat16, float16 or float64.
        weight: (D, W), the last column for the present; any floating dtype, as all that follow.
        bias: (D,).
        activation: None, or "silu" (alias "swish").
        initial_state: (S, W-1, D), the inputs before the first, oldest first; zeros without it. S is B, or the number
            of sequences in `cu_seqlens`.
        cu_seqlens: (S+1,) int32, where packed sequences begin and end: 0, ..., L. Empty sequences are allowed.
        reverse: Run time backwards, sequence by sequence: flip(causal_conv1d(flip(x))) without the copies. The initial
            state then lies behind the last input.
        return_final_state: Also return the last W-1 inputs of each sequence in the order of processing, oldest first
            (from `initial_state` where a sequence is shorter), to be the `initial_state` of what follows.

    Returns:
        y (B, L, D) in the dtype of x; with `return_final_state` also the final state (S, W-1, D) in that dtype. Both
        are differentiable.

    Raises:
        ValueError: for a wrong shape, dtype, device, activation or `cu_seqlens`.
    """
    check_dims(_OP, "x", x, "(B, L, D)")
    _check_filter(_OP, x, weight, bias, activation)
    num_states = num_sequences(_OP, cu_seqlens, x.shape[0])
    check_offsets(_OP, cu_seqlens, "x", x)
    if initial_state is not None:
        _check_state(_OP, "initial_state", initial_state, num_states, weight, x)
    y, final_state = causal_conv1d_forward(
        x, weight, bias, initial_state, cu_seqlens, activation is not None, reverse, current_backend()
    )
    return (y, final_state) if return_final_state else y


def causal_conv1d_update(
    x_t: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Take one step of `causal_conv1d`, for decoding; on a GPU one kernel, without gradients.

    Args:
        x_t: (B, D).
        conv_state: (B, W-1, D), the inputs before this one, oldest first; shifted in place to hold x_t, after the other
            inputs, which may be views of it (not under torch.compile), are read.
        weight: (D, W).
        bias: (D,).
        activation: None, or "silu" (alias "swish").

    Returns:
        y_t (B, D) in the dtype of x_t.

    Raises:
        ValueError: for a wrong shape, dtype, device or activation.
    """
    op = f"{_OP}_update"
    check_dims(op, "x_t", x_t, "(B, D)")
    _check_filter(op, x_t, weight, bias, activation)
    _check_state(op, "conv_state", conv_state, x_t.shape[0], weight, x_t)
    silu, backend = activation is not None, current_backend()
    x_t, weight, bias = unshared(conv_state, x_t, weight, bias)
    if x_t.is_cuda or backend == "triton":
        with torch.no_grad():
            return causal_conv1d_step(x_t, conv_state, weight, bias, silu, backend)
    return step(x_t, conv_state, weight, bias, silu)


def _check_filter(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check_tensors(op, weight=weight)
    dim = x.shape[-1]
    if weight.ndim != 2 or weight.shape[1] < 1:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected (D, W) with W >= 1 and D = {dim}")
    check_real_tensor(op, "weight", weight, (dim, weight.shape[1]), "(D, W)", x)
    if bias is not None:
        check_real_tensor(op, "bias", bias, (dim,), "(D,)", x)
    check_activation(op, activation)


def _check_state(op: str, name: str, state: Tensor, num_states: int, weight: Tensor, x: Tensor) -> None:
    check_real_tensor(op, name, state, (num_states, weight.shape[1] - 1, x.shape[-1]), "(S, W-1, D)", x)
