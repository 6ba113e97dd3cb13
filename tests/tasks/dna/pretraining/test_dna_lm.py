"""Pretraining runs: that they learn, what is scored, that they resume, what they refuse, and what starts from them."""

import gzip
import json
import math
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mambaverse.cli import main
from mambaverse.config import ConfigError, compose
from mambaverse.engine.data import Job, make_batch
from mambaverse.engine.evaluate import evaluate
from mambaverse.engine.run import resume, train
from mambaverse.engine.task import TASKS
from mambaverse.errors import UserError
from mambaverse.tasks.dna.pretraining.metrics import language_metrics
from mambaverse.tasks.dna.pretraining.scoring import score_bases
from mambaverse.tasks.dna.strands import reverse
from mambaverse.tasks.dna.task import DnaTask
from mambaverse.tasks.dna.tasks.dna_lm import DnaLmTask
from mambaverse.tasks.dna.tokens import COMPLEMENT, PAD, A, N
from tests.tasks.dna.pretraining.conftest import QUIET, Config, Open, markov, write_fasta

PS = ("model.name=caduceus_ps_d32_n2",)


def first_batch(task: DnaLmTask, size: int = 4) -> dict[str, Any]:
    return dict(make_batch(task.eval_set, task.collate, 0, Job(list(range(size)))))


# Learning


@pytest.mark.parametrize("objective", ["mlm", "next_token"])
def test_the_loss_falls_below_the_entropy_of_single_bases(config: Config, objective: str) -> None:
    options = ("trainer.epochs=3", "optim.lr=0.01", "data.eval_windows=16", "trainer.pictures=true")
    result = train(config(*options, objective=objective), console=QUIET)
    text = markov(40_000)
    shares = [text.count(letter) / len(text) for letter in "ACGT"]
    order_0 = -sum(share * math.log(share) for share in shares)
    assert result.metrics["loss"] < 0.85 * order_0
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["loss"]), rel=1e-5)
    written = json.loads((result.folder / "results.json").read_text())
    assert written["monitor"] == "perplexity" and (result.folder / "curves.png").is_file()
    assert evaluate(result.folder)["loss"] == pytest.approx(result.metrics["loss"], rel=1e-6)


