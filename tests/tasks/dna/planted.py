"""Small models whose answers are known, runs of them on disk, and a genome."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mambaverse
from mambaverse.config import compose, to_yaml
from mambaverse.engine.files import write_weights
from mambaverse.engine.folder import RunFolder, make_task
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.reader import Reader

PLAIN = {"stem": "embedding", "stem_kernel": 1, "stem_stride": 1, "drop_rate": 0.0}
SMALL: dict[str, dict[str, Any]] = {"vim": {"d_state": 2, "expand": 1}, "s6": {"d_state": 4, "expand": 1}}


def model(head: str = "mlm", *, causal: bool = False, seed: int = 0, sharp: float = 15.0, **options: Any) -> DnaModel:
    """Return a random model whose answers are far from even."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"dim": 16, "depth": 2, "head": head, "mixer_args": SMALL, **options}
    made: Any = mambaverse.create_model("dna_mamba_d64_n2" if causal else "caduceus_ph_d32_n2", **arguments)
    if made.stem == "embedding":
        with torch.no_grad():
            made.embeddings.word_embeddings.weight.mul_(sharp)
    return made.eval()


def save_run(
    folder: Path,
    head: str = "mlm",
    *,
    causal: bool = False,
    args: Mapping[str, Any] | None = None,
    bases: tuple[int, int] = (1, 4096),
    **data: Any,
) -> Path:
    """Write the run folder of a model, as the engine does, without training it."""
    name = "dna_mamba_d64_n2" if causal else "caduceus_ph_d32_n2"
    mixer = "s6" if causal else "vim"
    overrides = [
        f"model.name={name}", f"model.mixer={mixer}", f"model.mixer_args={{{mixer}: {{d_state: 2, expand: 1}}}}",
        f"model.args={json.dumps({'dim': 16, 'depth': 2, 'head': head, **PLAIN, **(args or {})})}",
        "data.root=nowhere", "trainer.num_threads=1", *(f"data.{key}={value}" for key, value in data.items()),
    ]  # fmt: skip
    config = compose("dna/fasta", overrides)
    task = make_task(config)
    task.restore({"classes": ["alpha", "beta"], "longest": bases[1], "shortest": bases[0]})
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.config.write_text(to_yaml(config))
    run.facts.write_text(json.dumps(task.facts()))
    torch.manual_seed(0)
    made = task.build_model()
    with torch.no_grad():
        made.embeddings.word_embeddings.weight.mul_(15)  # type: ignore[union-attr,operator]
    write_weights(run.weights(config), made.state_dict(), {})
    return folder


class Counting(Reader):
    """A reader that keeps what it was asked about."""

    def __init__(self, model: nn.Module, strands: str = "one", batch_size: int | None = None) -> None:
        super().__init__(model, strands, batch_size)
        self.asked: list[bytes] = []

    def ask(self, windows: Any, what: Any) -> Any:
        self.asked += [window.tobytes() for window in windows]
        return super().ask(windows, what)
