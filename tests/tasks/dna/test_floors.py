"""The simple models that a network of DNA has to beat."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mambaverse.engine.baseline import fit_baselines
from tests.tasks.dna.conftest import Make, rows, write_csv

QUIET = Console(quiet=True)


def test_the_floors_learn_what_is_there_to_learn(make_task: Make, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", rows(60))
    floors = fit_baselines(make_task("dna/fasta", f"data.root={path}"), QUIET)
    assert set(floors) == {
        "majority", "6-mers, linear SVM", "3- to 6-mers tf-idf, linear SVM", "one-hot, RBF SVM",
    }  # fmt: skip
    assert floors["majority"]["accuracy"] == 0.5 and floors["6-mers, linear SVM"]["accuracy"] > 0.9


def test_no_one_hot_floor_for_long_or_ragged_sequences(make_task: Make, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", [(s[: 30 + i % 5], c) for i, (s, c) in enumerate(rows())])
    assert "one-hot, RBF SVM" not in make_task("dna/fasta", f"data.root={path}").baselines()


@pytest.mark.slow
def test_the_floors_of_the_reference_come_out(make_task: Make, shared_data: Callable[[str], Path]) -> None:
    floor = fit_baselines(make_task("dna/rrna16s"), QUIET)["6-mers, linear SVM"]
    assert floor["accuracy"] > 0.94
    root = shared_data("fly_splice_train.csv.gz").parent
    splice = fit_baselines(make_task("dna/fly_splice", f"data.root={root}"), QUIET)
    assert splice["one-hot, RBF SVM"]["accuracy"] == pytest.approx(0.932, abs=0.003)
