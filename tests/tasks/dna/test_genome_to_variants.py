"""From a public genome to a table of variants, docs/variants.md, on a small piece: 16S genes stand for a genome."""

from __future__ import annotations

import csv
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mambaverse.cli import main
from mambaverse.tasks.dna.datasets.rrna16s import EMBEDDED, STEM
from mambaverse.tasks.dna.files import read_records

GENES, VARIANTS = 240, 60
SMALL = (
    "model.args.dim=48", "model.mixer_args.s6.d_state=4", "data.length=256", "data.epoch_windows=1280",
    "data.eval_windows=16", "data.batch_size=16", "data.reverse_complement=0", "optim.lr=0.01", "trainer.epochs=4",
    "trainer.num_threads=1", "trainer.pictures=false",
)  # fmt: skip


def test_a_model_pretrained_on_a_genome_tells_common_bases_from_changed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    genes = [record.letters for record in islice(read_records(EMBEDDED / f"{STEM}.csv.xz"), GENES)]
    with Path("genome.fa").open("wb") as file:
        for number, letters in enumerate(genes):
            file.write(b">gene%d\n%s\n" % (number, letters))
    random.seed(0)
    rows = []
    for number in sorted(random.sample(range(GENES), VARIANTS)):
        place = random.randrange(300, 900)
        ref = chr(genes[number][place])
        alt = random.choice(sorted(set("ACGT") - {ref}))
        rows.append(f"gene{number}\t{place + 1}\t.\t{ref}\t{alt}\t.\t.\t.\n")
    head = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    Path("calls.vcf").write_text(head + "".join(rows))

    train = ["train", "dna/pretrain_next_token", "data.name=genome", "data.root=genome.fa", "trainer.run_name=genome"]
    assert main([*train, *SMALL]) == 0
    score = ["score", "runs/genome", "--vcf", "calls.vcf", "--fasta", "genome.fa", "--out", "scores.tsv"]
    assert main([*score, "--window", "256", "--on-error", "skip"]) == 0

    with Path("scores.tsv").open() as file:
        table = list(csv.DictReader((line for line in file if not line.startswith("##")), delimiter="\t"))
    deltas = np.array([float(row["delta"]) for row in table])
    assert len(table) == VARIANTS and not Path("scores.skipped.tsv").exists()
    assert np.mean(deltas) < 0 and np.mean(deltas < 0) > 0.6  # what evolution kept is likelier
