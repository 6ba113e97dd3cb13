from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from mambaverse.config import ConfigError, compose, import_plugins, to_yaml
from mambaverse.engine.checkpoint import CheckpointError
from mambaverse.engine.files import write_weights
from mambaverse.engine.folder import RunFolder, load_run, make_task, open_run, read_config
from mambaverse.engine.run import resume, train
from mambaverse.engine.task import FactError
from mambaverse.errors import UserError
from mambaverse.mixers import mixer_class
from tests.engine.toy import CLASSES, toy_config


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "spoilt"))


def test_it_holds_what_its_description_promises(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "best.safetensors", "config.yaml", "confusion.png", "curves.png", "facts.json", "last.safetensors",
        "metrics.jsonl", "per_class.csv", "results.json", "split.csv", "state",
    }  # fmt: skip


def test_its_config_can_be_trained_from_again(finished: Path, tmp_path: Path, quiet: Console) -> None:
    again = compose(str(finished / "config.yaml"), [f"trainer.output_dir={tmp_path}"])
    assert to_yaml(read_config(finished)) == (finished / "config.yaml").read_text()
    result = train(again, console=quiet)
    one, two = (load_file(folder / "best.safetensors") for folder in (finished, result.folder))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_is_loaded_with_its_best_weights(finished: Path) -> None:
    before = torch.get_rng_state()
    config, task, model = load_run(finished)
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training
    assert config.data.batch_size == 16
    assert list(task.classes) == list(CLASSES)


def test_a_run_of_its_own_gets_a_name_of_its_own(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    config.trainer.run_name = None
    first = RunFolder.new(config, "vision/digits")
    second = RunFolder.new(config, "vision/digits")
    assert first.path != second.path
    assert first.path.name.startswith("vision-digits-20")
    assert RunFolder.new(config, "/some/where/mine.yaml").path.parent == tmp_path


@pytest.mark.skipif(os.name != "posix", reason="locks")
def test_two_processes_never_train_in_one_folder(run: Path, quiet: Console) -> None:
    script = "import sys; from pathlib import Path; from mambaverse.engine.folder import RunFolder\n"
    script += "with RunFolder(Path(sys.argv[1])).claimed(): print('mine', flush=True); sys.stdin.read()"
    for path, begin in (
        (run, partial(resume, run, quiet)),
        (run.parent / "new", partial(train, toy_config(run.parent, name="new"), console=quiet)),
    ):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", script, str(path)], **pipes) as other:  # type: ignore[call-overload]
            assert other.stdout.readline() == b"mine\n"
            with pytest.raises(UserError, match=f"{path.name}: another process trains in it; wait for its end, or"):
                begin()
            other.kill()
        begin()
        assert not (path / ".lock").exists()


def test_what_is_refused_before_it_begins_leaves_no_folder(tmp_path: Path, quiet: Console) -> None:
    with pytest.raises(UserError, match="unknown optimizer"):
        train(toy_config(tmp_path, "optim.name=nope", name="nothing"), console=quiet)
    assert not (tmp_path / "nothing").exists()


def test_a_name_that_is_taken_is_refused_or_replaced_and_only_what_is_ours_is_removed(
    run: Path, quiet: Console
) -> None:
    config = toy_config(run.parent, name="spoilt")
    with pytest.raises(UserError, match=r"is already a run; choose another trainer\.run_name"):
        train(config, console=quiet)
    (run / "notes.json").write_text("mine")
    (run / "sets.csv").write_text("of a run before it")
    config.trainer.overwrite = True
    config.trainer.epochs = 1
    train(config, console=quiet)
    assert (run / "notes.json").read_text() == "mine" and not (run / "sets.csv").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3

    other = run.parent / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    config.trainer.run_name = "other"
    with pytest.raises(UserError, match="other exists and is not a run"):
        train(config, console=quiet)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]
    for outside in ("../up", str(other)):
        config.trainer.run_name = outside
        with pytest.raises(UserError, match=r"leads out of trainer\.output_dir"):
            train(config, console=quiet)
    for nothing in ("", "."):  # else trainer.output_dir itself would become the run
        config.trainer.run_name = nothing
        with pytest.raises(UserError, match=f"trainer.run_name='{nothing}': expected a name, or null"):
            train(config, console=quiet)


def test_a_run_that_was_killed_as_it_wrote_its_config_begins_again(tmp_path: Path, quiet: Console) -> None:
    run = tmp_path / "cut"
    run.mkdir()
    (run / ".lock").touch()
    (run / "config.yaml.part").write_text("task: {na")
    with pytest.raises(UserError, match="unknown optimizer"):
        train(toy_config(tmp_path, "optim.name=nope", name="cut"), console=quiet)
    assert not run.exists()  # as without what the kill left
    run.mkdir()
    (run / "config.yaml.part").write_text("task: {na")
    assert train(toy_config(tmp_path, name="cut"), console=quiet).folder == run
    assert not (run / "config.yaml.part").exists()


def test_what_is_not_a_run_folder_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        open_run(tmp_path / "none")
    with pytest.raises(UserError, match=r"not a run folder, or its run never began: it has no config\.yaml"):
        open_run(tmp_path)


