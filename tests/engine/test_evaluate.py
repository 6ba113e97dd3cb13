from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from mambaverse.config import ConfigError
from mambaverse.engine.evaluate import evaluate, evaluate_run, predict, predict_run
from mambaverse.engine.task import Prediction, Sample
from mambaverse.errors import UserError
from tests.engine.toy import Toy

POINTS = ["2,0.1", "0.1,2", "-2,0.1", "0.1,-2"]
LABELS = ["east", "north", "west", "south"]


def test_a_run_evaluates_to_what_its_training_ended_with(finished: Path) -> None:
    assert evaluate(finished) == json.loads((finished / "results.json").read_text())["metrics"]


@pytest.mark.parametrize("override", ["data.eval_batch_size=1", "data.eval_batch_size=7", "data.num_workers=1"])
def test_batches_and_workers_do_not_change_a_score(finished: Path, override: str) -> None:
    assert evaluate(finished, [override]) == pytest.approx(evaluate(finished), rel=1e-6)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.epochs=3", "trainer.epochs"),
        ("trainer={device: cpu, compile: default}", "trainer.compile"),
        ("optim.lr=0.5", "optim.lr"),
    ],
)
def test_what_only_training_reads_changes_no_evaluation_and_is_refused(finished: Path, override: str, key: str) -> None:
    expected = f"{key} changes no evaluation, .* takes data.*, trainer.device, trainer.num_threads, trainer.precision"
    with pytest.raises(ConfigError, match=expected):
        evaluate(finished, [override])


def test_what_an_evaluation_reads_can_be_changed(finished: Path) -> None:
    own = ["trainer={device: cpu, num_threads: 1}", "trainer.precision=fp32", "trainer.select=best", "task.mix=false"]
    assert evaluate(finished, own) == evaluate(finished)
    with pytest.raises(ConfigError, match=r"unknown key 'trainer.epoch', did you mean 'epochs'"):
        evaluate(finished, ["trainer.epoch=3"])
    with pytest.raises(ConfigError, match="expected key=value"):
        evaluate(finished, ["trainer"])
    with pytest.raises(ConfigError, match="argument 'trainer=5'"):
        evaluate(finished, ["trainer=5"])
    with pytest.raises(ConfigError, match="Interpolation key 'nope' not found"):
        evaluate(finished, ["trainer=${nope}"])


