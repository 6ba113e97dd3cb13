from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file

from mambaverse.config import ConfigError
from mambaverse.engine import process
from mambaverse.engine import trainer as trainer_module
from mambaverse.engine.data import MODEL, TrainPlan, derive_seed
from mambaverse.engine.run import train
from mambaverse.engine.state import seed_generators
from mambaverse.errors import UserError
from tests.engine.toy import Net, Toy, numbers, toy_config

EXACT = ("task.dropout=0", "task.mix=false", "data.noise=0")  # nothing left that depends on how batches are cut


def _evals(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in history if row["kind"] == "eval"]


def test_it_learns(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["metrics"]["accuracy"] > 0.8
    assert results["steps"] == 24


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path, quiet: Console) -> None:
    one = train(toy_config(tmp_path, *EXACT, "data.num_train=96", "data.batch_size=32", name="one"), console=quiet)
    many = toy_config(tmp_path, *EXACT, "data.num_train=96", "data.batch_size=8", "trainer.accumulate=4", name="many")
    many_result = train(many, console=quiet)
    for a, b in zip(_evals(one.history), _evals(many_result.history), strict=True):
        assert (a["step"], a["epoch"]) == (b["step"], b["epoch"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)


def test_a_smaller_last_group_of_an_epoch_is_a_mean_over_its_own_batches(tmp_path: Path, quiet: Console) -> None:
    # 6 batches of 16: groups of 4 leave one of 2. Plain gradient descent shows their size in the weights.
    sgd = (
        "optim.name=momentum",
        "optim.args={momentum: 0}",
        "optim.weight_decay=0",
        "optim.schedule=constant",
        "trainer.clip_grad=null",
    )
    options = (
        *EXACT,
        *sgd,
        "optim.warmup_epochs=0",
        "trainer.epochs=1",
        "trainer.log_every=1",
        "trainer.clip_grad=1e9",
    )
    result = train(toy_config(tmp_path, *options, "trainer.accumulate=4"), console=quiet)
    rows = [row for row in result.history if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[-1]["epoch"] == 1.0
    mean = (4 * rows[0]["loss"] + 2 * rows[1]["loss"]) / 6  # the epoch's mean weighs the groups by their batches
    assert _evals(result.history)[0]["train_loss"] == pytest.approx(mean, rel=1e-6)

    config = toy_config(tmp_path, *options)  # the same two steps, by hand
    task = Toy(config)
    task.setup()
    seed_generators(derive_seed(config.trainer.seed, MODEL))
    model = task.build_model()
    batches = [job.indices for job in TrainPlan(100, 16, config.trainer.seed).jobs(0)]
    for group in (batches[:4], batches[4:]):
        indices = [i for batch in group for i in batch]
        loss = torch.nn.functional.cross_entropy(model(task.train_set.points[indices]), task.train_set.labels[indices])
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p.sub_(config.optim.lr * p.grad)
    saved = load_file(result.folder / "last.safetensors")
    torch.testing.assert_close(saved, dict(model.state_dict()), rtol=1e-5, atol=1e-6)


def test_the_average_is_what_is_evaluated_and_saved(tmp_path: Path, quiet: Console) -> None:
    result = train(toy_config(tmp_path, "trainer.ema_decay=0.99"), console=quiet)
    state = torch.load(next((result.folder / "state").glob("*/training.pt")), weights_only=True)
    saved = load_file(result.folder / "last.safetensors")
    assert all(torch.equal(saved[key], state["average"][key]) for key in saved)
    assert not torch.equal(state["average"]["head.weight"], state["model"]["head.weight"])
    model = Net(0.0)
    model.load_state_dict(saved)
    task = Toy(toy_config(tmp_path))
    task.setup()
    with torch.no_grad():
        logits = model.eval()(task.eval_set.points)
    accuracy = (logits.argmax(1) == task.eval_set.labels).float().mean().item()
    assert _evals(result.history)[-1]["accuracy"] == pytest.approx(accuracy)


def test_the_best_weights_are_those_of_the_best_epoch(tmp_path: Path, quiet: Console) -> None:
    result = train(toy_config(tmp_path, "trainer.monitor=loss", "optim.lr=0.3"), console=quiet)
    losses = [row["loss"] for row in _evals(result.history)]
    assert result.best == min(losses)
    assert result.metrics["loss"] == pytest.approx(min(losses), rel=1e-6)


def test_an_evaluation_every_third_epoch_changes_no_weight(tmp_path: Path, quiet: Console) -> None:
    options = ("trainer.epochs=5", "trainer.ema_decay=0.9")
    each = train(toy_config(tmp_path, *options, name="each"), console=quiet)
    third = train(toy_config(tmp_path, *options, "trainer.eval_interval=3", name="third"), console=quiet)
    rows = _evals(third.history)
    assert [row["epoch"] for row in rows] == [3, 5]
    assert [row["loss"] for row in rows] == [row["loss"] for row in _evals(each.history) if row["epoch"] in (3, 5)]
    losses = [row["train_loss"] for row in _evals(each.history)]
    assert rows[1]["train_loss"] == pytest.approx(sum(losses[3:]) / 2)  # the mean since the evaluation before
    a, b = load_file(each.folder / "last.safetensors"), load_file(third.folder / "last.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_patience_that_runs_out_between_evaluations_ends_with_one(tmp_path: Path, quiet: Console) -> None:
    options = ("optim.lr=0", "optim.min_lr=0", "optim.warmup_epochs=0", "trainer.patience=2", "trainer.epochs=9")
    result = train(toy_config(tmp_path, *options, "trainer.eval_interval=3"), console=quiet)
    assert [row["epoch"] for row in _evals(result.history)] == [2, 3, 4]  # the first is the best so far


def test_it_stops_when_patience_runs_out(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "optim.lr=0", "optim.min_lr=0", "optim.warmup_epochs=0", "trainer.patience=2")
    console = Console(file=io.StringIO(), width=100)
    result = train(config, console=console)
    assert [row["epoch"] for row in _evals(result.history)] == [1, 2, 3]  # the first is best, two bring nothing
    assert "Stopped early: no better accuracy in 2 epochs." in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_gradient_is_clipped(tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    update = trainer_module.Trainer._update

    def spy(self: Any, *args: Any) -> None:
        step = self.optimizer.step

        def measured(*a: Any, **k: Any) -> None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters]).item())
            step(*a, **k)

        monkeypatch.setattr(self.optimizer, "step", measured)
        update(self, *args)
        monkeypatch.setattr(self.optimizer, "step", step)

    monkeypatch.setattr(trainer_module.Trainer, "_update", spy)
    result = train(toy_config(tmp_path, "trainer.clip_grad=0.1", "trainer.log_every=1"), console=quiet)
    assert max(norms) <= 0.1 + 1e-6
    assert result.history[0]["grad_norm"] > 0.1  # logged as it was before


@pytest.mark.parametrize("where", ["clip_grad=1.0", "clip_grad=null"])
def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_state(
    tmp_path: Path, quiet: Console, where: str
) -> None:
    with pytest.raises(UserError) as error:
        train(toy_config(tmp_path, "task.nan_at=16", f"trainer.{where}", "trainer.pictures=true"), console=quiet)
    folder = tmp_path / "run"
    text = str(error.value)
    assert text.startswith("the loss is nan at step 16 (lr 0.00")
    assert "of epoch 3" in text
    assert "the state after step 12 is kept" in text
    state = torch.load(next((folder / "state").glob("*/training.pt")), weights_only=True)
    assert state["position"]["updates"] == 12
    assert all(value.isfinite().all() for value in state["model"].values())
    assert all(value.isfinite().all() for value in load_file(folder / "last.safetensors").values())
    assert (folder / "curves.png").is_file()


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The loss of the last step is finite, its gradient is not, and nothing measures it.
    def step(self: Toy, model: Any, batch: Any) -> Any:
        result = original(self, model, batch)
        if model.training and self.steps == 12:
            result["loss"] = result["loss"] + 0 * torch.sqrt(0 * model.head.weight.sum())
        return result

    original = Toy.step
    monkeypatch.setattr(Toy, "step", step)
    with pytest.raises(UserError, match=r"a weight is not finite at step 12 .*after step 6 is kept"):
        train(toy_config(tmp_path, "trainer.clip_grad=null"), console=quiet)


def test_reduced_precision_trains_close_to_full_with_full_weights(tmp_path: Path, quiet: Console) -> None:
    # without dropout: its draws depend on the dtype
    full, half = (
        train(toy_config(tmp_path, "task.dropout=0", f"trainer.precision={p}", name=p), console=quiet)
        for p in ("fp32", "bf16")
    )
    left, right = (_evals(result.history)[-1]["loss"] for result in (full, half))
    assert 0 < abs(left - right) < 0.02 * left
    assert load_file(half.folder / "best.safetensors")["head.weight"].dtype == torch.float32


def test_fp16_is_refused_on_a_cpu(tmp_path: Path, quiet: Console) -> None:
    with pytest.raises(UserError, match=r"trainer\.precision: fp16 needs a GPU"):
        train(toy_config(tmp_path, "trainer.precision=fp16"), console=quiet)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, quiet: Console) -> None:
    with pytest.raises(UserError, match=r"trainer\.device: cuda was asked for"):
        train(toy_config(tmp_path, "trainer.device=cuda"), console=quiet)


