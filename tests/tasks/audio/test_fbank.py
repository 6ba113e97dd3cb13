"""The filter bank: Kaldi's numbers, an independent reference, gradients, speed."""

from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch

from mambaverse.errors import UserError
from mambaverse.tasks.audio.clips import Source
from mambaverse.tasks.audio.datasets.mandarin_tones import EMBEDDED
from mambaverse.tasks.audio.fbank import Fbank, FbankOptions, mel_filters

OPTIONS = {
    "ast": FbankOptions(),  # the constants of AST and Audio Mamba
    "kaldi": FbankOptions(window="povey", bins=23),  # Kaldi's own defaults
    "narrow": FbankOptions(window="hamming", bins=40, shift_ms=5, frame_ms=32, low_hz=50, high_hz=3500),  # 512 = 2^9
    "rectangular": FbankOptions(window="rectangular", bins=40, preemphasis=0.0),
}
STORED = (
    Path(__file__).parent / "kaldi_fbank.npz"
)  # torchaudio 2.9.1, compliance.kaldi.fbank in float64, every 4th frame


def speech(name: str = "f/000_1.wav") -> torch.Tensor:
    return torch.from_numpy(Source(EMBEDDED, name).read(16_000))


@pytest.mark.parametrize("name", ["f/000_1.wav", "f/020_4.wav"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_speech_gives_kaldis_numbers(name: str, kind: str) -> None:
    with np.load(STORED) as stored:
        theirs = torch.from_numpy(stored[f"{name}:{kind}"])
    ours = Fbank(OPTIONS[kind])(speech(name))[::4]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def reference(x: np.ndarray, o: FbankOptions) -> np.ndarray:
    """Kaldi's algorithm, frame by frame and filter by filter, in float64."""
    n, fft = o.frame_samples, 512
    cosine = np.cos(2 * np.pi * np.arange(n) / (n - 1))
    window = {
        "hanning": 0.5 - 0.5 * cosine, "hamming": 0.54 - 0.46 * cosine, "povey": (0.5 - 0.5 * cosine) ** 0.85,
        "rectangular": np.ones(n),
    }[o.window]  # fmt: skip
    edges = np.linspace(1127 * np.log(1 + o.low_hz / 700), 1127 * np.log(1 + o.high_hz / 700), o.bins + 2)
    rows = []
    for start in range(0, len(x) - n + 1, o.shift_samples):
        frame = x[start : start + n] - x[start : start + n].mean()
        emphasised = [frame[i] - o.preemphasis * frame[max(i - 1, 0)] for i in range(n)]
        power = np.abs(np.fft.rfft(np.array(emphasised) * window, fft)) ** 2
        row = []
        for left, centre, right in zip(edges, edges[1:], edges[2:], strict=False):
            energy = 0.0
            for k in range(fft // 2):
                at = 1127 * np.log(1 + k * o.rate / fft / 700)
                if left < at < right:
                    weight = (at - left) / (centre - left) if at <= centre else (right - at) / (right - centre)
                    energy += weight * power[k]
            row.append(np.log(max(float(energy), 2.0**-23)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("kind", OPTIONS)
def test_it_is_the_algorithm_written_out(kind: str) -> None:
    x = speech()[2000:4000].double()
    expected = torch.from_numpy(reference(x.numpy(), OPTIONS[kind]))
    torch.testing.assert_close(Fbank(OPTIONS[kind])(x), expected, atol=1e-6, rtol=0)


def test_gradients_are_right() -> None:
    bank = Fbank(FbankOptions(rate=2000, bins=6, high_hz=1000))
    x = torch.randn(2, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(bank, x, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_autocast_changes_nothing_and_shorter_floats_are_rounded_once(dtype: torch.dtype, error: float) -> None:
    x = speech()[2000:6000].to(dtype)
    alone = Fbank()(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert Fbank()(x).equal(alone) and alone.dtype == dtype
    torch.testing.assert_close(alone.double(), Fbank()(x.double()), atol=error, rtol=0)


def test_integers_are_refused() -> None:
    with pytest.raises(UserError, match=r"fbank: expected waveforms of floats in \[-1, 1\], got int16"):
        Fbank()((speech() * 32768).to(torch.int16))


def test_frames_of_a_padded_batch_see_no_padding() -> None:
    bank, clips = Fbank(), [speech(), speech("f/020_4.wav")[:3000], speech()[:100]]
    lengths = torch.tensor([len(clip) for clip in clips])
    batch = bank(torch.nn.utils.rnn.pad_sequence(clips, batch_first=True))
    for row, clip, frames in zip(batch, clips, bank.num_frames(lengths).tolist(), strict=True):
        assert bank.options.num_frames(len(clip)) == frames
        torch.testing.assert_close(row[:frames], bank(clip), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("seconds", "frames"), [(10.0, 998), (10.24, 1022), (1.0, 98), (0.025, 1), (0.01, 1)])
def test_numbers_of_frames(seconds: float, frames: int) -> None:
    x = torch.zeros(round(seconds * 16_000))
    out = Fbank()(x)
    assert out.shape == (frames, 128)
    torch.testing.assert_close(out, torch.full_like(out, np.log(2.0**-23)))  # silence is the least energy, no -inf


def test_one_of_128_filters_holds_no_frequency_of_the_grid() -> None:
    empty = (mel_filters(FbankOptions()).sum(1) == 0).nonzero().flatten()
    assert len(empty) == 1


def test_it_is_a_hundred_times_faster_than_real_time() -> None:
    bank, x, seconds = Fbank(), torch.randn(1, 160_000), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            began = perf_counter()
            bank(x)
            seconds.append(perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    assert 10 / min(seconds) > 100  # 1,090 were measured (benchmarks/audio_fbank.py)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 1}, "bins: expected 2 to 1024, got 1"),
        ({"frame_ms": 0.0}, "frames of 0.0 ms every 10.0 ms are too short"),
        ({"rate": 100, "high_hz": 50.0}, "25.0 ms every 10.0 ms are too short at 100 Hz: expected 3 samples"),
        ({"shift_ms": 0.01}, "frames of 25.0 ms every 0.01 ms are too short"),
        ({"rate": 8000}, r"expected 0 <= low_hz < high_hz <= 4000 \(half the sample rate\), got 20 and 8000"),
        ({"low_hz": 9000.0}, "expected 0 <= low_hz < high_hz"),
        ({"window": "hannning"}, "unknown window 'hannning', did you mean 'hanning'"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FbankOptions(**options)
