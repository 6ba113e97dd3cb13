"""docs/variants.md: its commands run as they stand, on small runs and a small genome, and so does its Python."""

from __future__ import annotations

import gzip
import random
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from mambaverse.cli import main
from tests.tasks.dna.planted import save_run

PAGE = (Path(__file__).parents[3] / "docs/variants.md").read_text()
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    letters = "".join(random.Random(0).choices("ACGT", k=1500))
    Path("genome.fa").write_text(f">chr1\n{letters}\n")
    Path("new.fa").write_text(f">a\n{letters[:90]}\n>b\n{letters[90:140]}\n")
    head = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    rows = [f"chr1\t{at}\t.\t{letters[at - 1]}\t{letters[at - 1]}GT\t.\t.\t.\n" for at in (300, 320, 900)]
    Path("calls.vcf.gz").write_bytes(gzip.compress((head + "".join(rows)).encode()))
    save_run(Path("runs/masked"), "mlm", strands="both")
    save_run(Path("runs/causal"), "causal_lm", causal=True)
    save_run(Path("runs/genes"), "classifier")
    commands = [line.partition("  #")[0].strip() for line in BLOCKS["bash"].splitlines()]
    assert len(commands) == 7
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    assert len(Path("scores.tsv").read_text().splitlines()) == 4
    assert np.load("new.npz")["embeddings"].shape == (2, 16)
    assert Path("genes.bedgraph").read_text().splitlines()[-1].split("\t")[2] == "1500"


def test_the_python_runs() -> None:
    torch.manual_seed(0)
    found: dict[str, np.ndarray] = {}
    exec(BLOCKS["python"], found)
    assert found["changes"].shape == (20, 4)
