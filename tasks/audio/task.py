"""Audio classification: clips of any length as log-mel spectrograms or waveforms, cross-entropy over their classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

from mambaverse.config import ConfigError, RunConfig
from mambaverse.datasets import get_dataset, refuse_unread
from mambaverse.engine.classifier import Classifier
from mambaverse.engine.data import to_device
from mambaverse.engine.task import Batch, Sample, SampleSet, fact, register_task
from mambaverse.ensemble import members_of
from mambaverse.errors import UserError
from mambaverse.models import MODELS
from mambaverse.splits import write_split
from mambaverse.tasks.audio.augment import (
    Augment,
    change_tempo,
    draw_spectrogram,
    mix_waveforms,
    spec_augment,
    warp_frequencies,
)
from mambaverse.tasks.audio.baselines import mfcc_baselines
from mambaverse.tasks.audio.checkpoints import load_aum
from mambaverse.tasks.audio.clips import AudioSplits, Clips, warn_of
from mambaverse.tasks.audio.config import AudioDataConfig, AudioTaskConfig
from mambaverse.tasks.audio.explain import draw_clip, piece_shares
from mambaverse.tasks.audio.figures import spectrogram_sheet
from mambaverse.tasks.audio.frontend import STATISTICS_CLIPS, FrontEnd
from mambaverse.tasks.audio.reading import list_audio, read_audio

PIECES = 64  # of long clips, that the model is given at once in evaluation


class AudioSamples:
    """Clips with their labels: "waveform" (L,), varied and with "draws" in training, and "target"."""

    def __init__(self, clips: Clips, augment: Augment) -> None:
        self.clips, self.augment = clips, augment
        self.targets = clips.labels.tolist()

    def __len__(self) -> int:
        return len(self.clips)

    def sample(self, index: int, generator: Generator | None) -> Sample:
        """Return clip `index`; with a generator varied by its draws, with None whole and as it is."""
        waveform, target = self.clips.load(index), self.targets[index]
        if generator is None:
            return {"waveform": waveform, "target": target}
        return {"waveform": self.augment(waveform, generator), "target": target, "draws": draw_spectrogram(generator)}


@register_task("audio")
class AudioTask(Classifier):
    """Audio classification, of any data set "audio/..." and any model of spectrograms or waveforms with lengths."""

    data_config = AudioDataConfig
    task_config = AudioTaskConfig
    decided: ClassVar[Mapping[str, str]] = {
        **Classifier.decided,
        "bins": "set data.bins or data.coefficients",
    }

    front: FrontEnd

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert isinstance(config.data, AudioDataConfig) and isinstance(config.task, AudioTaskConfig)
        self.data, self.options = config.data, config.task
        self.max_samples = max(round(self.data.max_seconds * self.data.rate), 1)
        self._splits: AudioSplits | None = None

    def setup(self) -> None:
        """Open the data set. The inputs' mean and deviation go into the config, so that a run keeps them."""
        data = self.data
        if self._kind() == "waveform":
            refuse_unread(data, f"model.name={self.config.model.name}", "waveform", "frames", "coefficients")
        splits: AudioSplits = get_dataset(data.name, "audio").open(data)
        parts = (splits.train, splits.eval, splits.test)
        sets = [None if part is None else self._clips(part, splits.classes) for part in parts]
        assert sets[0] is not None and sets[1] is not None
        self.classes, self._splits, self.skipped = list(splits.classes), splits, len(splits.skipped)
        warn_of([line for clips in sets if clips is not None for line in clips.preload()], data.name)
        self.front = FrontEnd(self._kind(), data)
        if data.normalize == "dataset" and (data.mean is None or data.std is None):
            step = max(len(sets[0]) // STATISTICS_CLIPS, 1)
            pieces = [sets[0].load(i)[: self.max_samples] for i in range(0, len(sets[0]), step)]
            mean, std = self.front.statistics(pieces)
            data.mean, data.std = mean if data.mean is None else data.mean, std if data.std is None else data.std
        self._set_normalisation(data.mean, data.std)
        roll = round(data.roll_ms * data.rate / 1000)
        augment = Augment(self.max_samples, data.speed, data.gain_db, roll, data.noise)
        self.train_set, self.eval_set = AudioSamples(sets[0], augment), AudioSamples(sets[1], augment)
        self.test_set = None if sets[2] is None else AudioSamples(sets[2], augment)

    def facts(self) -> dict[str, Any]:
        """Return classes, and the inputs' mean and deviation."""
        return {"classes": list(self.classes), "mean": self.data.mean, "std": self.data.std}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take them over from a run."""
        super().restore(facts)
        self._set_normalisation(*(fact(facts, key, list[float] | None) for key in ("mean", "std")))

    def save_split(self, folder: Path) -> Path | None:
        """Write the clips of all sets to split.csv, with hashes."""
        assert self._splits is not None
        return write_split(folder / "split.csv", self._splits.rows())

    def model_arguments(self) -> dict[str, Any]:
        """Return classes, and for a model of spectrograms its bands and (where they are fixed) frames."""
        arguments = super().model_arguments()
        if self._kind() == "fbank":
            arguments["bins"] = self.data.coefficients or self.data.bins
            if self.data.frames is not None and "frames" not in self.config.model.args:
                arguments["frames"] = self.data.frames
        return arguments

    def build_model(self) -> nn.Module:
        """See `Classifier.build_model`; a mixer that needs a grid needs clips of one length."""
        model = super().build_model()
        if self.data.frames is None and any(getattr(one, "needs_spatial_shape", False) for one in members_of(model)):
            raise UserError(
                f"model.mixer={self.config.model.mixer}: needs the tokens to be one grid, the same for all clips; set "
                "data.frames, to which they are filled up or cut"
            )
        return model

    def load_checkpoint(self, model: nn.Module, path: Path) -> None:
        """Start from a weights file, ours or Audio or Vision Mamba's authors'; a head for other classes starts anew."""
        self.load_for_classes(model, path, load_aum, ("head", "wide"))

    def collate(self, samples: Sequence[Sample], generator: Generator | None) -> Batch:
        """Make "input" (fbank (B, T, F) or waveform (B, L)), normalised, and "lengths" (B,) in frames or samples.

        With a generator, spectrograms are masked and, with mixup on, targets are (B, classes). Without one, clips
        longer than data.max_seconds are cut into equal pieces, one row each, and "owner" (rows,) says whose they are.
        """
        waveforms = [sample["waveform"] for sample in samples]
        batch: dict[str, Any] = {}
        if "target" in samples[0]:
            batch["target"] = torch.tensor([sample["target"] for sample in samples])
        if generator is None:
            waveforms, batch["owner"] = self._pieces(waveforms)
        elif self.options.mixup and float(torch.rand((), generator=generator)) < self.options.mixup_prob:
            how = (len(self.classes), self.options.mixup, generator, self.options.label_smoothing)
            waveforms, batch["target"] = mix_waveforms(waveforms, batch["target"], *how)
        if generator is None:
            batch["input"], batch["lengths"] = self.front(waveforms)
            return batch
        draws = torch.stack([sample["draws"] for sample in samples])
        batch["input"], batch["lengths"] = self.front(waveforms, partial(self._vary, draws))
        if self.front.kind == "fbank" and (self.data.freq_mask or self.data.time_mask):
            sizes = (self.data.freq_mask, self.data.time_mask)
            batch["input"] = spec_augment(batch["input"], draws, batch["lengths"], *sizes)
        return batch

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (B, classes); those of a clip in pieces are the mean over them."""
        owner = batch.get("owner")
        if owner is None or len(owner) == int(owner[-1]) + 1:
            return self._run(model, batch["input"], batch["lengths"])
        parts = zip(batch["input"].split(PIECES), batch["lengths"].split(PIECES), strict=True)
        logits = torch.cat([self._run(model, x, lengths).float() for x, lengths in parts])
        sums = logits.new_zeros(int(owner[-1]) + 1, logits.shape[1]).index_add(0, owner, logits)
        return sums / owner.bincount()[:, None]

    def labels_of(self, samples: SampleSet) -> np.ndarray:
        """Return the class numbers (N,) of a set, without decoding its clips."""
        assert isinstance(samples, AudioSamples)
        return samples.clips.labels.numpy()

    def baselines(self) -> dict[str, Callable[[], np.ndarray]]:
        """Return the majority, and support vector machines on MFCC."""
        return super().baselines() | mfcc_baselines(self.train_set, self.reported_set, self.data.rate)

    def describe(self) -> dict[str, str]:
        """Return what the head of a run says of the clips and of how training varies them."""
        assert self._splits is not None and isinstance(self.train_set, AudioSamples)
        sizes = " + ".join(
            f"{len(part):,}" for part in (self.train_set, self.eval_set, self.test_set) if part is not None
        )
        text = f"{self.data.name}, {sizes} clips at {self.data.rate / 1000:g} kHz"
        if seconds := self.train_set.clips.seconds():
            text += f" of {min(seconds):.2g} to {max(seconds):.2g} s"
        text += f", {len(self.classes)} classes"
        described = {"data": f"{text} ({self._splits.note})" if self._splits.note else text, "input": self._input()}
        if parts := list(self._augmentations()):
            described["augmentation"] = ", ".join(parts)
        return described

    def figures(self, folder: Path, model: nn.Module, outputs: Tensor, targets: Tensor) -> list[Path]:
        """Draw the spectrograms with what the model says of them, predictions.png."""
        samples = self.reported_set
        return [spectrogram_sheet(folder / "predictions.png", samples, self.front, outputs, targets, self.classes)]

    def explain(self, path: Path, model: nn.Module, name: str, sample: Sample) -> None:
        """Draw what speaks for the class in a clip; of a long one the piece that says most for it."""
        batch = to_device(self.collate([sample], None), next(model.parameters()).device)
        run = partial(self._run, model)
        with torch.no_grad():
            chances = self.probabilities(self.forward(model, batch))[0]
            label = int(chances.argmax())
            pieces = self.probabilities(run(batch["input"], batch["lengths"]))[:, label]
        piece = int(pieces.argmax())
        x, length = batch["input"][piece], batch["lengths"][piece]
        shares = piece_shares(run, x, length, label)
        count = int(length)
        seconds = count / self.data.rate if x.ndim == 1 else count * self.data.shift_ms / 1000
        where = "" if len(pieces) == 1 else f", piece {piece + 1} of {len(pieces)}"
        said = f"{self.classes[label]} {chances[label]:.2f}"
        draw_clip(path, f"{Path(name).name}{where}", said, seconds, x[:count].cpu(), shares[:count].cpu())

    def load_inputs(self, paths: Sequence[str]) -> Iterator[tuple[str, Callable[[], Sample]]]:
        """Yield a loader for each audio file, and for each one in a folder."""
        for path in map(Path, paths):
            files = list_audio(path) if path.is_dir() else [path]
            if not files:
                raise UserError(f"{path}: a folder without audio files")
            yield from ((str(file), partial(self._load, file)) for file in files)

    def _load(self, path: Path) -> Sample:
        return {"waveform": torch.from_numpy(read_audio(path, self.data.rate))}

    def _run(self, model: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        return model(x) if self.front.frames is not None else model(x, lengths=lengths)

    def _vary(self, draws: Tensor, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Change the tempo and the frequencies of spectrograms (B, T, F), as `draws` (B, 6) decide."""
        if self.data.tempo:
            x, lengths = change_tempo(x, lengths, 1 + self.data.tempo * (2 * draws[:, 4] - 1))
        if self.data.warp:
            x = warp_frequencies(x, 1 + self.data.warp * (2 * draws[:, 5] - 1), self.front.centres)
        return x, lengths

    def _clips(self, part: Any, classes: Sequence[str]) -> Clips:
        return Clips(part, classes, self.data.rate, self.data.cache_mb * 2**20)

    def _kind(self) -> str:
        """Return what the model takes: fbank or waveform.

        Raises:
            ConfigError: `data.input` is not what it takes.
        """
        name, asked = self.config.model.name, self.data.input
        model = MODELS.entry(name).tags.get("model") if name in MODELS else None
        takes = getattr(model, "input_kind", asked or "fbank")
        if asked not in (None, takes):
            raise ConfigError(f"data.input={asked}: the model {name} takes {takes}; leave it out")
        return takes

    def _pieces(self, waveforms: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Cut long clips into the fewest equal pieces; return them and the clip that each is of."""
        cut = [list(waveform.chunk(-(-len(waveform) // self.max_samples))) for waveform in waveforms]
        owner = [clip for clip, pieces in enumerate(cut) for _ in pieces]
        return [piece for pieces in cut for piece in pieces], torch.tensor(owner)

    def _set_normalisation(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        self.front = FrontEnd(self._kind(), self.data, mean or (0.0,), std or (1.0,))

    def _input(self) -> str:
        data = self.data
        own = {"clip": "each by its own mean and deviation", "band": "each band by its own mean in a clip"}
        how = own.get(data.normalize) or "each coefficient by mean and deviation"
        if data.normalize == "dataset" and data.mean is not None and data.std is not None and len(data.mean) == 1:
            how = f"mean {data.mean[0]:g}, std {data.std[0]:g}"
        if self.front.kind == "waveform":
            return f"waveforms, {how}"
        long = f", {data.frames} frames" if data.frames else ""
        kind = f"{data.coefficients} MFCC of {data.bins} bands" if data.coefficients else f"log-mel, {data.bins} bands"
        return f"{kind}, {data.frame_ms:g} ms every {data.shift_ms:g} ms{long}, {how}"

    def _augmentations(self) -> list[str]:
        data, options, spectral = self.data, self.options, self.front.kind == "fbank"
        named = {
            f"speed ±{data.speed:.0%}": data.speed,
            f"level ±{data.gain_db:g} dB": data.gain_db,
            f"roll ±{data.roll_ms:g} ms": data.roll_ms,
            f"noise {data.noise:g}": data.noise,
            f"tempo ±{data.tempo:.0%}": spectral and data.tempo,
            f"frequencies ±{data.warp:.0%}": spectral and data.warp,
            f"masks of {data.freq_mask} bands": spectral and data.freq_mask,
            f"masks of {data.time_mask} frames": spectral and data.time_mask,
            f"mixup {options.mixup:g}": options.mixup,
            f"label smoothing {options.label_smoothing:g}": options.label_smoothing,
        }
        return [text for text, used in named.items() if used]
