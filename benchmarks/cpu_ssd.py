"""ssd on the CPU beside chunked SSD in torch with autograd and transformers': equal numbers first, then the time.

    python benchmarks/cpu_ssd.py [--quick] [--seconds 10]

Errors are relative RMS against float64 on the first sequence, the worst of the output and the gradients. "of peak" is
the arithmetic that the chunked algorithm needs, over the time, over what torch reaches here in one large float32 matrix
product. transformers (`pip install '.[bench]'`) is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial

import numba
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from peers import missing
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mambaverse.kernels.ssd import ssd
from mambaverse.kernels.ssd.cases import TIMED, Case
from mambaverse.kernels.ssd.layout import cpu_chunk_size
from mambaverse.kernels.testing import relative_rms

Inputs = dict[str, Tensor]
Op = Callable[..., Tensor]


def draw(case: Case) -> Inputs:
    """Return inputs with step sizes and decays as in Mamba-2: Δ about 0.01, A from -16 to -1."""
    tokens = case.batch, case.length
    inputs = {
        "x": torch.randn(*tokens, case.heads, case.head_dim),
        "dt": torch.randn(*tokens, case.heads),
        "A": -torch.empty(case.heads).uniform_(1, 16),
        "B": torch.randn(*tokens, case.groups, case.state_dim),
        "C": torch.randn(*tokens, case.groups, case.state_dim),
        "D": torch.ones(case.heads),
        "dt_bias": torch.full((case.heads,), -4.6),
    }
    return {k: v.requires_grad_() for k, v in inputs.items()}


def ours(inputs: Inputs) -> Tensor:
    return ssd(**inputs, dt_softplus=True)


def chunked_torch(inputs: Inputs) -> Tensor:
    """Batched products per chunk and head, the states by a loop over chunks; gradients by autograd."""
    x, dt, A, B, C, D, dt_bias = inputs.values()
    heads, q = x.shape[2], 64
    skip = D[:, None] * x
    dt = F.softplus(dt + dt_bias)
    padding = -x.shape[1] % q
    x, B, C = (F.pad(t, (0, 0, 0, 0, 0, padding)) for t in (x, B, C))
    dt = F.pad(dt, (0, 0, 0, padding))
    x = rearrange(x * dt[..., None], "b (k q) h p -> b h k q p", q=q)
    B, C = (rearrange(t, "b (k q) g n -> b g k q n", q=q) for t in (B, C))
    scores = repeat(C @ B.mT, "b g k i j -> b (g r) k i j", r=heads // B.shape[1])
    B, C = (repeat(t, "b g k q n -> b (g r) k q n", r=heads // t.shape[1]) for t in (B, C))
    log = rearrange(dt * A, "b (k q) h -> b h k q", q=q).cumsum(-1)
    decay = (log[..., :, None] - log[..., None, :]).masked_fill(torch.ones(q, q).triu(1).bool(), -torch.inf).exp()
    y = (scores * decay) @ x
    added = B.mT @ (x * (log[..., -1:] - log).exp()[..., None])
    state, states = torch.zeros_like(added[:, :, 0]), []
    for k in range(added.shape[2]):
        states.append(state)
        state = log[:, :, k, -1].exp()[..., None, None] * state + added[:, :, k]
    y = y + log.exp()[..., None] * (C @ torch.stack(states, 2))
    return rearrange(y, "b h k q p -> b (k q) h p")[:, : skip.shape[1]] + skip


def transformers_torch(inputs: Inputs) -> Tensor:
    """The torch path of transformers' Mamba-2, with the chunk that its configurations have."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    x, dt, A, B, C, D, dt_bias = inputs.values()
    result = mamba2_chunk_scan(x, dt, A, B, C, chunk_size=256, D=D, dt_bias=dt_bias, dt_softplus=True)
    return result[0] if isinstance(result, tuple) else result


OPS: dict[str, Op] = {"ours": ours, "torch, chunked": chunked_torch, "transformers": transformers_torch}


def gradients(op: Op, inputs: Inputs) -> list[Tensor]:
    y = op(inputs)
    return [y, *torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))]


def error(op: Op, inputs: Inputs) -> float:
    """Return the worst relative RMS error of `op` on the first sequence, against the reference in float64."""
    first = {k: (v[:1] if v.ndim > 2 else v).detach() for k, v in inputs.items()}
    exact = gradients(ours, {k: v.double().requires_grad_() for k, v in first.items()})
    actual = gradients(op, {k: v.requires_grad_() for k, v in first.items()})
    return max(relative_rms(a, e) for a, e in zip(actual, exact, strict=True))


def least_ms(functions: list[Callable[[], object]], seconds: float) -> list[float]:
    """Return the least time in ms of each function; all run in turn, at least three times, for about `seconds`."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    end = time.perf_counter() + seconds
    while len(times[-1]) < 3 or time.perf_counter() < end:
        for record, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            record.append(1e3 * (time.perf_counter() - start))
    return [min(record) for record in times]


def gflop(case: Case) -> tuple[float, float]:
    """Return the arithmetic of forward and of backward in GFLOP, triangular halves counted as halves."""
    tokens = case.batch * case.length
    q = -(-case.length // -(-case.length // cpu_chunk_size(case.state_dim)))
    inside = 2 * tokens * case.heads * case.head_dim * q / 2
    states = 2 * tokens * case.heads * case.head_dim * case.state_dim
    scores = 2 * tokens * case.groups * case.state_dim * q / 2
    return (inside + 2 * states + scores) / 1e9, (2 * inside + 4 * states + 3 * scores) / 1e9


def peak_gflops() -> float:
    a = torch.randn(2048, 2048)
    return 2 * 2.048**3 / (1e-3 * least_ms([lambda: a @ a], 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first shape only, for two seconds")
    parser.add_argument("--seconds", type=float, default=10, help="time for each shape and direction; the least counts")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases, seconds = (TIMED[:1], 2.0) if arguments.quick else (TIMED, arguments.seconds)
    console = Console()
    if without := missing("transformers"):
        del OPS["transformers"]
        console.print(without, markup=False)
    peak = peak_gflops()
    console.print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"numba {numba.__version__}; large float32 matrix product: {peak:.0f} GFLOP/s"
    )
    table = Table(title="ssd on the CPU, fp32, dt_bias, softplus and D; least time in ms")
    for column in ("B, L, H, P, N", "what", "error", "fwd", "fwd + bwd", "ours faster by", "of peak, fwd | fwd + bwd"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for case in cases:
        inputs = draw(case)
        plain = {k: v.detach() for k, v in inputs.items()}
        forward = least_ms([partial(op, plain) for op in OPS.values()], seconds)
        both = least_ms([partial(gradients, op, inputs) for op in OPS.values()], seconds)
        work = gflop(case)
        for i, (name, op) in enumerate(OPS.items()):
            shape = f"{case.batch}, {case.length}, {case.heads}, {case.head_dim}, {case.state_dim}"
            share = f"{1e5 * work[0] / forward[i] / peak:.0f} % | {1e5 * sum(work) / both[i] / peak:.0f} %"
            faster = f"{forward[i] / forward[0]:.1f}x | {both[i] / both[0]:.1f}x" if i else ""
            table.add_row(
                "" if i else shape, name, f"{error(op, inputs):.1e}", f"{forward[i]:.2f}", f"{both[i]:.2f}", faster,
                share if not i else "",
            )  # fmt: skip
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
