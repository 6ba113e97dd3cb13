"""The audio task: batches, models, evaluation of long clips, predictions, pictures, floors, and what it refuses."""

from __future__ import annotations

import csv
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image
from torch import Tensor

from mambaverse.cli import main
from mambaverse.config import compose, to_yaml
from mambaverse.errors import UserError
from mambaverse.mixers import MIXERS, list_mixers
from mambaverse.tasks.audio import frontend
from mambaverse.tasks.audio.baselines import mfcc
from mambaverse.tasks.audio.task import AudioTask
from mambaverse.tasks.audio.wav import write_wav
from tests.tasks.audio.conftest import raw_wav, tone

Make = Callable[..., AudioTask]
Draw = Callable[[int], torch.Generator]


def batch_of(task: AudioTask, n: int, draw: Draw | None = None) -> dict[str, Any]:
    rows = [task.train_set.sample(i, None if draw is None else draw(i)) for i in range(n)]
    return dict(task.collate(rows, None if draw is None else draw(99)))


AUGMENTED = (
    "data.speed=0.2", "data.gain_db=6", "data.roll_ms=20", "data.noise=0.1", "data.tempo=0.2",
    "data.warp=0.1", "data.freq_mask=8", "data.time_mask=6",
    "task.mixup=0.4",
)  # fmt: skip


def test_a_batch_is_normalised_by_the_training_clips(make_task: Make, tiny: str) -> None:
    task = make_task(tiny)
    batch = batch_of(task, len(task.train_set))
    inside = torch.arange(batch["input"].shape[1]) < batch["lengths"][:, None]
    values = batch["input"][inside]
    assert abs(values.mean().item()) < 1e-3 and values.std().item() == pytest.approx(1, abs=1e-3)
    assert not batch["input"][~inside].any() and batch["target"].dtype == torch.int64
    assert batch["lengths"].tolist() == [
        1 + (len(task.train_set.sample(i, None)["waveform"]) - 400) // 160 for i in range(len(task.train_set))
    ]


@pytest.mark.parametrize("how", ["clip", "band"])
@pytest.mark.parametrize("kind", ["fbank", "waveform"])
def test_normalised_by_itself_a_clip_is_the_same_at_any_level(make_task: Make, tiny: str, kind: str, how: str) -> None:
    task = make_task(tiny, f"data.normalize={how}", f"data.input={kind}")
    clips = [tone(500, 0.3), tone(700, 0.2), np.zeros(2000, np.float32)]
    loud, soft = (
        task.collate([{"waveform": torch.from_numpy(clip * level)} for clip in clips], None) for level in (1, 0.25)
    )
    assert loud["input"][2].eq(0).all()  # silence
    torch.testing.assert_close(loud["input"], soft["input"], atol=5e-3, rtol=1e-2)
    for row, length in zip(loud["input"][:2], loud["lengths"][:2].tolist(), strict=True):
        values = row[:length]
        means = values.mean(0) if how == "band" else values.mean()
        assert means.abs().max() < 1e-4 and values.square().mean().item() == pytest.approx(1, abs=1e-3)
        assert row[length:].eq(0).all()


def test_quiet_waveforms_are_normalised_like_loud_ones(make_task: Make, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):  # at -80 dB, as a recording of 24 bits may be
            quiet = tone(500, level=1e-4, seed=i) - tone(500, level=0, seed=i)  # without its noise
            (tmp_path / name / f"{i}.wav").write_bytes(raw_wav(quiet.tobytes(), bits=32, code=3))
    task = make_task("audio/folder", f"data.root={tmp_path}", "model.name=audio_raw_nano")
    assert task.data.std == [pytest.approx(1e-4 / 2**0.5, rel=1e-3)]
    assert batch_of(task, 2)["input"].std().item() == pytest.approx(1, rel=1e-3)


def test_the_same_draws_make_the_same_batch(make_task: Make, tiny: str, draw: Draw) -> None:
    first, second = (batch_of(make_task(tiny, *AUGMENTED), 9, draw) for _ in range(2))
    assert first["input"].equal(second["input"]) and first["target"].equal(second["target"])
    assert first["target"].shape == (9, 4) and "owner" not in first


