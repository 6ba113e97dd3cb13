"""Models that have learnt a sequence which repeats itself, so that what they must say of a change is known."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.tokens import MASK, encode
from tests.tasks.dna.planted import model

UNIT = "GATTACAC"


def learnt(head: str) -> DnaModel:
    """Return a small model trained on windows of `UNIT`, again and again, at every phase."""
    made = model(head, causal=head == "causal_lm", sharp=2.0).train()
    ids = torch.from_numpy(encode(UNIT * 6)).long()
    windows = torch.stack([ids[i : i + 40] for i in range(8)])
    optimizer, draw = torch.optim.AdamW(made.parameters(), 2e-2), torch.Generator().manual_seed(0)
    for _ in range(60):
        if head == "mlm":
            chosen = torch.rand(windows.shape, generator=draw) < 0.2
            logits, targets = made(torch.where(chosen, MASK, windows))[chosen], windows[chosen]
        else:
            logits, targets = made(windows)[:, 3:-1].flatten(0, 1), windows[:, 4:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    return made.eval()


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """In every test of this folder."""


@pytest.fixture(scope="module", params=["mlm", "causal_lm"])
def trained(request: pytest.FixtureRequest) -> DnaModel:
    return learnt(request.param)


@pytest.fixture
def periodic(tmp_path: Path) -> Genome:
    (tmp_path / "periodic.fa").write_text(f">chr1\n{UNIT * 20}\n")
    return Genome(tmp_path / "periodic.fa")


@pytest.fixture
def letters() -> str:
    return "".join(random.Random(1).choices("ACGT", k=700))


@pytest.fixture
def genome(tmp_path: Path, letters: str) -> Genome:
    (tmp_path / "genome.fa").write_text(f">chr1\n{letters}\n>tiny\nACGTACGTTTGACCAGTACA\n")
    return Genome(tmp_path / "genome.fa")
