"""Splits by share, fold and group: disjoint, whole, repeatable, and said aloud where they mislead."""

import csv
import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mambaverse.config import ConfigError, SplitConfig
from mambaverse.errors import UserError
from mambaverse.splits import SplitRow, split_items, write_split

LABELS = ["a"] * 30 + ["b"] * 20 + ["c"] * 10
GENUS = [f"g{i % 15}" for i in range(60)]  # each genus in several classes


def config(**fields: object) -> SplitConfig:
    return SplitConfig(name="mine", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [{}, {"folds": 5}, {"group": "genus"}, {"folds": 5, "group": "genus"}],
    ids=lambda f: "-".join(f) or "share",
)
def test_both_sets_are_disjoint_whole_and_the_same_again(fields: dict[str, object]) -> None:
    one, again = (split_items(LABELS, config(**fields), "mine", {"genus": GENUS}) for _ in range(2))
    assert (one.train, one.eval) == (again.train, again.eval)
    assert sorted(one.train + one.eval) == list(range(60))
    assert all(a < b for part in (one.train, one.eval) for a, b in pairwise(part))
    assert 6 <= len(one.eval) <= 18


def test_a_share_takes_as_much_of_each_class() -> None:
    drawn = split_items(LABELS, config(val_fraction=0.2), "mine")
    assert [[LABELS[i] for i in drawn.eval].count(name) for name in "abc"] == [6, 4, 2]
    assert split_items(LABELS, config(split_seed=1), "mine").eval != drawn.eval


@pytest.mark.parametrize("folds", [None, 3])
def test_no_group_is_on_both_sides(folds: int | None) -> None:
    drawn = split_items(LABELS, config(group="genus", folds=folds), "mine", {"genus": GENUS})
    sides = [{GENUS[i] for i in part} for part in (drawn.train, drawn.eval)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert drawn.groups == GENUS and "by genus" in drawn.note


@pytest.mark.parametrize(("fraction", "held_out"), [(0.01, 1), (0.5, 2), (0.8, 2)])
def test_of_few_groups_one_is_held_out_and_one_is_left(fraction: float, held_out: int) -> None:
    kinds = ["x", "y", "z"] * 20
    drawn = split_items(LABELS, config(group="kind", val_fraction=fraction), "mine", {"kind": kinds})
    assert len({kinds[i] for i in drawn.eval}) == held_out


@pytest.mark.parametrize("group", [None, "genus"])
def test_folds_hold_out_every_row_once(group: str | None) -> None:
    held_out = [split_items(LABELS, config(folds=5, fold=k, group=group), "x", {"genus": GENUS}).eval for k in range(5)]
    assert sorted(np.concatenate(held_out)) == list(range(60))


def test_a_random_split_of_data_with_groups_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    split_items(LABELS, config(), "mine", {"genus": GENUS, "family": GENUS})
    error = capsys.readouterr().err
    assert error.startswith("warning: mine: a random split ignores the groups genus, family") and error.count("\n") == 1
    assert "data.group=genus" in error
    split_items(LABELS, config(group="genus"), "mine", {"genus": GENUS})
    split_items(LABELS, config(), "mine")
    assert capsys.readouterr().err == ""


def test_a_class_that_cannot_be_learnt_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    split_items(["a", "a", "b", "b"], config(folds=2, group="kind"), "mine", {"kind": ["1", "1", "2", "2"]})
    assert "no sample of class" in capsys.readouterr().err


def test_groups_are_read_off_file_names() -> None:
    names = [f"{i % 2}_speaker{i % 5}_{i}.wav" for i in range(40)]
    drawn = split_items([i % 2 for i in range(40)], config(group="_(speaker[0-9])_"), "mine", names=names)
    assert drawn.groups is not None and drawn.groups[:3] == ["speaker0", "speaker1", "speaker2"]
    assert {names[i][2:10] for i in drawn.train}.isdisjoint(names[i][2:10] for i in drawn.eval)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group": "genius"}, "mine: unknown data.group 'genius', did you mean 'genus'"),
        ({"group": "(["}, "not a regular expression"),
        ({"group": "(x)"}, "does not match the file n0"),
        ({"group": r"(?:n)\d"}, r"data.group=(?:n)\d: expected a group in parentheses"),
        ({"group": "(?:x)?"}, "data.group=(?:x)?: expected a group in parentheses"),
        ({"group": "(9)?"}, "data.group=(9)?: its group 1 is empty in the file n0"),
        ({"group": "n(9?)"}, "data.group=n(9?): its group 1 is empty in the file n0"),
        ({"folds": 11}, "class 'c' has 10 samples; 11 folds need 11"),
        ({"folds": 16, "group": "genus"}, "data.group=genus has 15 groups; the split needs 16"),
    ],
)
def test_a_split_that_cannot_be_made_is_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        split_items(LABELS, config(**fields), "mine", {"genus": GENUS}, [f"n{i}" for i in range(60)])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_of_one_cannot_be_split() -> None:
    with pytest.raises(UserError, match="class 'b' has 1 usable sample"):
        split_items(["a", "a", "b"], config(), "mine")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"val_fraction": 1.0}, "data.val_fraction"),
        ({"folds": 1}, "data.folds"),
        ({"folds": 3, "fold": 3}, "data.fold: expected a number from 0 to 2, got 3"),
        ({"fold": 3}, "data.fold=3: expected data.folds beside it"),
        ({"on_error": "ignore"}, "data.on_error"),
    ],
)
def test_values_that_mean_nothing_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_a_file_name_that_is_no_text_is_written_with_backslashes(tmp_path: Path) -> None:
    target = write_split(tmp_path / "split.csv", [SplitRow("train", "a", "a/\udcff,é.png", b"1")])
    (row,) = csv.DictReader(target.read_text(encoding="utf-8").splitlines())
    assert row["name"] == "a/\\udcff,é.png"


def test_a_skipped_file_that_cannot_be_opened_has_no_hash(tmp_path: Path) -> None:
    (closed := tmp_path / "x.wav").mkdir()  # opening a folder fails for root, too
    target = write_split(tmp_path / "split.csv", [SplitRow("skipped", "", "x.wav", closed)])
    assert [row["sha256"] for row in csv.DictReader(target.read_text().splitlines())] == [""]
    with pytest.raises(IsADirectoryError):
        write_split(target, [SplitRow("train", "a", "x.wav", closed)])


def test_the_split_is_written_with_hashes_of_files_and_of_records(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"sound")
    rows = [SplitRow("train", "a", "x.wav", tmp_path / "x.wav", "g1"), SplitRow("eval", "b", "record 2", b"ACGT")]
    path = write_split(tmp_path / "split.csv", rows)
    written = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["sha256"] for row in written] == [hashlib.sha256(data).hexdigest() for data in (b"sound", b"ACGT")]
    assert [(row["set"], row["group"], row["bytes"]) for row in written] == [("train", "g1", "5"), ("eval", "", "4")]