def test_threads_are_what_the_config_says_and_then_what_they_were(tmp_path: Path, quiet: Console) -> None:
    seen = set()

    class Watching(Toy):
        def step(self, model: Any, batch: Any) -> Any:
            seen.add(torch.get_num_threads())
            return super().step(model, batch)

    from mambaverse.engine.task import TASKS

    torch.set_num_threads(1)
    TASKS.register("toy", Watching, overwrite=True)
    try:
        train(toy_config(tmp_path, "trainer.num_threads=2", "trainer.epochs=1"), console=quiet)
    finally:
        TASKS.register("toy", Toy, overwrite=True)
    assert seen == {2}
    assert torch.get_num_threads() == 1


def test_products_in_float32_stay_so_where_accelerate_would_have_tf32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_on_a_gpu(**options: Any) -> Accelerator:  # with a compiled model; Accelerate does so in AcceleratorState
        torch.backends.cuda.matmul.allow_tf32 = True
        return Accelerator(**options)

    monkeypatch.setattr(process, "Accelerator", as_on_a_gpu)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            with process.launch(toy_config(tmp_path).trainer):
                assert torch.backends.cuda.matmul.allow_tf32 == allowed
            assert torch.backends.cuda.matmul.allow_tf32 == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.name=adamww", r"optim\.name: unknown optimizer 'adamww', did you mean 'adamw'"),
        ("optim.name=fusedadam", r"optim\.name: fusedadam cannot be had here: .*(APEX|apex)"),
        ("optim.name=adahessian", r"optim\.name: adahessian needs second derivatives"),
        ("optim.args.betas=[0.9]", "optim: adamw refused its arguments"),
        ("optim.schedule_args={cycle_mul: 0}", "optim: cosine refused its arguments"),
        ("optim.schedule_args={k_decay: abc}", "optim: cosine refused its arguments"),
        ("optim.args.beta=1", "optim: adamw refused its arguments: .*beta"),
        ("optim.schedule=cosin", r"optim\.schedule: unknown schedule 'cosin', did you mean 'cosine'"),
        ("optim.schedule_args.decay=1", "optim: cosine refused its arguments: .*decay"),
        ("trainer.monitor=acuracy", r"trainer\.monitor: there is no metric 'acuracy', did you mean 'accuracy'"),
    ],
)
def test_what_a_config_gets_wrong_is_said_before_anything_is_written(
    tmp_path: Path, quiet: Console, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(toy_config(tmp_path, override), console=quiet)
    assert not (tmp_path / "run").exists()


def test_metrics_are_lines_of_json_that_tell_steps_and_epochs(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(3, 25, 3))
    assert [row["epoch"] for row in rows if row["kind"] == "eval"] == [1, 2, 3, 4]
    assert {"lr", "loss", "grad_norm", "samples_per_s"} <= rows[0].keys()
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


def test_evaluating_draws_nothing_from_the_generators_of_training(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(toy_config(tmp_path, name="plain"), console=quiet)
    forward = Toy.forward
    monkeypatch.setattr(
        Toy, "forward", lambda *a: (torch.rand(1), forward(*a))[1] if not a[1].training else forward(*a)
    )
    drawing = train(toy_config(tmp_path, name="drawing"), console=quiet)
    assert numbers(plain.history) == numbers(drawing.history)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path, quiet: Console) -> None:
    result = train(toy_config(tmp_path, "trainer.tensorboard=true", "trainer.epochs=2"), console=quiet)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.folder / "tensorboard"))
    events.Reload()
    logged = [(e.step, e.value) for e in events.Scalars("eval/accuracy")]
    expected = [(row["step"], pytest.approx(row["accuracy"])) for row in _evals(result.history)]
    assert logged == expected


