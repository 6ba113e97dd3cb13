"""Promises of the command explain: a picture an input, bad inputs as in predict, and a clear no from a task without."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mambaverse.engine.explain import explain_run, picture_name
from mambaverse.errors import UserError
from tests.engine.toy import Toy

POINTS = ["2,0.1", "0.1,2"]


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []

    def explain(self: Toy, path: Path, model: Any, name: str, sample: Any) -> None:
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        seen.append(name)
        path.write_text(name)

    monkeypatch.setattr(Toy, "explain", explain)
    return seen


def test_each_input_has_a_picture_in_the_run_folder(finished: Path, drawing: list[str], tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    console = Console(file=io.StringIO(), width=40)
    written = explain_run(run, POINTS, console=console)
    assert [path.parent for path in written] == 2 * [run / "explain"] and drawing == POINTS
    assert console.file.getvalue().splitlines() == [str(path) for path in written]  # type: ignore[attr-defined]
    assert [path.read_text() for path in written] == POINTS


def test_pictures_go_where_they_are_wanted(finished: Path, drawing: list[str], tmp_path: Path, quiet: Console) -> None:
    (written,) = explain_run(finished, POINTS[:1], out=tmp_path / "a/b", console=quiet)
    assert written.parent == tmp_path / "a/b"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file: a file is there; expected a folder"):
        explain_run(finished, POINTS, out=tmp_path / "file", console=quiet)


def test_a_bad_input_stops_with_a_remedy_or_is_counted(
    finished: Path, drawing: list[str], tmp_path: Path, quiet: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = [POINTS[0], "bad", POINTS[1]]
    with pytest.raises(UserError, match="'bad': expected two numbers; --on-error skip leaves such inputs out"):
        explain_run(finished, inputs, out=tmp_path / "x", console=quiet)
    assert len(list((tmp_path / "x").iterdir())) == 1
    assert len(explain_run(finished, inputs, out=tmp_path / "x", on_error="skip", console=quiet)) == 2
    assert capsys.readouterr().err == "skipped: 'bad': expected two numbers\n1 of 3 inputs skipped\n"


def test_a_task_without_pictures_says_so(finished: Path, quiet: Console) -> None:
    with pytest.raises(UserError, match="explain: the task 'toy' draws no picture"):
        explain_run(finished, POINTS, console=quiet)


def test_names_of_pictures_are_safe_and_never_the_same() -> None:
    written: list[Path] = []
    for name in ("photos/a b.jpg", "other/a b.png", "chr1:10-20", "..", "übung.jpg"):
        written.append(Path(picture_name(name, written)))
    assert [path.name for path in written] == ["a_b.png", "a_b-2.png", "chr1_10-20.png", "input.png", "übung.png"]


def test_a_long_name_is_cut_to_what_a_disk_has(tmp_path: Path) -> None:
    first = picture_name("x" * 300, [])
    second = picture_name("é" * 300, [Path(first)])
    for name in (first, second, picture_name("x" * 301, [Path(first)])):
        (tmp_path / f"{name}.part").touch()
    assert len(list(tmp_path.iterdir())) == 3
