"""What the arguments of `selective_scan` must be, and those of its one-step form, which has no length."""

from __future__ import annotations

from torch import Tensor

from mambaverse.kernels.checks import check_dims, check_tensor, check_tensors


def check_inputs(
    op: str, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, axes: str,
) -> None:  # fmt: skip
    """Raise ValueError unless all arguments fit u (B, L, D) or (B, D), whose leading axes are `axes`: "B, L" or "B"."""
    check_dims(op, "u", u, f"({axes}, D)")
    check_tensors(op, delta=delta, A=A, B=B, C=C)
    dim = u.shape[-1]
    if A.ndim != 2 or A.shape[0] != dim or A.shape[1] == 0:
        raise ValueError(f"{op}: A has shape {tuple(A.shape)}; expected (D, N) with D = {dim} and N >= 1")
    check_tensor(op, "A", A, A.shape, "(D, N)", u)
    check_grouped(op, "B", B, u, A.shape[1], axes)
    shapes = {
        "delta": (delta, u.shape, f"({axes}, D)"),
        "C": (C, B.shape, "the shape of B"),
        "D": (D, (dim,), "(D,)"),
        "z": (z, u.shape, f"({axes}, D)"),
        "delta_bias": (delta_bias, (dim,), "(D,)"),
    }
    for name, (tensor, shape, letters) in shapes.items():
        if tensor is not None:
            check_tensor(op, name, tensor, shape, letters, u)
            check_real(op, name, tensor, A if name == "C" else None)
    check_real(op, "B", B, A)


def check_grouped(op: str, name: str, B: Tensor, u: Tensor, state_dim: int, axes: str) -> None:
    """Raise ValueError unless B has the leading axes of u, then N, or G and N where G divides D."""
    lead, dim = tuple(u.shape[:-1]), u.shape[-1]
    groups = B.shape[-2] if B.ndim == len(lead) + 2 else 1
    fits = B.ndim in (len(lead) + 1, len(lead) + 2) and tuple(B.shape[: len(lead)]) == lead
    if not fits or B.shape[-1] != state_dim:
        example = (*lead, state_dim)
        raise ValueError(f"{op}: {name} has shape {tuple(B.shape)}; expected ({axes}, N) = {example} or ({axes}, G, N)")
    if groups == 0 or dim % groups:
        raise ValueError(f"{op}: {name} has {groups} groups; expected a divisor of the {dim} channels of u")
    check_tensor(op, name, B, B.shape, f"({axes}, N)", u)


def check_real(op: str, name: str, tensor: Tensor, A: Tensor | None = None) -> None:
    """Raise ValueError if `tensor` is complex; beside a complex A it may be."""
    if tensor.is_complex() and not (A is not None and A.is_complex()):
        hint = "" if A is None else ", as that of A is"
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; expected a real floating dtype{hint}")