def test_mixed_labels_are_smoothed_too(make_task: Make, tiny: str, draw: Draw) -> None:
    sharp, soft = (
        batch_of(make_task(tiny, "task.mixup=0.4", f"task.label_smoothing={share}"), 9, draw) for share in (0, 0.2)
    )
    assert soft["input"].equal(sharp["input"])
    torch.testing.assert_close(soft["target"], 0.8 * sharp["target"] + 0.2 / sharp["target"].shape[1])


def test_a_worker_process_makes_the_same_batch(make_task: Make, tiny: str, draw: Draw) -> None:
    task = make_task(tiny, *AUGMENTED)
    samples, collate = pickle.loads(pickle.dumps((task.train_set, task.collate)))
    batch = collate([samples.sample(i, draw(i)) for i in range(6)], draw(99))
    assert batch["input"].equal(batch_of(task, 6, draw)["input"])


def test_spectrograms_of_long_clips_take_little_memory(
    make_task: Make, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tiny, "data.max_seconds=0.1")
    sample = {"waveform": torch.from_numpy(tone(300, 1.0))}
    whole, sizes = task.collate([sample], None), []
    monkeypatch.setattr(frontend, "PORTION", 4000)
    task.front.fbank.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].numel()))
    parts = task.collate([sample], None)
    assert sizes == [3200] * 5 and parts["input"].shape == (10, 8, 32)
    torch.testing.assert_close(parts["input"], whole["input"])


def test_fixed_frames_are_padded_with_zeros_before_they_are_normalised(make_task: Make, tiny: str) -> None:
    task = make_task(tiny, "data.frames=40", "data.mean=[-6.0]", "data.std=[8.0]")
    batch = task.collate([{"waveform": torch.from_numpy(tone(500, s))} for s in (0.2, 0.8)], None)
    assert batch["input"].shape == (2, 40, 32)
    torch.testing.assert_close(batch["input"][0, 18:], torch.full((22, 32), 0.75))  # as AST and Audio Mamba have it
    model: Any = task.build_model()
    assert model.frames == 40 and task.forward(model, batch).shape == (2, 4)