def test_windows_that_a_run_learnt_from_are_counted_where_another_split_holds_them_out(
    config: Config, genome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(config("data.epoch_windows=8", "data.val_fraction=0.1", "trainer.epochs=1"), console=QUIET).folder
    evaluate(run, ["data.root=" + str(genome)])
    assert "learnt from" not in capsys.readouterr().err
    evaluate(run, ["data.val_fraction=0.6", "data.split_seed=5"])
    found = re.search(r"learnt from (\d+) of the (\d+) samples that it is evaluated on", capsys.readouterr().err)
    assert found is not None and 0 < int(found[1]) <= int(found[2])
    other = write_fasta(tmp_path / "other.fa", {"chr1": markov(40_000, 3), "chr2": markov(9000, 4)})
    evaluate(run, [f"data.root={other}", "data.split_seed=5"])  # the same places, with other letters
    assert "learnt from" not in capsys.readouterr().err


def test_the_numbers_are_means_over_bases_not_over_batches(opened: Open) -> None:
    task = opened("data.valid_chromosomes=[chr2, tiny]")
    model = task.build_model().eval()
    found = []
    with torch.no_grad():
        for size in (3, 50):
            metrics = language_metrics()
            for at in range(0, len(task.eval_set), size):
                indices = list(range(at, min(at + size, len(task.eval_set))))
                batch = make_batch(task.eval_set, task.collate, 0, Job(indices))
                task.update(metrics, task.step(model, batch)["output"], batch)
            found.append({name: float(value) for name, value in metrics.compute().items()})
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["perplexity"] == pytest.approx(math.exp(found[0]["loss"]), rel=1e-5)


@pytest.mark.parametrize("objective", ["mlm", "next_token"])
def test_n_and_padding_and_weightless_bases_are_never_scored(opened: Open, objective: str) -> None:
    task = opened("data.max_unknown=1", "task.soft_mask_weight=0", objective=objective)
    samples: Any = task.train_set
    rows = [samples.sample(i, None) for i in range(len(samples))]
    batch: dict[str, Any] = dict(task.collate(rows, None))
    model = task.build_model().eval()
    ids, lengths = batch["ids"], batch["lengths"]
    if objective == "mlm":
        hidden = (ids == N) | (batch["weight"] == 0) | (torch.arange(128) >= lengths[:, None])
        assert (batch["target"][(ids == N) | (torch.arange(128) >= lengths[:, None])] == PAD).all()
        expected = ((batch["target"] != PAD) & ~hidden).sum(1)
    else:
        after = torch.zeros_like(ids, dtype=torch.bool)
        after[:, :-1] = ((ids >= A) & (ids < N) & (batch["weight"] > 0))[:, 1:]
        expected = (after & (torch.arange(128) + 1 < lengths[:, None])).sum(1)
    with torch.no_grad():
        counts = task.step(model, batch)["output"][:, 4]
    assert counts.tolist() == expected.tolist() and 0 < counts.sum() < ids.numel()


def test_soft_masked_bases_weigh_as_told(opened: Open) -> None:
    logits, targets = torch.randn(2, 6, 16), torch.tensor([[7, 8, 9, 10, PAD, PAD], [7, 7, 8, PAD, PAD, PAD]])
    weights = torch.tensor([[1, 0.1, 1, 0.1, 1, 0], [0.1, 1, 0, 1, 1, 1]])
    rows, (total, count) = score_bases(logits, targets, weights)
    nll = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    scored = (targets != PAD) & (weights > 0)
    torch.testing.assert_close(total / count, (nll * weights * scored).sum() / (weights * scored).sum())
    assert rows[:, 4].tolist() == [4, 2]
    task = opened("task.soft_mask_weight=0.1", "data.random_windows=false")
    samples: Any = task.train_set
    letters = samples.genome.fetch("chr1", 20_000, 20_010)
    found = [samples._read(samples.genome.region(text), strand)[1] for text in ("chr1:20001-20010",) for strand in "+-"]
    assert letters.islower() and all((weight == torch.tensor(0.1).numpy()).all() for weight in found)


# Strands


def test_the_loss_of_a_model_of_both_strands_is_that_of_the_other_strand(opened: Open) -> None:
    task = opened(*PS, "data.valid_chromosomes=[chr2, tiny]")
    model = task.build_model().eval()
    batch = first_batch(task, len(task.eval_set))
    lengths, complement = batch["lengths"], torch.from_numpy(COMPLEMENT.copy()).long()
    turned = {key: reverse(complement[batch[key].long()], lengths) for key in ("ids", "target")}
    with torch.no_grad():
        here, there = task.step(model, batch), task.step(model, {**batch, **turned})
    torch.testing.assert_close(here["output"], there["output"], rtol=1e-5, atol=1e-4)
    assert task._other_strand == 0 and "both strands in the model" in task.describe()["augmentation"]


@pytest.mark.parametrize("objective", ["mlm", "next_token"])
def test_evaluation_on_both_strands_is_the_same_for_the_other(opened: Open, objective: str) -> None:
    task = opened("data.strands=both", objective=objective)
    model = task.build_model().eval()
    batch = first_batch(task)
    complement = torch.from_numpy(COMPLEMENT.copy()).long()
    turned = {key: complement[value.long()].flip(1) for key, value in batch.items()}
    with torch.no_grad():
        here, there = task.step(model, batch), task.step(model, turned)
    torch.testing.assert_close(here["output"], there["output"], rtol=1e-5, atol=1e-4)


# Resuming, memory


def test_a_resumed_run_with_length_warm_up_ends_the_same(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("data.length_warmup=64", "data.epoch_windows=16", "data.eval_windows=8", "data.strands=both",
               "trainer.epochs=3", "trainer.log_every=1")  # fmt: skip
    whole = train(config(*options, "trainer.run_name=whole"), console=QUIET)
    original = DnaLmTask.step
    for stop in (1, 3):  # steps, into an epoch of 64 and of 128 bases
        left = [stop]

        def step(self: DnaLmTask, model: nn.Module, batch: Any, left: list[int] = left) -> dict[str, torch.Tensor]:
            left[0] -= model.training
            if not left[0] and model.training:
                signal.raise_signal(signal.SIGTERM)
            return original(self, model, batch)

        with monkeypatch.context() as patch:
            patch.setattr(DnaLmTask, "step", step)
            cut = train(config(*options, "trainer.run_name=cut"), console=QUIET)
        assert cut.signal == signal.SIGTERM and not cut.metrics
        again = resume(cut.folder, QUIET)
        assert again.metrics == whole.metrics
        a, b = (load_file(run.folder / "last.safetensors") for run in (whole, again))
        assert all(torch.equal(a[name], b[name]) for name in a)
        losses = [[row["loss"] for row in run.history if row["kind"] == "train"] for run in (whole, again)]
        assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_changed_genome_is_not_gone_on_with(config: Config, genome: Path) -> None:
    run = train(config("data.epoch_windows=8", "trainer.epochs=1"), console=QUIET)
    text = genome.read_text()
    genome.write_text(text.replace("ACG", "ACC", 1) if "ACG" in text else text.replace("A", "C", 1))
    with pytest.raises(UserError, match="not those that this run began with"):
        resume(run.folder, QUIET)


def test_checkpointing_changes_no_number(config: Config) -> None:
    options = ("data.epoch_windows=16", "data.eval_windows=8", "trainer.epochs=1")
    plain = train(config(*options, objective="next_token"), console=QUIET)
    for more in (("trainer.grad_checkpointing=true",),
                 ("trainer.grad_checkpointing=true", "trainer.checkpoint_chunk=48")):  # fmt: skip
        run = train(config(*options, *more, objective="next_token"), console=QUIET)
        assert run.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-5)
    with pytest.raises(UserError, match="chunk_size=48 needs a causal model"):
        train(config(*options, *more), console=QUIET)
    with pytest.raises(ConfigError, match=r"checkpoint_chunk: needs trainer\.grad_checkpointing=true"):
        config("trainer.checkpoint_chunk=48")


# What is refused


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.name=species3",), "data.name=species3: labelled sequences.*pretraining reads genomes: .*genome"),
        (("data.length_warmup=48",), "length_warmup=48: doubling it .* the nearest that does is 64"),
        (("data.valid_chromosomes=[chr7]",), r"data\.valid_chromosomes: .*no record 'chr7'"),
        (("data.bed=nowhere.bed",), r"data\.bed=nowhere\.bed: no such file"),
        (("data.genome=nowhere.fa",), "no such file"),
        (("data.length=30000", "data.length_warmup=null"), "too few to hold stretches out"),
        (("model.members=2",), r"model\.members: a language model is one model"),
        (("task.objective=mlmm",), r"task\.objective: unknown 'mlmm', did you mean 'mlm'\?"),
        (("data.strands=bth",), r"data\.strands: expected one or both, got 'bth', did you mean 'both'\?"),
        (("task.mask_rate=0",), r"task\.mask_rate: expected a number between 0 and 1"),
        (("data.strict=true", "data.max_unknown=1"), None),
    ],
)
def test_what_cannot_be_is_said_by_its_key(opened: Open, overrides: tuple[str, ...], said: str | None) -> None:
    if said is None:
        opened(*overrides)
        return
    with pytest.raises(UserError, match=said):
        opened(*overrides)


