"""Genomes that come with mambaverse or are built out of packages: their records, and what of them is held out."""

from pathlib import Path
from typing import Any

import pytest

from mambaverse.datasets import get_dataset
from mambaverse.errors import UserError
from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.pretraining.corpus import BED, FASTA
from mambaverse.tasks.dna.tasks.dna_lm import genome_samples
from tests.tasks.dna.pretraining.conftest import Open, markov, write_fasta


def read(folder: Path) -> tuple[Genome, list[list[str]]]:
    return Genome(folder / FASTA), [line.split("\t") for line in (folder / BED).read_text().splitlines()]


def test_the_16s_genes_are_made_from_the_table_inside_and_split_by_genus(opened: Open) -> None:
    task = opened("data.name=rrna16s_genes", "data.root=null", "data.max_unknown=1", "data.length=512")
    names = [set(genome_samples(part).windows.regions.names) for part in (task.train_set, task.eval_set, task.test_set)]  # type: ignore[arg-type]
    assert sum(map(len, names)) == 5181 == len(set.union(*names))
    assert all(200 < len(part) < 1000 for part in names[1:])
    assert "a tenth of the genera" in task.describe()["genome"]
    assert get_dataset("dna/rrna16s_genes").status().startswith("found")


def test_the_genomes_of_augustus_keep_human_chr5_apart(tmp_path: Path) -> None:
    from mambaverse.tasks.dna.datasets.augustus_genomes import RECORDS

    raw = tmp_path / "usr/share/data"
    raw.mkdir(parents=True)
    for seed, file in enumerate(RECORDS.values()):
        write_fasta(raw / file, {f"chr{seed} some words": markov(1000 + seed, seed)})
    data: Any = get_dataset("dna/augustus_genomes")
    (made := tmp_path / "made").mkdir()
    assert data.find(made) is None and data.find_package(tmp_path / "none") is None
    data.build(data.find_package(tmp_path), made)
    genome, rows = read(made)
    assert genome.names == ("human_chr3", "human_chr4", "human_chr5", "fly_chr2R") and data.find(made) == made
    assert genome.fetch("human_chr4").decode() == markov(1001, 1)
    by_set = {split: {row[0] for row in rows if row[3] == split} for split in ("train", "valid", "test")}
    assert by_set["train"] == {"human_chr3", "human_chr4", "fly_chr2R"} and "human_chr5" in by_set["test"]
    for name, size in genome.lengths.items():  # each base is in one set
        assert sum(int(row[2]) - int(row[1]) for row in rows if row[0] == name) == size


def test_a_bacterium_is_built_and_its_end_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_fasta(tmp_path / "raw/NC_008253.fna", {"gi|1|ref|NC_008253.1| words": markov(1000)})
    data: Any = get_dataset("dna/ecoli536")
    (made := tmp_path / "made").mkdir()
    data.build(data.find_package(tmp_path / "raw"), made)
    genome, rows = read(made)
    assert genome.names == ("NC_008253.1",)
    assert [(row[1], row[2], row[3]) for row in rows] == [
        ("0", "800", "train"), ("800", "900", "valid"), ("900", "1000", "test"),
    ]  # fmt: skip


def test_a_built_genome_takes_another_split_but_no_other_genome(opened: Open, tmp_path: Path) -> None:
    write_fasta(tmp_path / FASTA, {"NC_008253.1": markov(20_000), "plasmid": markov(5000, 3)})
    (tmp_path / BED).write_text("NC_008253.1\t0\t10000\ttrain\nNC_008253.1\t10000\t20000\tvalid\n")
    own = ("data.name=ecoli536", f"data.root={tmp_path}")
    assert opened(*own).test_set is None
    assert len(opened(*own, "data.valid_chromosomes=[plasmid]").eval_set) == 40
    (tmp_path / "mine.bed").write_text("plasmid\t0\t3000\ttrain\nplasmid\t3000\t5000\ttest\n")
    assert len(opened(*own, "data.bed=mine.bed").eval_set) == 16
    with pytest.raises(UserError, match=r"dna/ecoli536 comes with its own; data\.name=genome reads yours"):
        opened(*own, "data.genome=g.fa")
