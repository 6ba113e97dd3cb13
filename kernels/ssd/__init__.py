"""State space duality (SSD, the sequence operator of Mamba-2): a recurrence per head, worked out chunk by chunk.

    Δ[t] = clamp(softplus(dt[t] + dt_bias), dt_limit)
    h[t] = exp(Δ[t] A) h[t-1] + w[t] x[t] B[t]ᵀ
    y[t] = (exp(Δ[t] A) h[t-1] C[t] + o[t] x[t] B[t]·C[t] + D x[t]) · silu(z[t])

w = Δ, as in Mamba-2, and o = w, so that y[t] = (h[t] C[t] + D x[t]) · silu(z[t]), where they are not given. With both,
the recurrences of Mamba-3, gated linear attention and others are calls of this one.

Source: Dao and Gu, "Transformers are SSMs" (2024), arXiv 2405.21060, sections 5 and 6.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.checks import check_offsets, check_real_tensor, num_sequences, wants_states
from mambaverse.kernels.ssd.checks import check_chunk_size, check_inputs, check_weights
from mambaverse.kernels.ssd.op import ssd_forward
from mambaverse.kernels.ssd.update import ssd_update

__all__ = ["bidirectional_ssd", "ssd", "ssd_update"]


@overload
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., *, z: Tensor | None = ...,
    dt_bias: Tensor | None = ..., dt_softplus: bool = ..., dt_limit: tuple[float, float] = ...,
    initial_state: Tensor | None = ..., cu_seqlens: Tensor | None = ..., reverse: bool = ...,
    return_final_state: Literal[False] = ..., chunk_size: int | None = ..., weight: Tensor | None = ...,
    own_weight: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., *, z: Tensor | None = ...,
    dt_bias: Tensor | None = ..., dt_softplus: bool = ..., dt_limit: tuple[float, float] = ...,
    initial_state: Tensor | None = ..., cu_seqlens: Tensor | None = ..., reverse: bool = ...,
    return_final_state: Literal[True], chunk_size: int | None = ..., weight: Tensor | None = ...,
    own_weight: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    weight: Tensor | None = None,
    own_weight: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the SSD recurrence of Mamba-2 over the length, for every head at once.

    All tensors may have any strides, and any of the floating dtypes float32, bfloat16, float16, float64, mixed. Sums,
    decays and states are float32; where x is float64, everything is, on the reference.

    Args:
        x: (B, L, H, P), the input; with `cu_seqlens` (1, L, H, P).
        dt: (B, L, H), the step sizes before bias, softplus and limits.
        A: (H,), the rate of each head; the decay over a step is exp(Δ A), so A < 0 unless the state shall grow.
        B: (B, L, G, N), what the input writes to; head h has group h // (H // G). (B, L, N) stands for G = 1.
        C: Likewise, what the output reads.
        D: (H,) or (H, P), the skip.
        z: (B, L, H, P), the gate.
        dt_bias: (H,).
        dt_softplus: Take softplus of dt + dt_bias.
        dt_limit: Least and greatest Δ.
        initial_state: (S, H, P, N); zeros without it. S is B, or the number of sequences in `cu_seqlens`.
        cu_seqlens: (S+1,) int32, where packed sequences begin and end: 0, ..., L. Empty sequences are allowed.
        reverse: Run time backwards, sequence by sequence: flip(ssd(flip(x), ...)) without the copies. The initial state
            then enters at the last position and the final state is that after the first.
        return_final_state: Also return the state after each sequence.
        chunk_size: Positions that are worked out as one matrix product, at most; a matter of speed only. None leaves it
            to us. The Triton kernels have their own, whatever it is.
        weight: (B, L, H), w, what x enters the state with; the decay stays exp(Δ A). None: Δ.
        own_weight: (B, L, H), o, what x[t] enters y[t] with, whatever it enters the state with. None: w.

    On a CPU a NaN or an infinity also reaches up to 7 positions of its sequence before its own, within a tile of 8.

    Returns:
        y (B, L, H, P) in the dtype of x; with `return_final_state` also the final state (S, H, P, N), float32 (float64
        where x is). Both are differentiable.

    Raises:
        ValueError: for a wrong shape, dtype, device, limit, chunk size or `cu_seqlens`.
        BackendError: where no backend runs on the device of x.
    """
    B, C, low, high = check_inputs("ssd", x, dt, A, B, C, D, z, dt_bias, dt_limit, "B, L")
    num_states = num_sequences("ssd", cu_seqlens, x.shape[0])
    check_offsets("ssd", cu_seqlens, "x", x)
    if initial_state is not None:
        shape = (num_states, *x.shape[2:], B.shape[3])
        check_real_tensor("ssd", "initial_state", initial_state, shape, "(S, H, P, N)", x)
    check_chunk_size("ssd", chunk_size)
    check_weights("ssd", x, weight, own_weight, "(B, L, H)")
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    save = wants_states((*tensors, weight, own_weight))
    y, final_state, _ = ssd_forward(
        *tensors, cu_seqlens, dt_softplus, low, high, reverse, chunk_size or 0, current_backend(), save,
        weight, own_weight,
    )  # fmt: skip
    return (y, final_state) if return_final_state else y


from mambaverse.kernels.ssd.bidirectional import bidirectional_ssd  # noqa: E402  it calls `ssd`
