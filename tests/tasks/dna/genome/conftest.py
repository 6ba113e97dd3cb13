"""Small genomes, written as people write them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.genome.bgzf import to_bgzf


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBAVERSE_DATA", str(tmp_path / "cache/data"))


def random_letters(length: int, seed: int = 0, alphabet: str = "ACGTacgtNRYn") -> str:
    return "".join(random.Random(seed).choices(alphabet, k=length))


def fasta_text(records: Mapping[str, str], width: int = 60, newline: str = "\n") -> bytes:
    lines = []
    for name, letters in records.items():
        lines.append(f">{name} some words")
        lines += [letters[i : i + width] for i in range(0, len(letters), width)]
    return "".join(line + newline for line in lines).encode()


def make_genome(folder: Path, records: Mapping[str, str], *, bgzf: bool = False, **options: object) -> Genome:
    path = folder / "genome.fa"
    path.write_bytes(fasta_text(records))
    return Genome(to_bgzf(path) if bgzf else path, **options)  # type: ignore[arg-type]
