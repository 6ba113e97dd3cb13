"""A full disk or a crash while saving leaves what was there before."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from mambaverse.engine import files
from mambaverse.engine.evaluate import evaluate
from mambaverse.engine.files import SaveError, new_folder, output_path, write_atomic, write_weights
from mambaverse.engine.run import resume, train
from mambaverse.engine.state import StateFolder
from mambaverse.errors import UserError
from tests.engine.toy import numbers, toy_config


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "one")
    write_atomic(path, "two")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "two"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "one")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "write":
        (tmp_path / "a.txt.part").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(files.os, call, full)
    with pytest.raises(SaveError, match=r"cannot write .*a\.txt: No space left on device"):
        write_atomic(path, "two" * 10000)
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_output_never_replaces_an_input(tmp_path: Path) -> None:
    (tmp_path / "calls.vcf").write_text("calls")
    (tmp_path / "link.vcf").symlink_to("calls.vcf")
    with pytest.raises(UserError, match=r"--out .*link\.vcf: it would replace the input .*calls\.vcf; name another"):
        output_path("--out", tmp_path / "link.vcf", inputs=(None, tmp_path / "none", tmp_path / "calls.vcf"))
    with pytest.raises(UserError, match=r"--out .*calls\.vcf: is there already, in the input .*; name another"):
        output_path("--out", tmp_path / "calls.vcf", inputs=(tmp_path,))
    output_path("--out", tmp_path / "new.vcf", inputs=(tmp_path / "calls.vcf", tmp_path))


def test_weights_that_share_memory_come_back_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    weights = {"a": base, "tied": base, "part": base[1:], "turned": base.T}
    write_weights(tmp_path / "w.safetensors", weights, {"epoch": "1"})
    loaded = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="cannot write"), new_folder(tmp_path / "x") as part:
        (part / "a").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "x") as part:
        (part / "a").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_newest_complete_state_is_loaded_and_a_half_written_one_is_not(tmp_path: Path) -> None:
    states = StateFolder(tmp_path / "state")
    assert states.load() is None
    states.save({"position": 1})
    states.save({"position": 2})
    half = tmp_path / "state" / "0000003.part"
    half.mkdir()
    (half / "training.pt").write_bytes(b"PK")
    assert states.load() == {"position": 2}
    states.save({"position": 3})
    assert states.load() == {"position": 3}
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["0000003"]


def test_a_state_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    states = StateFolder(tmp_path / "state")
    states.save({"position": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(SaveError, match="File too large"):
            states.save({"position": 2, "model": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert states.load() == {"position": 1}


def test_a_run_whose_disk_fills_up_ends_with_one_line_and_goes_on_when_there_is_room(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(toy_config(tmp_path, name="whole"), console=quiet)
    saves = 0
    save = files.save_torch

    def full_later(path: Path, obj: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 3:
            path.write_bytes(b"half a state")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, obj)

    monkeypatch.setattr("mambaverse.engine.state.save_torch", full_later)
    with pytest.raises(SaveError) as error:
        train(toy_config(tmp_path, name="cut"), console=quiet)
    folder = tmp_path / "cut"
    text = str(error.value)
    assert "No space left on device" in text
    assert f"mambaverse train --resume {folder}" in text
    assert "\n" not in text
    again = resume(folder, quiet)
    assert numbers(again.history) == numbers(whole.history)


def test_a_disk_that_is_full_at_the_end_of_a_run_loses_nothing_either(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr("mambaverse.engine.run.write_atomic", lambda path, _: write_atomic(path.parent / "no" / "x", ""))
        with pytest.raises(SaveError, match=f"; make room, then go on .*: mambaverse train --resume {folder}$"):
            train(toy_config(tmp_path, name="cut"), console=quiet)
    assert resume(folder, quiet).metrics and (folder / "results.json").is_file()


def test_a_finished_run_that_lost_its_best_weights_is_told_of_the_last_ones(tmp_path: Path, quiet: Console) -> None:
    path = train(toy_config(tmp_path), console=quiet).folder
    (path / "best.safetensors").unlink()
    with pytest.raises(UserError, match=r"put it back, or take the last weights, trainer\.select=last; "):
        evaluate(path)
    assert evaluate(path, ["trainer.select=last"])


@pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="mounts a disk of its own")
def test_a_disk_that_is_really_full(tmp_path: Path, quiet: Console) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # Weights take 43 kB, a state 140 kB: the first of each fits (two files of weights), a second state does not.
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        config = toy_config(tmp_path, "model.args={width: 1200}", f"trainer.output_dir={disk}")
        with pytest.raises(SaveError, match="No space left on device"):
            train(config, console=quiet)
        state = StateFolder(disk / "run" / "state").load()
        assert state is not None
        assert state["position"]["epoch"] == 1
        assert evaluate(disk / "run")["accuracy"] > 0.25
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        cut = resume(disk / "run", quiet)
    finally:
        subprocess.run(["umount", disk], check=True)
    whole = train(toy_config(tmp_path, "model.args={width: 1200}"), console=quiet)
    assert numbers(cut.history) == numbers(whole.history)
