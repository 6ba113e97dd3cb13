"""Paired bootstrap: its scores, its errors, and the command on finished runs."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from mambaverse.cli import main
from mambaverse.engine import run
from mambaverse.engine.compare import compare_runs, paired_bootstrap, read_predictions
from mambaverse.errors import UserError
from tests.engine.toy import Toy, toy_config

CLASSIFIER = ("task.name=toy_classifier", "plugins=[tests.engine.test_baseline]")


def drawn(count: int, classes: int, right: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return targets (the same for every seed) and predictions that are right so often."""
    truth = np.random.default_rng(99).integers(0, classes, count)
    draw = np.random.default_rng(seed)
    return truth, np.where(draw.random(count) < right, truth, draw.integers(0, classes, count))


@pytest.mark.parametrize("classes", [2, 5])
def test_scores_are_those_of_scikit_learn(classes: int) -> None:
    truth, ours = drawn(300, classes, 0.6, 1)
    theirs = drawn(300, classes, 0.5, 2)[1]
    known = {
        "accuracy": accuracy_score,
        "mcc": matthews_corrcoef,
        "macro_f1": lambda a, b: f1_score(a, b, average="macro"),
    }
    if classes == 2:
        known["f1"] = f1_score
    for name, function in known.items():
        found = paired_bootstrap(truth, ours, theirs, score=name, resamples=2)
        assert found.ours == pytest.approx(function(truth, ours)), name
        assert found.theirs == pytest.approx(function(truth, theirs)), name


def test_the_standard_error_is_that_of_drawing_samples_one_by_one() -> None:
    truth, ours = drawn(200, 2, 0.7, 1)
    theirs = drawn(200, 2, 0.6, 2)[1]
    draw = np.random.default_rng(0)
    differences = []
    for _ in range(1500):
        rows = draw.integers(0, 200, 200)
        one, two = (np.corrcoef(truth[rows], said[rows])[0, 1] for said in (ours, theirs))  # of two classes it is MCC
        differences.append(one - two)
    found = paired_bootstrap(truth, ours, theirs, resamples=4000)
    assert found.standard_error == pytest.approx(np.std(differences), rel=0.06)
    assert found.below == pytest.approx(np.mean(np.array(differences) < 0), abs=0.05)


def test_the_error_of_accuracy_is_that_of_the_paired_differences() -> None:
    truth, ours = drawn(1000, 3, 0.7, 1)
    theirs = drawn(1000, 3, 0.6, 2)[1]
    single = (ours == truth).astype(float) - (theirs == truth)
    found = paired_bootstrap(truth, ours, theirs, score="accuracy", resamples=6000)
    assert found.difference == pytest.approx(single.mean())
    assert found.standard_error == pytest.approx(single.std() / 1000**0.5, rel=0.04)


def test_pairs_are_drawn_together() -> None:
    truth, ours = drawn(500, 2, 0.7, 1)
    same = paired_bootstrap(truth, ours, ours.copy())
    assert same.difference == same.standard_error == same.below == 0
    nearly = ours.copy()
    nearly[:5] = 1 - nearly[:5]
    assert paired_bootstrap(truth, ours, nearly).standard_error < 0.02  # alone each has an error of 0.03


def test_the_mean_of_several_runs_counts() -> None:
    truth = drawn(400, 2, 0.7, 0)[0]
    ours = np.stack([drawn(400, 2, 0.7, seed)[1] for seed in (1, 2, 3)])
    theirs = drawn(400, 2, 0.6, 4)[1]
    found = paired_bootstrap(truth, ours, theirs)
    assert found.ours == pytest.approx(np.mean([matthews_corrcoef(truth, row) for row in ours]))
    one = paired_bootstrap(truth, ours[0], theirs)
    assert found.standard_error < one.standard_error
    assert paired_bootstrap(truth, ours, theirs) == found  # the same seed, the same numbers


def test_what_cannot_be_compared_is_refused() -> None:
    truth, ours = drawn(10, 2, 0.7, 1)
    with pytest.raises(UserError, match="no score 'mc' to compare, did you mean 'mcc'"):
        paired_bootstrap(truth, ours, ours, score="mc")
    with pytest.raises(UserError, match="10 targets, 10 and 9 predictions"):
        paired_bootstrap(truth, ours, ours[1:])
    with pytest.raises(UserError, match="0 targets"):
        paired_bootstrap(truth[:0], ours[:0], ours[:0])
    alike = np.zeros(10, int)
    assert paired_bootstrap(alike, alike, alike).ours == 0  # MCC of one class is 0, as scikit-learn's


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, quiet = tmp_path_factory.mktemp("runs"), Console(quiet=True)
    return [
        run.train(toy_config(folder, *CLASSIFIER, f"trainer.seed={i}", name=f"run{i}"), console=quiet).folder
        for i in (0, 1)
    ]


