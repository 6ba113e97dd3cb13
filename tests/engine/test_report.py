"""What people see: the head, the progress, the pictures."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from mambaverse.engine import progress
from mambaverse.engine.logs import MetricsLog, read_metrics
from mambaverse.engine.plots import count_confusion, draw_confusion, draw_curves
from mambaverse.engine.process import StopRequest
from mambaverse.engine.report import format_count, predictions_table, sample_cost
from mambaverse.engine.run import train
from tests.engine.toy import CLASSES, Net, Toy, toy_config


def _text(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_says_what_it_trains_and_where_it_ended(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    result = train(toy_config(tmp_path, "trainer.accumulate=2"), console=console)
    lines = {line.split("  ")[0]: line for line in _text(console).splitlines()}
    assert "net" in lines["model"]
    assert "148" in lines["parameters"]
    assert "192 a sample, forward (96 multiply-adds)" in lines["FLOPs"]
    assert "sectors" in lines["data"]
    assert "32 (16 x 1 processes x 2 accumulated)" in lines["batch"]
    assert "cpu, fp32, 1 thread" in lines["device"]
    assert "auto (cpu)" in lines["backend"]
    assert "4 epochs of 3 steps" in lines["length"]
    assert str(result.folder) in _text(console)
    assert "Best weights, of epoch" in _text(console)


def test_without_a_terminal_there_is_a_plain_line_an_epoch(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    train(toy_config(tmp_path), console=console)
    lines = [line for line in _text(console).splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert all("train loss" in line and "eval loss" in line and "accuracy" in line for line in lines)
    assert "\x1b" not in _text(console)


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (120, "epoch  3/12  train loss 1.8535  eval loss 1.1215  accuracy 0.6581  mcc 0.6104  macro f1 0.3616  best"),
        (88, "epoch  3/12  train 1.8535  eval 1.1215  accuracy 0.6581  mcc 0.6104  best"),
        (80, "epoch  3/12  train 1.8535  eval 1.1215  mcc 0.6104  best"),  # at most 9:59:59 left would be in it
    ],
)
def test_the_line_of_an_epoch_fits_on_a_terminal(width: int, line: str) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    row = {"epoch": 3, "train_loss": 1.8535, "loss": 1.1215, "accuracy": 0.6581, "mcc": 0.6104, "macro_f1": 0.3616}
    display = progress.Display(console, epochs=12, total=120, done=29, metric="mcc")
    display.epoch(row, 30, best=True)
    assert _text(console).splitlines() == [line]
    display = progress.Display(Console(file=io.StringIO(), width=width), epochs=12, total=120, done=29, metric="mcc")
    display.epoch(row, 30, best=True)
    assert len(_text(display._console).splitlines()[0]) == 100  # in a file all of it, in one line


def test_a_long_epoch_shows_lines_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    console = Console(file=io.StringIO(), width=120)
    train(toy_config(tmp_path), console=console)
    assert "step 4/24  loss" in _text(console)


def test_a_terminal_gets_a_bar_with_loss_metric_speed_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "REDRAW_S", 0.0)
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    train(toy_config(tmp_path), console=console)
    bars = [line for line in _text(console).replace("\r", "\n").splitlines() if "left" in line and "samples/s" in line]
    assert any("loss" in bar and "best accuracy" in bar and "━" in bar for bar in bars)


def test_the_time_left_does_not_count_what_the_first_step_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    console = Console(file=io.StringIO(), width=120)
    display = progress.Display(console, epochs=1, total=120, done=20, metric="accuracy")  # of a run that goes on
    for taken in range(1, 101):
        now[0] += 60.0 if taken == 1 else 1.0
        display.step(20 + taken, 1, None, None)
    lines = _text(console).splitlines()
    assert lines[0] == "epoch 1/1  step 21/120"
    assert lines[1] == "epoch 1/1  step 22/120  1:38 left"
    assert [lines[i].split("  ")[-1] for i in (2, 39, 98, 99)] == ["1:37 left", "1:00 left", "0:01 left", "0:00 left"]


def test_names_are_shown_as_they_are_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["seq[/red]", "x[bold]", "chr:x:9", f"{'folder/' * 20}a.fa"]
    progress.Screen().print(predictions_table([(name, "[b]", "0.5") for name in names]))
    out = capsys.readouterr().out
    assert all(name in out for name in (*names[:3], "[b]"))
    cells = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert "".join(cells[3:]) == names[3]


def test_counts_are_written_short() -> None:
    assert [format_count(n) for n in (12, 1234, 25_797_000, 3.2e9)] == ["12", "1.23 k", "25.80 M", "3.20 G"]
    assert [progress.format_seconds(s) for s in (0, 75, 3700)] == ["0:00", "1:15", "1:01:40"]


def test_flops_name_the_operators_that_are_not_counted(tmp_path: Path) -> None:
    library = torch.library.Library("mambaverse", "FRAGMENT")
    library.define("engine_test_op(Tensor x) -> Tensor")
    library.impl("engine_test_op", lambda x: x.clone(), "CPU")

    class Scanning(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.ops.mambaverse.engine_test_op(x))

    task = Toy(toy_config(tmp_path))
    task.setup()
    model = Scanning(0.0).train()
    cost = sample_cost(task, model, torch.device("cpu"))
    assert (cost.flops, cost.multiply_adds, cost.uncounted) == (192, 96, ("engine_test_op",))
    assert model.training
    library._destroy()


def _picture(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def test_the_pictures_of_a_run_are_drawn(finished: Path) -> None:
    width, height = _picture(finished / "curves.png")
    assert width > 1200 and 300 < height < 900
    width, height = _picture(finished / "confusion.png")
    assert min(width, height) > 300


def _rows(epochs: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        loss = 3 * math.exp(-epoch)
        rows.append({"kind": "train", "step": epoch, "epoch": float(epoch), "loss": loss, "lr": 1e-3})
        row = {"kind": "eval", "step": epoch, "epoch": epoch, "train_loss": loss, "loss": loss, "accuracy": 0.5}
        rows.append(row)
    return rows


@pytest.mark.parametrize("epochs", [0, 1, 2, 60])  # nothing yet, a point, a line, too many for markers
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_curves_are_drawn_from_any_number_of_epochs(tmp_path: Path, epochs: int, metric: str) -> None:
    rows = _rows(epochs)
    if rows:
        rows[-1]["loss"] = rows[-1]["accuracy"] = None  # was not finite
    draw_curves(tmp_path / "c.png", rows, metric, more_is_better=metric != "loss")
    assert _picture(tmp_path / "c.png")[0] > 1200


def test_curves_of_a_run_without_logged_steps_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("mambaverse.engine.plots.write_figure", lambda figure, path, dpi: figures.append(figure))
    rows = [row for row in _rows(2) if row["kind"] == "eval"]  # fewer steps than trainer.log_every
    draw_curves(tmp_path / "c.png", rows, "accuracy", more_is_better=True)
    left, _, right = figures[0].axes
    assert left.get_legend_handles_labels()[1] == ["training, mean", "evaluation"]
    assert "trainer.log_every" in right.texts[0].get_text()


@pytest.mark.parametrize(
    "classes", [2, 10, 21, 100]
)  # numbers in the cells, the last size with, the first without, most
def test_confusion_is_readable_up_to_a_hundred_classes(tmp_path: Path, classes: int) -> None:
    names = ["$\\frac\udcff", "普通话", "a name that is too long for an axis"] + [f"class_{i}" for i in range(classes)]
    draw_confusion(tmp_path / "c.png", torch.eye(classes, dtype=torch.long) * 7, names[:classes])
    width, height = _picture(tmp_path / "c.png")
    assert min(width, height) >= max(300, 11 * classes)  # pixels a class: a name of 5 points still reads


def test_confusion_counts_true_against_predicted() -> None:
    outputs = torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 3, 1], [0, 0, 1]])
    counts = count_confusion(outputs, torch.tensor([0, 0, 1, 2]), 3)
    assert counts is not None
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert count_confusion(outputs, torch.rand(4), 3) is None  # not a classifier
    assert count_confusion(outputs, torch.tensor([0, 0, 1, 2]), len(CLASSES)) is None


def test_a_log_is_cut_back_to_where_its_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"kind": "train", "step": 1, "loss": float("nan")})
    keep = log.sync()
    log.write({"kind": "train", "step": 2, "loss": 1.0})
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"kind": "train", "st')  # killed while writing
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    log = MetricsLog(path, keep=keep)
    log.write({"kind": "train", "step": 3, "loss": 2.0})
    log.close()
    assert read_metrics(path) == [{"kind": "train", "step": 1, "loss": None}, {"kind": "train", "step": 3, "loss": 2.0}]


def test_a_damaged_line_of_a_log_costs_no_more_than_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnot json\n3\n{"step": 2}\n{"kind": "eval", "step": 2}\n')
    assert [row["kind"] for row in read_metrics(path)] == ["train", "eval"]
    told = capsys.readouterr().err.splitlines()
    expected = [f"warning: {path}, line {n}: expected a row of metrics; left out" for n in (2, 3, 4)]
    assert told == expected


def test_signals_are_taken_in_the_main_thread_only() -> None:
    from threading import Thread

    entered = []

    def work() -> None:
        with StopRequest() as stop:
            entered.append(stop.signal)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [None]
