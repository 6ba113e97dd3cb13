"""The angles of Mamba-3 on the GPU: three Triton kernels forward and three backward, parallel over chunks.

Same equations, arguments and results as `reference`. Deterministic. Strides are read as they are, and offsets are
64-bit; tokens that no sequence covers get zeros, and nothing is read on the host.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.launch import Spec, launch, memo_of, on_device, power_of_2
from mambaverse.kernels.summed_angles import triton_kernels as kernels

_CHUNK, _AT_ONCE = (
    (16, 4) if os.environ.get("TRITON_INTERPRET") == "1" else (64, 8)
)  # tokens, a multiple of those loaded at once
_BLOCK, _COLUMNS = 256, 128  # columns of a program that walks chunks, and of one that walks or sums tokens


def forward(dt: Tensor, rate: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return the angles, as `reference.forward`."""
    run = _Run(dt, rate, initial, cu_seqlens)
    out = run.outputs((*dt.shape, rate.shape[2]), torch.float32)
    if run.places and out.numel():
        with on_device(dt):
            before = run.boundaries(None, None)
            launch(
                run.memo, "angles", kernels.angles, (run.places, run.blocks),
                (dt, rate, run.cu, before, out, *run.sizes, *dt.stride(), *rate.stride()), lambda: run.walk | run.flags,
            )  # fmt: skip
    return out


def backward(
    dangles: Tensor, dt: Tensor, rate: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of dt, rate and initial, as `reference.backward`."""
    run = _Run(dt, rate, initial, cu_seqlens, dangles)
    ddt, drate = run.outputs(dt.shape, dt.dtype), run.outputs(rate.shape, rate.dtype)
    dinitial = dt.new_empty(0) if initial is None else torch.zeros(initial.shape, dtype=initial.dtype, device=dt.device)
    if not run.places or not dangles.numel():
        return ddt.zero_(), drate.zero_(), dinitial
    with on_device(dt):
        after = run.boundaries(dangles, dinitial)
        launch(
            run.memo, "gradients", kernels.gradients, (run.places,),
            (dangles, dt, rate, run.cu, after, ddt, drate, *run.sizes, *dangles.stride(), *dt.stride(), *rate.stride()),
            lambda: run.flags | {"BS": max(16, power_of_2(rate.shape[2]))},
        )  # fmt: skip
    return ddt, drate, dinitial


class _Run:
    """The inputs of one call as the kernels take them."""

    def __init__(
        self, dt: Tensor, rate: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, *others: Tensor
    ) -> None:
        self.dt, self.rate, self.initial = dt, rate, initial
        (batch, length, heads), pairs = dt.shape, rate.shape[2]
        self.packed = cu_seqlens is not None
        self.cu = dt if cu_seqlens is None else cu_seqlens.contiguous()
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        chunks = -(-length // _CHUNK)
        self.places = batch * chunks
        if self.packed:  # the most that there may be
            self.places = (length - 1) // _CHUNK + self.sequences if length and self.sequences else 0
        self.sizes = length, self.sequences, self.sequences.bit_length(), heads
        self.flags: dict[str, Any] = {"S": pairs, "T": _CHUNK, "PACKED": self.packed, "num_warps": 4}
        self.blocks, self.walk = -(-heads * pairs // _COLUMNS), {"COLUMNS": _COLUMNS, "AT_ONCE": _AT_ONCE}
        specs = (Spec.of(t) for t in (dt, rate, initial, cu_seqlens, *others))
        self.memo = memo_of("summed_angles", dt.device, *specs)

    def outputs(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor to write to; zeros beside offsets, which may leave tokens out (unread on a GPU)."""
        make = torch.zeros if self.packed else torch.empty
        return make(shape, dtype=dtype, device=self.dt.device)

    def boundaries(self, dangles: Tensor | None, dinitial: Tensor | None) -> Tensor:
        """Return the turns before each chunk, or the gradients of angles after it: (places, H, S) float64."""
        heads, pairs = self.dt.shape[2], self.rate.shape[2]
        sums = torch.empty((self.places, heads, pairs), dtype=torch.float64, device=self.dt.device)
        if dangles is None:
            launch(
                self.memo, "turn_sums", kernels.turn_sums, (self.places, self.blocks),
                (self.dt, self.rate, self.cu, sums, *self.sizes, *self.dt.stride(), *self.rate.stride()),
                lambda: self.walk | self.flags,
            )  # fmt: skip
        else:
            launch(
                self.memo, "gradient_sums", kernels.gradient_sums, (self.places, self.blocks),
                (dangles, self.cu, sums, *self.sizes, *dangles.stride()), lambda: self.flags | {"COLUMNS": _COLUMNS},
            )  # fmt: skip
        start = self.dt if self.initial is None else self.initial
        launch(
            self.memo, "boundaries", kernels.boundaries, (self.sequences, -(-heads * pairs // _BLOCK)),
            (sums, start, start if dinitial is None else dinitial, self.cu, self.sizes[0], heads, *start.stride()),
            lambda: self.flags | {
                "BLOCK": _BLOCK, "GRADIENT": dangles is not None, "HAS_INITIAL": self.initial is not None,
            },
        )  # fmt: skip
        return sums
