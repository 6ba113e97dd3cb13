"""Each data set: what is read, how it is split and numbered, what it is built from, and what is refused."""

import csv
import gzip
import lzma
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from mambaverse.datasets import get_dataset
from mambaverse.errors import UserError
from mambaverse.tasks.dna.datasets._rda import read_rda
from mambaverse.tasks.dna.genes import Gene, read_genes, splice_sites, windows
from mambaverse.tasks.dna.task import DnaTask, sequences_of
from mambaverse.tasks.dna.tokens import decode
from tests.tasks.dna.conftest import Make, letters, read_csv, rows, write, write_csv

Shared = Callable[[str], Path]


def fails(make: Make, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        make(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sizes(task: DnaTask) -> tuple[int, ...]:
    return tuple(len(part) for part in (task.train_set, task.eval_set, task.test_set) if part is not None)


def letters_of(task: DnaTask, part: str = "train_set") -> list[str]:
    return [decode(sequences_of(getattr(task, part))[i]) for i in range(len(getattr(task, part)))]


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


def test_rows_of_a_group_stay_together(make_task: Make, tmp_path: Path) -> None:
    data = [(sequence, label, f"plate{i % 5}") for i, (sequence, label) in enumerate(rows(20))]
    path = write_csv(tmp_path / "x.csv", data, ("sequence", "label", "plate"))
    task = make_task("dna/fasta", f"data.root={path}", "data.group=plate", "data.folds=5")
    groups = [set(sequences_of(part).groups or ()) for part in (task.train_set, task.eval_set)]
    assert not groups[0] & groups[1] and len(groups[1]) == 1


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


# Built from packages


def gene_file(path: Path, name: str = "chr2R_1-300", location: str = "join(51..120,201..260)") -> str:
    sequence = letters(300, 7)
    body = "\n".join(
        f"{start + 1:>9} " + " ".join(sequence[i : i + 10].lower() for i in range(start, min(start + 60, 300), 10))
        for start in range(0, 300, 60)
    )
    text = (
        f"LOCUS       {name}   300 bp  DNA\nFEATURES             Location/Qualifiers\n     source          1..300\n"
        f'     CDS             {location}\n                     /gene="1"\nORIGIN\n{body}\n//\n'
    )
    write(path, text)
    return sequence


def test_genes_are_read_on_their_strand(tmp_path: Path) -> None:
    sequence = gene_file(tmp_path / "g.gb")
    (gene,) = read_genes(tmp_path / "g.gb")
    assert (gene.name, gene.letters, gene.exons) == ("chr2R_1-300", sequence, [(50, 120), (200, 260)])
    gene_file(tmp_path / "r.gb", location="complement(join(51..120,201..260))")
    (turned,) = read_genes(tmp_path / "r.gb")
    assert turned.reverse and turned.along()[1] == [(40, 100), (180, 250)]
    write(tmp_path / "bad.gb", "LOCUS       x 10 bp DNA\nFEATURES  Location/Qualifiers\n  CDS  1..\n")
    with pytest.raises(UserError, match=r"bad\.gb: not readable as GenBank"):
        read_genes(tmp_path / "bad.gb")


def test_splice_sites_are_at_the_borders_of_exons() -> None:
    gene = Gene("g", letters(400, 1), [(100, 150), (250, 300)], reverse=False)
    found = splice_sites(gene, Random(0))
    assert found[0] == (gene.letters[110:190], "donor") and found[1] == (gene.letters[210:290], "acceptor")
    decoys = [sequence for sequence, label in found if label == "decoy"]
    assert len(decoys) == 2 and all(s[40:42] == "GT" or s[38:40] == "AG" for s in decoys)


def test_windows_lie_in_one_kind_each() -> None:
    gene = Gene("g", letters(1300, 1), [(300, 600), (900, 1100)], reverse=False)
    found = windows(gene)
    kinds = [label for _, label in found]
    assert kinds == ["flank", "flank", "coding", "coding", "intron", "intron", "coding", "flank"]
    assert found[2][0] == gene.letters[300:500]


def test_fly_sets_are_built_from_the_genes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        gene_file(tmp_path / f"raw/usr/share/doc/augustus/tutorial/results/genes.gb.{part}", f"{part}_1-300")
    for name in ("fly_splice", "fly_windows"):
        data = get_dataset(name, "dna")
        raw = data.find_package(tmp_path / "raw")
        assert raw is not None and data.find_package(tmp_path / "nothing") is None
        (tmp_path / name).mkdir()
        data.build(raw, tmp_path / name)
        assert data.find(tmp_path / name) == tmp_path / name
    with gzip.open(tmp_path / "fly_splice/fly_splice_train.csv.gz", "rt") as file:
        built = list(csv.DictReader(file))
    assert {row["gene"] for row in built} == {"train_1-300"} and {row["label"] for row in built} >= {"donor"}


def test_16s_is_built_from_its_fasta(tmp_path: Path) -> None:
    head = ">S1\tx\tBacteria; Firmicutes; Bacilli; Lactobacillales; Lactobacillaceae; Lactobacillus\n"
    write(tmp_path / "usr/rRNA16S.gold.fasta", head + "acgt\n")
    data = get_dataset("rrna16s", "dna")
    raw = data.find_package(tmp_path)
    assert raw is not None
    data.build(raw, tmp_path)
    with lzma.open(tmp_path / "rrna16s_full.csv.xz", "rt") as file:
        assert file.read().splitlines()[1] == "ACGT,Firmicutes,Bacilli,Lactobacillales,Lactobacillaceae,Lactobacillus"
    write(tmp_path / "usr/rRNA16S.gold.fasta", ">S1\tBacteria; Firmicutes\nacgt\n")
    with pytest.raises(UserError, match="expected kingdom to genus in the header"):
        data.build(raw, tmp_path)


def rda(frame: dict[str, tuple[list[int], list[str]]], rows_: int) -> bytes:
    """Return an .rda file with a data frame DNA of factors."""

    def chars(text: str) -> bytes:
        return struct.pack(">ii", 9, len(text)) + text.encode()

    def strings(values: list[str]) -> bytes:
        return struct.pack(">ii", 16, len(values)) + b"".join(map(chars, values))

    def pair(tag: bytes, value: bytes) -> bytes:
        return struct.pack(">i", 2 | 1 << 10) + tag + value

    def symbol(text: str) -> bytes:
        return struct.pack(">i", 1) + chars(text)

    nil = struct.pack(">i", 254)
    levels_seen = False
    columns = []
    for values, levels in frame.values():
        tag = struct.pack(">i", 255 | 2 << 8) if levels_seen else symbol("levels")
        levels_seen = True
        head = struct.pack(">ii", 13 | 1 << 9, rows_) + struct.pack(f">{rows_}i", *values)
        columns.append(head + pair(tag, strings(levels)) + nil)
    body = struct.pack(">ii", 19 | 1 << 9, len(columns)) + b"".join(columns)
    body += pair(symbol("names"), strings(list(frame))) + nil
    return b"RDX2\nX\n" + struct.pack(">3i", 2, 0, 0) + pair(symbol("DNA"), body) + nil


def test_uci_is_built_from_rs_data_frame(tmp_path: Path) -> None:
    codes = np.array([[1, 2, 3] * 20, [0, 0, 0] * 20])  # 0 T, 1 A, 2 C, 3 G; 60 bases a row
    frame = {
        f"V{3 * place + bit + 1}": ([int(code == bit + 1) + 1 for code in codes[:, place]], ["0", "1"])
        for place in range(60)
        for bit in range(3)
    } | {"Class": ([2, 1], ["ei", "n"])}
    (tmp_path / "DNA.rda").write_bytes(gzip.compress(rda(frame, 2)))
    data = get_dataset("splice_uci", "dna")
    raw = data.find_package(tmp_path)
    assert raw is not None
    data.build(raw, tmp_path)
    with gzip.open(tmp_path / "splice_uci.csv.gz", "rt") as file:
        assert file.read().splitlines() == ["sequence,label", "ACG" * 20 + ",n", "TTT" * 20 + ",ei"]


@pytest.mark.parametrize("content", [b"", b"RDX9\nX\n", b"RDX2\nX\n" + bytes(30), gzip.compress(b"x")[:-4]])
def test_a_damaged_rda_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "DNA.rda").write_bytes(content)
    try:
        assert read_rda(tmp_path / "DNA.rda") == {}
    except UserError as error:
        assert "not readable as R data" in str(error)
    with pytest.raises(UserError, match=r"not readable as R data|expected a data frame DNA"):
        get_dataset("splice_uci", "dna").build(tmp_path / "DNA.rda", tmp_path)


def test_beta_lactamases_are_built_from_an_index_of_bwa(tmp_path: Path) -> None:
    folder = tmp_path / "AMRfior/databases/ncbi/bwa"
    about = [
        "blaTEM gene for class A beta-lactamase",
        "blaSIM gene for subclass B1 metallo-beta-lactamase",
        "tetA gene",
    ]
    lines = [line for i, text in enumerate(about) for line in (f"0 NG_{i} X {text}", f"{4 * i} 4 0")]
    write(folder / "sequence_dna_bwadb.ann", "\n".join(["12 3 11", *lines]) + "\n")
    (folder / "sequence_dna_bwadb.pac").write_bytes(bytes([0b00011011, 0b11111111, 0, 0]))
    data = get_dataset("beta_lactamase", "dna")
    raw = data.find_package(tmp_path)
    assert raw is not None and data.find_package(tmp_path / "no") is None
    data.build(raw, tmp_path)
    with lzma.open(tmp_path / "amr_betalactamase.csv.xz", "rt") as file:
        assert file.read().splitlines() == ["sequence,class,family", "ACGT,A,blaTEM", "TTTT,B,blaSIM"]
    write(folder / "sequence_dna_bwadb.ann", "1 1 1\n0 x\ny z\n")
    with pytest.raises(UserError, match=r"not an \.ann file of BWA"):
        data.build(raw, tmp_path)


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
