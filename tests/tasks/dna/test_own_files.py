"""One's own FASTA files and folders: what is a class, what a set, and what a header says."""

from pathlib import Path

import pytest

from tests.tasks.dna.conftest import Make, fails, letters_of, rows, sizes, write, write_csv

ALPHA, BETA = (
    "".join(f">{label}{i} label={label}\n{s}\n" for i, (s, _) in enumerate(rows(6, labels=(label,))))
    for label in ("alpha", "beta")
)


def test_labels_stand_in_the_headers_of_a_fasta_file(make_task: Make, fasta: Path) -> None:
    task = make_task("dna/fasta", f"data.root={fasta}", "data.group=plate", "data.folds=4")
    assert list(task.classes) == ["alpha", "beta"] and sizes(task) == (18, 6)
    assert len(letters_of(task)[0]) == 40
    other = make_task("dna/fasta", f"data.root={fasta}", r"data.label_pattern=label=(\w)")
    assert list(other.classes) == ["a", "b"]


def test_a_folder_has_a_class_a_folder_or_a_file(make_task: Make, tmp_path: Path) -> None:
    for label in ("alpha", "beta"):
        text = "".join(f">{label}{i}\n{s}\n" for i, (s, _) in enumerate(rows(labels=(label,))))
        write(tmp_path / f"folders/{label}/x.fa.gz", text)
        write(tmp_path / f"files/{label}.fasta", text)
    for name in ("folders", "files"):
        task = make_task("dna/fasta", f"data.root={tmp_path / name}")
        assert list(task.classes) == ["alpha", "beta"] and sizes(task) == (20, 4)


def test_a_folder_may_come_split(make_task: Make, tmp_path: Path) -> None:
    write_csv(tmp_path / "a/train.csv", rows(5))
    write_csv(tmp_path / "a/test.csv", rows(3))
    assert sizes(make_task("dna/fasta", f"data.root={tmp_path / 'a'}")) == (10, 6)
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        for label in ("alpha", "beta"):
            text = "".join(f">{i}\n{s}\n" for i, (s, _) in enumerate(rows(count, labels=(label,))))
            write(tmp_path / f"b/{part}/{label}/x.fa", text)
    assert sizes(make_task("dna/fasta", f"data.root={tmp_path / 'b'}")) == (8, 4, 6)


def test_folders_without_sequences_are_named(make_task: Make, tmp_path: Path) -> None:
    write(tmp_path / "empty/notes.md", "x")
    assert "holds no sequence files" in fails(make_task, "dna/fasta", f"data.root={tmp_path / 'empty'}")
    write(tmp_path / "half/a/x.fa", ">a\nACGT\n")
    (tmp_path / "half/b").mkdir()
    assert "half/b: an empty class" in fails(make_task, "dna/fasta", f"data.root={tmp_path / 'half'}")
    write_csv(tmp_path / "two/x.csv", rows())
    write_csv(tmp_path / "two/y.csv", rows())
    assert "data.root=FILE says which is meant" in fails(make_task, "dna/fasta", f"data.root={tmp_path / 'two'}")
    write_csv(tmp_path / "only/train.csv", rows())
    assert "comes split, and has only train" in fails(make_task, "dna/fasta", f"data.root={tmp_path / 'only'}")


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


HEADERS = (
    ("label=a", "a"), ('label="heat shock" x', "heat shock"), ("kind=x;label=a.b|z", "a.b"), ("label=a label=a", "a"),
    ('note="label=b" label=a', "a"), ("label=α", "α"), ("note=1 note=2 label=a", "a"),
)  # fmt: skip


@pytest.mark.parametrize(("words", "label"), HEADERS)
def test_a_label_is_a_word_or_stands_in_quotes(make_task: Make, tmp_path: Path, words: str, label: str) -> None:
    text = "".join(f">r{i} {(words, 'label=other')[i % 2]}\n{s}\n" for i, (s, _) in enumerate(rows(6)))
    assert set(make_task("dna/fasta", f"data.root={write(tmp_path / 'x.fa', text)}").classes) == {label, "other"}


def test_a_key_may_have_hyphens_and_dots(make_task: Make, tmp_path: Path) -> None:
    lines = [f">r{i} site-type={label} my.plate={i % 4}\n{s}\n" for i, (s, label) in enumerate(rows(6))]
    path = write(tmp_path / "x.fa", "".join(lines))
    task = make_task("dna/fasta", f"data.root={path}", "data.label=site-type", "data.group=my.plate", "data.folds=4")
    assert list(task.classes) == ["alpha", "beta"] and sizes(task) == (9, 3)


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (b"label=a label=b", (), "its header says label=a and label=b; expected one of them"),
        (b"label=caf\xe9", (), "label= in its header is not UTF-8 text; save the file as UTF-8"),
        (b"label=a plate=\xe9", ("data.group=plate",), "plate= in its header is not UTF-8 text"),
        (b"label=caf\xe9", (r"data.label_pattern='label=(\S+)'",), "its label is not UTF-8 text"),
        (b'label="heat shock', (), "a missing label"),
        (b'label=""', (), "an empty label"),
    ],
)
def test_a_label_that_cannot_be_told_is_a_bad_record(
    make_task: Make, tmp_path: Path, words: bytes, options: tuple[str, ...], message: str
) -> None:
    path = write(tmp_path / "x.fa", b">r " + words + b"\nACGT\n" + ALPHA.encode())
    assert f"x.fa, line 1, record 'r': {message}" in fails(make_task, "dna/fasta", f"data.root={path}", *options)
