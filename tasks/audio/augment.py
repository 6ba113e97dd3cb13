"""How training varies clips; every choice is drawn from the generator that is handed in.

On the waveform: a random piece of a long clip, speed (and with it pitch), level, place in time, white noise.
On the spectrogram: tempo alone, the length of the vocal tract alone (Jaitly and Hinton 2013), and SpecAugment's masks
(Park et al. 2019). On a batch: mixup of waveforms (Zhang et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class Augment:
    """Variations of a waveform (L,), in the order in which they are applied.

    Attributes:
        max_samples: Longer clips are cut to a piece of that length, at a random place.
        speed: Largest relative change of speed.
        gain_db: Largest change of level, in dB.
        roll_samples: Largest move in time.
        noise: Largest level of white noise, relative to the clip's.
    """

    max_samples: int
    speed: float = 0.0
    gain_db: float = 0.0
    roll_samples: int = 0
    noise: float = 0.0

    def __call__(self, waveform: Tensor, generator: Generator) -> Tensor:
        """Return a varied waveform."""
        if (room := len(waveform) - self.max_samples) > 0:
            start = int(torch.randint(room + 1, (), generator=generator))
            waveform = waveform[start : start + self.max_samples]
        if self.speed:
            waveform = change_speed(waveform, 1 + self.speed * _signed(generator))
        if self.roll_samples:
            waveform = roll(
                waveform, int(torch.randint(2 * self.roll_samples + 1, (), generator=generator)) - self.roll_samples
            )
        if self.gain_db:
            waveform = waveform * 10 ** (self.gain_db * _signed(generator) / 20)
        if self.noise:
            level = self.noise * float(torch.rand((), generator=generator)) * waveform.square().mean().sqrt()
            waveform = waveform + level * torch.randn(len(waveform), generator=generator)
        return waveform


def change_speed(waveform: Tensor, factor: float) -> Tensor:
    """Return waveform (L,) played `factor` times as fast, (L / factor,): its spectrum is cut or filled up."""
    length = max(round(len(waveform) / factor), 1)
    if length == len(waveform):
        return waveform
    spectrum = torch.fft.rfft(waveform)
    return torch.fft.irfft(spectrum, n=length) * (length / len(waveform))


def roll(waveform: Tensor, samples: int) -> Tensor:
    """Return waveform (L,) moved by `samples`, earlier if negative, of the same length; what enters is silence."""
    return F.pad(waveform, (samples, -samples)) if abs(samples) < len(waveform) else torch.zeros_like(waveform)


def draw_spectrogram(generator: Generator) -> Tensor:
    """Return six numbers in [0, 1) that decide how a spectrogram is varied.

    Width and place of its mask in frequency, likewise in time; its tempo; its frequencies.
    """
    return torch.rand(6, generator=generator)


def change_tempo(x: Tensor, lengths: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return spectrograms x (B, T, F) of `lengths` (B,) played `factors` (B,) times as fast, and their lengths.

    Frames are interpolated linearly; the pitch stays.
    """
    new = (lengths / factors).round().long().clamp(min=1)
    at = torch.arange(int(new.max())) * ((lengths - 1) / (new - 1).clamp(min=1))[:, None]  # ends meet ends
    return interpolate(x, torch.minimum(at, (lengths - 1)[:, None].float()), 1), new


def warp_frequencies(x: Tensor, factors: Tensor, centres: Tensor) -> Tensor:
    """Return spectrograms x (B, T, F) with all frequencies multiplied by `factors` (B,); time stays.

    Args:
        x: Log-mel energies.
        factors: Above 1 as of a shorter vocal tract.
        centres: The bands' frequencies in Hz (F,), evenly spaced on the mel scale.
    """
    mels = 1127 * torch.log1p(centres / 700)
    wanted = 1127 * torch.log1p(centres / factors[:, None] / 700)  # (B, F): what was there before
    at = (wanted - mels[0]) / (mels[1] - mels[0])
    return interpolate(x, at.clamp(0, len(centres) - 1), 2)


def interpolate(x: Tensor, at: Tensor, axis: int) -> Tensor:
    """Return x (B, T, F) at the places `at` (B, N) of an axis, 1 or 2, between neighbours linearly."""
    low = at.long().clamp(max=x.shape[axis] - 1)
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    shape = (-1, -1, x.shape[2]) if axis == 1 else (-1, x.shape[1], -1)
    share, low, high = ((t.unsqueeze(3 - axis)).expand(*shape) for t in (at - low, low, high))
    return torch.lerp(x.gather(axis, low), x.gather(axis, high), share.to(x.dtype))


def spec_augment(x: Tensor, draws: Tensor, lengths: Tensor, freq_mask: int, time_mask: int) -> Tensor:
    """Overwrite bands and frames of normalised spectrograms with their mean, 0.

    Args:
        x: (B, T, F).
        draws: What `draw_spectrogram` drew, (B, 4 or more).
        lengths: Their frames (B,).
        freq_mask: Most bands hidden.
        time_mask: Most frames hidden; never more than half of a clip.

    Returns:
        (B, T, F), a new tensor.
    """
    u = draws
    bands, frames = x.shape[2], lengths
    width = (u[:, 0] * (min(freq_mask, bands) + 1)).long()
    start = (u[:, 1] * (bands - width + 1)).long()
    at = torch.arange(bands)
    hidden_bands = (at >= start[:, None]) & (at < (start + width)[:, None])  # (B, F)
    most = torch.minimum(torch.full_like(frames, time_mask), frames // 2)
    width = (u[:, 2] * (most + 1)).long()
    start = (u[:, 3] * (frames - width + 1)).long()
    at = torch.arange(x.shape[1])
    hidden_frames = (at >= start[:, None]) & (at < (start + width)[:, None])  # (B, T)
    return x.masked_fill(hidden_bands[:, None, :] | hidden_frames[:, :, None], 0)


def mix_waveforms(
    waveforms: Sequence[Tensor],
    targets: Tensor,
    num_classes: int,
    alpha: float,
    generator: Generator,
    smoothing: float = 0.0,
) -> tuple[list[Tensor], Tensor]:
    """Mix each clip with another of the batch, λ : 1 - λ with λ ~ Beta(α, α) for each pair.

    Both are padded to the longer one; returns the clips and the weights of their classes (B, classes), of which
    `smoothing` is the share that is spread over all classes.
    """
    order = torch.randperm(len(waveforms), generator=generator)
    numpy_draws = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    shares = torch.from_numpy(numpy_draws.beta(alpha, alpha, len(waveforms))).float()
    mixed = []
    for waveform, other, share in zip(waveforms, order.tolist(), shares.tolist(), strict=True):
        longest = max(len(waveform), len(waveforms[other]))
        a, b = (F.pad(part, (0, longest - len(part))) for part in (waveform, waveforms[other]))
        mixed.append(share * a + (1 - share) * b)
    weights = F.one_hot(targets, num_classes).float() * (1 - smoothing) + smoothing / num_classes
    return mixed, shares[:, None] * weights + (1 - shares[:, None]) * weights[order]


def _signed(generator: Generator) -> float:
    """Return a number in [-1, 1)."""
    return 2 * float(torch.rand((), generator=generator)) - 1
