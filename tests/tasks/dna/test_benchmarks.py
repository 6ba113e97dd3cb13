"""Published benchmarks by their files, their splits drawn anew by groups, and dev sets where none comes with them."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambaverse.config import compose
from mambaverse.engine.run import train
from mambaverse.tasks.dna.datasets._nucleotide_transformer import BOTH, FIRST, REVISED, metric_of
from mambaverse.tasks.dna.task import DnaTask, sequences_of
from tests.tasks.dna.conftest import TINY, Make, fails, letters, read_csv, rows, sizes, write, write_csv

INTERVALS = ("id", "region", "start", "end", "strand")


def groups_of(task: DnaTask) -> list[set[str]]:
    parts = (task.train_set, task.eval_set, task.test_set)
    return [set(sequences_of(part).groups or ()) for part in parts if part is not None]


def genome(folder: Path, ending: str = "csv.gz") -> Path:
    """Write five chromosomes of 400 bases, and ten places of each class in each; returns the genome."""
    for part, shift in (("train", 0), ("test", 15)):
        for label, strand in (("yes", "-"), ("no", "")):
            places = [
                (i, f"chr{c}", 35 * i + shift, 35 * i + shift + 30, strand) for c in range(1, 6) for i in range(10)
            ]
            write_csv(folder / f"{part}/{label}.{ending}", places, INTERVALS)
    return write(folder / "genome.fa", "".join(f">{c}\n{letters(400, c)}\n" for c in range(1, 6)))


# GenomicBenchmarks


@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
def test_places_are_split_anew_by_chromosome(make_task: Make, tmp_path: Path, ending: str) -> None:
    fasta = genome(tmp_path / "x", ending)
    data = (f"data.root={tmp_path / 'x'}", f"data.genome={fasta}")
    official = make_task("dna/genomic_benchmarks", *data)
    assert sizes(official) == (100, 100)
    assert official.audit().line().count("100 overlaps (100.0%), 100 overlaps of half or more (100.0%)") == 1
    held_out = make_task("dna/genomic_benchmarks", *data, "data.group=chromosome", "data.folds=5")
    assert sizes(held_out) == (160, 40) and "its own split set aside: fold 0 of 5" in held_out.describe()["data"]
    assert not groups_of(held_out)[0] & groups_of(held_out)[1]
    assert "overlaps" not in held_out.audit().line()
    assert held_out.save_split(tmp_path) is not None
    assert {row["group"] for row in read_csv(tmp_path / "split.csv")} == set("12345")


def test_places_may_give_a_dev_set_of_other_chromosomes_too(make_task: Make, tmp_path: Path) -> None:
    fasta = genome(tmp_path / "x")
    data = (f"data.root={tmp_path / 'x'}", f"data.genome={fasta}", "data.group=chromosome", "data.dev_fraction=0.25")
    train, dev, test = groups_of(make_task("dna/genomic_benchmarks", *data))
    assert not train & dev and not train & test and not dev & test


def test_texts_know_no_chromosome(make_task: Make, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in ("a", "b"):
            write(tmp_path / f"{part}/{label}/0.txt", letters(30, 1))
    root = f"data.root={tmp_path}"
    message = fails(make_task, "dna/genomic_benchmarks", root, "data.group=chromosome")
    assert "texts do not say where they lie; take the form with places" in message
    (tmp_path / "test/c").mkdir()
    assert "test/c: an empty class: no .txt files in it" in fails(make_task, "dna/genomic_benchmarks", root)


def test_the_metadata_name_the_genome_and_the_classes(make_task: Make, tmp_path: Path) -> None:
    fasta = genome(tmp_path / "x")
    root = f"data.root={tmp_path / 'x'}"
    meta = "version: 0\nclasses:\n  no: {type: fa.gz, url: ftp://here/a.fa.gz}\n"
    write(tmp_path / "x/metadata.yaml", meta + "  yes: {type: fa.gz, url: ftp://here/b.fa.gz}\n")
    assert "no is of ftp://here/a.fa.gz; yes is of ftp://here/b.fa.gz" in fails(
        make_task, "dna/genomic_benchmarks", root
    )
    assert sizes(make_task("dna/genomic_benchmarks", root, f"data.genome={fasta}")) == (100, 100)
    write(tmp_path / "x/metadata.yaml", meta)
    message = fails(make_task, "dna/genomic_benchmarks", root, f"data.genome={fasta}")
    assert "class 'yes' is in train alone" in message
    write(tmp_path / "x/metadata.yaml", "classes: 3")
    assert "expected `classes:`" in fails(make_task, "dna/genomic_benchmarks", root, f"data.genome={fasta}")


def test_classes_may_lie_in_several_files(make_task: Make, tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_csv(tmp_path / f"x/{part}/coding.csv", [(0, "ENST01", 0, 8, "+")], INTERVALS)
        write_csv(tmp_path / f"x/{part}/not.csv", [(0, "7", 1, 9, ".")], INTERVALS)
    one, two = write(tmp_path / "cdna.fa", ">ENST01\nACGTACGTA\n"), write(tmp_path / "dna.fa", ">7\nTTTTTTTTTT\n")
    task = make_task("dna/genomic_benchmarks", f"data.root={tmp_path / 'x'}", f"data.genome='{one},{two}'")
    assert sizes(task) == (2, 2)
    write_csv(tmp_path / "x/train/not.csv", [(0, "7", 1, 9, "x")], INTERVALS)
    message = fails(make_task, "dna/genomic_benchmarks", f"data.root={tmp_path / 'x'}", f"data.genome='{one},{two}'")
    assert "not.csv, line 2: strand 'x': expected +, -, . or nothing" in message


def test_the_protocol_chooses_on_a_tenth_of_the_training_set_and_reports_the_test_set(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("test", 3)):
        for label in ("alpha", "beta"):
            for i, (sequence, _) in enumerate(rows(count, labels=(label,))):
                write(tmp_path / f"x/{part}/{label}/{i}.txt", sequence)
    size = ("trainer.epochs=1", "trainer.device=cpu", "data.batch_size=12", "trainer.log_every=1", *TINY)
    run = (f"data.root={tmp_path / 'x'}", f"trainer.output_dir={tmp_path}", "trainer.run_name=run", *size)
    result = train(compose("dna/genomic_benchmarks_protocol", run))
    split = read_csv(result.folder / "split.csv")
    assert [sum(row["set"] == part for row in split) for part in ("train", "eval", "test")] == [36, 4, 6]
    assert '"set": "test set"' in (result.folder / "results.json").read_text()


def test_a_dev_set_is_not_drawn_twice(make_task: Make, tmp_path: Path) -> None:
    for part in ("train", "dev", "test"):
        write_csv(tmp_path / f"{part}.csv", rows(5))
    message = fails(make_task, "dna/fasta", f"data.root={tmp_path}", "data.dev_fraction=0.2")
    assert "comes with a dev set; data.dev_fraction=0.2 would draw another" in message
    assert "expected a number from 0 to below 1" in fails(
        make_task, "dna/fasta", f"data.root={tmp_path}", "data.dev_fraction=1"
    )


# One's own tables that come split


def test_a_table_that_comes_split_is_split_anew_by_groups(make_task: Make, tmp_path: Path) -> None:
    data = [(s, label, f"g{i % 6}", ("train", "test")[i // 2 % 2]) for i, (s, label) in enumerate(rows(12))]
    path = write_csv(tmp_path / "x.csv", data, ("sequence", "label", "genus", "split"))
    task = make_task("dna/fasta", f"data.root={path}", "data.group=genus", "data.folds=3")
    assert sizes(task) == (16, 8) and not groups_of(task)[0] & groups_of(task)[1]
    assert sizes(make_task("dna/fasta", f"data.root={path}")) == (12, 12)
    message = fails(make_task, "dna/fasta", f"data.root={path}", "data.group=genos")
    assert "data.group=genos: no such column, did you mean 'genus'" in message
    for part in ("train", "test"):
        lines = [row[:3] for row in data if row[3] == part]
        write_csv(tmp_path / f"folder/{part}.csv", lines, ("sequence", "label", "genus"))
    folder = f"data.root={tmp_path / 'folder'}"
    assert sizes(make_task("dna/fasta", folder, "data.group=genus", "data.folds=3")) == (16, 8)
    assert "no such column" in fails(make_task, "dna/fasta", folder, "data.group=family")


def test_fasta_files_that_come_split_are_split_anew_by_a_key_of_their_headers(make_task: Make, tmp_path: Path) -> None:
    for part, first in (("train", 0), ("test", 12)):
        text = "".join(
            f">r{i} label={label} family=f{i % 4}\n{s}\n" for i, (s, label) in enumerate(rows(6), start=first)
        )
        write(tmp_path / f"{part}.fa", text)
    task = make_task("dna/fasta", f"data.root={tmp_path}", "data.group=family", "data.folds=4")
    assert sizes(task) == (18, 6) and len(groups_of(task)[1]) == 1
    assert "no familie=... in its header" in fails(
        make_task, "dna/fasta", f"data.root={tmp_path}", "data.group=familie"
    )


def test_records_with_too_many_n_are_refused_or_left_out(make_task: Make, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", [*rows(6), ("NNNNACGT", "alpha")])
    message = fails(make_task, "dna/fasta", f"data.root={path}", "data.max_unknown=0.1")
    assert "x.csv, line 14: 4 of 8 bases (50.0%) are N or ambiguous" in message
    task = make_task("dna/fasta", f"data.root={path}", "data.max_unknown=0.1", "data.on_error=skip")
    assert sum(sizes(task)) == 12 and task.skipped == 1


# Nucleotide Transformer


def fna(folder: Path, task: str = "H3", count: int = 6) -> Path:
    for part, first in (("train", 0), ("test", 50)):
        lines = [
            f">{task} chr{i % 5 + 1}:{40 * i}-{40 * i + 40}|{i % 2}\n{letters(40, first + i)}" for i in range(count)
        ]
        write(folder / f"{task}/{part}.fna", "\n".join(lines) + "\n")
    return folder


def revised_rows(part: str) -> list[tuple[str, str, int, str]]:
    first = 0 if part == "train" else 100
    return [
        (letters(30, first + i), f"chr{(i if part == 'train' else 20)}:{40 * i}-{40 * i + 30}", i // 2 % 2, task)
        for i, task in enumerate(("H2AFZ", "enhancers") * 6)
    ]


NAMES = ("sequence", "name", "label", "task")


def test_the_first_tasks_are_read_from_their_fna_files(make_task: Make, tmp_path: Path) -> None:
    root = f"data.root={fna(tmp_path)}"
    task = make_task("dna/nucleotide_transformer", root, "data.subset=H3", "data.dev_fraction=0.34")
    assert sizes(task) == (4, 2, 6) and list(task.classes) == ["0", "1"] and task.monitor == "mcc"
    assert sequences_of(task.train_set).names[0].startswith("H3 chr")
    message = fails(make_task, "dna/nucleotide_transformer", root, "data.subset=H2")
    assert "data.subset=H2: no task of dna/nucleotide_transformer, did you mean 'H" in message
    assert "data.subset is not set" in fails(make_task, "dna/nucleotide_transformer", root)
    assert "holds no H4/train.fna" in fails(make_task, "dna/nucleotide_transformer", root, "data.subset=H4")
    write(tmp_path / "H3/train.fna", ">one 1\nACGT\n")
    message = fails(make_task, "dna/nucleotide_transformer", root, "data.subset=H3")
    assert "expected a header '>NAME|LABEL', got 'one 1'" in message and "line 1" in message


def test_the_revised_tasks_are_read_from_one_table(make_task: Make, tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_csv(tmp_path / f"data/{part}-0.csv", revised_rows(part), NAMES)
    data = (f"data.root={tmp_path}", "data.subset=H2AFZ", "data.dev_fraction=0")
    task = make_task("dna/nucleotide_transformer_revised", *data)
    assert sizes(task) == (6, 6)
    held_out = make_task("dna/nucleotide_transformer_revised", *data, "data.group=chromosome", "data.split_seed=1")
    assert not groups_of(held_out)[0] & groups_of(held_out)[1]
    message = fails(make_task, "dna/nucleotide_transformer_revised", f"data.root={tmp_path}", "data.subset=H3K27ac")
    assert "column 'task' never says 'H3K27ac'" in message


def test_numbers_of_the_two_sets_cannot_be_mixed_up(make_task: Make, tmp_path: Path) -> None:
    assert set(FIRST) & set(REVISED) and len({*FIRST, *BOTH}) == len({*REVISED, *BOTH}) == 18
    message = fails(make_task, "dna/nucleotide_transformer", f"data.root={tmp_path}", "data.subset=H2AFZ")
    assert "no task of dna/nucleotide_transformer, but of data.name=nucleotide_transformer_revised" in message
    fna(tmp_path / "first", "H4ac")
    fna(tmp_path / "first", "enhancers")
    message = fails(
        make_task, "dna/nucleotide_transformer_revised", f"data.root={tmp_path / 'first'}", "data.subset=enhancers"
    )
    assert "holds H4ac, which is of data.name=nucleotide_transformer;" in message
    for part in ("train", "test"):
        write_csv(tmp_path / f"second/{part}.csv", revised_rows(part), NAMES)
    message = fails(
        make_task, "dna/nucleotide_transformer", f"data.root={tmp_path / 'second'}", "data.subset=enhancers"
    )
    assert "holds H2AFZ, which is of data.name=nucleotide_transformer_revised;" in message


def test_names_without_a_chromosome_cannot_be_split_by_it(make_task: Make, tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / f"H4/{part}.fna", "".join(f">YBR{i}|{i % 2}\n{letters(30, i)}\n" for i in range(6)))
    data = (f"data.root={tmp_path}", "data.subset=H4", "data.dev_fraction=0")
    assert sizes(make_task("dna/nucleotide_transformer", *data)) == (6, 6)
    message = fails(make_task, "dna/nucleotide_transformer", *data, "data.group=chromosome")
    assert "no chromosome in its name 'YBR0'" in message


def test_each_task_is_scored_as_its_paper_does() -> None:
    assert metric_of("H3K9ac") == metric_of("enhancers_types") == "mcc"
    assert metric_of("promoter_tata") == metric_of("splice_sites_donors") == "f1"
    assert metric_of("splice_sites_all") == "accuracy"


def test_f1_is_that_of_the_second_of_two_classes(make_task: Make, tmp_path: Path) -> None:
    from sklearn.metrics import f1_score

    task = make_task("dna/nucleotide_transformer", f"data.root={fna(tmp_path, 'promoter_tata')}",
                     "data.subset=promoter_tata", "data.dev_fraction=0")  # fmt: skip
    assert task.monitor == "f1"
    import torch

    scores, truth = torch.tensor([[2.0, 1], [0, 1], [0, 1], [3, 1]]), torch.tensor([0, 1, 0, 1])
    metrics = task.metrics()
    metrics.update(scores, truth)
    assert float(metrics.compute()["f1"]) == pytest.approx(f1_score(truth, scores.argmax(1)))


def test_parquet_is_read_with_pyarrow(make_task: Make, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for part in ("train", "test"):
        columns = dict(zip(NAMES, zip(*revised_rows(part), strict=True), strict=True))
        parquet.write_table(pyarrow.table({k: list(v) for k, v in columns.items()}), tmp_path / f"{part}-00000.parquet")
    data = (f"data.root={tmp_path}", "data.subset=enhancers", "data.dev_fraction=0")
    assert sizes(make_task("dna/nucleotide_transformer_revised", *data)) == (6, 6)
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1 not at all")
    assert "damaged:" in fails(make_task, "dna/nucleotide_transformer_revised", *data)


def test_parquet_without_pyarrow_says_what_to_install(
    make_task: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "train.parquet", b"PAR1")
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    message = fails(make_task, "dna/nucleotide_transformer_revised", f"data.root={tmp_path}", "data.subset=enhancers")
    assert "reading parquet needs pyarrow: pip install pyarrow" in message


def test_dev_sets_depend_on_the_seed_alone(make_task: Make, tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_csv(tmp_path / f"{part}.csv", rows(10))

    def dev(seed: int) -> list[str]:
        task = make_task("dna/fasta", f"data.root={tmp_path}", "data.dev_fraction=0.3", f"data.split_seed={seed}")
        assert np.bincount(sequences_of(task.eval_set).labels).tolist() == [3, 3]
        return sequences_of(task.eval_set).names

    assert dev(1) == dev(1) != dev(2)