def test_coefficients_are_each_normalised_and_are_the_floors_own(make_task: Make, tiny: str) -> None:
    task = make_task(tiny, "data.bins=40", "data.coefficients=20")
    batch = batch_of(task, len(task.train_set))
    values = batch["input"][torch.arange(batch["input"].shape[1]) < batch["lengths"][:, None]]
    assert values.shape[1] == 20
    torch.testing.assert_close(values.mean(0), torch.zeros(20), atol=1e-3, rtol=0)
    torch.testing.assert_close(values.std(0), torch.ones(20), atol=1e-3, rtol=0)
    assert "20 MFCC of 40 bands, 25 ms every 10 ms, each coefficient by mean" in task.describe()["input"]
    assert task.forward(task.build_model(), batch).shape == (108, 4)
    waveform = task.train_set.sample(0, None)["waveform"]
    theirs = scipy.fft.dct(task.front.fbank(waveform).numpy(), axis=1, norm="ortho")[:, :20]
    np.testing.assert_allclose(mfcc(waveform, task.front.fbank), theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=audio_raw_nano", "data.input=fbank"], "data.input=fbank: the model audio_raw_nano takes wav"),
        (["data.input=waveform"], "the model aum_nano_patch128x2_128x128 takes fbank; leave it out"),
        (["model.name=audio_raw_nano", "data.frames=9"], "raw_nano: data.frames=9 is read of no waveform; take it out"),
        (["model.mixer=ss2d"], "model.mixer=ss2d: needs the tokens to be one grid, the same for all clips; set "),
        (["model.mixer=[s6,ss2d]", "model.members=2"], "needs the tokens to be one grid"),
    ],
)
def test_what_the_model_cannot_take_is_told_before_it_trains(
    make_task: Make, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_task("audio/mandarin_tones", *overrides).build_model()


def test_the_model_decides_what_it_is_given(make_task: Make, tiny: str) -> None:
    spectrograms = make_task(tiny)
    assert spectrograms.front.kind == "fbank" and "log-mel, 32 bands" in spectrograms.describe()["input"]
    waveforms = make_task(tiny, "model.name=audio_raw_nano")
    assert batch_of(waveforms, 3)["input"].ndim == 2 and "waveforms" in waveforms.describe()["input"]
    assert waveforms.build_model()(torch.randn(1, 500)).shape == (1, 4)


@pytest.mark.parametrize("config", ["drums", "folder", "fsdd", "mandarin_tones", "speech_commands"])
def test_the_model_of_each_shipped_config_takes_its_clips(make_task: Make, config: str) -> None:
    task = make_task(f"audio/{config}", "model.args.depth=1", setup=False)
    task.restore({"classes": ["a", "b"], "mean": [-6.0], "std": [4.0]})
    batch = task.collate([{"waveform": torch.from_numpy(tone(300, s, task.data.rate))} for s in (0.01, 0.5)], None)
    with torch.no_grad():
        output = task.forward(task.build_model().eval(), batch)
    assert output.shape == (2, 2) and output.isfinite().all()


@pytest.mark.parametrize("mixer", list_mixers())
def test_any_mixer_takes_a_step(make_task: Make, mixer: str, draw: Draw) -> None:
    one_length = ["data.frames=64"] if MIXERS.get(mixer).needs_spatial_shape else []
    task = make_task(
        "audio/mandarin_tones", f"model.mixer={mixer}", "model.args={depth: 2, embed_dim: 16}", *one_length
    )
    result = task.step(task.build_model().train(), batch_of(task, 4, draw))
    result["loss"].backward()
    assert result["loss"].isfinite() and result["output"].shape == (4, 4)


def test_a_long_clip_is_cut_into_equal_pieces_whose_logits_are_averaged(make_task: Make, tiny: str) -> None:
    task = make_task(tiny, "data.max_seconds=0.25")
    model = task.build_model()
    long, short = (torch.from_numpy(tone(400, seconds)) for seconds in (3.1, 0.2))
    batch = task.collate([{"waveform": long}, {"waveform": short}], None)
    assert batch["owner"].tolist() == [0] * 13 + [1] and len(batch["input"]) == 14
    logits = task.forward(model, batch)
    pieces = [task.forward(model, task.collate([{"waveform": p}], None)) for p in long.chunk(13)]
    torch.testing.assert_close(logits[0], torch.cat(pieces).mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1:], task.forward(model, task.collate([{"waveform": short}], None)))


