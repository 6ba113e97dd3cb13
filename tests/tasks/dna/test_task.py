"""The DNA task: what it makes of a config and of sequences, how they vary, what it predicts, draws and refuses."""

import json
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from mambaverse.cli import main
from mambaverse.config import compose
from mambaverse.engine.baseline import fit_baselines
from mambaverse.engine.data import TrainPlan, make_batch
from mambaverse.errors import UserError
from mambaverse.tasks.dna.sequences import Augment, mix, moved, tiles, window_start
from mambaverse.tasks.dna.task import DnaTask, sequences_of
from mambaverse.tasks.dna.tokens import COMPLEMENT, PAD, N, decode, encode
from tests.tasks.dna.conftest import TINY, Make, letters, rows, write, write_csv

Draw = Callable[[int], torch.Generator]
QUIET = Console(quiet=True)


def batch_of(task: DnaTask, n: int, draw: Draw | None = None) -> dict[str, Tensor]:
    samples = [task.train_set.sample(i, None if draw is None else draw(i)) for i in range(n)]
    return dict(task.collate(samples, None if draw is None else draw(99)))


# Batches


def test_a_batch_of_one_length_has_no_lengths(make_task: Make, table: Path) -> None:
    batch = batch_of(make_task("dna/fasta", f"data.root={table}"), 8)
    assert batch["ids"].shape == (8, 40) and batch["ids"].dtype == torch.uint8 and set(batch) == {"ids", "target"}
    assert batch["target"].dtype == torch.int64


def test_a_batch_of_several_lengths_is_padded_behind(make_task: Make, tmp_path: Path) -> None:
    data = [(sequence[: 20 + i % 7], label) for i, (sequence, label) in enumerate(rows())]
    task = make_task("dna/fasta", f"data.root={write_csv(tmp_path / 'x.csv', data)}")
    batch = batch_of(task, 10)
    sequences = sequences_of(task.train_set)
    assert batch["lengths"].tolist() == sequences.lengths()[:10].tolist()
    for i, size in enumerate(batch["lengths"].tolist()):
        assert batch["ids"][i, :size].tolist() == sequences[i].tolist() and (batch["ids"][i, size:] == PAD).all()


def test_the_same_draws_make_the_same_batch_also_in_a_worker(make_task: Make, table: Path, draw: Draw) -> None:
    options = ("data.window=30", "data.reverse_complement=0.5", "data.shift=2", "data.mutate=0.2", "data.mask=0.1")
    task = make_task("dna/fasta", f"data.root={table}", *options)
    first, second = (batch_of(task, 9, draw) for _ in range(2))
    assert first["ids"].equal(second["ids"]) and first["ids"].shape == (9, 30)
    samples, collate = pickle.loads(pickle.dumps((task.train_set, task.collate)))
    assert collate([samples.sample(i, draw(i)) for i in range(9)], draw(99))["ids"].equal(first["ids"])
    assert not batch_of(task, 9)["ids"].equal(first["ids"])
    state = torch.get_rng_state()
    batch_of(task, 9, draw)
    assert torch.get_rng_state().equal(state)


def test_mixup_takes_bases_of_two_sequences_and_as_much_of_their_labels(
    make_task: Make, table: Path, draw: Draw
) -> None:
    task = make_task("dna/fasta", f"data.root={table}", "task.mixup=1.0")
    plain, first, second = (batch_of(task, 8, d) for d in (None, draw, draw))
    assert first["ids"].equal(second["ids"]) and first["target"].equal(second["target"])
    assert first["target"].shape == (8, 2) and torch.allclose(first["target"].sum(1), torch.ones(8))
    assert not first["ids"].equal(plain["ids"])
    assert (first["ids"] == plain["ids"][:, None]).any(0).all()  # every base stands at that place in some sequence


def test_mixup_stops_where_the_shorter_of_two_ends(draw: Draw) -> None:
    ids = torch.full((2, 6), PAD, dtype=torch.uint8)
    ids[0, :6], ids[1, :3] = 7, 8
    mixed = mix(ids, torch.tensor([0, 1]), 2, 1.0, draw(3))
    assert mixed["ids"].eq(PAD).equal(ids.eq(PAD)) and (mixed["ids"][0, 3:] == 7).all()
    swapped = (mixed["ids"] != ids).sum(1) / torch.tensor([6, 3])
    torch.testing.assert_close(mixed["target"], torch.stack([torch.stack([1 - swapped[0], swapped[0]]),
                                                             torch.stack([swapped[1], 1 - swapped[1]])]))  # fmt: skip


