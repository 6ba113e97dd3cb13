"""The keys and queries of Mamba-3: normalised, with a bias a head, and turned by angles, in one pass over memory.

    k[h] = turn(B[g] / sqrt(mean(B[g]²) + eps) · B_weight + B_bias[h], θ[h]),   q[h] likewise of C;   g = h // (H // G)
    turn: (a, b) -> (a cos θ - b sin θ, a sin θ + b cos θ) for S pairs of the N channels; the others stay

Sources: Lahoti et al. 2026, "Mamba-3" (arXiv 2603.15569), section 3; turning pairs of channels is RoPE's (Su et al.
2021, arXiv 2104.09864), here by angles that depend on the data.
"""

from __future__ import annotations

from torch import Tensor

from mambaverse.kernels.backend import current_backend
from mambaverse.kernels.checks import check_dims, check_not_negative, check_real_tensor, check_tensors
from mambaverse.kernels.turned_qk.op import turned_qk_forward

PAIRINGS = ("interleaved", "half_split")


def turned_qk(
    B: Tensor,
    C: Tensor,
    B_weight: Tensor,
    C_weight: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    angles: Tensor,
    *,
    pairing: str = "interleaved",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return keys and queries of every head, from projections that the heads of a group share.

    All tensors may have any strides, and any of the dtypes float32, bfloat16, float16, float64, mixed. Inside
    everything is float32; where B is float64, float64, on the reference.

    Args:
        B: (B, L, R, G, N), R vectors a token and group.
        C: (B, L, R, G, N).
        B_weight: (N,), of the RMS norm over N.
        C_weight: (N,).
        B_bias: (H, R, N); head h has group h // (H // G).
        C_bias: (H, R, N).
        angles: (B, L, H, S), radians, S ≤ N / 2; those of the R vectors of a head are the same. On a GPU they should
            stay below 4e5, beyond which float32 leaves their cosines few digits.
        pairing: "interleaved" turns the channels (2 i, 2 i + 1), "half_split" (i, i + N / 2), i < S.
        eps: Added to the mean square.

    Returns:
        k (B, L, R, H, N) in the dtype of B, and q in that of C.

    Raises:
        ValueError: for a wrong shape, dtype, device, pairing or eps.
        BackendError: where no backend runs on the device of B.
    """
    op = "turned_qk"
    if pairing not in PAIRINGS:
        raise ValueError(f"{op}: pairing is {pairing!r}; expected one of {', '.join(PAIRINGS)}")
    check_not_negative(op, eps=eps)
    check_tensors(op, B=B, B_bias=B_bias)
    if B.ndim != 5 or 0 in B.shape[2:] or not B.is_floating_point():
        raise ValueError(f"{op}: B is {B.dtype} of shape {tuple(B.shape)}; expected a floating dtype, (B, L, R, G, N)")
    batch, length, rank, groups, size = B.shape
    heads = B_bias.shape[0] if B_bias.ndim == 3 else 0
    if heads == 0 or heads % groups:
        raise ValueError(
            f"{op}: B_bias has shape {tuple(B_bias.shape)}; expected (H, R, N), H a multiple of B's {groups} groups"
        )
    check_dims(op, "angles", angles, "(B, L, H, S)")
    turned = angles.shape[-1]
    if turned > size // 2 or (pairing == "half_split" and size % 2):
        raise ValueError(
            f"{op}: {turned} pairs of {size} channels cannot turn with pairing={pairing!r}; expected at most N // 2, "
            "and an even N for 'half_split'"
        )
    shapes = {
        "C": (C, B.shape, "(B, L, R, G, N)"),
        "B_weight": (B_weight, (size,), "(N,)"),
        "C_weight": (C_weight, (size,), "(N,)"),
        "B_bias": (B_bias, (heads, rank, size), "(H, R, N)"),
        "C_bias": (C_bias, (heads, rank, size), "(H, R, N)"),
        "angles": (angles, (batch, length, heads, turned), "(B, L, H, S)"),
    }
    for name, (tensor, shape, letters) in shapes.items():
        check_real_tensor(op, name, tensor, shape, letters, B)
    return turned_qk_forward(
        B, C, B_weight, C_weight, B_bias, C_bias, angles, pairing == "interleaved", eps, current_backend()
    )
