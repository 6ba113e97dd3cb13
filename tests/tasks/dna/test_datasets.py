"""Each data set: what is read, how it is split and numbered, and what is refused."""

import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mambaverse.tasks.dna.task import sequences_of
from mambaverse.tasks.dna.tokens import decode
from tests.tasks.dna.conftest import Make, fails, letters, letters_of, read_csv, rows, sizes, write, write_csv

Shared = Callable[[str], Path]


# One's own files


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "csv.xz"])
def test_a_table_is_split_and_its_labels_are_numbered_by_name(make_task: Make, tmp_path: Path, ending: str) -> None:
    path = write_csv(tmp_path / f"x.{ending}", [*rows(labels=("beta", "alpha")), ("ac gt".replace(" ", ""), "alpha")])
    task = make_task("dna/fasta", f"data.root={path}")
    assert list(task.classes) == ["alpha", "beta"] and sizes(task) == (20, 5)
    assert "20 % of each class held out" in task.describe()["data"].replace("20%", "20 %")


def test_columns_may_have_other_names(make_task: Make, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", rows(), ("dna", "kind"))
    task = make_task("dna/fasta", f"data.root={path}", "data.sequence=dna", "data.label=kind")
    assert sizes(task) == (20, 4)


def test_a_bad_first_row_hides_no_column(make_task: Make, tmp_path: Path) -> None:
    lines = [f"{s},{label},{('train', 'train', 'test', 'test')[i % 4]}" for i, (s, label) in enumerate(rows(8))]
    path = write(tmp_path / "x.csv", "\n".join(["sequence,label,split", "ACGT,alpha", *lines]) + "\n")
    task = make_task("dna/fasta", f"data.root={path}", "data.on_error=skip")
    assert sizes(task) == (8, 8)


def test_folds_of_what_comes_split_are_refused(make_task: Make, tmp_path: Path) -> None:
    data = [(*row, ("train", "test")[i % 4 > 1], f"plate{i % 5}") for i, row in enumerate(rows(20))]
    path = write_csv(tmp_path / "x.csv", data, ("sequence", "label", "split", "plate"))
    message = fails(make_task, "dna/fasta", f"data.root={path}", "data.folds=5")
    assert "comes split; data.folds=5 expects data that do not: take it out, or split anew" in message
    assert len(make_task("dna/fasta", f"data.root={path}", "data.folds=5", "data.group=plate").eval_set)


def test_rows_of_a_group_stay_together(make_task: Make, tmp_path: Path) -> None:
    data = [(sequence, label, f"plate{i % 5}") for i, (sequence, label) in enumerate(rows(20))]
    path = write_csv(tmp_path / "x.csv", data, ("sequence", "label", "plate"))
    task = make_task("dna/fasta", f"data.root={path}", "data.group=plate", "data.folds=5")
    groups = [set(sequences_of(part).groups or ()) for part in (task.train_set, task.eval_set)]
    assert not groups[0] & groups[1] and len(groups[1]) == 1


def test_a_group_that_a_table_has_not_is_named_and_blanks_around_one_do_not_tear_it(
    make_task: Make, tmp_path: Path
) -> None:
    data = [(sequence, label, f"{i}") for i, (sequence, label) in enumerate(rows(20))]
    path = write_csv(tmp_path / "x.csv", data, ("sequence", "label", "plate"))
    message = fails(make_task, "dna/fasta", f"data.root={path}", "data.group=plat")
    assert "x.csv: data.group=plat: no such column, did you mean 'plate'?" in message  # though each row is its own
    torn = [(sequence, label, f"plate{i % 5}{' ' * (i % 2)}") for i, (sequence, label) in enumerate(rows(20))]
    path = write_csv(tmp_path / "y.csv", torn, ("sequence", "label", "plate"))
    task = make_task("dna/fasta", f"data.root={path}", "data.group=plate", "data.folds=5")
    groups = [set(sequences_of(part).groups or ()) for part in (task.train_set, task.eval_set)]
    assert groups[0] | groups[1] == {f"plate{i}" for i in range(5)} and not groups[0] & groups[1]


def test_a_random_split_of_grouped_rows_warns(
    make_task: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [(sequence, label, f"plate{i % 5}", i) for i, (sequence, label) in enumerate(rows(20))]
    path = write_csv(tmp_path / "x.csv", data, ("sequence", "label", "plate", "number"))
    make_task("dna/fasta", f"data.root={path}")
    assert "a random split ignores the groups plate:" in capsys.readouterr().err  # and not the number of the row


def test_a_column_split_says_how_a_table_is_split(make_task: Make, tmp_path: Path) -> None:
    data = [(s, label, ("train", "Test", "dev")[i % 3]) for i, (s, label) in enumerate(rows(9))]
    path = write_csv(tmp_path / "x.csv", data, ("sequence", "label", "split"))
    assert sizes(make_task("dna/fasta", f"data.root={path}")) == (6, 6, 6)
    bad = write_csv(tmp_path / "y.csv", [("ACGT", "a", "tran"), ("ACGT", "b", "test")], ("sequence", "label", "split"))
    assert "column 'split' says 'tran', did you mean 'train'" in fails(make_task, "dna/fasta", f"data.root={bad}")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "sequence,lable\nACGT,a\n", "no column 'label', did you mean 'lable'?; data.label names another"),
        ("x.csv", "dna,label\nACGT,a\n", "no column 'sequence'; known: dna, label; data.sequence names another"),
        ("x.csv", "sequence,label\nACGT,a\nACGT,a\n", "only one class, 'a'; expected two or more"),
        ("x.csv", "sequence,label\nACGT,a\nACGT, \n", "x.csv, line 3: an empty label"),
        ("x.csv", "sequence,label\nACGT,a\n,b\n", "x.csv, line 3: an empty record"),
        ("x.csv", "sequence,label\n", "holds no usable sequences"),
        ("x.csv", "sequence,label\nACGT,a\nACGT,a\nACG,b\n", "class 'b' has 1 usable sample"),
        ("x.fa", ">a label=x\nACGT\n>b\nACGT\n", "line 3, record 'b': a missing label: expected '>b label=...'"),
        ("x.fa", ">a label=x\nACGT\n>a label=y\nAC\n", "line 3, record 'a': record 1 has this name too"),
        ("x.fa", ">a label=x\nACGT\n>b label=y\nACUT\n", "record 'b': RNA: letter 'U' at position 3"),
        ("train.csv", "sequence,label\nACGT,a\nACGT,b\n", "class 'a' has 1 usable sample"),
    ],
)
def test_bad_data_are_one_line(make_task: Make, tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    assert message in fails(make_task, "dna/fasta", f"data.root={path}")


def test_a_test_label_that_was_not_trained_is_named(make_task: Make, tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", rows(4))
    write_csv(tmp_path / "test.csv", [("ACGT", "alpah")])
    message = fails(make_task, "dna/fasta", f"data.root={tmp_path}")
    assert "label 'alpah' of 1 (test) is not among the training labels, did you mean 'alpha'" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.root=null",), "data set dna/fasta is not here: it needs data.root"),
        (("data.group=plat",), "no plat=... in its header, did you mean 'plate'"),
        (("data.label_pattern=label",), "data.label_pattern=label: expected a group in parentheses"),
        (("data.label_pattern='('",), "data.label_pattern=(: not a regular expression"),
        (("data.label_pattern='kind=(.)'",), "data.label_pattern does not match its header"),
        (("data.min_count=100",), "no class of 100 sequences"),
        (("data.shift=40",), "data.shift: 40 is too much for sequences of 40 bases"),
        (("data.window=0",), "data.window: expected at least 1, got 0"),
        (("data.mutate=2",), "data.mutate: expected a number between 0 and 1, got 2"),
        (("data.strands=two",), "data.strands: expected one or both, got 'two'"),
        (("data.wndow=5",), "unknown key 'data.wndow', did you mean 'window'"),
    ],
)
def test_wrong_options_are_one_line(make_task: Make, fasta: Path, overrides: tuple[str, ...], message: str) -> None:
    assert message in fails(make_task, "dna/fasta", f"data.root={fasta}", *overrides)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("x.csv", ("data.label_pattern=k=(.)",), "x.csv: data.label_pattern=k=(.) is read of no table; take it out"),
        ("x.csv", ("data.subset=mouse/0",), "x.csv: data.subset=mouse/0 is read of no file of one's own"),
        (
            "x.fa",
            ("data.label_pattern=k=(.)", "data.label=k"),
            "data.label=k is read of no FASTA with data.label_pattern",
        ),
        ("classes", ("data.label=kind",), "classes: data.label=kind is read of no folder of classes; take it out"),
        ("classes", ("data.label_pattern=k=(.)",), "data.label_pattern=k=(.) is read of no folder of classes"),
        ("tables", ("data.label_pattern=k=(.)",), "data.label_pattern=k=(.) is read of no table; take it out"),
        ("mixed", ("data.subset=x",), "data.subset=x is read of no file of one's own; take it out"),
    ],
)
def test_what_a_layout_does_not_read_is_refused(
    make_task: Make, tmp_path: Path, layout: str, options: tuple[str, ...], message: str
) -> None:
    records = "".join(f">r{i} label={label} k={label[0]}\n{s}\n" for i, (s, label) in enumerate(rows(4)))
    write(tmp_path / "x.fa", records)
    write_csv(tmp_path / "x.csv", rows(4))
    for label in ("alpha", "beta"):
        write(tmp_path / f"classes/{label}/a.fa", ">a\nACGT\n")
    for part in ("train", "test"):
        write_csv(tmp_path / f"tables/{part}.csv", rows(4))
    write(tmp_path / "mixed/train.fa", records)
    write_csv(tmp_path / "mixed/test.csv", [(s, label[0]) for s, label in rows(4)])
    root = f"data.root={tmp_path / layout}"
    assert message in fails(make_task, "dna/fasta", root, *(option.replace("=k=(.)", "='k=(.)'") for option in options))
    mixed = make_task("dna/fasta", f"data.root={tmp_path / 'mixed'}", "data.label_pattern='k=(.)'")
    assert list(mixed.classes) == sorted({label[0] for _, label in rows(4)})


