"""`mambaverse bench scan_vs_attention`: milliseconds over the length L, as in Figure 8 of the Mamba paper.

- scan: `selective_scan` with all that an S6 layer gives it, 2048 channels and 16 states: the inner width of a layer of
  1024 channels;
- attention: `scaled_dot_product_attention`, causal, 16 heads of 64: the same layer's width;
- PyTorch scan: the same as "scan" in plain PyTorch, by the parallel scan of Hillis and Steele (1986): log2 L rounds,
  each of which combines every step with the one 2^k before it:

      (a, b)[t] <- (a[t] a[t - 2^k], a[t] b[t - 2^k] + b[t])     of h[t] = a[t] h[t-1] + b[t]

  It holds (B, L, D, N) tensors, and autograd keeps two a round. Where they would not fit, and beyond a length where it
  took too long, it is left out, and that is said.

The paper: Gu and Dao, 2023 (arXiv 2312.00752), section 4.5 and appendix E.5; it measured on an A100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu, softplus

from mambaverse.bench.operators import functions
from mambaverse.bench.options import dtype_name
from mambaverse.bench.report import Report, Row, noting
from mambaverse.bench.timing import Clock
from mambaverse.kernels.backend import use_backend
from mambaverse.kernels.selective_scan import selective_scan
from mambaverse.kernels.selective_scan.cases import Case, make_inputs
from mambaverse.kernels.testing import TOLERANCE, outputs_and_gradients, relative_rms

LENGTHS = {"cpu": (256, 512, 1024, 2048), "cuda": tuple(2**k for k in range(9, 17))}
TOKENS = {"cpu": 1, "cuda": 16384}  # of a batch: a GPU needs as many to be busy
CHANNELS, STATES, HEADS, HEAD_DIM = 2048, 16, 16, 64
CHECKED_LENGTH = 128  # of the run in float64
CPU_BYTES = 2 << 30  # that the PyTorch scan may take there
GPU_SHARE = 0.8  # of the free memory, likewise
PATIENCE_MS = 5000.0  # what takes the PyTorch scan longer is not tried at a greater length
SCAN, ATTENTION, PLAIN = "scan", "attention", "PyTorch scan"


def run(lengths: Sequence[int] | None, dtype: torch.dtype, clock: Clock, console: Console) -> Report:
    """Check the scans and time them and attention at each length.

    Args:
        lengths: Of the sequences; None: those of `LENGTHS` for the device.
        dtype: Of the inputs.
        clock: Times, and where.
        console: Where each length is announced.
    """
    errors = {SCAN: _error(_scan, dtype, clock.device), PLAIN: _error(plain_scan, dtype, clock.device)}
    rows: list[Row] = []
    too_slow: set[str] = set()
    for length in lengths or LENGTHS[clock.kind]:
        batch = max(1, TOKENS[clock.kind] // length)
        console.print(f"length {length:,}, batch {batch}", highlight=False)
        inputs = _inputs(batch, length, dtype, clock.device)
        q, k, v = (torch.randn(batch, HEADS, length, HEAD_DIM, dtype=dtype, device=clock.device) for _ in range(3))
        case = f"{length:,} x {batch}"
        found = {name: Row(case, name, x=length) for name in (SCAN, ATTENTION, PLAIN)}
        for name, (error, worst) in errors.items():
            found[name].error, found[name].worst = error, worst
            found[name].passes(TOLERANCE[dtype])
        if not found[SCAN].note:
            with noting(found[SCAN]):
                found[SCAN].measure(clock, *functions(_scan, inputs)[:2])
        with noting(found[ATTENTION]):
            found[ATTENTION].measure(clock, *functions(_attention, {"q": q, "k": k, "v": v})[:2])
        if not found[PLAIN].note:
            _measure_plain(found[PLAIN], batch, length, inputs, clock, too_slow)
        for name in (SCAN, PLAIN):
            found[name].compare(ATTENTION, found[ATTENTION])
        found[SCAN].compare(PLAIN, found[PLAIN])
        rows += found.values()
    report = Report("scan_vs_attention", dtype_name(dtype), clock.name, "function", rows, lines=True)
    report.captions += [
        f"case: length x batch; error: at {CHECKED_LENGTH} x 1",
        f"scan: {CHANNELS} channels, {STATES} states; attention: causal, {HEADS} heads of {HEAD_DIM}",
    ]
    return report


def plain_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """Return the selective scan y (B, L, D) in plain PyTorch, by Hillis and Steele's parallel scan, in float32.

    Args:
        u: Inputs (B, L, D); so are delta and z.
        delta: Step sizes before bias and softplus.
        A: Decay rates (D, N).
        B: Input weights (B, L, N).
        C: Output weights (B, L, N).
        D: Of the skip (D,).
        z: Gate.
        delta_bias: (D,).
    """
    x, dt = u.float(), softplus(delta.float() + delta_bias)
    a = torch.exp(dt[..., None] * A)  # (B, L, D, N)
    h = (dt * x)[..., None] * B.float()[:, :, None]
    step = 1
    while step < u.shape[1]:
        h = torch.cat([h[:, :step], torch.addcmul(h[:, step:], a[:, step:], h[:, :-step])], 1)
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], 1)
        step *= 2
    y = torch.einsum("bldn,bln->bld", h, C.float()) + D * x
    return (y * silu(z.float())).to(u.dtype)


def plain_bytes(batch: int, length: int) -> tuple[int, int]:
    """Return about how many bytes `plain_scan` takes: forward, forward and backward."""
    rounds = (length - 1).bit_length()
    tensor = 4 * batch * length * CHANNELS * STATES
    return 6 * tensor, (2 * rounds + 8) * tensor


def _measure_plain(
    row: Row, batch: int, length: int, inputs: dict[str, Tensor], clock: Clock, too_slow: set[str]
) -> None:
    """Time `plain_scan` as far as memory and patience go; `too_slow` says what took too long at a smaller length."""
    free: float = CPU_BYTES
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps counts as taken
        free = GPU_SHARE * torch.cuda.mem_get_info()[0]
    skipped = {}
    for what, needs in zip(("fwd", "fwd+bwd"), plain_bytes(batch, length), strict=True):
        if what in too_slow or needs > free:
            skipped[what] = "too slow" if what in too_slow else f"{needs / 1e9:.1f} GB"
    if "fwd" not in skipped:
        with noting(row):
            forward, step, _ = functions(plain_scan, inputs)
            row.measure(clock, forward, None if "fwd+bwd" in skipped else step, graph=False)
    row.note = row.note or "; ".join(f"{what} skipped: {why}" for what, why in skipped.items())
    too_slow |= {what for what, t in (("fwd", row.forward), ("fwd+bwd", row.step)) if t.ms > PATIENCE_MS}


def _scan(**inputs: Any) -> Tensor:
    return selective_scan(**inputs, delta_softplus=True, return_final_state=False)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def _inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    inputs: dict[str, Any] = make_inputs(Case("", "", batch, length, CHANNELS, STATES), dtype=dtype, device=device)
    del inputs["initial_state"]
    return inputs


def _error(scan: Callable[..., Tensor], dtype: torch.dtype, device: torch.device) -> tuple[float, str]:
    """Return the largest relative RMS error against float64, and what has it."""
    inputs = _inputs(1, CHECKED_LENGTH, dtype, device)
    with use_backend("reference"):
        expected = outputs_and_gradients(_scan, {name: value.double() for name, value in inputs.items()})
    errors = {k: relative_rms(v, expected[k]) for k, v in outputs_and_gradients(scan, inputs).items()}
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst
