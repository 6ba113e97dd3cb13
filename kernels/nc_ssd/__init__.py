"""Non-causal state space duality: one state of a whole sequence, which every token writes to and reads from.

    Δ[t] = softplus(dt[t] + dt_bias);   w[t] = -A Δ[t]
    S = Σ_t w[t] x[t] B[t]ᵀ;   y[t] = S C[t] + D x[t]

Where SSD multiplies the state by its decay before each token, here the decay's exponent is the weight of the token
itself, so that no token comes before another: what a scan in both directions adds up becomes one sum.

Source: Shi et al. 2024, "VSSD: Vision Mamba with Non-Causal State Space Duality" (arXiv 2407.18559), section 3.2; that
the weight is Δ A, whatever its sign, is from the authors' code.
"""

from __future__ import annotations

from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.checks import check_real_tensor
from mambaverse.kernels.nc_ssd.op import nc_ssd_forward
from mambaverse.kernels.ssd.checks import check_inputs


def nc_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Sum all tokens into one state a sequence and head, and read it at each of them.

    All tensors may have any strides, and any of the dtypes float32, bfloat16, float16, float64, mixed; sums are float32
    at least. The result does not depend on the order of the tokens.

    Args:
        x: (B, L, H, P), the input.
        dt: (B, L, H), the step sizes before bias and softplus.
        A: (H,), below 0 for weights above 0.
        B: (B, L, G, N), what the input writes to; head h has group h // (H // G). (B, L, N) stands for G = 1.
        C: Likewise, what the output reads.
        D: (H,), the skip.
        dt_bias: (H,).
        dt_softplus: Take softplus of dt + dt_bias.

    Returns:
        y (B, L, H, P) in the dtype of x.

    Raises:
        ValueError: for a wrong shape, dtype or device.
        BackendError: where no backend runs on the device of x.
    """
    B, C, _, _ = check_inputs("nc_ssd", x, dt, A, B, C, None, None, dt_bias, (0.0, float("inf")), "B, L")
    if D is not None:
        check_real_tensor("nc_ssd", "D", D, x.shape[2:3], "(H,)", x)
    return nc_ssd_forward(x, dt, A, B, C, D, dt_bias, dt_softplus, current_backend())[0]