def test_data_that_changed_since_are_not_evaluated_unless_they_are_named(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A split that is drawn anew may hold out what the run learnt from."""

    def save_split(task: Toy, folder: Path) -> Path:
        (folder / "split.csv").write_text(f"{task.config.data.root}\n")
        return folder / "split.csv"

    monkeypatch.setattr(Toy, "save_split", save_split)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "split.csv").write_text("None\n")
    assert evaluate(run) == evaluate(finished, ["data.root=here"])
    (run / "split.csv").write_text("others\n")
    for overrides in ([], ["data.eval_batch_size=7"]):
        with pytest.raises(UserError, match=r"not those that this run began with: .* data\.root=\.\.\. evaluates it"):
            evaluate(run, overrides)
    assert evaluate(run, ["data.root=here"]) == evaluate(finished, ["data.root=here"])
    (run / "split.csv").write_text("None\nskipped,for a reason in other words\n")
    assert evaluate(run) == evaluate(finished, ["data.root=here"])
    (run / "split.csv").unlink()
    evaluate(run)
    assert "split.csv is not there: it cannot be told" in capsys.readouterr().err


def test_what_a_run_learnt_from_is_counted_where_another_split_holds_it_out(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save_split(task: Toy, folder: Path) -> Path:
        held_out = "ab" if task.config.data.root else "cd"
        rows = (f"{'eval' if name in held_out else 'train'},{name}2,1,{name}\n" for name in "abcd")
        unhashed = (f"{'eval' if task.config.data.root else 'train'},{name},1,\n" for name in "ef")
        (folder / "split.csv").write_text(header + "".join([*rows, *unhashed]))
        return folder / "split.csv"

    header = "set,name,bytes,sha256\n"
    monkeypatch.setattr(Toy, "save_split", save_split)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    rows = ("train,a1,1,a", "train,b2,1,other", "eval,c1,1,c", "eval,d1,1,d", "train,e,1,", "train,f,2,")
    (run / "split.csv").write_text(header + "\n".join(rows))
    evaluate(run, ["data.root=here"])  # a, under another name, and e; b and f have other contents
    assert "learnt from 2 of the 50 samples that it is evaluated on" in capsys.readouterr().err
    evaluate(run, ["data.root=null"])
    assert "learnt from" not in capsys.readouterr().err


def test_an_evaluation_is_shown_as_a_table(finished: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    evaluate_run(finished, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "accuracy" in text
    assert "loss" in text


def test_inputs_are_labelled_in_order_with_probabilities_that_sum_to_one(finished: Path) -> None:
    rows = list(predict(finished, POINTS))
    assert [row.name for row in rows] == POINTS
    assert [row.label for row in rows] == LABELS
    for row in rows:
        assert sum(row.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row.probability == max(row.probabilities.values())


def test_a_prediction_needs_no_data(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engine.toy import Toy

    def gone(self: Toy) -> None:
        raise UserError("the data are gone")

    monkeypatch.setattr(Toy, "setup", gone)
    run = shutil.copytree(finished, tmp_path / "elsewhere")
    assert [row.label for row in predict(run, POINTS)] == LABELS
    with pytest.raises(UserError, match="the data are gone"):
        evaluate(run)


def test_a_bad_input_is_named_after_the_rows_before_it(finished: Path) -> None:
    rows = predict(finished, [POINTS[0], "not a point", POINTS[1]])
    assert next(rows).label == "east"
    with pytest.raises(UserError, match="'not a point': expected two numbers"):
        next(rows)


def test_bad_inputs_can_be_left_out(finished: Path) -> None:
    bad: list[UserError] = []
    rows = list(predict(finished, ["a", *POINTS, "b"], on_bad=bad.append))
    assert [row.label for row in rows] == LABELS
    assert [str(error)[:3] for error in bad] == ["'a'", "'b'"]


def test_inputs_that_are_all_left_out_are_an_error(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="2 of 2 inputs skipped: none is left"):
        predict_run(finished, ["worse", "bad"], on_error="skip")
    out, err = capsys.readouterr()
    assert out == "" and err.count("skipped: ") == 2


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_empty_path_is_refused_before_anything_is_labelled(
    finished: Path, capsys: pytest.CaptureFixture[str], on_error: str
) -> None:
    with pytest.raises(UserError, match="expected files or folders, got an empty path ''"):
        predict_run(finished, [POINTS[0], ""], on_error=on_error)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_predictions_are_printed_as(finished: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    predict_run(finished, [*POINTS, "worse"], form=form, on_error="skip")
    out, err = capsys.readouterr()
    assert err == "skipped: 'worse': expected two numbers\n1 of 5 inputs skipped\n"
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["label"] for row in rows] == LABELS
        assert list(rows[0]) == ["input", "label", "probability", *LABELS]
    elif form == "json":
        objects = [json.loads(line) for line in out.splitlines()]
        assert [one["label"] for one in objects] == LABELS
        assert list(objects[0]) == ["name", "label", "probability", "probabilities"]
    else:
        assert all(label in out for label in LABELS)


def test_a_table_shows_what_was_labelled_before_a_bad_input(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError):
        predict_run(finished, [POINTS[0], "bad"])
    assert "east" in capsys.readouterr().out


def test_a_sheet_is_refused_before_anything_is_labelled_where_the_task_draws_none(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--sheet: the task 'toy' draws no sheet"):
        predict_run(finished, POINTS, sheet=tmp_path / "sheet.png")
    assert capsys.readouterr().out == ""


def test_a_sheet_gets_the_first_inputs_and_the_number_of_all(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engine.toy import Toy

    seen: list[tuple[int, list[str], int]] = []

    def sheet(self: Toy, path: Path, samples: list[Sample], rows: list[Prediction], total: int) -> None:
        seen.append((len(samples), [row.label for row in rows], total))

    monkeypatch.setattr(Toy, "sheet_size", 3)
    monkeypatch.setattr(Toy, "sheet", sheet)
    predict_run(finished, [*POINTS, "bad"], sheet=tmp_path / "sheet.png", on_error="skip")
    with pytest.raises(UserError, match=r"'bad': .*; --on-error skip leaves such inputs out"):
        predict_run(finished, [POINTS[0], "bad", POINTS[1]], sheet=tmp_path / "sheet.png")
    assert seen == [(3, LABELS[:3], 4), (1, LABELS[:1], 1)]