def test_a_prepared_table_has_no_subsets(make_task: Make) -> None:
    assert "dna/rrna16s: data.subset=V4 is read of no prepared table" in fails(
        make_task, "dna/rrna16s", "data.subset=V4"
    )


def test_bad_records_can_be_left_out_and_are_counted(
    make_task: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = "".join(f">{label}{i} label={label}\n{s}\n" for i, (s, label) in enumerate(rows(6)))
    path = write(tmp_path / "x.fa", f">e label=alpha\n>u label=alpha\nACGU\n{good}>alpha0 label=alpha\nAC\n>n\nAC\n")
    task = make_task("dna/fasta", f"data.root={path}", "data.on_error=skip")
    err = capsys.readouterr().err
    assert "4 of 16 records left out (data.on_error=skip)" in err and "record 'u': RNA" in err
    assert sum(sizes(task)) == 12 and "4 bad records skipped" in task.describe()["data"]
    assert task.save_split(tmp_path) is not None
    skipped = [row["name"] for row in read_csv(tmp_path / "split.csv") if row["set"] == "skipped"]
    assert len(skipped) == 4 and "record 'e': an empty record" in skipped[0]


def test_the_split_is_written_down_with_hashes(make_task: Make, table: Path, tmp_path: Path) -> None:
    task = make_task("dna/fasta", f"data.root={table}")
    task.save_split(tmp_path)
    written = read_csv(tmp_path / "split.csv")
    assert Counter(row["set"] for row in written) == {"train": 20, "eval": 4}
    assert len(written[0]["sha256"]) == 64 and written[0]["bytes"] == "40"
    again = make_task("dna/fasta", f"data.root={table}")
    first = (tmp_path / "split.csv").read_bytes()
    again.save_split(tmp_path)
    assert (tmp_path / "split.csv").read_bytes() == first


# The prepared ones


def test_16s_comes_with_the_package_in_the_split_of_its_config(make_task: Make) -> None:
    task = make_task("dna/rrna16s")
    assert len(task.classes) == 12 and sizes(task) == (3881, 971)
    assert (task.shortest, task.longest) == (250, 250)
    genera = [set(sequences_of(part).groups or ()) for part in (task.train_set, task.eval_set)]
    assert not genera[0] & genera[1]


@pytest.mark.parametrize(("rank", "classes"), [("phylum", 7), ("order", 20)])
def test_16s_has_other_ranks(make_task: Make, rank: str, classes: int) -> None:
    task = make_task("dna/rrna16s", f"data.label={rank}", "data.window=null")
    assert (len(task.classes) >= classes and task.longest == 1655) or task.longest > 1500


def test_an_unknown_rank_is_refused(make_task: Make) -> None:
    assert "data.label=clas: no label of dna/rrna16s, did you mean 'class'" in fails(
        make_task, "dna/rrna16s", "data.label=clas"
    )


@pytest.mark.parametrize(
    ("config", "expected", "classes", "length"),
    [
        ("fly_splice", (7158, 1522), ["acceptor", "decoy", "donor"], 80),
        ("fly_windows", (19713, 4786), ["coding", "flank", "intron"], 200),
        ("splice_uci", (2700, 301), ["ei", "ie", "n"], 60),
        ("species3", (12000, 3000), ["ecoli", "fly", "human"], 200),
    ],
)
def test_prepared_tables_open_as_described(
    make_task: Make, shared_data: Shared, config: str, expected: tuple[int, ...], classes: list[str], length: int
) -> None:
    task = make_task(f"dna/{config}", f"data.root={shared_data('SHA256SUMS').parent}")
    assert sizes(task) == expected and list(task.classes) == classes and task.longest == task.shortest == length


def test_uci_has_no_sequence_twice(make_task: Make, shared_data: Shared) -> None:
    task = make_task("dna/splice_uci", f"data.root={shared_data('splice_uci.csv.gz')}")
    both = [*letters_of(task), *letters_of(task, "eval_set")]
    assert len(both) == len(set(both)) == 3001


def test_beta_lactamases_are_split_by_family(make_task: Make, shared_data: Shared) -> None:
    task = make_task("dna/beta_lactamase", f"data.root={shared_data('amr_betalactamase.csv.xz')}")
    assert sizes(task) == (4317, 1347) and list(task.classes) == ["A", "B", "C", "D"]
    families = [set(sequences_of(part).groups or ()) for part in (task.train_set, task.eval_set)]
    assert not families[0] & families[1]


def test_gue_has_official_sets_in_a_folder_or_a_zip(make_task: Make, tmp_path: Path) -> None:
    for part, count in (("train", 6), ("dev", 2), ("test", 3)):
        for name in ("mouse/0", "tf/1"):
            write_csv(tmp_path / f"GUE/{name}/{part}.csv", rows(count, labels=("alpha", "beta")))
    with zipfile.ZipFile(tmp_path / "gue.zip", "w") as archive:
        for path in sorted((tmp_path / "GUE").rglob("*.csv")):
            archive.write(path, path.relative_to(tmp_path / "GUE"))
    for root in (tmp_path / "GUE", tmp_path / "gue.zip"):
        assert sizes(make_task("dna/gue", f"data.root={root}", "data.subset=tf/1")) == (12, 4, 6)
        assert "the tasks in" in fails(make_task, "dna/gue", f"data.root={root}")
        assert "did you mean 'mouse/0'" in fails(make_task, "dna/gue", f"data.root={root}", "data.subset=mouse/9")
    assert "is not here" in fails(make_task, "dna/gue")
    (tmp_path / "empty").mkdir()
    assert "holds no folders with train.csv" in fails(make_task, "dna/gue", f"data.root={tmp_path / 'empty'}")


def test_gue_of_the_shared_data(make_task: Make, shared_data: Shared) -> None:
    task = make_task("dna/gue", f"data.root={shared_data('gue8.zip')}", "data.subset=mouse/3")
    assert sizes(task) == (1904, 239, 239)


def test_genomic_benchmarks_as_texts(make_task: Make, tmp_path: Path) -> None:
    for part, count in (("train", 11), ("test", 2)):
        for label in ("positive", "negative"):
            for i in range(count):
                write(tmp_path / f"demo/{part}/{label}/{i}.txt", letters(20 + i, i))
    task = make_task("dna/genomic_benchmarks", f"data.root={tmp_path}", "data.subset=demo")
    assert sizes(task) == (22, 4) and list(task.classes) == ["negative", "positive"]
    assert sequences_of(task.train_set).names[:3] == ["negative/0.txt", "negative/1.txt", "negative/2.txt"]
    assert sizes(make_task("dna/genomic_benchmarks", f"data.root={tmp_path / 'demo'}")) == (22, 4)
    assert "did you mean 'demo'" in fails(
        make_task, "dna/genomic_benchmarks", f"data.root={tmp_path}", "data.subset=dmo"
    )
    assert "data.subset is not set" in fails(make_task, "dna/genomic_benchmarks", f"data.root={tmp_path}")


INTERVALS = ("id", "region", "start", "end", "strand")


def intervals(folder: Path) -> Path:
    """Write a genome of two chromosomes and places in it; returns the genome."""
    for part in ("train", "test"):
        write_csv(folder / f"{part}/yes.csv.gz", [(0, "chr1", 0, 8, "+"), (1, "2", 4, 10, "-")], INTERVALS)
        write_csv(folder / f"{part}/no.csv.gz", [(0, "chr1", 2, 9, "")], INTERVALS)
    return write(folder / "genome.fa", ">1 first\nAACCGGTT\nAACC\n>chr2\nGATTACAGATTACA\n")


def test_genomic_benchmarks_as_places_in_a_genome(make_task: Make, tmp_path: Path) -> None:
    genome = intervals(tmp_path / "human_nontata_promoters")
    root = f"data.root={genome.parent}"
    task = make_task("dna/genomic_benchmarks", root, f"data.genome={genome}")
    assert letters_of(task) == ["CCGGTTA", "AACCGGTT", "ATCTGT"]  # no; yes on +; yes on -
    assert "data.genome=FASTA says which" in fails(make_task, "dna/genomic_benchmarks", root)


def test_known_leaks_are_told(make_task: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    genome = intervals(tmp_path / "human_nontata_promoters")
    make_task("dna/genomic_benchmarks", f"data.root={genome.parent}", f"data.genome={genome}")
    assert "49.3 % of its test places overlap training places" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, "chr1", 0, 99, "+"), "0-99 is not within 1 of 12 bases; another genome?"),
        ((0, "chr1", "a", 9, "+"), "start and end: expected whole numbers"),
        ((0, "chr9", 0, 9, "+"), "no record '9' in"),
    ],
)
def test_places_outside_of_the_genome_are_named(
    make_task: Make, tmp_path: Path, row: tuple[object, ...], message: str
) -> None:
    genome = intervals(tmp_path / "x")
    write_csv(tmp_path / "x/train/bad.csv.gz", [row], INTERVALS)
    error = fails(make_task, "dna/genomic_benchmarks", f"data.root={tmp_path / 'x'}", f"data.genome={genome}")
    assert message in error and "bad.csv.gz, line 2" in error


