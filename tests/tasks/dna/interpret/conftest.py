"""One thread, and a genome in a file."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mambaverse.tasks.dna.genome import Genome


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models here are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def letters() -> str:
    return "".join(random.Random(2).choices("ACGT", k=600))


@pytest.fixture
def genome(tmp_path: Path, letters: str) -> Genome:
    """Two chromosomes, of which the first in the file is the second by its name."""
    other = letters[300:400].lower() + "N" * 60 + letters[:40]
    (tmp_path / "genome.fa").write_text(f">chr2 x\n{letters}\n>chr1\n{other}\n")
    return Genome(tmp_path / "genome.fa")