def test_a_run_writes_what_it_says_of_each_sample(two_runs: list[Path]) -> None:
    with (two_runs[0] / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    classes, truth, said = read_predictions(two_runs[0])
    assert len(rows) == len(truth) == 40 and list(rows[0]) == ["item", "target", "predicted", *classes]
    for row, number in zip(rows, said, strict=True):
        shares = [float(row[name]) for name in classes]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and row["predicted"] == classes[number]
        assert max(shares) == float(row[classes[number]])


def test_runs_are_compared_with_their_baselines(two_runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, two_runs)]) == 0
    out = capsys.readouterr().out
    assert "accuracy of 40 samples, mean of 2 runs; 2,000 paired resamples" in out
    assert "majority" in out and "oracle" in out
    found = compare_runs(two_runs, console=Console(quiet=True), score="mcc")
    assert found["oracle"].theirs == 1 and found["oracle"].difference <= 0 and found["majority"].theirs == 0


def test_baselines_are_not_fitted_to_data_that_changed_since(
    two_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_split(task: Toy, folder: Path) -> Path:
        (folder / "split.csv").write_text("set,name,sha256\neval,a,a\n")
        return folder / "split.csv"

    one, quiet = shutil.copytree(two_runs[0], tmp_path / "run"), Console(quiet=True)
    (one / "split.csv").write_text("set,name,sha256\neval,a,b\n")
    monkeypatch.setattr(Toy, "save_split", save_split)
    with pytest.raises(UserError, match=r"split\.csv: .* not those that this run began with: baselines would be"):
        compare_runs([one], console=quiet)
    compare_runs([one], [two_runs[1]], console=quiet)


def test_runs_are_compared_with_other_runs(two_runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(two_runs[0]), "--to", str(two_runs[1]), "--score", "macro_f1"]) == 0
    assert "macro_f1 of 40 samples" in capsys.readouterr().out


def test_wrong_comparisons_are_one_line(
    two_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert main(["compare", *arguments]) == 2
        return capsys.readouterr().err

    one = str(two_runs[0])
    other = shutil.copytree(two_runs[1], tmp_path / "other")
    text = (other / "predictions.csv").read_text().splitlines(keepends=True)
    (other / "predictions.csv").write_text("".join(text[:-1]))
    assert "were not reported on the same samples" in error(one, "--to", str(other))
    assert "no run folder" in error(str(tmp_path / "none"))
    sides = [shutil.copytree(two_runs[0], tmp_path / name) for name in ("drawn", "drawn anew")]
    for name in ("split.csv", "sets.csv"):  # the targets of samples in the order of their classes are always the same
        for side, sample in zip(sides, "ab", strict=True):
            (side / name).write_text(f"set,name,sha256\ntrain,c,3\neval,{sample},{sample}\n")
        assert "not reported on the same samples: their splits differ" in error(str(sides[0]), "--to", str(sides[1]))
        (sides[1] / name).write_text("set,name,sha256\neval,a,a\n")
        assert main(["compare", str(sides[0]), "--to", str(sides[1])]) == 0
        for side in sides:
            (side / name).unlink()
    capsys.readouterr()
    assert "did you mean 'accuracy'" in error(one, "--score", "acuracy")
    assert "given twice; a mean over runs takes each once" in error(one, str(two_runs[1]), one + "/.")
    assert "given twice" in error(one, "--to", str(two_runs[1]), str(two_runs[1]))
    assert main(["compare", one, "--to", one]) == 0
    assert "--resamples: expected 2 or more" in error(one, "--resamples", "1")
    assert "at most 1,000,000, got 1,000,000,000,000" in error(one, "--resamples", "1000000000000")
    (other / "predictions.csv").write_text("item,target,predicted,a,b,c\n0,a,b,1,0,0\n")
    assert "f1 is that of the second of two classes, and here are 3" in error(str(other), "--score", "f1")
    (tmp_path / "config.yaml").write_text("")
    assert "has no predictions.csv" in error(str(tmp_path))
    (tmp_path / "predictions.csv").write_text("item,target,predicted,a\n0,a,b,1\n")
    assert "damaged: expected item, target, predicted" in error(str(tmp_path))
    for damaged in (b"", b"\xfe\x00"):
        (other / "predictions.csv").write_bytes(damaged)
        assert "damaged: expected item, target, predicted" in error(one, "--to", str(other))
    other = shutil.copytree(two_runs[1], tmp_path / "unfinished")
    (other / "results.json").write_text("{")
    assert "results.json: half written or missing; --score says what to compare by" in error(str(other))