def test_fresh_decoys_have_a_gt_or_an_ag_and_are_no_site(make_task: Make, shared_data: Shared) -> None:
    root = shared_data("fly_splice_train.csv.gz").parent
    task = make_task("dna/fly_splice", f"data.root={root}", "data.fresh=0.8")
    samples, decoy = task.train_set, task.classes.index("decoy")
    known = letters_of(task)
    sites = {known[i] for i in range(len(known)) if samples.sample(i, None)["target"] != decoy}
    generator = torch.Generator().manual_seed(0)
    fresh = 0
    for i in range(600):
        sample = samples.sample(i, generator)
        seen = decode(sample["ids"])
        if sample["target"] != decoy:
            assert seen == known[i]
            continue
        assert len(seen) == 80 and (seen[40:42] == "GT" or seen[38:40] == "AG") and seen not in sites
        fresh += seen != known[i]
    decoys = sum(samples.sample(i, None)["target"] == decoy for i in range(600))
    assert 0.7 < fresh / decoys < 0.9
    assert decode(task.eval_set.sample(0, generator)["ids"]) == letters_of(task, "eval_set")[0]


def test_fresh_sequences_need_a_source(make_task: Make, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", rows())
    assert "data.fresh=0.5: fasta has no source" in fails(make_task, "dna/fasta", f"data.root={path}", "data.fresh=0.5")


def test_fresh_decoys_without_their_windows(make_task: Make, tmp_path: Path) -> None:
    for part in ("train", "test"):
        lines = [(letters(80, i), ("acceptor", "decoy", "donor")[i % 3]) for i in range(6)]
        write_csv(tmp_path / f"fly_splice_{part}.csv", lines)
    message = fails(make_task, "dna/fly_splice", f"data.root={tmp_path}", "data.fresh=0.8")
    assert message.startswith("data.fresh=0.8 (0 needs none of this): data set dna/fly_windows is not here")
    make_task("dna/fly_splice", f"data.root={tmp_path}", "data.fresh=0")
