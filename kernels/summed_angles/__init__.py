"""The angles of Mamba-3: sums over the tokens so far, each brought into one turn, without a sum that loses digits.

    θ[t] = (θ[t-1] + Δ[t] π rate[t]) mod 2π,   one for each head (Δ) and pair of channels (rate = tanh φ)

Source: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles" (arXiv 2603.15569),
section 3.
"""

from __future__ import annotations

from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.checks import check_dims, check_offsets, check_real_tensor, num_sequences
from mambaverse.kernels.summed_angles.op import summed_angles_forward


def summed_angles(
    dt: Tensor, rate: Tensor, *, initial: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Return the angle of every head and pair after each token.

    All tensors may have any strides, and any of the dtypes float32, bfloat16, float16, float64, mixed. Sums are
    float64: after 2,000 tokens one in float32 is off by some 1e-4, and the angle's cosine with it.

    Args:
        dt: (B, L, H), Δ.
        rate: (B, L, S), in half turns a unit of Δ.
        initial: (sequences, H, S), the angles before the first token, in radians; zeros without it. There are B
            sequences, or those of `cu_seqlens`.
        cu_seqlens: (sequences + 1,) int32, where packed sequences begin and end: 0, ..., L; B is 1 then.

    Returns:
        Angles (B, L, H, S) in radians, from 0 to 2π, float32 (float64 where dt is).

    Raises:
        ValueError: for a wrong shape, dtype, device or `cu_seqlens`.
        BackendError: where no backend runs on the device of dt.
    """
    op = "summed_angles"
    check_dims(op, "dt", dt, "(B, L, H)")
    check_dims(op, "rate", rate, "(B, L, S)")
    (batch, length, heads), pairs = dt.shape, rate.shape[2]
    sequences = num_sequences(op, cu_seqlens, batch)
    check_offsets(op, cu_seqlens, "dt", dt)
    check_real_tensor(op, "rate", rate, (batch, length, pairs), "(B, L, S)", dt)
    if initial is not None:
        check_real_tensor(op, "initial", initial, (sequences, heads, pairs), "(sequences, H, S)", dt)
    return summed_angles_forward(dt, rate, initial, cu_seqlens, current_backend())