def test_the_window_of_evaluation_is_one_and_the_same(make_task: Make, tmp_path: Path) -> None:
    data = rows(20, length=200)
    for name, order in (("a", data), ("b", data[::-1])):
        write_csv(tmp_path / f"{name}.csv", order)
    sets = [make_task("dna/fasta", f"data.root={tmp_path / name}.csv", "data.window=50") for name in ("a", "b")]
    seen = [{decode(w) for part in (t.train_set, t.eval_set) for w in part.windows()} for t in sets]  # type: ignore[attr-defined]
    assert seen[0] == seen[1] and {len(window) for window in seen[0]} == {50}
    other = make_task("dna/fasta", f"data.root={tmp_path / 'a.csv'}", "data.window=50", "data.window_seed=1")
    assert {decode(w) for w in other.train_set.windows()} != seen[0]  # type: ignore[attr-defined]


def test_training_windows_are_other_ones_unless_told(make_task: Make, tmp_path: Path, draw: Draw) -> None:
    path = write_csv(tmp_path / "x.csv", rows(6, length=200))
    task = make_task("dna/fasta", f"data.root={path}", "data.window=50")
    starts = {decode(task.train_set.sample(0, draw(seed))["ids"]) for seed in range(20)}
    assert len(starts) > 10 and all(start in decode(sequences_of(task.train_set)[0]) for start in starts)
    fixed = make_task("dna/fasta", f"data.root={path}", "data.window=50", "data.random_windows=false")
    assert decode(fixed.train_set.sample(0, draw(3))["ids"]) == decode(fixed.train_set.sample(0, None)["ids"])
    assert "one window a sequence" in fixed.describe()["data"]


def test_each_augmentation_does_what_it_says(draw: Draw) -> None:
    ids = encode(letters(2000))
    turned = Augment(reverse_complement=1.0)(ids, 0.5, 0, draw(0))
    assert turned.tolist() == COMPLEMENT[ids[::-1]].tolist()
    assert Augment(reverse_complement=0.4)(ids, 0.5, 0, draw(0)) is ids
    mutated = Augment(mutate=0.2)(ids, 0, 0, draw(0))
    assert 0.12 < (mutated != ids).mean() < 0.18 and set(mutated.tolist()) == {7, 8, 9, 10}  # a quarter stay
    assert mutated.dtype == np.uint8
    masked = Augment(mask=0.1)(ids, 0, 0, draw(0))
    assert 0.07 < (masked == N).mean() < 0.13 and (masked[masked != N] == ids[masked != N]).all()
    shifts = {decode(Augment(shift=1)(ids[:4], 0, place, draw(0))) for place in (0.0, 0.5, 0.999)}
    text = decode(ids[:4])
    assert shifts == {text[1:] + "N", text, "N" + text[:3]}
    assert moved(ids, 0) is ids


def test_windows_of_a_long_record_cover_it_or_are_evenly_spread() -> None:
    ids = np.arange(100, dtype=np.uint8)
    covering = tiles(ids, 30, 64)
    assert [int(part[0]) for part in covering] == [0, 23, 47, 70] and all(len(part) == 30 for part in covering)
    assert [int(part[0]) for part in tiles(ids, 10, 3)] == [0, 45, 90]
    assert [len(part) for part in tiles(ids[:30], 30, 64)] == [30]
    assert window_start(ids, 100, 0) == 0 and 0 <= window_start(ids, 30, 5) <= 70


def test_the_loader_makes_fifty_thousand_windows_a_second(make_task: Make) -> None:
    task = make_task("dna/rrna16s")
    plan = TrainPlan(len(task.train_set), 64, 0)
    torch.set_num_threads(1)
    limit = 50_000 if sys.gettrace() is None else 1  # under a coverage tracer every line costs extra
    rates = [0.0]
    while max(rates) <= limit and len(rates) < 60:  # the best of some seconds: another worker's tests take its caches
        start = time.process_time()
        for job in plan.jobs(0):
            make_batch(task.train_set, task.collate, 0, job)
        rates.append(64 * plan.num_batches / (time.process_time() - start))
    assert max(rates) > limit


