"""Non-causal SSD on the GPU: a Triton kernel that sums states, one that reads them, and one for the gradients.

Same equations, arguments and results as `reference`, with sums in float32. Products are bfloat16's where x is, three of
tf32 where x, B and C are float32, and one of tf32 else, since states pass what float16 holds. Deterministic: states and
the gradients of A, D and dt_bias are added up from parts in a fixed order. Strides but those of A, D and dt_bias are
read as they are, and offsets are 64-bit.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels import columns
from mambaverse.kernels.backend import BackendError
from mambaverse.kernels.launch import (
    AHEAD_BYTES,
    Spec,
    launch,
    memo_of,
    num_multiprocessors,
    on_device,
    power_of_2,
    shared_memory,
)
from mambaverse.kernels.nc_ssd import triton_kernels as kernels
from mambaverse.kernels.nc_ssd.reference import state_dtype

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_STATE = 64 * 128  # numbers of a state, sizes rounded up to powers of two: backward has two of them on chip
_PROGRAMS = 4  # that a multiprocessor runs side by side


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool
) -> tuple[Tensor, Tensor]:
    """Return y and the states, as `reference.forward`."""
    if width := _columns_of_parts(x, B):
        return columns.forward(forward, width, x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)
    A, D, dt_bias = A.contiguous(), _dense(D), _dense(dt_bias)
    call = _Call((x, dt, A, B, C, D, dt_bias), dt_softplus)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on_device(x):
        state = call.states("write", x, B, state_dtype(x), weighted=True)
        if x.numel():
            launch(
                call.memo, "read", kernels.read, (call.programs,),
                (x, C, D, state, y, *call.sizes, *x.stride(), *C.stride()),
                lambda: call.flags | {"num_stages": min(call.stages, 2)},
            )  # fmt: skip
    return y, state


def backward(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    state: Tensor, dt_softplus: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C, D and dt_bias, as `reference.backward`."""
    if width := _columns_of_parts(x, B):
        return columns.backward(
            backward, width, ("x", "dt", "A", "B", "C", "D", "dt_bias"), dy=dy, x=x, dt=dt, A=A, B=B, C=C, D=D,
            dt_bias=dt_bias, state=state, dt_softplus=dt_softplus,
        )  # fmt: skip
    A, D, dt_bias = A.contiguous(), _dense(D), _dense(dt_bias)
    call = _Call((x, dt, A, B, C, D, dt_bias, dy), dt_softplus)
    make = torch.empty if x.numel() else torch.zeros
    dx, ddt, dB, dC = (make(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    blocks = -(-x.shape[1] // call.flags["BT"])
    parts = make((x.shape[0] * blocks, 3, x.shape[2]), dtype=torch.float32, device=x.device)
    with on_device(x):
        dstate = call.states("write_gradient", dy, C, torch.float32, weighted=False)
        if x.numel():
            launch(
                call.memo, "gradient", kernels.gradient, (x.shape[0] * blocks * B.shape[2],),
                (dy, x, dt, A, B, C, D, dt_bias, state.contiguous(), dstate, dx, ddt, dB, dC, parts, blocks,
                 x.shape[1], *dy.stride(), *x.stride(), *dt.stride(), *B.stride(), *C.stride()),
                lambda: call.flags | {"num_stages": call.stages_of_gradient},
            )  # fmt: skip
    dA, dD, dbias = parts.sum(0).unbind(0)
    nothing = x.new_empty(0)
    return (
        dx, ddt, dA.to(A.dtype), dB, dC, nothing if D is None else dD.to(D.dtype),
        nothing if dt_bias is None else dbias.to(dt_bias.dtype),
    )  # fmt: skip


class _Call:
    """What the launches of a call share.

    The tokens of a sequence and head are cut into as many runs as fill the GPU; a program has one, and walks it in
    tiles.
    """

    def __init__(self, tensors: tuple[Tensor | None, ...], dt_softplus: bool) -> None:
        self.tensors = tensors[:7]
        x, _, _, B, C, *_ = tensors
        assert x is not None and B is not None and C is not None
        (batch, length, heads, head_dim), (groups, state_dim) = x.shape, B.shape[2:]
        columns, states = _tile(head_dim), _tile(state_dim)
        bf16 = x.dtype == torch.bfloat16 and not INTERPRETED  # whose products know no bfloat16
        small = columns * states <= 4096
        tokens = 64 if bf16 or small else 32
        processors = 2 if INTERPRETED else num_multiprocessors(x.device)
        tiles = max(1, -(-length // tokens))
        wanted = max(1, _PROGRAMS * processors // max(1, batch * heads))
        rows = -(-tiles // min(tiles, wanted)) * tokens
        self.runs = max(1, -(-length // rows))
        self.programs = batch * self.runs * heads
        self.sizes = self.runs, length, rows
        # Loads that are in flight take shared memory, of `write` from what other programs have, of `gradient`, which
        # loads the next heads' tiles and states, more than there is where these are large.
        ahead = not INTERPRETED and shared_memory(x.device) >= AHEAD_BYTES
        self.stages = 1 if not ahead else 2 if small or columns > 256 else 3
        self.stages_of_gradient = 3 if ahead and columns <= 64 and states <= 128 else 1
        full = all(t.dtype == torch.float32 for t in (x, B, C))
        self.flags: dict[str, Any] = {
            "H": heads, "R": heads // groups, "P": head_dim, "N": state_dim, "BP": columns, "BN": states, "BT": tokens,
            "SOFTPLUS": dt_softplus, "BF16": bf16, "PRECISION": "tf32x3" if full else "tf32",
            "num_warps": 4 if small else 8,
        }  # fmt: skip
        self.memo = memo_of("nc_ssd", x.device, *map(Spec.of, tensors), dt_softplus)

    def states(self, name: str, v: Tensor, m: Tensor, dtype: torch.dtype, weighted: bool) -> Tensor:
        """Return Σ_t v[t] m[t]ᵀ (B, H, P, N), with the weights of x or without."""
        _, dt, A, _, _, _, dt_bias = self.tensors
        assert dt is not None and A is not None
        batch, _, heads, head_dim = v.shape
        state = torch.empty((batch, heads, head_dim, m.shape[3]), dtype=dtype, device=v.device)
        if not v.numel():
            return state.zero_()
        parts = torch.empty((self.runs, *state.shape), dtype=torch.float32, device=v.device)
        out = state if self.runs == 1 else parts
        launch(
            self.memo, name, kernels.write, (self.programs,),
            (v, dt, A, dt_bias, m, out, batch, *self.sizes, *v.stride(), *dt.stride(), *m.stride()),
            lambda: self.flags | {"WEIGHTED": weighted, "num_stages": self.stages},
        )  # fmt: skip
        if self.runs > 1:
            launch(
                self.memo, (name, "add"), kernels.add, (-(-state.numel() // 1024),),
                (parts, state, state.numel(), self.runs), lambda: {"BLOCK": 1024, "num_warps": 4},
            )  # fmt: skip
        return state


def _tile(size: int) -> int:
    return max(16, power_of_2(size))


def _columns_of_parts(x: Tensor, B: Tensor) -> int:
    """Return into how many columns heads are cut whose states are larger than MAX_STATE; 0 where they are not.

    Raises:
        BackendError: if 16 columns are too many.
    """
    head_dim, state_dim = x.shape[3], B.shape[3]
    if _tile(head_dim) * _tile(state_dim) <= MAX_STATE:
        return 0
    if (width := MAX_STATE // _tile(state_dim)) < 16:
        raise BackendError(
            f"nc_ssd: backend 'triton' takes up to {MAX_STATE // 16} states, not {state_dim}; "
            'use_backend("reference") runs anywhere'
        )
    return width


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
