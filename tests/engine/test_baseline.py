"""What is reported of a run: the last weights or a test set if asked, each class, and the floor beside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from mambaverse.engine import run
from mambaverse.engine.baseline import baseline_config, baselines_table
from mambaverse.engine.classifier import Classifier
from mambaverse.engine.evaluate import evaluate, evaluate_run
from mambaverse.engine.task import register_task
from mambaverse.errors import UserError
from tests.engine.toy import CLASSES, Sectors, Toy, ToyConfig, ToyData, toy_config


@register_task("toy_classifier", overwrite=True)
class ToyClassifier(Toy, Classifier):
    """Sectors with a test set of their own and with a floor."""

    data_config = ToyData
    task_config = ToyConfig

    def setup(self) -> None:
        super().setup()
        self.test_set = Sectors(40, 3)

    def baselines(self) -> dict[str, Callable[[], np.ndarray]]:
        def perfect() -> np.ndarray:
            return self.labels_of(self.reported_set)

        return {**Classifier.baselines(self), "oracle": perfect}


def wide() -> Console:
    return Console(file=io.StringIO(), width=140)


def text_of(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_last_weights_are_reported_if_asked(tmp_path: Path, quiet: Console) -> None:
    result = run.train(toy_config(tmp_path, "trainer.select=last"), console=quiet)
    last = [row for row in result.history if row["kind"] == "eval"][-1]
    assert result.metrics["accuracy"] == pytest.approx(last["accuracy"])
    assert evaluate(result.folder) == json.loads((result.folder / "results.json").read_text())["metrics"]
    (result.folder / "last.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no last\.safetensors"):
        evaluate(result.folder)


def test_a_test_set_is_what_the_end_reports(tmp_path: Path) -> None:
    console = wide()
    config = toy_config(tmp_path, "task.name=toy_classifier", "plugins=[tests.engine.test_baseline]")
    result = run.train(config, console=console)
    assert (
        sum(int(row["samples"]) for row in csv.DictReader((result.folder / "per_class.csv").read_text().splitlines()))
        == 40
    )
    assert "test set" in text_of(console)
    assert json.loads((result.folder / "results.json").read_text())["set"] == "test set"
    assert evaluate(result.folder) == result.metrics


def test_the_floor_stands_beside_the_number(tmp_path: Path) -> None:
    console = wide()
    overrides = ("task.name=toy_classifier", "plugins=[tests.engine.test_baseline]", "trainer.baseline=true")
    config = toy_config(tmp_path, *overrides)
    folder = run.train(config, console=console).folder
    floors = json.loads((folder / "results.json").read_text())["baselines"]
    assert floors["oracle"]["accuracy"] == floors["oracle"]["macro_f1"] == 1
    assert 0.2 < floors["majority"]["accuracy"] < 0.6
    assert all(word in text_of(console) for word in ("majority", "oracle", "this run"))
    console = wide()
    evaluate_run(folder, console=console, baseline=True)
    assert "majority" in text_of(console)
    assert baseline_config(config, wide())["oracle"]["mcc"] == 1


def test_only_what_the_run_reports_has_a_column() -> None:
    floors = {"majority": {"accuracy": 0.5, "macro_f1": 0.3, "mcc": 0.0, "f1": 0.6, "seconds": 1.0}}

    def columns(ours: dict[str, float] | None) -> list[object]:
        return [column.header for column in baselines_table(floors, ours).columns]

    assert columns(None) == ["model", "accuracy", "macro F1", "F1", "MCC"]
    table = baselines_table(floors, {"loss": 0.2, "accuracy": 0.9, "macro_f1": 0.8})
    assert [(column.header, *column.cells) for column in table.columns] == [
        ("model", "majority", "this run"), ("accuracy", "0.5000", "0.9000"), ("macro F1", "0.3000", "0.8000"),
    ]  # fmt: skip
    assert columns({"accuracy": 0.9, "f1": 0.9}) == ["model", "accuracy", "F1"]


def test_a_task_without_baselines_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="task 'toy' has no baselines"):
        baseline_config(toy_config(tmp_path), wide())
    whole = run.train(toy_config(tmp_path), console=wide()).folder
    monkeypatch.setattr(Toy, "step", lambda *_: pytest.fail("said only after the evaluation"))
    with pytest.raises(UserError, match="task 'toy' has no baselines"):
        evaluate_run(whole, console=wide(), baseline=True)
    with pytest.raises(UserError, match="task 'toy' has no baselines"):
        run.train(toy_config(tmp_path, "trainer.baseline=true"), console=wide())


def test_each_class_is_reported(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "per_class.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == list(CLASSES)
    assert sum(int(row["samples"]) for row in rows) == 50
    assert all(0 <= float(row[key]) <= 1 for row in rows for key in ("precision", "recall", "f1"))


def test_scores_are_those_that_scikit_learn_has(tmp_path: Path) -> None:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    task: Any = ToyClassifier(toy_config(tmp_path))
    task.classes = [str(i) for i in range(7)]
    task.scores = ("accuracy", "top5", "macro_f1", "mcc")
    metrics = Classifier.metrics(task)
    outputs, targets = torch.randn(90, 7), torch.arange(90) % 7
    metrics.update(outputs, targets)
    said = outputs.argmax(1)
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values["accuracy"] == pytest.approx(accuracy_score(targets, said))
    assert values["macro_f1"] == pytest.approx(f1_score(targets, said, average="macro"))
    assert values["mcc"] == pytest.approx(matthews_corrcoef(targets, said), abs=1e-6)
    assert values["top5"] == pytest.approx((outputs.topk(5).indices == targets[:, None]).any(1).double().mean().item())
