"""Small files in the formats of the real ones, tasks from configs, and the data that are not in the repository."""

from __future__ import annotations

import csv
import gzip
import lzma
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from mambaverse.config import RunConfig, compose
from mambaverse.engine.task import TASKS
from mambaverse.errors import UserError
from mambaverse.tasks.dna.task import DnaTask, sequences_of
from mambaverse.tasks.dna.tokens import decode

Make = Callable[..., DnaTask]
MOTIFS = {"alpha": "GATTACA", "beta": "CCCGGGC", "gamma": "TATATAT"}
TINY = ("model.name=caduceus_ph_d32_n2", "model.args={depth: 1}", "model.mixer_args={vim: {d_state: 2, expand: 1}}")


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """Accelerate keeps one state a process, torch its generator and its threads."""
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(threads)
    torch.set_rng_state(generator)


@pytest.fixture
def make_task() -> Make:
    """Return the task that a config and some overrides describe, set up."""

    def make(config: str, *overrides: str, setup: bool = True) -> DnaTask:
        run: RunConfig = compose(config, overrides)
        task = TASKS.get(run.task.name)(run)
        assert isinstance(task, DnaTask)
        if setup:
            task.setup()
        return task

    return make


def fails(run: Callable[..., object], *arguments: object) -> str:
    """Return the one line of the UserError that `run` raises."""
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sizes(task: DnaTask) -> tuple[int, ...]:
    """Return the samples of the training, evaluation and test set."""
    return tuple(len(part) for part in (task.train_set, task.eval_set, task.test_set) if part is not None)


def letters_of(task: DnaTask, part: str = "train_set") -> list[str]:
    """Return the sequences of one of the task's sets."""
    found = sequences_of(getattr(task, part))
    return [decode(found[i]) for i in range(len(found))]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def letters(length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("ACGT", k=length))


def example(label: str, number: int, length: int = 40) -> str:
    """Return a sequence with the motif of its class in it."""
    background, motif = letters(length, seed=zlib.crc32(f"{label} {number}".encode())), MOTIFS[label]
    at = number % (length - len(motif))
    return background[:at] + motif + background[at + len(motif) :]


def write(path: Path, text: str | bytes) -> Path:
    """Write a file, compressed if its name says so."""
    data = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".xz":
        data = lzma.compress(data)
    path.write_bytes(data)
    return path


def write_csv(path: Path, rows: Iterable[Sequence[object]], header: Sequence[str] = ("sequence", "label")) -> Path:
    text = "\n".join(",".join(map(str, row)) for row in (header, *rows)) + "\n"
    return write(path, text)


def rows(per_class: int = 12, length: int = 40, labels: Sequence[str] = ("alpha", "beta")) -> list[tuple[str, str]]:
    return [(example(label, i, length), label) for i in range(per_class) for label in labels]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of two classes, 12 sequences of 40 bases each."""
    return write_csv(tmp_path / "own.csv", rows())


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    """A FASTA file with labels in its headers, in lines of 16 letters."""
    records = [
        f">r{i} label={label} plate={i % 4}\n{sequence[:16]}\n{sequence[16:32]}\n{sequence[32:]}\n"
        for i, (sequence, label) in enumerate(rows())
    ]
    return write(tmp_path / "own.fa", "".join(records))


def shared(name: str) -> Path:
    """Return a file of the data that are not in the repository; skips the test where it is not there."""
    folder = Path(os.environ.get("MAMBAVERSE_TEST_DATA") or Path(__file__).parents[4] / "shared/data")
    if not (folder / name).exists():
        pytest.skip(f"{name} is not in {folder}; MAMBAVERSE_TEST_DATA names another folder")
    return folder / name


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    return shared


@pytest.fixture
def draw() -> Callable[[int], torch.Generator]:
    return lambda seed: torch.Generator().manual_seed(seed)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))
