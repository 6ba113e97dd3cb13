"""Step sizes, decays and weights of Mamba-3 from their projections, in one pass over memory.

    Δ = softplus(δ + b);   rate = Δ max(f(a), floor);   γ = σ(μ) Δ;   β = (1 - σ(μ)) Δ;   weight[t] = γ[t] + β[t+1]

A token enters its own output with γ, and the state with the weight: the trapezoidal rule gives it a share of its own
step and one of the next.

Source: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles" (arXiv 2603.15569),
section 3; f is that of the authors' code.
"""

from __future__ import annotations

from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.checks import check_dims, check_not_negative, check_offsets, check_real_tensor, num_sequences
from mambaverse.kernels.trapezoid_weights.op import trapezoid_weights_forward

FORMS = ("heavy_tail", "softplus")


def trapezoid_weights(
    dt: Tensor,
    a: Tensor,
    trap: Tensor,
    dt_bias: Tensor,
    *,
    A_form: str = "heavy_tail",
    A_floor: float = 1e-4,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Δ, the rate -Δ A, the weight and the own weight γ of every token and head.

    All tensors may have any strides, and any of the dtypes float32, bfloat16, float16, float64, mixed; everything
    inside is float32 at least.

    Args:
        dt: (B, L, H), δ.
        a: (B, L, H).
        trap: (B, L, H), μ.
        dt_bias: (H,), b.
        A_form: f: "heavy_tail" is 1 + a for a >= 0 and 1 / (1 - a) below, "softplus" what the authors' code had until
            June 2026.
        A_floor: The least f(a).
        cu_seqlens: (sequences + 1,) int32, where packed sequences begin and end: 0, ..., L; B is 1 then. A sequence's
            last token has no share of a next step.

    Returns:
        Δ, rate, weight and γ, each (B, L, H) float32 (float64 where dt is).

    Raises:
        ValueError: for a wrong shape, dtype, device or `cu_seqlens`, an unknown `A_form`, or an `A_floor` that is no
            number of at least 0.
        BackendError: where no backend runs on the device of dt.
    """
    op = "trapezoid_weights"
    if A_form not in FORMS:
        raise ValueError(f"{op}: A_form is {A_form!r}; expected one of {', '.join(map(repr, FORMS))}")
    check_not_negative(op, A_floor=A_floor)
    check_dims(op, "dt", dt, "(B, L, H)")
    num_sequences(op, cu_seqlens, dt.shape[0])
    check_offsets(op, cu_seqlens, "dt", dt)
    for name, tensor in (("a", a), ("trap", trap)):
        check_real_tensor(op, name, tensor, dt.shape, "(B, L, H)", dt)
    check_real_tensor(op, "dt_bias", dt_bias, dt.shape[2:], "(H,)", dt)
    return trapezoid_weights_forward(
        dt, a, trap, dt_bias, cu_seqlens, A_floor, A_form == "heavy_tail", current_backend()
    )
