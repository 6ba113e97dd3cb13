"""One's own FASTA files and folders: what is a class, what a set, and what a header says."""

from pathlib import Path

import pytest

from tests.tasks.dna.conftest import Make, fails, rows, sizes, write

ALPHA, BETA = (
    "".join(f">{label}{i} label={label}\n{s}\n" for i, (s, _) in enumerate(rows(6, labels=(label,))))
    for label in ("alpha", "beta")
)


def test_a_class_keeps_the_dots_of_its_file(make_task: Make, tmp_path: Path) -> None:
    write(tmp_path / "E.coli.fa", ALPHA)
    write(tmp_path / "E.faecalis.FNA.gz", BETA)
    assert list(make_task("dna/fasta", f"data.root={tmp_path}").classes) == ["E.coli", "E.faecalis"]


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (("train_1.fa", "test_1.fa"), "test_1.fa"),
        (("train1.fa", "test1.fa"), "test1.fa"),
        (("Train.2.fa.gz", "x.fa"), "Train.2.fa.gz"),
        (("train-01/a.fa", "test-01/a.fa"), "test-01"),
        (("test.fa", "alpha.fa"), "test.fa"),
        (("dev.fa", "test.fa"), "dev.fa"),
        (("train.fa", "test.fa", "train_2.fa"), "train_2.fa"),
    ],
)
def test_a_name_that_is_nearly_a_sets_is_no_class(
    make_task: Make, tmp_path: Path, names: tuple[str, ...], wrong: str
) -> None:
    for name in names:
        write(tmp_path / name, ALPHA + BETA)
    message = fails(make_task, "dna/fasta", f"data.root={tmp_path}")
    assert f"{tmp_path / wrong}: named as a set, not as a class" in message
    assert "holds train and test (and dev or val), each one file or folder of exactly that name" in message


def test_names_that_only_begin_as_a_sets_are_classes(make_task: Make, tmp_path: Path) -> None:
    write(tmp_path / "testis.fa", ALPHA)
    write(tmp_path / "valine.fa", BETA)
    assert list(make_task("dna/fasta", f"data.root={tmp_path}").classes) == ["testis", "valine"]
    assert sizes(make_task("dna/fasta", f"data.root={tmp_path}")) == (10, 2)