@pytest.mark.parametrize(
    ("records", "options", "objective"),
    [
        ({"chr1": markov(600), "chr2": markov(300).lower()}, ("task.soft_mask_weight=0",), "mlm"),
        ({"chr1": markov(600), "chr2": markov(300).lower()}, ("task.soft_mask_weight=0",), "next_token"),
        ({"chr1": markov(600), "chr2": "N" * 300}, ("data.max_unknown=1",), "next_token"),
        ({"chr1": markov(600), "chr2": markov(300)}, ("task.mask_rate=1e-9",), "mlm"),
    ],
    ids=["soft, mlm", "soft, next", "N", "rate"],
)
def test_an_evaluation_that_scores_no_base_is_refused_before_training(
    config: Config, opened: Open, genome: Path, records: dict[str, str], options: tuple[str, ...], objective: str
) -> None:
    path = write_fasta(genome.with_name("few.fa"), records)
    data = (f"data.root={path}", "data.valid_chromosomes=[chr2]", "data.length=64", "data.length_warmup=null")
    said = r"few\.fa: no base of the eval set is scored, in 5 windows of 64 bases .*hold"
    with pytest.raises(UserError, match=said):
        train(config(*data, *options, objective=objective), console=QUIET)
    assert not list(genome.parent.glob("runs/*"))
    write_fasta(path, {**records, "chr2": markov(300)})
    assert len(opened(*data, objective=objective).metrics()) == 3


def test_the_objective_must_fit_the_model(opened: Open) -> None:
    task = opened("task.objective=next_token")
    with pytest.raises(UserError, match=r"task\.objective=next_token, model\.name=caduceus_ph.*use dna_mamba_\*"):
        task.build_model()
    with pytest.raises(UserError, match=r"model\.args\.head cannot be set: set task\.objective"):
        opened("model.args={head: classifier}").build_model()


def test_plain_gzip_and_bad_letters_are_said_with_a_remedy(opened: Open, genome: Path) -> None:
    packed = genome.with_suffix(".fa.gz")
    packed.write_bytes(gzip.compress(genome.read_bytes()))
    with pytest.raises(UserError, match=r"plain gzip.*write it as BGZF: python -m"):
        opened(f"data.root={packed}")
    bad = write_fasta(genome.with_name("bad.fa"), {"chr1": markov(10_000) + "X" + markov(10_000)})
    task = opened(f"data.root={bad}", "data.max_unknown=1")
    samples = [part for part in (task.train_set, task.eval_set, task.test_set) if part is not None]
    with pytest.raises(UserError, match=r"bad\.fa, chr1:[0-9,]+-[0-9,]+: illegal letter 'X' at position"):
        for part in samples:
            for i in range(len(part)):
                part.sample(i, None)


