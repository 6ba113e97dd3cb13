"""Everything that must survive: saved as one folder, complete or not there at all.

    run/state/0000012.part/  --write, fsync, rename-->  run/state/0000012/  --then-->  older ones are removed

So a process killed at any moment, or a full disk, leaves the newest complete state, from which a run goes on bit by bit
as if it had never stopped. Random choices about data need no saving (they are functions of seed, epoch and position,
see data.py); the generators saved here are the global ones, which dropout and drop path draw from.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambaverse.engine.checkpoint import CheckpointError, read_torch
from mambaverse.engine.files import new_folder, save_torch

FILE = "training.pt"


@dataclass
class Averages:
    """Sums of what steps returned, in Python floats."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, values: dict[str, float], count: int) -> None:
        """Add the means of `count` batches."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * count
        self.count += count

    def take(self) -> dict[str, float]:
        """Return the means, and begin anew."""
        means = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


@dataclass
class Position:
    """How far a run has come."""

    epoch: int = 0  # epochs finished, evaluation included
    batch: int = 0  # batches of the next one that this process has learnt from
    updates: int = 0  # optimizer steps
    seconds: float = 0.0  # spent training, over all sessions
    best: float | None = None  # best value of the monitored metric
    best_epoch: int = 0  # the epoch it was reached in, from 1
    log_bytes: int = 0  # length of metrics.jsonl
    interval: Averages = field(default_factory=Averages)  # since its last line
    of_epoch: Averages = field(default_factory=Averages)  # since the evaluation before

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Position:
        """Return the position that `to_dict` described."""
        parts = {f.name: Averages(**values[f.name]) for f in fields(cls) if f.name in ("interval", "of_epoch")}
        return cls(**{**values, **parts})


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch (all devices), Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def get_generators(device: torch.device) -> dict[str, Any]:
    """Return the states of this process's global generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: dict[str, Any], device: torch.device) -> None:
    """Put the global generators back into the states that `get_generators` returned."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


class StateFolder:
    """The folder run/state, with the newest complete state of a run in a numbered folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: dict[str, Any]) -> Path:
        """Write `state` (tensors and plain values), then remove the states before it.

        Raises:
            SaveError: it could not be written; the state before it is still there.
        """
        older = self._complete()
        number = int(older[-1].name) + 1 if older else 1
        target = self.folder / f"{number:07d}"
        with new_folder(target) as part:
            save_torch(part / FILE, state)
        for folder in older:
            shutil.rmtree(folder, ignore_errors=True)
        return target

    def load(self) -> dict[str, Any] | None:
        """Return the newest complete state, its tensors on the CPU; None if none was ever saved.

        Raises:
            CheckpointError: the file is damaged.
        """
        complete = self._complete()
        if not complete:
            return None
        state = read_torch(complete[-1] / FILE)
        if not isinstance(state, dict) or "position" not in state:
            raise CheckpointError(f"{complete[-1] / FILE}: holds no training state")
        return state

    def _complete(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(f for f in self.folder.iterdir() if f.name.isdigit())