def test_a_run_that_is_not_there_names_the_nearest(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"did you mean '{run}'\?"):
        open_run(run.with_name(run.name + "s"))
    run.parent.rename(run.parent.with_name("runs"))
    monkeypatch.chdir(run.parent.parent)
    with pytest.raises(UserError, match=rf"no run folder '{run.name}', did you mean 'runs/{run.name}'\?"):
        open_run(Path(run.name))


def test_a_run_without_weights_yet_says_how_to_get_them(run: Path) -> None:
    (run / "best.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no best\.safetensors.*mambaverse train --resume"):
        load_run(run)


def test_a_half_written_run_is_refused_by_the_file_that_is_damaged(run: Path, quiet: Console) -> None:
    weights = (run / "best.safetensors").read_bytes()
    (run / "best.safetensors").write_bytes(weights[:100])
    with pytest.raises(CheckpointError, match=r"best\.safetensors: damaged"):
        load_run(run)
    (run / "best.safetensors").write_bytes(weights)
    (run / "facts.json").write_text('{"classes": [')
    with pytest.raises(UserError, match=r"facts\.json: half written or missing"):
        load_run(run)
    state = next((run / "state").glob("*/training.pt"))
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"training\.pt: damaged"):
        resume(run, quiet)
    (run / "config.yaml").write_text("task: {name: toy\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: not readable as YAML"):
        resume(run, quiet)


@pytest.mark.parametrize(("text", "message"), [("[]", "half written or missing"), ("{}", "lacks 'classes'")])
def test_facts_that_say_too_little_are_refused(run: Path, text: str, message: str) -> None:
    (run / "facts.json").write_text(text)
    with pytest.raises(UserError, match=rf"facts\.json: {message}"):
        load_run(run, data=False)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("classes", ["5", "null", '"east"', "[1, 2, 3, 4]", '{"east": 0}', "NaN"])
def test_facts_of_another_type_are_refused(run: Path, classes: str, data: bool) -> None:
    (run / "facts.json").write_text(f'{{"classes": {classes}}}')
    expected = "half written or missing .NaN where" if classes == "NaN" else "classes: expected a list of names, got"
    with pytest.raises(UserError, match=rf"facts\.json: {expected}"):
        load_run(run, data=data)


@pytest.mark.parametrize(
    ("config", "key", "value", "expected"),
    [
        ("vision/digits", "img_size", "8", "a whole number from 1, got '8'"),
        ("vision/digits", "in_chans", 0, "a whole number from 1, got 0"),
        ("vision/digits", "mean", [None], r"a list of numbers, got \[None\]"),
        ("vision/digits", "std", [0.1, 0.2], r"1 values, one a channel, got \[0.1, 0.2\]"),
        ("dna/rrna16s", "longest", 2.5, "a whole number from 1, got 2.5"),
        ("audio/mandarin_tones", "mean", 3, "a list of numbers or None, got 3"),
    ],
)
def test_facts_of_a_domain_are_checked(config: str, key: str, value: object, expected: str) -> None:
    task = make_task(compose(config))
    facts = {"classes": ["a", "b"], "img_size": 8, "in_chans": 1, "mean": [0.5], "std": [0.2]}
    facts |= {"longest": 9, "shortest": 3}
    task.restore(facts)
    with pytest.raises(FactError, match=rf"{key}: expected {expected}"):
        task.restore({**facts, key: value})


def test_weights_of_another_model_are_refused(run: Path) -> None:
    write_weights(run / "best.safetensors", {"stem.weight": torch.zeros(3, 2)}, {})
    with pytest.raises(CheckpointError, match="weights of another model: 5 missing"):
        load_run(run)


def test_data_of_other_classes_are_refused(run: Path) -> None:
    facts = (run / "facts.json").read_text()
    (run / "facts.json").write_text(facts.replace("east", "ost"))
    with pytest.raises(UserError, match=r"the data have classes 4 \(east, .*trained on 4 \(ost, "):
        load_run(run)


@pytest.mark.parametrize("body", ["1 / 0", "def"])
def test_a_plugin_that_cannot_be_imported_is_named(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    (tmp_path / "broken_plugin.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"plugin 'broken_plugin' cannot be imported: (ZeroDivision|Syntax)Error: "):
        toy_config(tmp_path, "plugins=[broken_plugin]")
    config = toy_config(tmp_path)
    config.plugins = ["broken_plugin"]
    with pytest.raises(ConfigError, match="'broken_plugin'"):
        train(config, console=quiet)


@pytest.mark.parametrize("given", ["beside", "beside.py", "./beside.py", "beside.inner"])
def test_a_plugin_that_lies_beside_is_told_how_python_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    (tmp_path / "beside.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    for ask in (lambda: import_plugins([given]), lambda: mixer_class(f"{given}:Mine")):
        with pytest.raises(UserError, match=r"imported: .*; (\./)?beside\.py is the module 'beside', .*PYTHONPATH=\.$"):
            ask()
    for given in ("", "..", "nowhere.py", "json.nothing"):  # no file of it is here
        with pytest.raises(UserError, match=r"imported: (?!.*PYTHONPATH)"):
            import_plugins([given])


def test_a_run_cut_off_at_its_very_beginning_can_begin_again(run: Path, finished: Path, quiet: Console) -> None:
    for path in run.iterdir():
        if path.name != "config.yaml":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    resume(run, quiet)
    one, two = (load_file(folder / "best.safetensors") for folder in (finished, run))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (run / "facts.json").is_file()