def test_a_folder_names_its_genome(opened: Open, genome: Path) -> None:
    assert len(opened(f"data.root={genome.parent}").train_set) > 10
    write_fasta(genome.with_name("other.fa"), {"a": "ACGT"})
    with pytest.raises(UserError, match=r"2 FASTA files; data\.genome names the one that is meant: g\.fa, other\.fa"):
        opened(f"data.root={genome.parent}")
    assert len(opened(f"data.root={genome.parent}", "data.genome=g.fa").train_set) > 10


def test_a_language_model_predicts_no_labels(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(config("data.epoch_windows=8", "data.eval_windows=4", "trainer.epochs=1"), console=QUIET)
    for how in ("raise", "skip"):  # which inputs are left out changes nothing
        assert main(["predict", str(run.folder), "x.fa", "--on-error", how]) == 2
        said = capsys.readouterr().err
        assert "error: predict: a language model says no labels" in said and "--on-error" not in said


# Fine-tuning


@pytest.fixture
def pretrained(config: Config) -> Path:
    return train(config("data.epoch_windows=8", "data.eval_windows=4", "trainer.epochs=1"), console=QUIET).folder


def classifier(table: Path, pretrained: Path, *overrides: str) -> tuple[str, ...]:
    return (
        f"data.root={table}", f"model.checkpoint={pretrained / 'best.safetensors'}", "model.name=caduceus_ph_d32_n2",
        "model.mixer_args={vim: {d_state: 2, expand: 1}}", "trainer.epochs=1", f"trainer.output_dir={table.parent}",
        "trainer.run_name=fine", "trainer.overwrite=true", "data.batch_size=8", "trainer.num_threads=1",
        "trainer.pictures=false", *overrides,
    )  # fmt: skip


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    draw = random.Random(0)
    rows = [(markov(60, i) if i % 2 else "".join(draw.choices("ACGT", k=60)), i % 2) for i in range(40)]
    path = tmp_path / "own.csv"
    path.write_text("sequence,label\n" + "".join(f"{sequence},{label}\n" for sequence, label in rows))
    return path


def test_a_classifier_starts_from_pretrained_weights(
    pretrained: Path, labelled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DnaTask, "figures", lambda *_: [])
    stem = ("model.args.stem=embedding", "model.args.stem_stride=1", "data.window=null")
    run = compose("dna/fasta", classifier(labelled, pretrained, *stem, "optim.lr=0", "trainer.ema_decay=null"))
    found = train(run, console=QUIET)
    told = [line for line in capsys.readouterr().err.splitlines() if "best.safetensors" in line]
    assert len(told) == 1 and "holds no score.weight; they start anew" in told[0]
    assert "tensors taken over (embeddings, layers, norm_f)" in told[0]
    before, after = load_file(pretrained / "best.safetensors"), load_file(found.folder / "last.safetensors")
    assert {*after} - {*before} == {"score.weight"}
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)  # warm-up moves them a little


def test_what_does_not_fit_is_named_with_a_remedy(pretrained: Path, labelled: Path) -> None:
    for overrides, said in (
        ((), "reads base by base; the model has stem='kmer'.*model.args.stem=embedding model.args.stem_stride=1"),
        (("model.args.stem=embedding", "model.args.stem_stride=1", "model.name=caduceus_ph_d64_n2"),
         "weights of 32 channels and 2 layers, the model has 64 and 2"),
        (("model.args.stem=embedding", "model.args.stem_stride=1", "model.mixer_args={vim: {d_state: 4}}"),
         r"of another shape \(layers\.0\.mixer\.A_log \(32, 2\), expected \(32, 4\)"),
    ):  # fmt: skip
        run = compose("dna/fasta", classifier(labelled, pretrained, *overrides))
        task = TASKS.get("dna")(run)
        task.setup()
        with pytest.raises(UserError, match=said):
            task.load_checkpoint(task.build_model(), pretrained / "best.safetensors")


def test_a_genome_is_no_data_set_of_a_classifier(labelled: Path) -> None:
    task = TASKS.get("dna")(compose("dna/fasta", ("data.name=genome", f"data.root={labelled}")))
    with pytest.raises(UserError, match="a genome without labels, to pretrain on: dna/pretrain_mlm"):
        task.setup()


def test_both_strands_means_training_on_either(labelled: Path) -> None:
    for overrides, share in ((("data.strands=both",), 0.5), ((), 0.0),
                             (("data.strands=both", "data.reverse_complement=0"), 0.0)):  # fmt: skip
        run: Any = compose("dna/fasta", (f"data.root={labelled}", *overrides))
        assert run.data.other_strand == share
