"""The `data` and `task` sections of an audio run."""

from __future__ import annotations

from dataclasses import dataclass

from mambaverse.config import ConfigError, SplitConfig
from mambaverse.engine.classifier import ClassifierConfig
from mambaverse.tasks.audio.fbank import FbankOptions

INPUTS = ("fbank", "waveform")
NORMALIZE = ("dataset", "clip", "band")
MAX_GAIN = 120  # dB, from the softest sample of 20 bits to full scale; far beyond it floats end


@dataclass
class AudioDataConfig(SplitConfig):
    """Which clips, what the model sees of them, and how training varies them."""

    rate: int = 16_000  # Hz, to which files of other rates are resampled
    input: str | None = None  # fbank or waveform; None: what the model takes
    bins: int = 128  # mel bands of the filter bank
    frame_ms: float = 25.0  # length of its frames,
    shift_ms: float = 10.0  # and their distance
    low_hz: float = 20.0  # its lowest frequency,
    high_hz: float | None = None  # and its highest; None: half the rate
    window: str = "hanning"
    coefficients: int | None = None  # so many cepstral coefficients (MFCC) in place of the bands; None: the bands
    frames: int | None = None  # pad with zeros or cut every spectrogram to so many; None: as long as the clip
    max_seconds: float = 30.0  # longer clips: a random piece in training, else the mean over all their pieces
    normalize: str = "dataset"  # by `mean` and `std`; clip: by each clip's own; band: the mean by band, too
    mean: list[float] | None = None  # of the model's input: one number, or one for each coefficient;
    std: list[float] | None = None  # None: of the training clips. Audio Mamba and AST divide by twice the deviation
    cache_mb: int = 1024  # decoded clips are kept up to so much, in each loading process
    speed: float = 0.0  # play a clip faster or slower by up to this share; its pitch changes with it
    gain_db: float = 0.0  # make it louder or softer by up to so much
    roll_ms: float = 0.0  # move it forth or back by up to so much, filled up with silence
    noise: float = 0.0  # add white noise of up to this share of its level (RMS)
    tempo: float = 0.0  # play a spectrogram faster or slower by up to this share; its pitch stays
    warp: float = 0.0  # multiply its frequencies by up to this share more or less; its tempo stays
    freq_mask: int = 0  # hide up to so many bands
    time_mask: int = 0  # hide up to so many frames

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        super().__post_init__()
        if self.input not in (None, *INPUTS):
            raise ConfigError(f"data.input: expected fbank or waveform, got {self.input!r}")
        if self.normalize not in NORMALIZE:
            raise ConfigError(f"data.normalize: expected {', '.join(NORMALIZE)}, got {self.normalize!r}")
        if not 100 <= self.rate <= 768_000:
            raise ConfigError(f"data.rate: expected 100 to 768000 Hz, got {self.rate}")
        if self.frames is not None and self.frames < 1:
            raise ConfigError(f"data.frames: expected at least 1, got {self.frames}")
        if self.max_seconds <= 0:
            raise ConfigError(f"data.max_seconds: expected more than 0, got {self.max_seconds}")
        if self.coefficients is not None and not 1 <= self.coefficients <= self.bins:
            raise ConfigError(f"data.coefficients: expected 1 to {self.bins} (data.bins), got {self.coefficients}")
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and len(values) not in (1, self.coefficients):
                raise ConfigError(f"data.{key}: expected one number, or one for each coefficient, got {values}")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"data.std: expected more than 0, got {self.std}")
        if not 0 <= self.gain_db <= MAX_GAIN:
            raise ConfigError(f"data.gain_db: expected 0 to {MAX_GAIN} dB, got {self.gain_db}")
        for key in ("cache_mb", "roll_ms", "noise", "freq_mask", "time_mask"):
            if (value := getattr(self, key)) < 0:
                raise ConfigError(f"data.{key}: expected at least 0, got {value}")
        for key in ("speed", "tempo", "warp"):
            if not 0 <= (value := getattr(self, key)) < 1:
                raise ConfigError(f"data.{key}: expected a share in [0, 1), got {value}")
        self.fbank()

    def fbank(self) -> FbankOptions:
        """Return the options of the filter bank."""
        high = self.rate / 2 if self.high_hz is None else self.high_hz
        return FbankOptions(self.rate, self.bins, self.frame_ms, self.shift_ms, self.low_hz, high, self.window)


@dataclass
class AudioTaskConfig(ClassifierConfig):
    """How labels are softened and clips mixed while training."""

    mixup: float = 0.0  # α of mixup's Beta(α, α), of waveforms; 0: off
    mixup_prob: float = 1.0  # probability that a batch is mixed

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        super().__post_init__()
        if self.mixup < 0:
            raise ConfigError(f"task.mixup: expected at least 0, got {self.mixup}")
        if not 0 <= self.mixup_prob <= 1:
            raise ConfigError(f"task.mixup_prob: expected a probability, got {self.mixup_prob}")