# Models


def test_the_model_gets_what_the_data_and_the_config_say(make_task: Make, table: Path) -> None:
    task = make_task("dna/fasta", f"data.root={table}", *TINY, "model.args={pool: place}", "model.mixer=[s6,attention]")
    model: Any = task.build_model()
    assert model.num_classes == 2 and model.place_weight.shape == (10, 32)  # four bases a token
    assert task.forward(model, batch_of(task, 4)).shape == (4, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.args={num_classes: 3}", "it is the number of the data's classes"),
        ("model.args={max_length: 3}", "model.args.max_length cannot be set: set data.window"),
        ("model.args={mixer: s6}", "set model.mixer"),
        ("model.args={pol: mean}", "unknown argument 'pol', did you mean 'pool'"),
        ("model.name=caduceus_ph_d65_n2", "unknown model 'caduceus_ph_d65_n2', did you mean"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line(make_task: Make, table: Path, override: str, message: str) -> None:
    task = make_task("dna/fasta", f"data.root={table}", override)
    with pytest.raises(UserError) as caught:
        task.build_model()
    assert message in str(caught.value)


CONFIGS = {
    "rrna16s": 250, "fly_splice": 80, "splice_uci": 60, "fly_windows": 200, "species3": 200, "gue": 70,
    "genomic_benchmarks": 512, "fasta": 1000, "beta_lactamase": 600,
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_the_model_of_each_shipped_config_takes_its_sequences(make_task: Make, config: str) -> None:
    task = make_task(f"dna/{config}", "data.root=x", setup=False)
    size = CONFIGS[config]
    task.restore({"classes": ["a", "b", "c"], "longest": size, "shortest": size})
    output = task.forward(task.build_model().eval(), {"ids": torch.full((2, size), 7, dtype=torch.uint8)})
    assert output.shape == (2, 3) and output.isfinite().all()


def test_both_strands_are_averaged_in_evaluation_only(make_task: Make, table: Path) -> None:
    task = make_task("dna/fasta", f"data.root={table}", *TINY, "data.strands=both")
    model, batch = task.build_model().eval(), batch_of(task, 6)
    other = {"ids": torch.from_numpy(COMPLEMENT[batch["ids"].numpy()[:, ::-1]].copy())}
    torch.testing.assert_close(task.forward(model, batch), task.forward(model, other))
    mean = (model(batch["ids"]) + model(other["ids"])) / 2
    torch.testing.assert_close(task.forward(model, batch), mean)
    model.train()
    torch.manual_seed(0)  # of the dropout
    scores = task.forward(model, batch)
    torch.manual_seed(0)
    torch.testing.assert_close(scores, model(batch["ids"]))
    assert "both strands" in task.describe()["evaluation"]


def test_data_that_come_split_are_told_from_others(make_task: Make, tmp_path: Path) -> None:
    """By a hash of each set: a run goes on with its own data only."""
    parts = [(*row, "test" if i > 5 else "train") for i, row in enumerate(rows(4))]
    table = write_csv(tmp_path / "a.csv", parts, ("sequence", "label", "split"))

    def digests() -> list[list[str]]:
        file = make_task("dna/fasta", f"data.root={table}").save_split(tmp_path)
        assert file is not None and file.name == "sets.csv"
        return [line.split(",") for line in file.read_text().splitlines()[1:]]

    before = digests()
    assert [line[:2] for line in before] == [["train", "6"], ["eval", "2"]]
    table.write_text(table.read_text().replace(parts[7][0], parts[7][0][::-1]))
    assert [a == b for a, b in zip(before, digests(), strict=True)] == [True, False]


def test_scores_of_a_classifier_of_dna(make_task: Make, table: Path) -> None:
    task = make_task("dna/fasta", f"data.root={table}")
    assert set(task.metrics()) == {"accuracy", "macro_f1", "f1", "mcc"}  # f1 for the second of two classes


def test_the_head_names_data_and_augmentation(make_task: Make, table: Path) -> None:
    options = ("data.window=30", "data.reverse_complement=0.5", "data.shift=2", "data.mutate=0.2", "data.mask=0.1")
    described = make_task("dna/fasta", f"data.root={table}", *options).describe()
    assert "20 + 4 sequences of 30 bases, 2 classes" in described["data"] and "random windows" in described["data"]
    assert described["augmentation"] == "other strand 0.5, shift 2, mutate 0.2, mask 0.1, label smoothing 0.1"


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run on a table of one's own, with windows of 40 of 60 bases."""
    from mambaverse.engine.run import train

    folder = tmp_path_factory.mktemp("run")
    path = write_csv(folder / "own.csv", rows(40, length=60))
    options = [f"data.root={path}", "data.window=40", "data.batch_size=16", "trainer.epochs=2", "trainer.device=cpu"]
    overrides = [*TINY, *options, f"trainer.output_dir={folder}", "trainer.run_name=own", "data.strands=both"]
    return train(compose("dna/fasta", overrides), console=QUIET).folder


def test_a_run_draws_its_pictures(run: Path) -> None:
    for name in ("predictions.png", "saliency.png", "confusion.png", "curves.png"):
        with Image.open(run / name) as image:
            assert image.width > 500 and image.height > 100
    assert json.loads((run / "facts.json").read_text()) == {
        "classes": ["alpha", "beta"], "longest": 40, "shortest": 40,
    }  # fmt: skip


def predict(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> tuple[int, str, str]:
    status = main(["predict", str(run), *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_predict_names_records_and_gives_probabilities(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.fa", f">short\n{letters(9)}\n>whole here\n{letters(40)}\n>long\n{letters(100)}\n")
    status, out, err = predict(capsys, run, str(path), "--format", "csv")
    lines = [line.split(",") for line in out.splitlines()]
    assert status == 0 and lines[0] == ["input", "label", "probability", "alpha", "beta"]
    assert [line[0] for line in lines[1:]] == ["short", "whole", "long"]
    assert all(abs(float(line[3]) + float(line[4]) - 1) < 1e-5 for line in lines[1:])
    assert "record 'long': 100 bases, the model reads 40 at a time: the mean of the scores of 3 windows" in err


def test_a_long_record_gets_the_mean_of_its_windows(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sequence = letters(80, 3)
    whole = write(tmp_path / "x.fa", f">x\n{sequence}\n")
    halves = write_csv(tmp_path / "y.csv", [(sequence[:40],), (sequence[40:],)], ("sequence",))
    probabilities = []
    for path in (whole, halves):
        out = predict(capsys, run, str(path), "--format", "json")[1]
        probabilities.append([json.loads(line)["probabilities"]["alpha"] for line in out.splitlines()])
    logits = [float(np.log(p / (1 - p))) for p in probabilities[1]]
    assert float(np.log(probabilities[0][0] / (1 - probabilities[0][0]))) == pytest.approx(np.mean(logits), abs=1e-4)


def test_predict_reads_tables_and_folders(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "in/a.csv.gz", [(letters(40, i),) for i in range(3)], ("sequence",))
    write(tmp_path / "in/b/c.fna", f">z\n{letters(40)}\n")
    out = predict(capsys, run, str(tmp_path / "in"), "--format", "csv")[1]
    assert [line.split(",")[0] for line in out.splitlines()[1:]] == ["1", "2", "3", "z"]


def test_predict_takes_a_table_that_training_took(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.csv", f"sequence, label\n{letters(40)}, alpha\n")
    status, out, err = predict(capsys, run, str(path), "--format", "csv")
    assert (status, err) == (0, "") and out.splitlines()[1].startswith("1,")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.fa", ">a\nACGU\n", "record 'a': RNA: letter 'U' at position 4"),
        ("x.fa", ">a\n>b\nACGT\n", "record 'a': an empty record"),
        ("x.fa", ">a\nACGT\n>a\nACGT\n", "record 'a': record 1 has this name too"),
        ("x.csv", "sequence,label\nACGT,gamma\n", "line 2: label 'gamma' is none of the run's"),
        ("x.csv", "dna\nACGT\n", "no column 'sequence'"),
        ("x.doc", "", "not known as a sequence file"),
    ],
)
def test_a_bad_input_ends_predict_with_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    status, _, err = predict(capsys, run, str(write(tmp_path / name, text)))
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def test_bad_records_are_skipped_counted_and_the_rest_is_labelled(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.fa", f">e\n>ok\n{letters(40)}\n>u\nACGU\n>ok2\n{letters(40, 1)}\n")
    status, out, err = predict(capsys, run, str(path), "--format", "csv", "--on-error", "skip")
    assert status == 0 and [line.split(",")[0] for line in out.splitlines()[1:]] == ["ok", "ok2"]
    assert "2 of 4 inputs skipped" in err and "record 'e'" in err and "record 'u'" in err


def test_a_bad_file_of_a_folder_is_counted_and_loses_none_behind_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("a", f">a\n{letters(40)}\n"), ("b", "junk\n"), ("c", f">c\n{letters(40, 1)}\n")):
        write(tmp_path / f"in/{name}.fa", text)
    status, out, err = predict(capsys, run, str(tmp_path / "in"), "--format", "csv", "--on-error", "skip")
    assert status == 0 and [line.split(",")[0] for line in out.splitlines()[1:]] == ["a", "c"]
    assert "b.fa, line 1: not FASTA" in err and "1 of 3 inputs skipped" in err
    status, _, err = predict(capsys, run, str(tmp_path / "in"))
    assert status == 2 and "b.fa, line 1: not FASTA" in err.splitlines()[-1]


def test_explain_draws_the_bases_of_a_record_as_a_logo(run: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.fa", f">short\n{letters(9)}\n>long\n{letters(100)}\n")
    assert main(["explain", str(run), str(path), "--out", str(tmp_path)]) == 0
    for name in ("short.png", "long.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 1000


def test_an_empty_folder_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = predict(capsys, run, str(tmp_path))
    assert status == 2 and "a folder without sequence files" in err


def test_records_are_read_as_the_predictions_go_on(make_task: Make, tmp_path: Path) -> None:
    path = tmp_path / "x.fa"
    path.write_text("".join(f">r{i}\n{letters(40, i)}\n" for i in range(50)))
    task = make_task("dna/fasta", setup=False)
    task.restore({"classes": ["a", "b"], "longest": 40, "shortest": 40})
    inputs = iter(task.load_inputs([str(path)]))
    assert next(inputs)[0] == "r0"  # nothing is read ahead: a generator
    with path.open("a") as file:
        file.write(">late\nACGT\n")
    assert [name for name, _ in inputs][-1] == "late"


@pytest.mark.parametrize("argument", ["position=true", "wide=2", "pool=place"])
def test_models_in_which_places_count_refuse_other_lengths(make_task: Make, tmp_path: Path, argument: str) -> None:
    task = make_task("dna/fasta", "data.root=x", f"model.args.{argument}", setup=False)
    task.restore({"classes": ["a", "b"], "longest": 80, "shortest": 80})
    ((_, load),) = task.load_inputs([str(write(tmp_path / "x.fa", f">x\n{letters(60)}\n"))])
    with pytest.raises(UserError, match="record 'x': 60 bases; places count in this model: expected 80"):
        load()


def test_eval_on_other_classes_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "x.csv", rows(6, length=60, labels=("alpha", "gamma")))
    assert main(["eval", str(run), f"data.root={path}"]) == 2
    assert "gamma" in capsys.readouterr().err


def test_16s_trains_from_its_config(tmp_path: Path) -> None:
    from mambaverse.engine.run import train

    options = ["data.min_count=600", "data.window=40", "trainer.epochs=1", "trainer.device=cpu", "data.batch_size=256"]
    overrides = [*TINY, *options, f"trainer.output_dir={tmp_path}", "trainer.run_name=x"]
    result = train(compose("dna/rrna16s", overrides), console=QUIET)
    assert (result.folder / "split.csv").is_file() and 0 < result.metrics["accuracy"] <= 1


@pytest.mark.slow
def test_16s_reaches_its_floor(make_task: Make, tmp_path: Path) -> None:
    from mambaverse.engine.run import train

    floor = fit_baselines(make_task("dna/rrna16s"), QUIET)["6-mers, linear SVM"]["accuracy"]
    config = compose("dna/rrna16s", [f"trainer.output_dir={tmp_path}", "trainer.num_threads=1"])
    assert train(config, console=QUIET).metrics["accuracy"] > floor
