"""In-silico mutagenesis of a causal model: mutants read on from the state before them, beside full forward passes.

Of the full passes a sample is timed, and the numbers of both are compared there; the time of all is that of the sample
times how many there are. Both are in fp32.

    python benchmarks/dna_mutagenesis.py --model dna_mamba_d64_n2 --length 10000 --places 1000
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch

import mambaverse
from mambaverse.tasks.dna.interpret.mutagenesis import mutagenesis
from mambaverse.tasks.dna.reader import Reader
from mambaverse.tasks.dna.tokens import A, T


def seconds(run: Callable[[], np.ndarray], device: str) -> tuple[np.ndarray, float]:
    """Return what `run` returns, and how long it took."""
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def main() -> None:
    """Time both ways for the last places of a window, and for those at its centre."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dna_mamba_d64_n2")
    parser.add_argument("--length", type=int, default=10_000, help="bases of the window")
    parser.add_argument("--places", type=int, default=1_000, help="that are mutated")
    parser.add_argument("--sample", type=int, default=40, help="places of which all three mutants are read whole")
    parser.add_argument("--batch-size", type=int, help="windows of one pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = mambaverse.create_model(given.model, head="causal_lm").to(given.device)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(20)  # else all bases are about as likely, and nothing changes
    reader = Reader(model, batch_size=given.batch_size)
    ids = np.random.default_rng(0).integers(A, T + 1, given.length).astype(np.uint8)
    name = torch.cuda.get_device_name() if given.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{given.model}, {name}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{given.places:,} of {given.length:,} bases, {reader.rows(given.length)} windows a pass")
    middle = (given.length - given.places) // 2
    for what, start in (("last", given.length - given.places), ("centre", middle)):
        end = start + given.places
        mutagenesis(reader, ids, end - 10, end)  # compiles what has to be
        first = start + (given.places - given.sample) // 2
        whole, sampled_s = seconds(
            lambda first=first: mutagenesis(reader, ids, first, first + given.sample, reuse=False), given.device
        )
        reused, reused_s = seconds(lambda start=start, end=end: mutagenesis(reader, ids, start, end), given.device)
        whole_s = sampled_s * given.places / given.sample
        gap = np.abs(reused[first - start : first - start + given.sample] - whole).max()
        print(
            f"{what:>6}: reused {reused_s:8.2f} s, {3 * given.places:,} full passes {whole_s:8.1f} s (of "
            f"{3 * given.sample} timed), {whole_s / reused_s:5.2f} times; "
            f"largest gap {gap:.1e} of {np.abs(whole).max():.2f}"
        )


if __name__ == "__main__":
    main()
