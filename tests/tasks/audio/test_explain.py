"""What is drawn of an audio model: of spectrograms and waveforms, and of the piece of a long clip that says most."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mambaverse.cli import main
from mambaverse.tasks.audio import task as task_module
from mambaverse.tasks.audio.explain import piece_shares
from tests.tasks.audio.conftest import Make, tone


def test_shares_sum_to_the_change_of_the_score() -> None:
    model = nn.Linear(6, 3)

    def score(x: Tensor, lengths: Tensor) -> Tensor:
        return model(x.sum(1) / lengths[:, None])

    x = torch.randn(5, 6)
    shares = piece_shares(score, x, torch.tensor(5), 2)
    expected = score(x[None], torch.tensor([5])) - model.bias
    assert shares.shape == x.shape and shares.sum().item() == pytest.approx(expected[0, 2].item(), abs=1e-5)


@pytest.mark.parametrize("overrides", [[], ["data.frames=64"], ["data.coefficients=13"]], ids=str)
def test_a_clip_is_drawn_as_the_model_gets_it(make_task: Make, tiny: str, tmp_path: Path, overrides: list[str]) -> None:
    task = make_task(tiny, *overrides)
    sample = {"waveform": torch.from_numpy(tone(440.0))}
    task.explain(tmp_path / "x.png", task.build_model().eval(), "sounds/$a$.wav", sample)
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > 1000 and image.height > 500


def test_of_a_long_clip_the_piece_that_says_most_is_drawn(
    make_task: Make, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tiny, "data.max_seconds=0.3")
    drawn: list[tuple[str, float, int]] = []

    def draw(path: Path, title: str, said: str, seconds: float, x: Tensor, shares: Tensor) -> None:
        assert x.shape == shares.shape
        drawn.append((title, seconds, len(x)))

    monkeypatch.setattr(task_module, "draw_clip", draw)
    sample = {"waveform": torch.from_numpy(tone(440.0, seconds=0.9))}
    task.explain(tmp_path / "x.png", task.build_model().eval(), "sounds/a.wav", sample)
    ((title, seconds, frames),) = drawn
    assert title.startswith("a.wav, piece ") and title.endswith(" of 3")
    assert seconds == pytest.approx(frames * task.data.shift_ms / 1000) and 0.2 < seconds <= 0.3


def test_a_run_on_waveforms_is_explained_from_the_command_line(clips: Path, tmp_path: Path) -> None:
    where = [f"trainer.output_dir={tmp_path}", "trainer.run_name=raw", "trainer.epochs=1", "trainer.num_threads=1"]
    model = ["model.name=audio_raw_nano", "model.args={depth: 1}"]
    assert main(["train", "audio/folder", f"data.root={clips}", *model, *where]) == 0
    assert main(["explain", str(tmp_path / "raw"), str(next((clips / "low").glob("*.wav")))]) == 0
    (picture,) = (tmp_path / "raw/explain").iterdir()
    with Image.open(picture) as image:
        assert image.width > 1000
