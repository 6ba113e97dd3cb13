"""One thread, and a genome in a file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mambaverse.tasks.dna.genome import Genome


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """In every test of this folder."""


@pytest.fixture
def letters() -> str:
    return "".join(random.Random(2).choices("ACGT", k=600))


@pytest.fixture
def genome(tmp_path: Path, letters: str) -> Genome:
    """Two chromosomes, of which the first in the file is the second by its name."""
    other = letters[300:400].lower() + "N" * 60 + letters[:40]
    (tmp_path / "genome.fa").write_text(f">chr2 x\n{letters}\n>chr1\n{other}\n")
    return Genome(tmp_path / "genome.fa")