def test_a_clip_is_labelled_the_same_in_any_batch(make_task: Make) -> None:
    task = make_task("audio/mandarin_tones", "model.args={depth: 2, embed_dim: 16}")
    model = task.build_model().eval()
    rows = [task.eval_set.sample(i, None) for i in range(6)]
    with torch.no_grad():
        together = task.forward(model, task.collate(rows, None))
        alone = torch.cat([task.forward(model, task.collate([row], None)) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.name=mandarin_tone", "unknown dataset 'audio/mandarin_tone', did you mean 'audio/mandarin_tones'"),
        ("data.input=mel", "data.input: expected fbank or waveform, got 'mel'"),
        ("data.normalize=batch", "data.normalize: expected dataset, clip, band, got 'batch'"),
        ("data.rate=10", "data.rate: expected 100 to 768000 Hz, got 10"),
        ("data.frames=0", "data.frames: expected at least 1, got 0"),
        ("data.max_seconds=0", "data.max_seconds: expected more than 0, got 0.0"),
        ("data.std=[0]", "data.std: expected more than 0, got [0.0]"),
        ("data.mean=[0,1]", "data.mean: expected one number, or one for each coefficient, got [0.0, 1.0]"),
        ("data.coefficients=200", "data.coefficients: expected 1 to 128 (data.bins), got 200"),
        ("data.noise=-1", "data.noise: expected at least 0, got -1.0"),
        ("data.gain_db=1e9", "data.gain_db: expected 0 to 120 dB, got 1000000000.0"),
        ("data.time_mask=-1", "data.time_mask: expected at least 0, got -1"),
        ("data.speed=1", "data.speed: expected a share in [0, 1), got 1.0"),
        ("data.bins=1", "fbank: bins: expected 2 to 1024, got 1"),
        ("data.high_hz=9000", "expected 0 <= low_hz < high_hz <= 8000 (half the sample rate), got 20 and 9000"),
        ("data.window=hann", "unknown window 'hann', did you mean 'hanning'"),
        ("data.group=speakr", "unknown data.group 'speakr'"),
        ("data.bin=40", "unknown key 'data.bin', did you mean 'bins'"),
        ("task.mixup=-1", "task.mixup: expected at least 0, got -1.0"),
        ("task.mixup_prob=2", "task.mixup_prob: expected a probability, got 2.0"),
        ("task.label_smoothing=1", "task.label_smoothing: expected a number in [0, 1), got 1.0"),
    ],
)
def test_a_wrong_value_is_one_line(make_task: Make, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_task("audio/mandarin_tones", override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_data_decide_cannot_be_set_twice(make_task: Make, tiny: str) -> None:
    with pytest.raises(UserError, match=r"model.args.bins cannot be set: set data.bins or data.coefficients"):
        make_task(tiny, "model.args={bins: 3}").build_model()


def test_a_run_keeps_what_its_data_told_it(make_task: Make, tiny: str, tmp_path: Path) -> None:
    task = make_task(tiny)
    assert task.data.mean is not None and f"mean:\n  - {task.data.mean[0]}\n" in to_yaml(task.config)
    other = make_task(tiny, setup=False)
    other.restore(json.loads(json.dumps(task.facts())))
    write_wav(tmp_path / "x.wav", tone(500), 16_000)
    ((name, load),) = other.load_inputs([str(tmp_path / "x.wav")])
    sample = load()
    assert name == str(tmp_path / "x.wav")
    ours, theirs = (t.collate([sample], None)["input"] for t in (task, other))
    torch.testing.assert_close(ours, theirs)


def test_folders_are_labelled_file_by_file(make_task: Make, tiny: str, clips: Path) -> None:
    task = make_task(tiny)
    found = list(task.load_inputs([str(clips / "low"), str(clips / "high/a_0.wav")]))
    assert len(found) == 7 and found[-1][0] == str(clips / "high/a_0.wav")
    assert all(load()["waveform"].dtype == torch.float32 for _, load in found)
    with pytest.raises(UserError, match="a folder without audio files"):
        list(task.load_inputs([str(clips / "low"), str(clips.parent / "nothing")] if empty(clips) else []))


def empty(clips: Path) -> bool:
    (clips.parent / "nothing").mkdir()
    return True


def test_inputs_are_found_as_they_are_asked_for(make_task: Make, tiny: str) -> None:
    inputs = iter(make_task(tiny).load_inputs(["no.wav"] * 10**6))
    _, load = next(inputs)
    with pytest.raises(UserError, match=r"no.wav: no such file or directory"):
        load()


def test_labels_are_had_without_decoding_and_the_floors_fit_them(make_task: Make, tiny: str) -> None:
    task = make_task(tiny, "data.folds=5")
    truth = task.labels_of(task.reported_set)
    floors = {name: np.mean(fit() == truth) for name, fit in task.baselines().items()}
    assert list(floors) == ["majority", "MFCC 20 x 20, SVM", "MFCC statistics, SVM"]
    assert floors["majority"] == pytest.approx(0.25, abs=0.01)
    assert min(floors["MFCC 20 x 20, SVM"], floors["MFCC statistics, SVM"]) > 0.8


def test_the_floors_take_clips_of_one_frame(make_task: Make, clips: Path) -> None:
    for name in ("low", "high"):
        for i in range(6):
            write_wav(clips / name / f"{'ab'[i % 2]}_{i}.wav", tone(300 if name == "low" else 3000, 0.01), 16_000)
    task = make_task("audio/folder", f"data.root={clips}")
    assert all(len(fit()) == 2 for fit in task.baselines().values())


def test_the_head_of_a_run_says_what_is_learnt_from(make_task: Make, tiny: str) -> None:
    described = make_task(tiny, "data.folds=5", *AUGMENTED).describe()
    assert "mandarin_tones, 108 + 28 clips at 16 kHz of 0.29 to 0.37 s" in described["data"]
    assert "4 classes (the clips inside mambaverse, of one speaker" in described["data"]
    said = "speed ±20%, level ±6 dB, roll ±20 ms, noise 0.1, tempo ±20%, frequencies ±10%, masks of 8 bands, masks of 6"
    assert described["augmentation"] == f"{said} frames, mixup 0.4"
    waveforms = make_task(tiny, *AUGMENTED, "model.name=audio_raw_nano").describe()["augmentation"]
    assert waveforms == "speed ±20%, level ±6 dB, roll ±20 ms, noise 0.1, mixup 0.4"  # none of spectrograms
    assert "augmentation" not in make_task(tiny).describe()
    assert "each by its own mean" in make_task(tiny, "data.normalize=clip", "data.frames=50").describe()["input"]


@pytest.mark.parametrize("wrong", [0, 3, 28])
def test_the_sheet_of_spectrograms_shows_mistakes(make_task: Make, tiny: str, tmp_path: Path, wrong: int) -> None:
    task = make_task(tiny, "data.folds=5")
    targets = torch.from_numpy(task.labels_of(task.reported_set))
    outputs = torch.nn.functional.one_hot(targets, 4).float() * 5
    outputs[:wrong] = outputs[:wrong].roll(1, 1)
    (path,) = task.figures(tmp_path, task.build_model(), outputs, targets)
    with Image.open(path) as image:
        width, height = image.size
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert path.name == "predictions.png" and width > 1000 and height > 500
    red = (np.abs(colours.astype(int) - [0xC6, 0x28, 0x28]).sum(1) < 12).mean()
    assert (red > 1e-3) == (wrong > 0)


@pytest.fixture
def trained(tiny: str, tmp_path: Path) -> Path:
    arguments = ["trainer.epochs=2", "data.folds=5", f"trainer.output_dir={tmp_path}", "trainer.run_name=run"]
    assert main(["train", tiny, *arguments, *AUGMENTED]) == 0
    return tmp_path / "run"


def test_a_run_is_trained_evaluated_and_labels_files(
    trained: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"predictions.png", "confusion.png", "per_class.csv", "split.csv"} <= {p.name for p in trained.iterdir()}
    with (trained / "split.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 136 and {row["set"] for row in rows} == {"train", "eval"} and rows[0]["group"]
    assert main(["eval", str(trained), "--baseline"]) == 0
    assert "MFCC 20 x 20" in capsys.readouterr().out
    (clips / "low/bad.wav").write_bytes(b"no audio")
    assert main(["predict", str(trained), str(clips), "--format", "json", "--on-error", "skip"]) == 0
    captured = capsys.readouterr()
    said = [json.loads(line) for line in captured.out.splitlines()]
    assert len(said) == 12 and set(said[0]["probabilities"]) == {"tone 1", "tone 2", "tone 3", "tone 4"}
    assert "bad.wav: not an audio file" in captured.err and "1 of 13 inputs skipped" in captured.err
    assert main(["predict", str(trained), str(clips / "low/bad.wav")]) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_a_stopped_run_goes_on_with_the_same_batches(make_task: Make, tiny: str, draw: Draw) -> None:
    config = compose(tiny, ["trainer.epochs=3"])
    assert compose(tiny, ["trainer.epochs=3"]) == config
    task = make_task(tiny, *AUGMENTED)
    batch_of(task, 5, draw)  # what was loaded before changes nothing
    again = batch_of(task, 5, draw)["input"]
    assert again.equal(batch_of(make_task(tiny, *AUGMENTED), 5, draw)["input"])


@pytest.mark.slow
def test_a_clip_of_two_hours_is_labelled(make_task: Make, tmp_path: Path) -> None:
    task = make_task("audio/mandarin_tones", "data.cache_mb=0", "model.args={depth: 1, embed_dim: 16}")
    model: Any = task.build_model().eval()
    minute = tone(300, 60, 8000)
    write_wav(tmp_path / "long.wav", np.tile(minute, 120), 8000)
    ((_, load),) = task.load_inputs([str(tmp_path / "long.wav")])
    with torch.no_grad():
        output: Tensor = task.forward(model, task.collate([load()], None))
    assert output.shape == (1, 4) and output.isfinite().all()
