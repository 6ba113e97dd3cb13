"""From waveforms of any lengths to the padded, normalised batch that a model takes: log-mel spectrograms, or samples.

fbank       (B, T, F), x = (log-mel - mean) / std;  with data.frames padded with 0 or cut to T before that, as AST does
waveform    (B, L)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mambaverse.tasks.audio.config import AudioDataConfig
from mambaverse.tasks.audio.fbank import Fbank, centres, cosine_transform

STATISTICS_CLIPS = 1000  # evenly spaced training clips, of which mean and deviation are taken
Vary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
LEAST_STD = 1e-5  # of what is normalised: silence stays 0
PORTION = 2**20  # samples whose spectrograms are computed at once: on the way each takes over 100 bytes


class FrontEnd:
    """Makes batches.

    Args:
        kind: "fbank" or "waveform".
        config: The filter bank, the number of frames, and how to normalise.
        mean: Of the inputs, and
        std: their deviation, for `normalize` "dataset".
    """

    def __init__(
        self, kind: str, config: AudioDataConfig, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
    ) -> None:
        self.kind, self.normalize, self.rate = kind, config.normalize, config.rate
        self.fbank = Fbank(config.fbank())
        self.centres = centres(self.fbank.options)
        self.frames = config.frames if kind == "fbank" else None
        self.transform = None
        if kind == "fbank" and config.coefficients is not None:
            self.transform = cosine_transform(config.bins, config.coefficients)
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def __call__(self, waveforms: Sequence[Tensor], vary: Vary | None = None) -> tuple[Tensor, Tensor]:
        """Return inputs and their lengths (B,) in frames or samples; what is behind them is 0.

        `vary` changes spectrograms before they are normalised: it takes and returns (x, lengths).
        """
        x, lengths = self.raw(waveforms)
        if vary is not None and self.kind == "fbank":
            x, lengths = vary(x, lengths)
            x = x * _inside(x, lengths)
        if self.transform is not None:
            x = x @ self.transform
        if self.frames is not None:
            x = F.pad(x, (0, 0, 0, max(self.frames - x.shape[1], 0)))[:, : self.frames]
            lengths = torch.full_like(lengths, self.frames)
        if self.normalize == "dataset":
            return (x - self.mean) / self.std * _inside(x, lengths), lengths
        return self._by_itself(x.view(*x.shape[:2], -1), lengths).view(x.shape), lengths

    def _by_itself(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return x (B, T, F), each clip minus its mean (of all, or of each band), over its deviation."""
        inside, count = _inside(x, lengths), lengths[:, None, None]
        mean = (x * inside).double().sum(1, keepdim=True) / count  # in float64: that of silence is exact
        if self.normalize == "clip":
            mean = mean.mean(2, keepdim=True)
        centred = (x - mean.float()) * inside
        std = (centred.double().square().sum((1, 2), keepdim=True) / (count * x.shape[2])).sqrt()
        return centred / std.float().clamp(min=LEAST_STD)

    def raw(self, waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the same without normalisation, and of the clips' own lengths."""
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        x = pad_sequence(list(waveforms), batch_first=True)
        if self.kind == "waveform":
            return x, lengths
        lengths = self.fbank.num_frames(lengths)
        x = self.spectrogram(x)
        return x * _inside(x, lengths), lengths

    @torch.no_grad()
    def spectrogram(self, waveforms: Tensor) -> Tensor:
        """Return log-mel energies (B, T, F) of waveforms (B, L); of many they are computed some rows at a time."""
        rows = max(PORTION // max(waveforms.shape[1], 1), 1)
        return torch.cat([self.fbank(part) for part in waveforms.split(rows)])

    def statistics(self, waveforms: Sequence[Tensor]) -> tuple[list[float], list[float]]:
        """Return mean and deviation of the inputs that clips make: of all numbers, or of each coefficient."""
        count, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for waveform in waveforms:
            x = self.raw([waveform])[0]
            x = x @ self.transform if self.transform is not None else x.view(-1, 1)
            x = x.double().reshape(-1, x.shape[-1])
            count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        return [_rounded(m) for m in mean.tolist()], [_rounded(s) if s > LEAST_STD else 1.0 for s in std.tolist()]


def _rounded(value: float) -> float:
    """Return four decimals of a number, or below 1 four digits: the deviation of quiet waveforms is 0.0001."""
    return round(value, 4) if abs(value) >= 1 else float(f"{value:.4g}")


def _inside(x: Tensor, lengths: Tensor) -> Tensor:
    """Return which places of x (B, L, ...) belong to clips of `lengths` (B,): (B, L) and as many axes as x."""
    inside = torch.arange(x.shape[1]) < lengths[:, None]
    return inside.view(*inside.shape, *[1] * (x.ndim - 2))
