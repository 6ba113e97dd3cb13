"""The floor of an audio task: support vector machines on mel-frequency cepstral coefficients.

    MFCC        the first 20 coefficients of the cosine transform of a log-mel spectrogram of 40 bands
    shape       every coefficient at 20 evenly spaced times (linear interpolation): 400 numbers that keep the order
    statistics  mean and deviation of the coefficients and of their differences over a clip: 80 numbers

Each number is scaled to deviation 1 on the training clips, then an SVM with a Gaussian kernel, C = 10.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch

from mambaverse.engine.task import SampleSet
from mambaverse.tasks.audio.fbank import Fbank, FbankOptions, cosine_transform

COEFFICIENTS, TIMES, BANDS = 20, 20, 40
C = 10.0  # of the SVM
Features = tuple[tuple[np.ndarray, np.ndarray], np.ndarray]


def mfcc_baselines(train: SampleSet, held_out: SampleSet, rate: int) -> dict[str, Callable[[], np.ndarray]]:
    """Return the floors by name: each learns from `train` and returns class numbers for `held_out`."""

    @cache  # both floors see the same coefficients
    def features() -> list[Features]:
        return [_features(part, rate) for part in (train, held_out)]

    return {"MFCC 20 x 20, SVM": partial(_fit, features, 0), "MFCC statistics, SVM": partial(_fit, features, 1)}


def _fit(features: Callable[[], list[Features]], kind: int) -> np.ndarray:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    (x, y), (x_new, _) = features()
    return make_pipeline(StandardScaler(), SVC(C=C)).fit(x[kind], y).predict(x_new[kind])


def _features(samples: SampleSet, rate: int) -> Features:
    """Return (shape (N, 400), statistics (N, 80)) of the clips of a set, and their class numbers (N,)."""
    bank = Fbank(FbankOptions(rate, bins=BANDS, high_hz=rate / 2))
    rows = [samples.sample(i, None) for i in range(len(samples))]
    coefficients = [mfcc(row["waveform"], bank) for row in rows]
    shape, statistics = (np.stack([f(c) for c in coefficients]) for f in (shape_of, statistics_of))
    return (shape, statistics), np.array([row["target"] for row in rows])


def mfcc(waveform: torch.Tensor, bank: Fbank) -> np.ndarray:
    """Return the coefficients (T, 20) of a waveform (L,)."""
    return (bank(waveform) @ cosine_transform(BANDS, COEFFICIENTS)).numpy()


def shape_of(coefficients: np.ndarray) -> np.ndarray:
    """Return coefficients (T, 20) at 20 evenly spaced times, (400,)."""
    at = np.linspace(0, len(coefficients) - 1, TIMES)
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, len(coefficients) - 1), (at - low)[:, None]
    return ((1 - share) * coefficients[low] + share * coefficients[high]).ravel()


def statistics_of(coefficients: np.ndarray) -> np.ndarray:
    """Return mean and deviation of coefficients (T, 20) and of their differences in time, (80,)."""
    steps = np.diff(coefficients, axis=0) if len(coefficients) > 1 else np.zeros_like(coefficients)
    return np.concatenate([coefficients.mean(0), coefficients.std(0), steps.mean(0), steps.std(0)])
