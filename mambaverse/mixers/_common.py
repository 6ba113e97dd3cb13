"""What several mixers share: checks of arguments, default sizes, initialisations of A and Δ, rotations by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.errors import UserError


def largest_divisor(size: int, limit: int, multiple: int = 1) -> int:
    """Return the largest divisor of `size` that is at most `limit` and a multiple of `multiple`; else 1.

    The default width of a head: 64 wherever it fits, 48 for 96 channels.
    """
    return max((d for d in range(multiple, limit + 1, multiple) if size % d == 0), default=1)


def check_sizes(mixer: str, **sizes: int | None) -> None:
    """Raise UserError unless every size is at least 1, or None."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"{mixer}: {name} must be at least 1, got {size}")


def resolve_heads(
    mixer: str, dim: int, num_heads: int | None, headdim: int | None, *, even: bool = False
) -> tuple[int, int]:
    """Return (H, P) with H · P = D; what is None follows from the other, or else P is the largest divisor up to 64.

    Raises:
        UserError: if they do not multiply to D, or P is odd where `even` (rotations turn pairs of channels).
    """
    check_sizes(mixer, num_heads=num_heads, headdim=headdim)
    if headdim is None:
        headdim = dim // num_heads if num_heads else largest_divisor(dim, 64, 2 if even else 1)
    if num_heads is None:
        num_heads = dim // headdim
    if num_heads * headdim != dim:
        raise UserError(f"{mixer}: num_heads · headdim must be dim = {dim}, got {num_heads} · {headdim}")
    if even and headdim % 2:
        raise UserError(f"{mixer}: rotary turns pairs of channels, so headdim must be even, got {headdim}")
    return num_heads, headdim


def resolve_inner_heads(mixer: str, inner: int, headdim: int | None, ngroups: int) -> tuple[int, int]:
    """Return (H, P) with H · P = E, the inner channels; a P of None is the largest divisor of E up to 64.

    Raises:
        UserError: if P does not divide E, or the G groups not the H heads.
    """
    headdim = largest_divisor(inner, 64) if headdim is None else headdim
    if inner % headdim:
        raise UserError(f"{mixer}: headdim must divide expand · dim = {inner}, got {headdim}")
    heads = inner // headdim
    if heads % ngroups:
        raise UserError(
            f"{mixer}: ngroups must divide the number of heads {heads} = {inner} / {headdim}, got {ngroups}"
        )
    return heads, headdim


def check_numbers(mixer: str, *, positive: bool = False, **numbers: float) -> None:
    """Raise UserError unless every number is finite and at least 0, or above 0 if `positive`."""
    for name, number in numbers.items():
        if not math.isfinite(number) or number < 0 or (positive and number == 0):
            least = "above 0" if positive else "of at least 0"
            raise UserError(f"{mixer}: {name} must be a finite number {least}, got {number:g}")


def check_range(
    mixer: str, name: str, bounds: Sequence[float], above: float, *, finite: bool = True
) -> tuple[float, float]:
    """Return the bounds (low, high), or raise UserError unless they are two numbers with above < low <= high.

    Unless `finite` is False, infinity is no number.
    """
    if len(bounds) != 2 or not (above < bounds[0] <= bounds[1] and (bounds[1] if finite else bounds[0]) < math.inf):
        kind = "two finite numbers" if finite else "two numbers"
        raise UserError(f"{mixer}: {name} must be {kind}, {above:g} < low <= high, got {list(bounds)}")
    return float(bounds[0]), float(bounds[1])


def check_state(mixer: str, state: Any, *parts: str, rows: int | None = None) -> Any:
    """Return `state`, or raise ValueError unless it is a tuple of tensors, one a part; of one part, a tensor alone.

    Where `rows` is given, each part of several has as many: one a sequence.
    """
    if len(parts) == 1:
        sound = isinstance(state, Tensor)
    else:
        sound = isinstance(state, tuple | list) and len(state) == len(parts)
        sound = sound and all(isinstance(part, Tensor) for part in state)
    if not sound:
        expected = f"a state ({', '.join(parts)}) of tensors" if len(parts) > 1 else f"the tensor {parts[0]} as a state"
        raise ValueError(f"{mixer}: expected {expected}, got {_kinds(state)}; init_state makes the first")
    if rows is not None and any(part.ndim == 0 or part.shape[0] != rows for part in state):
        raise ValueError(
            f"{mixer}: expected a state ({', '.join(parts)}) of {rows} rows, one a sequence, got {_kinds(state)}"
        )
    return state


