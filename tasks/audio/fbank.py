"""Log-mel filter banks as Kaldi computes them, in torch: batched, differentiable, on any device.

    frames      x[160 i .. 160 i + 400) of 16-kHz audio (25 ms every 10 ms), only whole ones ("snip edges")
    each frame  minus its mean;  y[n] = x[n] - 0.97 x[max(n - 1, 0)];  times the window;  zeros up to 512 samples
    power       |DFT(y)|^2 at the 256 frequencies below Nyquist's
    mel         M[b, k]: triangles of equal width on the scale 1127 ln(1 + f / 700), between 20 and 8000 Hz
    out         ln max(M power, ε),  ε = 2^-23

Source: Kaldi, feat/feature-window.cc, feature-fbank.cc and mel-computations.cc (no dither, no energy, htk_compat), with
the constants of AST (Gong et al. 2021) and Audio Mamba (Erol et al. 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.errors import UserError, suggest

EPSILON = 2.0**-23  # least energy of a filter, before the logarithm
WINDOWS = ("hanning", "hamming", "povey", "rectangular")


@dataclass(frozen=True)
class FbankOptions:
    """What a filter bank is made of; times in ms, frequencies in Hz."""

    rate: int = 16_000
    bins: int = 128  # mel filters
    frame_ms: float = 25.0
    shift_ms: float = 10.0
    low_hz: float = 20.0
    high_hz: float = 8_000.0
    window: str = "hanning"
    preemphasis: float = 0.97

    def __post_init__(self) -> None:
        """Check that they fit each other."""
        if not 2 <= self.bins <= 1024:
            raise UserError(f"fbank: bins: expected 2 to 1024, got {self.bins}")
        if self.frame_ms <= 0 or self.shift_ms <= 0 or self.shift_samples < 1 or self.frame_samples < 3:
            what = f"fbank: frames of {self.frame_ms} ms every {self.shift_ms} ms are too short at {self.rate} Hz"
            raise UserError(f"{what}: expected 3 samples (a window of 2 is all 0) every 1 or more")
        if not 0 <= self.low_hz < self.high_hz <= self.rate / 2:
            raise UserError(
                f"fbank: expected 0 <= low_hz < high_hz <= {self.rate / 2:g} (half the sample rate), "
                f"got {self.low_hz:g} and {self.high_hz:g}"
            )
        if self.window not in WINDOWS:
            raise UserError(f"fbank: unknown window {self.window!r}{suggest(self.window, WINDOWS)}")

    @property
    def frame_samples(self) -> int:
        """Samples of a frame."""
        return int(self.rate * self.frame_ms / 1000)

    @property
    def shift_samples(self) -> int:
        """Samples from one frame to the next."""
        return int(self.rate * self.shift_ms / 1000)

    @property
    def fft_samples(self) -> int:
        """Length of the DFT: the power of 2 that holds a frame."""
        return int(2 ** math.ceil(math.log2(self.frame_samples)))

    def num_frames(self, samples: int) -> int:
        """Return the number of frames of a clip; a clip shorter than a frame is filled up with zeros to one."""
        return 1 + max(samples - self.frame_samples, 0) // self.shift_samples


class Fbank(nn.Module):
    """The filter bank of `options`; its window and filters are buffers that no state dict holds."""

    window: Tensor
    filters: Tensor

    def __init__(self, options: FbankOptions | None = None) -> None:
        super().__init__()
        self.options = options or FbankOptions()
        self.register_buffer("window", make_window(self.options.window, self.options.frame_samples), persistent=False)
        self.register_buffer("filters", mel_filters(self.options).T.contiguous(), persistent=False)  # (K, bins)

    def forward(self, waveform: Tensor) -> Tensor:
        """Return log-mel energies (..., T, bins) of waveforms (..., L), floats in [-1, 1], in their dtype.

        Of a batch padded behind its clips, the frames i < `num_frames(length)` see no padding. All is computed in
        float64, which autocast leaves alone: in float32 the rounding of the spectrum, 1e-7 of the loudest band, shows
        in the quiet ones, by up to 3e-4.

        Raises:
            UserError: waveforms that are no floats, such as the 16-bit integers of a file.
        """
        if not waveform.is_floating_point():
            given = str(waveform.dtype).removeprefix("torch.")
            raise UserError(f"fbank: expected waveforms of floats in [-1, 1], got {given}")
        options = self.options
        if waveform.shape[-1] < options.frame_samples:
            waveform = F.pad(waveform, (0, options.frame_samples - waveform.shape[-1]))
        frames = waveform.unfold(-1, options.frame_samples, options.shift_samples).double()
        frames = frames - frames.mean(-1, keepdim=True)
        if options.preemphasis:
            before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
            frames = torch.add(frames, before, alpha=-options.preemphasis)
        spectrum = torch.fft.rfft(frames * self.window, n=options.fft_samples)[
            ..., :-1
        ]  # the filters end below Nyquist's
        parts = torch.view_as_real(spectrum)  # squared apart: a sum over the last axis, of 2, takes 15 times as long
        power = parts[..., 0].square() + parts[..., 1].square()  # (..., T, K)
        return (power @ self.filters.double()).clamp(min=EPSILON).log().to(waveform.dtype)

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Return the numbers of frames (B,) of clips of `lengths` (B,) samples."""
        options = self.options
        return 1 + (lengths - options.frame_samples).clamp(min=0) // options.shift_samples


