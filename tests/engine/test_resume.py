"""A run that was stopped, in whatever way, ends with the numbers of one that was not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from mambaverse.engine.folder import read_config
from mambaverse.engine.process import StopRequest
from mambaverse.engine.run import resume, train
from mambaverse.errors import UserError
from tests.engine.toy import Toy, numbers, toy_config

ALL = ("trainer.ema_decay=0.9", "trainer.accumulate=2", "optim.layer_decay=0.9", "trainer.epochs=5")


def _same(left: Path, right: Path) -> None:
    for name in ("best.safetensors", "last.safetensors"):
        a, b = load_file(left / name), load_file(right / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


# First step, within a log interval and a group, ends of epochs, last; ends of epochs that are not evaluated.
@pytest.mark.parametrize(("step", "interval"), [(1, 1), (2, 1), (5, 1), (10, 1), (13, 1), (30, 1), (12, 3), (20, 3)])
def test_stopped_by_a_signal_and_resumed(
    tmp_path: Path, quiet: Console, step: int, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = step in (1, 20)  # before anything is logged, and between two evaluations
    options = (*ALL, f"trainer.eval_interval={interval}", f"trainer.pictures={str(pictures).lower()}")
    whole = train(toy_config(tmp_path, *options, name="whole"), console=quiet)
    monkeypatch.setattr(Toy, "signal_at", step)
    cut = train(toy_config(tmp_path, *options, name="cut"), console=quiet)
    assert cut.signal == signal.SIGTERM
    assert not cut.metrics
    assert cut.history == [] or cut.history[-1]["step"] <= step
    again = resume(cut.folder, quiet)
    assert again.signal is None
    assert again.metrics == whole.metrics
    assert numbers(again.history) == numbers(whole.history)
    _same(whole.folder, cut.folder)


@pytest.mark.parametrize("part", ["generators", "position", "model", "optimizer"])
def test_a_state_that_holds_something_else_is_one_line(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(Toy, "signal_at", 5)
    cut = train(toy_config(tmp_path, *ALL, name="cut"), console=quiet)
    (path,) = (cut.folder / "state").glob("*/training.pt")
    torch.save({**torch.load(path, weights_only=True), part: {"odd": 1}}, path)
    with pytest.raises(UserError, match=r"state: damaged, or of another version \(.*model\.checkpoint="):
        resume(cut.folder, quiet)


def test_a_run_with_cuda_graphs_is_resumed_without(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(toy_config(tmp_path, *ALL, name="whole"), console=quiet)
    monkeypatch.setattr(Toy, "signal_at", 5)
    cut = train(toy_config(tmp_path, *ALL, name="cut"), console=quiet)
    for path in (cut.folder / "state").glob("*/training.pt"):
        state = torch.load(path, weights_only=True)
        for group in state["optimizer"]["param_groups"]:
            group["capturable"] = True  # as a GPU leaves it
        torch.save(state, path)
    assert resume(cut.folder, quiet).metrics == whole.metrics


def test_the_second_ctrl_c_stops_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
    try:
        with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            assert stop.signal == signal.SIGINT
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stopped_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "signal_at", 8)
    monkeypatch.setattr(Toy, "signal", signal.SIGINT)
    cut = train(toy_config(tmp_path), console=Console(width=200))
    out = capsys.readouterr().out
    assert cut.signal == signal.SIGINT
    assert f"mambaverse train --resume {cut.folder}" in out


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from rich.console import Console
import torch
torch.set_num_threads(1)
from mambaverse.engine.run import resume, train
from tests.engine.toy import toy_config

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
draw, kills, quiet = random.Random(seed), 0, Console(quiet=True)
config = toy_config(folder, *sys.argv[3:], name="cut")
while True:
    child = os.fork()
    if child == 0:
        run = folder / "cut"
        if (run / "config.yaml").exists():
            resume(run, quiet)
        else:
            train(config, console=quiet)
        os._exit(0)
    limit = time.monotonic() + (draw.uniform(0.02, 0.5) if kills < 10 else 60)
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < limit:
        time.sleep(0.002)
    if done[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        continue
    assert done[1] == 0, done
    print(kills)
    break
"""


def test_killed_again_and_again_at_random_moments(tmp_path: Path, quiet: Console) -> None:
    often = ("trainer.save_minutes=0.0005", "task.sleep_s=0.002", "trainer.pictures=true")
    overrides = (*ALL, "trainer.epochs=20", *often)
    seed = random.SystemRandom().randrange(2**31)
    script = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED, str(tmp_path), str(seed), *overrides],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert script.returncode == 0, (seed, script.stderr)
    assert int(script.stdout) > 0, seed
    whole = train(toy_config(tmp_path, *overrides, name="whole"), console=quiet)
    again = resume(tmp_path / "cut", quiet)  # finished: evaluates once more
    assert again.metrics == whole.metrics, seed
    assert numbers(again.history) == numbers(whole.history), seed
    _same(whole.folder, tmp_path / "cut")


def test_a_finished_run_resumed_changes_nothing(tmp_path: Path, quiet: Console) -> None:
    whole = train(toy_config(tmp_path, "trainer.pictures=true"), console=quiet)
    weights = load_file(whole.folder / "best.safetensors")
    again = resume(whole.folder, quiet)
    assert (again.metrics, again.history, again.best) == (whole.metrics, whole.history, whole.best)
    assert all(torch.equal(weights[k], v) for k, v in load_file(whole.folder / "best.safetensors").items())


def test_workers_change_no_number(tmp_path: Path, quiet: Console) -> None:
    here = train(toy_config(tmp_path, name="here"), console=quiet)
    there = train(toy_config(tmp_path, "data.num_workers=2", name="there"), console=quiet)
    assert numbers(here.history) == numbers(there.history)
    _same(here.folder, there.folder)


def test_two_runs_of_a_config_are_equal_and_of_another_seed_are_not(tmp_path: Path, quiet: Console) -> None:
    one, two, other = (
        train(toy_config(tmp_path, f"trainer.seed={seed}", name=name), console=quiet)
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert numbers(one.history) == numbers(two.history) != numbers(other.history)


@pytest.fixture
def stopped(tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Toy, "signal_at", 8)
    return train(toy_config(tmp_path), console=quiet).folder


def test_a_resumed_run_keeps_its_config(stopped: Path, quiet: Console) -> None:
    config = read_config(stopped)
    config.optim.lr = 1.0
    config.data.num_workers = 1  # free to change
    with pytest.raises(UserError, match=r"keeps its config, but optim\.lr changed"):
        train(config, resume=stopped, console=quiet)


def test_a_resumed_run_keeps_its_config_whatever_is_written_into_the_file(stopped: Path, quiet: Console) -> None:
    text = (stopped / "config.yaml").read_text()
    (stopped / "config.yaml").write_text(text.replace("lr: ", "lr: 1").replace("num_workers: 0", "num_workers: 1"))
    with pytest.raises(UserError, match=r"keeps its config, but optim\.lr, optim\.warmup_lr.* changed; put it back"):
        resume(stopped, quiet)
    (stopped / "config.yaml").write_text(text)
    assert resume(stopped, quiet).metrics


def test_a_resumed_run_needs_the_data_it_began_with(stopped: Path, quiet: Console) -> None:
    (stopped / "split.csv").write_text("train,99\n")
    with pytest.raises(UserError, match=r"split\.csv: the data, or their split"):
        resume(stopped, quiet)
