"""A whole Caduceus-PS on one GPU, forward and backward, and what its scans and convolutions would take in mamba_ssm.

The peer's number is an estimate: our model's time without its scans and convolutions, plus theirs as measured one by
one on the same kind of GPU (`PEER_MS`, at one strand and one direction or two): a Caduceus block runs two scans with
flipped copies, and two convolutions, for each of the two strands. Matrix products are counted once in both.

    python benchmarks/dna_caduceus.py --length 131072
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from mambaverse.kernels.causal_conv1d import causal_conv1d
from mambaverse.kernels.selective_scan import bidirectional_selective_scan
from mambaverse.models import create_model

DIM, DEPTH, INNER, STATE, WIDTH = 256, 16, 512, 16, 4
PEER_LENGTH = 131_072  # of the peer's times
PEER_MS = {"scans": 19.66, "conv": 0.721}  # mamba_ssm 2.3.2.post1 (two scans, flips), causal_conv1d 1.7.0; H100, bf16
STRANDS, DIRECTIONS = 2, 2


def milliseconds(run: Callable[[], None], repeats: int) -> float:
    """Return the median time of `run` on the GPU, after two calls that are not timed."""
    times = []
    for i in range(2 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def scans(length: int) -> Callable[[], None]:
    """Return forward and backward of one block's scan: both strands, both directions."""

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)

    def pair(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
        """Return what each direction has of its own, as a mixer does: not in one tensor, to which gradients go back."""
        return tuple(random(*shape, dtype=dtype) for _ in range(DIRECTIONS))

    u, delta = (pair(STRANDS, length, INNER) for _ in range(2))
    z = random(STRANDS, length, INNER)
    A = tuple((-torch.rand(INNER, STATE, device="cuda") - 0.1).requires_grad_() for _ in range(DIRECTIONS))
    B, C = (pair(STRANDS, length, 1, STATE) for _ in range(2))
    D, bias = (pair(INNER, dtype=torch.float32) for _ in range(2))
    inputs, grad = (*u, *delta, *A, *B, *C, *D, z, *bias), torch.randn_like(z)

    def run() -> None:
        y = bidirectional_selective_scan(u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True, merge="add")
        torch.autograd.grad(y, inputs, grad)

    return run


def convolutions(length: int) -> Callable[[], None]:
    """Return forward and backward of one block's convolutions: both strands, both directions."""
    x = torch.randn(STRANDS, length, INNER, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(INNER, WIDTH, device="cuda", requires_grad=True)
    bias, grad = torch.randn(INNER, device="cuda", requires_grad=True), torch.randn_like(x)

    def run() -> None:
        for reverse in (False, True):
            y = causal_conv1d(x, weight, bias, activation="silu", reverse=reverse)
            torch.autograd.grad(y, (x, weight, bias), grad)

    return run


def main() -> None:
    """Time the parts, then the model, and print both with the estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=PEER_LENGTH, help="bases")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    scan, conv = milliseconds(scans(args.length), args.repeats), milliseconds(convolutions(args.length), args.repeats)
    model = create_model(f"caduceus_ps_d{DIM}_n{DEPTH}", num_classes=2).cuda()
    ids, target = torch.randint(7, 11, (1, args.length), device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(ids).float(), target)
        loss.backward()
        model.zero_grad()

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    whole = milliseconds(step, args.repeats)
    share = args.length / PEER_LENGTH
    their_scan, their_conv = STRANDS * PEER_MS["scans"] * share, STRANDS * DIRECTIONS * PEER_MS["conv"] * share
    theirs = whole + DEPTH * (their_scan + their_conv - scan - conv)
    name, gib = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**30
    print(f"{name}, torch {torch.__version__}; Caduceus-PS d{DIM} n{DEPTH}, L = {args.length:,}, bf16, both passes; ms")
    for what, ours, peer in (
        ("a block's scans, and mamba_ssm's with flips", scan, their_scan),
        ("a block's convolutions, and causal_conv1d's", conv, their_conv),
        ("the model, and the estimate", whole, theirs),
    ):
        print(f"{what:45} {ours:9.2f} {peer:9.2f}   {peer / ours:.2f}x")
    print(f"{args.length / whole * 1e3:,.0f} tokens a second, {gib:.1f} GiB at most")


if __name__ == "__main__":
    main()
