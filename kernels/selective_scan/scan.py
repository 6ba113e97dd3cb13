"""The public function `selective_scan`: checks its arguments and calls the op."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.checks import check_offsets, check_tensor, num_sequences, wants_states
from mambaverse.kernels.selective_scan.checks import check_inputs, check_real
from mambaverse.kernels.selective_scan.op import selective_scan_forward


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: Literal[False] = False,
) -> Tensor: ...
@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective state-space recurrence of Mamba (S6) over a sequence.

    `h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] u[t]`, `y[t] = (C[t]·h[t] + D u[t]) silu(z[t])`, with
    `Δ = softplus(delta + delta_bias)` or just `delta + delta_bias`. Gradients flow to every tensor, and through the
    states. Inputs may have any strides and mix float32, bfloat16 and float16; decay, state and sums are in float32
    (float64 throughout if u is float64, by the reference). Length 0 returns an empty y and the initial state.

    Args:
        u: (B, L, D) input.
        delta: (B, L, D) step size, before bias and softplus.
        A: (D, N), negative where the state should decay. Complex: each state stands for a conjugate pair, as in S4D;
            C·h becomes 2 Re(C·h), states are complex64, and B and C may be complex too.
        B: (B, L, N), or (B, L, G, N): channel d uses group d // (D // G).
        C: Shape of B.
        D: (D,) skip connection.
        z: (B, L, D) gate.
        delta_bias: (D,) added to delta.
        delta_softplus: Whether Δ is softplus(delta + delta_bias).
        initial_state: (S, D, N), zero by default; S is the batch size B, or the number of packed sequences.
        cu_seqlens: (S+1,) int32 or int64 offsets of sequences that are packed along L, with B = 1; sequence s is
            [cu_seqlens[s], cu_seqlens[s + 1]) and may be empty.
        reverse: Whether to walk every sequence from its end, as flip(op(flip(inputs))) would; the initial state is then
            that after the last position and the final state that at the first.
        return_final_state: Whether to return the state after the last step too.

    Returns:
        y (B, L, D), contiguous, in u's dtype; or (y, final_state (S, D, N) in float32).

    Raises:
        ValueError: An argument has the wrong shape, dtype, device or (cu_seqlens) values; the message names it.
        BackendError: The backend in force cannot run here.

    Source: Gu and Dao, "Mamba", 2023 (arXiv 2312.00752), Algorithm 2. The discretization of B is the published code's.
    """
    check_inputs("selective_scan", u, delta, A, B, C, D, z, delta_bias, "B, L")
    sequences = num_sequences("selective_scan", cu_seqlens, u.shape[0])
    check_offsets("selective_scan", cu_seqlens, "u", u)
    if initial_state is not None:
        shape = sequences, *A.shape
        check_tensor("selective_scan", "initial_state", initial_state, shape, "(S, D, N)", u)
        check_real("selective_scan", "initial_state", initial_state, A)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    save = wants_states(tensors)
    y, final_state, _ = selective_scan_forward(*tensors, cu_seqlens, delta_softplus, reverse, current_backend(), save)
    return (y, final_state) if return_final_state else y