def make_window(name: str, samples: int) -> Tensor:
    """Return a symmetric window (samples,) float64: "hanning", "hamming", "povey" (Kaldi's own) or "rectangular"."""
    if name == "hanning":
        return torch.hann_window(samples, periodic=False, dtype=torch.float64)
    if name == "hamming":
        return torch.hamming_window(samples, periodic=False, dtype=torch.float64)
    if name == "povey":
        return torch.hann_window(samples, periodic=False, dtype=torch.float64) ** 0.85
    return torch.ones(samples, dtype=torch.float64)


def mel_filters(options: FbankOptions) -> Tensor:
    """Return the triangles (bins, K) float64 over the K = fft_samples / 2 frequencies below Nyquist's.

    A filter that is narrower than the grid of frequencies may hold none of them (one of 128 at 16 kHz does); its
    energy is then ε.
    """
    low, high = mel(options.low_hz), mel(options.high_hz)
    step = (high - low) / (options.bins + 1)
    left = low + step * torch.arange(options.bins, dtype=torch.float64)[:, None]
    grid = torch.arange(options.fft_samples // 2, dtype=torch.float64) * options.rate / options.fft_samples
    at = 1127 * torch.log1p(grid / 700)
    rising, falling = (at - left) / step, (left + 2 * step - at) / step
    return torch.minimum(rising, falling).clamp(min=0)


def centres(options: FbankOptions) -> Tensor:
    """Return the bands' frequencies in Hz (bins,)."""
    low, high = mel(options.low_hz), mel(options.high_hz)
    at = low + (high - low) / (options.bins + 1) * torch.arange(1, options.bins + 1)
    return 700 * torch.expm1(at / 1127)


def cosine_transform(bins: int, coefficients: int) -> Tensor:
    """Return the matrix (bins, coefficients) that turns log-mel energies into cepstral coefficients.

    The first columns of the orthonormal DCT-II: √(2 / F) cos(π k (n + 1/2) / F), divided by √2 for k = 0.
    """
    n, k = torch.arange(bins, dtype=torch.float64)[:, None] + 0.5, torch.arange(coefficients, dtype=torch.float64)
    matrix = math.sqrt(2 / bins) * torch.cos(math.pi * k * n / bins)
    matrix[:, 0] /= math.sqrt(2)
    return matrix.float()


def mel(hz: float) -> float:
    """Return a frequency on the mel scale: 1127 ln(1 + f / 700)."""
    return 1127 * math.log1p(hz / 700)