def _kinds(state: Any) -> str:
    """Return what a state is made of, in words; of a tensor its shape."""
    if isinstance(state, Tensor):
        return f"a tensor {tuple(state.shape)}"
    if isinstance(state, tuple | list):
        return f"{type(state).__name__} ({', '.join(map(_kinds, state))})"
    return "None" if state is None else type(state).__name__


def resolve_dt_rank(mixer: str, dt_rank: int | str, dim: int) -> int:
    """Return the rank of Δ's projection: "auto" is ceil(D / 16)."""
    if isinstance(dt_rank, int) and dt_rank >= 1:
        return dt_rank
    if dt_rank != "auto":
        raise UserError(f"{mixer}: dt_rank must be 'auto' or at least 1, got {dt_rank!r}")
    return math.ceil(dim / 16)


def reset_parameters(module: nn.Module) -> None:
    """Call `reset_parameters` of `module`, or, where it has none, of the modules that it is made of."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for child in module.children():
        reset_parameters(child)


def inverse_softplus(x: Tensor) -> Tensor:
    """Return y with softplus(y) = x > 0, without overflow for small x."""
    return x + torch.log(-torch.expm1(-x))


@torch.no_grad()
def init_log_uniform_(log_dt: Tensor, dt_min: float, dt_max: float) -> None:
    """Fill `log_dt` (...) with ln Δ, Δ log-uniform in [dt_min, dt_max]."""
    log_dt.copy_(torch.empty(log_dt.shape, device=log_dt.device).uniform_(math.log(dt_min), math.log(dt_max)))


@torch.no_grad()
def init_dt_bias_(bias: Tensor, dt_min: float, dt_max: float, floor: float) -> None:
    """Fill `bias` (...) with softplus^-1(Δ), Δ log-uniform in [dt_min, dt_max] and at least `floor` (Mamba, 3.6)."""
    log_dt = torch.empty(bias.shape, device=bias.device).uniform_(math.log(dt_min), math.log(dt_max))
    bias.copy_(inverse_softplus(log_dt.exp().clamp(min=floor)))


@torch.no_grad()
def init_dt_proj_(weight: Tensor, kind: str, scale: float) -> None:
    """Fill the weight (E, R) of Δ's projection to keep the variance: ± scale · R^-1/2, "random" or "constant"."""
    bound = scale * weight.shape[1] ** -0.5
    if kind == "constant":
        weight.fill_(bound)
    else:
        weight.uniform_(-bound, bound)


@torch.no_grad()
def init_s4d_real_(A_log: Tensor) -> None:
    """Fill `A_log` (E, N) with ln(n + 1), so that A[n] = -(n + 1): S4D-Real (Mamba, section 3.6)."""
    n = torch.arange(A_log.shape[1], device=A_log.device, dtype=torch.float32)
    A_log.copy_((n + 1).log().expand_as(A_log))


def init_uniform_A_(A_log: Tensor, bounds: tuple[float, float]) -> None:  # noqa: N802
    """Fill A_log with log(-A), -A uniform between the bounds."""
    A_log.copy_(torch.empty(A_log.shape, device=A_log.device).uniform_(*bounds).log())


def positive_dt(dt: Tensor, bias: Tensor | None) -> Tensor:
    """Return Δ = softplus(dt + bias) of dt (..., channels) and bias (channels,), in fp32 at least."""
    dt = at_least_fp32(dt)
    return F.softplus(dt if bias is None else dt + at_least_fp32(bias))


def heads_and_groups(u: Tensor, headdim: int, ngroups: int, d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut [x, B, C] (..., E + 2 G N) of Mamba-2 into x (..., H, P), B and C (..., G, N); scriptable."""
    width = ngroups * d_state
    x, B, C = torch.split(u, [u.shape[-1] - 2 * width, width, width], dim=-1)
    B, C = B.unflatten(-1, (ngroups, d_state)), C.unflatten(-1, (ngroups, d_state))
    return x.unflatten(-1, (-1, headdim)), B, C


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether to call `layer` is what `kind` does with ordinary tensors, and nothing else."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    if type(layer) is not kind or "forward" in vars(layer) or any(hooks):  # accelerate's hooks are the second
        return False
    return torch.compiler.is_compiling() or type(layer.weight) in (nn.Parameter, Tensor)  # under export they are fake


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x in fp32, or in fp64 if it is: decays and their sums are never 16-bit (scriptable)."""
    return x if x.dtype == torch.float64 else x.float()
