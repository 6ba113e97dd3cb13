"""What the launches of one call of `ssd` have in common, and those of `triton_forward`."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mambaverse.kernels.launch import Spec, capability, launch, memo_of
from mambaverse.kernels.ssd.layout import TRITON_FAR, TRITON_KEEP, ceil_div
from mambaverse.kernels.ssd.triton_backward import steps
from mambaverse.kernels.ssd.triton_forward import carry, combine, scan
from mambaverse.kernels.ssd.triton_plan import INTERPRETED, Plan, tuning

HEADS = 16  # of a program of `steps`, and of one that adds up what is left of each


def strides(tensor: Tensor | None, ndim: int) -> tuple[int, ...]:
    """Return those of a tensor, zeros for None."""
    return (0,) * ndim if tensor is None else tensor.stride()


class Run:
    """The inputs of one call as the kernels take them."""

    def __init__(
        self, p: Plan, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        bias: Tensor | None, initial: Tensor | None, weight: Tensor | None, own: Tensor | None,
        cu_seqlens: Tensor | None, softplus: bool, low: float, high: float, reverse: bool, *others: Tensor | None,
    ) -> None:  # fmt: skip
        self.p = p
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        specs = (Spec.of(t) for t in (x, dt, A, B, C, D, z, bias, initial, weight, own, cu_seqlens, *others))
        self.memo = memo_of("ssd", x.device, *specs, softplus, reverse)
        self.x, self.dt, self.A, self.B, self.C, self.D, self.z = x, dt, A, B, C, D, z
        self.bias, self.initial, self.cu, self.weight, self.own = bias, initial, cu_seqlens, weight, own
        self.D_width = 0 if D is None else 1 if D.ndim == 1 else p.head_dim  # gradients of D a head
        self.sizes = (p.heads, p.heads // p.groups)
        self.limits = (low, high)
        # Whether backward gates dy once, in `carry`, and leaves it where dx will be, and in bfloat16 what rounding took
        # from it where dz will be. float16 has not the range.
        self.gates = z is not None and (x.dtype == torch.float32 or x.dtype == z.dtype == torch.bfloat16)
        self.flags: dict[str, Any] = {
            "P": p.head_dim, "N": p.state_dim, "BP": p.tile[0], "BN": p.tile[1],
            "DT": tl.bfloat16 if p.dtype == torch.bfloat16 else tl.float32,
            "PRECISION": "tf32x3" if p.dtype == torch.float32 else "tf32",
            "PACKED": p.packed, "REVERSE": reverse,
            "FAST": 0 if INTERPRETED else 2 if capability(x.device) >= 10 else 1,
        }  # fmt: skip
        self.step_flags = {"HAS_BIAS": bias is not None, "SOFTPLUS": softplus}
        self.bounds = p.length, p.sequences, p.sequences.bit_length()

    def or_x(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Put x, which a flag tells the kernels not to read, in the place of what is not there."""
        return tuple(self.x if t is None else t for t in tensors)

    def tuned(self, kernel: str, ends: bool = False) -> dict[str, Any]:
        """Return the flags that all kernels have, and how a kernel is cut."""
        chunk, warps, stages = tuning(kernel, self.p, ends)
        loop = {} if kernel in ("gradient_x", "rest_of_one") else {"STAGES": stages}
        return self.flags | loop | {"Q": chunk, "num_warps": warps, "num_stages": stages}

    def strides_of_D(self) -> tuple[int, int]:  # noqa: N802
        """Return the step of D from one head to the next, and from one column to the next."""
        return (0, 0) if self.D is None else (self.D.stride(0), self.D.stride(1) if self.D.ndim == 2 else 0)

    def kept(self, segments: range) -> int:
        """Return how many states of a sequence are kept of `segments`."""
        return self.p.kept if self.p.piece == 0 else len(segments) * (TRITON_FAR // TRITON_KEEP)

    def programs(self, num_chunks: int) -> int:
        """Return how many chunks there are where `num_chunks` of each sequence are taken; of packed ones all."""
        return self.p.slots if self.p.packed else self.p.batch * num_chunks

    def over_steps(self, function: Any, tensors: tuple[Tensor, ...], *more: int, **flags: bool) -> None:
        """Launch a kernel that takes the step sizes of a chunk and HEADS heads a program."""
        p = self.p
        launch(
            self.memo, function.__name__, function, (p.slots, ceil_div(p.heads, HEADS)),
            (*(self.dt, self.A, *tensors, *self.bounds, p.heads, *self.limits),
            *(*self.dt.stride(), *self.A.stride(), *strides(self.bias, 1), *more)),
            lambda: self.step_flags | flags | {
                "Q": TRITON_KEEP, "HEADS": HEADS, "HAS_WEIGHT": self.weight is not None, "PACKED": p.packed,
                "REVERSE": self.flags["REVERSE"], "num_warps": 4,
            },
        )  # fmt: skip

    def steps(self) -> Tensor:
        """Return step sizes and sums of log decays, (slots, H, 3, TRITON_KEEP)."""
        p = self.p
        out = torch.empty((p.slots, p.heads, 3, TRITON_KEEP), dtype=torch.float32, device=self.x.device)
        if p.slots:
            self.over_steps(steps, (*self.or_x(self.bias, self.weight, self.cu), out), *strides(self.weight, 3))
        return out

    def scan(self, y: Tensor, final: Tensor, states: Tensor, starts: Tensor | None, save: bool) -> None:
        """Write y, the final state and, with `save`, the states between."""
        p = self.p
        launch(
            self.memo, ("scan", save), scan, (p.programs, p.segments),
            (*(self.x, self.dt, self.A, self.B, self.C),
            *self.or_x(self.D, self.z, self.bias, self.initial, self.weight, self.own, self.cu, starts),
            *(y, final, states, p.length, p.segment, p.segments, *self.sizes, p.kept, *self.limits),
            *(*self.x.stride(), *self.dt.stride(), *self.A.stride(), *self.B.stride(), *self.C.stride()),
            *(*self.strides_of_D(), *strides(self.z, 4), *strides(self.bias, 1), *strides(self.initial, 4)),
            *(*strides(self.weight, 3), *strides(self.own, 3)),),
            lambda: self.tuned("scan") | self.step_flags | {
                "D_WIDTH": self.D_width, "HAS_Z": self.z is not None, "HAS_INITIAL": self.initial is not None,
                "SPLIT": p.segments > 1, "SAVE": save, "KEEP": p.keep, "HAS_WEIGHT": self.weight is not None,
                "HAS_OWN": self.own is not None,
            },
        )  # fmt: skip

    def carry(
        self, x: Tensor, B: Tensor, z: Tensor | None, incoming: Tensor | None, *, gradient: bool,
        starts: Tensor | None = None, outgoing: Tensor | None = None, states: Tensor | None = None,
        ends: Tensor | None = None, sums: Tensor | None = None, segments: range | None = None, first_chunk: int = 0,
        gated: Tensor | None = None, rest: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Carry states, or with `gradient` their gradients; write `ends` and `sums` of segments, or the others."""
        p = self.p
        segments = range(p.segments) if segments is None else segments
        weight = None if gradient else self.weight
        launch(
            self.memo, ("carry", gradient, ends is None), carry, (p.programs, len(segments)),
            (x, self.dt, self.A, B, *self.or_x(z, self.bias, incoming, weight, self.cu, starts, ends, sums, outgoing),
            *self.or_x(states, gated, rest),
            *(p.length, p.segment, p.segments, segments.start, *self.sizes, self.kept(segments), first_chunk),
            *self.limits,
            *(*x.stride(), *self.dt.stride(), *self.A.stride(), *B.stride(), *strides(z, 4), *strides(self.bias, 1)),
            *(*strides(incoming, 4), *strides(weight, 3)),),
            lambda: self.tuned("carry" if ends is None else "carry_to_ends") | self.step_flags | {
                "HAS_Z": z is not None, "HAS_INCOMING": incoming is not None,
                "HAS_OUTGOING": outgoing is not None and self.initial is not None,
                "SPLIT": starts is not None and gradient, "GRADIENT": gradient, "SUMMARY": ends is not None,
                "KEEP": TRITON_KEEP, "HAS_WEIGHT": weight is not None, "GATES": gated is not None,
            },
        )  # fmt: skip

    def segment_starts(
        self, x: Tensor, B: Tensor, z: Tensor | None, incoming: Tensor | None, *, gradient: bool
    ) -> Tensor:
        """Return what enters each segment, (sequences, H, segments, P, N) float32.

        Nothing enters a segment from the last one, or of gradients from the first, so that its end is not looked for.
        """
        p = self.p
        shape = p.sequences, p.heads, p.segments, p.head_dim, p.state_dim
        ends, starts = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
        sums = torch.empty(shape[:3], dtype=torch.float32, device=x.device)
        left = range(1, p.segments) if gradient else range(p.segments - 1)
        self.carry(x, B, z, None, gradient=gradient, ends=ends, sums=sums, segments=left)
        size, block = p.head_dim * p.state_dim, 512
        launch(
            self.memo, ("combine", gradient), combine, (p.sequences * p.heads, ceil_div(size, block)),
            (ends, sums, *self.or_x(incoming), starts, p.heads, p.segments, *strides(incoming, 4)),
            lambda: {
                "SIZE": size, "N": p.state_dim, "HAS_INCOMING": incoming is not None, "GRADIENT": gradient,
                "BLOCK": block, "num_warps": 4,
            },
        )  # fmt: skip
        return starts
