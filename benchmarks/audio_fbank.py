"""The filter bank's speed, as a multiple of real time on one core: ours, and torchaudio's where it is installed.

python benchmarks/audio_fbank.py [--seconds 10] [--repeat 10]
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from datetime import date
from time import perf_counter

import torch
from torch import Tensor

from mambaverse.tasks.audio.fbank import Fbank

RATE = 16_000


def fastest(function: Callable[[Tensor], object], x: Tensor, repeat: int) -> float:
    """Return the least seconds of `repeat` calls, after one that is not counted."""
    times = []
    for _ in range(repeat + 1):
        began = perf_counter()
        function(x)
        times.append(perf_counter() - began)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip")
    parser.add_argument("--repeat", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bank = Fbank()
    print(f"128 bands, 25 ms every 10 ms at 16 kHz, one thread, torch {torch.__version__}, {date.today()}")
    for batch in (1, 16):
        x = 0.1 * torch.randn(batch, int(arguments.seconds * RATE))
        seconds = fastest(bank, x, arguments.repeat)
        print(f"{batch} clip(s) of {arguments.seconds:g} s: {batch * arguments.seconds / seconds:,.0f} x real time")
    if importlib.util.find_spec("torchaudio") is None:
        print("torchaudio: not installed, not measured")
        return
    from torchaudio.compliance.kaldi import fbank  # type: ignore[import-not-found, unused-ignore]

    options = {"num_mel_bins": 128, "window_type": "hanning", "htk_compat": True, "dither": 0.0}
    x = 0.1 * torch.randn(1, int(arguments.seconds * RATE))
    seconds = fastest(lambda wave: fbank(wave, sample_frequency=RATE, **options), x, arguments.repeat)
    print(f"torchaudio, 1 clip of {arguments.seconds:g} s: {arguments.seconds / seconds:,.0f} x real time")


if __name__ == "__main__":
    main()