def test_a_run_without_pictures_draws_none_and_has_the_same_numbers(
    tmp_path: Path, quiet: Console, finished: Path
) -> None:
    result = train(toy_config(tmp_path, "trainer.pictures=false"), console=quiet)
    assert not list(result.folder.glob("**/*.png"))
    files = {path.name for path in result.folder.iterdir()}
    assert files == {path.name for path in finished.iterdir() if path.suffix != ".png"}
    assert result.metrics == json.loads((finished / "results.json").read_text())["metrics"]


def test_a_model_starts_from_a_checkpoint(tmp_path: Path, quiet: Console, finished: Path) -> None:
    path = finished / "best.safetensors"
    config = toy_config(tmp_path, f"model.checkpoint={path}", "optim.lr=0", "optim.min_lr=0", "optim.warmup_epochs=0")
    result = train(config, console=quiet)
    assert result.metrics == json.loads((finished / "results.json").read_text())["metrics"]


def test_an_empty_evaluation_set_is_refused(tmp_path: Path, quiet: Console) -> None:
    with pytest.raises(UserError, match="the evaluation set has no samples"):
        train(toy_config(tmp_path, "data.num_eval=0"), console=quiet)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_learns_the_same(tmp_path: Path, quiet: Console) -> None:
    plain = train(toy_config(tmp_path, *EXACT, "trainer.epochs=1", name="plain"), console=quiet)
    options = (*EXACT, "trainer.epochs=1", "trainer.compile=default")
    compiled = train(toy_config(tmp_path, *options, name="compiled"), console=quiet)
    for a, b in zip(_evals(plain.history), _evals(compiled.history), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    one, two = (load_file(run.folder / "last.safetensors") for run in (plain, compiled))
    assert one.keys() == two.keys()  # no name of what is wrapped


def test_an_unknown_way_to_compile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.compile: expected default, .* got 'fast'"):
        toy_config(tmp_path, "trainer.compile=fast")
