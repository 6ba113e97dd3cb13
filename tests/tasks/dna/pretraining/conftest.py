"""A small genome whose next base hangs on the two before it, and runs on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mambaverse.config import RunConfig, compose
from mambaverse.engine.task import TASKS
from mambaverse.tasks.dna.tasks.dna_lm import DnaLmTask

TINY = {
    "mlm": ("model.name=caduceus_ph_d32_n2", "model.mixer_args={vim: {d_state: 2, expand: 1}}"),
    "next_token": ("model.name=dna_mamba_d64_n2", "model.args={dim: 32}", "model.mixer_args={s6: {d_state: 2}}"),
}
QUIET = Console(quiet=True)
Config = Callable[..., RunConfig]
Open = Callable[..., DnaLmTask]


def markov(length: int, seed: int = 0, sharp: float = 0.85) -> str:
    """Return letters of which each is, with probability `sharp`, the one that the two before it call for."""
    draw = random.Random(seed)
    rule = random.Random(1)
    table = {a + b: rule.choice("ACGT") for a in "ACGT" for b in "ACGT"}
    letters = list("AC")
    while len(letters) < length:
        called = table[letters[-2] + letters[-1]]
        letters.append(called if draw.random() < sharp else draw.choice("ACGT"))
    return "".join(letters)


def write_fasta(path: Path, records: dict[str, str], width: int = 60) -> Path:
    lines = []
    for name, text in records.items():
        lines += [f">{name}", *(text[i : i + width] for i in range(0, len(text), width))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBAVERSE_DATA", str(tmp_path / "cache/data"))


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    """Three records: 40,000, 9,000 and 50 bases; 700 N and 2,000 lower-case bases in the first."""
    first = markov(40_000)
    first = first[:5000] + "N" * 700 + first[5700:20_000] + first[20_000:22_000].lower() + first[22_000:]
    return write_fasta(tmp_path / "g.fa", {"chr1": first, "chr2": markov(9000, 7), "tiny": markov(50, 8)})


@pytest.fixture
def config(genome: Path, tmp_path: Path) -> Config:
    """Return the config of a small run on that genome, by objective, with overrides; it draws no pictures."""

    def make(*overrides: str, objective: str = "mlm") -> RunConfig:
        own = (
            "data.name=genome", f"data.root={genome}", "data.length=128", "data.batch_size=8", "trainer.num_threads=1",
            "data.epoch_windows=null", "data.eval_windows=null", "trainer.epochs=2", "trainer.run_name=run",
            f"trainer.output_dir={tmp_path / 'runs'}", "trainer.overwrite=true", "trainer.pictures=false",
            *TINY[objective],
        )  # fmt: skip
        return compose(f"dna/pretrain_{objective}", [*own, *overrides])

    return make


@pytest.fixture
def opened(config: Config) -> Open:
    """Return the task of such a config, set up and with its model built."""

    def make(*overrides: str, objective: str = "mlm") -> DnaLmTask:
        run = config(*overrides, objective=objective)
        task = TASKS.get("dna_lm")(run)
        assert isinstance(task, DnaLmTask)
        task.setup()
        return task

    return make
