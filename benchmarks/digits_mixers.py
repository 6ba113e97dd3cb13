"""The same model on scikit-learn's digits with one mixer after the other: accuracy, images a second, seconds.

python benchmarks/digits_mixers.py [--config vision/digits] [--seeds 1] [--threads 2] [MIXER ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from mambaverse.config import compose
from mambaverse.engine.run import train

MIXERS = ("vim", "s6", "ssd", "bissd", "ncssd", "mamba3", "s4d", "attention", "retnet", "linear_attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mixers", nargs="*", default=MIXERS)
    parser.add_argument("--config", default="vision/digits")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    quiet = Console(quiet=True)
    title = f"{arguments.config}, {arguments.threads} threads, torch {torch.__version__}, {date.today()}"
    table = Table("mixer", "parameters", "accuracy, % (each seed)", "images/s in training", "seconds", title=title)
    for mixer in arguments.mixers:
        accuracy, rate, seconds, parameters = [], [], [], 0
        for seed in range(arguments.seeds):
            with TemporaryDirectory() as folder:
                overrides = [f"model.mixer={mixer}", f"trainer.seed={seed}", f"trainer.output_dir={folder}"]
                overrides.append(f"trainer.num_threads={arguments.threads}")
                result = train(compose(arguments.config, overrides), name=arguments.config, console=quiet)
                facts = json.loads((Path(result.folder) / "results.json").read_text())
            rates = [row["samples_per_s"] for row in result.history if row.get("samples_per_s")]
            accuracy.append(100 * result.metrics["accuracy"])
            rate.append(statistics.median(rates))
            seconds.append(facts["seconds"])
            parameters = facts["parameters"]
        print(f"{mixer}: {accuracy}, {max(rate):.0f} images/s, {seconds} s", flush=True)
        each = ", ".join(f"{a:.2f}" for a in accuracy)
        table.add_row(mixer, f"{parameters:,}", each, f"{max(rate):.0f}", f"{statistics.mean(seconds):.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
