"""The tables of docs/audio.md: accuracy of the audio recipes beside their floors, on the same folds.

    python benchmarks/audio_tables.py tones    Mandarin tones, whole package, unseen syllables: fold 0, three seeds
    python benchmarks/audio_tables.py fsdd     spoken digits, one speaker after the other held out, one seed
    python benchmarks/audio_tables.py mixers   tones, fold 0, one seed, with one mixer after the other
    python benchmarks/audio_tables.py folds    tones, all five folds, one seed

Finished runs (those with a results.json in --output) are not run again; the table is printed and written as CSV.
Whole package: `mambaverse data audio/mandarin_tones [--root gcin-voice_*.deb]`; digits: --fsdd fsdd_360.zip, or FSDD's
folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mambaverse.config import compose
from mambaverse.engine.run import train

TONES, FSDD = "audio/mandarin_tones", "audio/fsdd"
MIXERS = ("vim", "s6", "ssd", "s4d", "attention")
SEEDS = (0, 1, 2)
FLOORS = ("MFCC 20 x 20, SVM", "MFCC statistics, SVM")


@dataclass(frozen=True)
class Row:
    """One run of a table: its name, its group (rows of one group are averaged), its config and changes to it."""

    name: str
    group: str
    config: str
    overrides: tuple[str, ...]


def rows_of(table: str, arguments: argparse.Namespace) -> list[Row]:
    if table == "fsdd":
        root = f"data.root={arguments.fsdd}"
        return [Row(f"fsdd-fold{f}-seed0", "six speakers", FSDD, (root, f"data.fold={f}")) for f in range(6)]
    if table == "mixers":
        return [tones(0, 0, mixer, mixer) for mixer in arguments.mixers or MIXERS]
    own = str(compose(TONES).model.mixer)
    if table == "tones":
        return [tones(0, seed, mixer, f"fold 0, {mixer}") for mixer in arguments.mixers or (own,) for seed in SEEDS]
    return [tones(fold, 0, mixer, f"five folds, {mixer}") for mixer in arguments.mixers or (own,) for fold in range(5)]


def tones(fold: int, seed: int, mixer: str, group: str) -> Row:
    overrides = (f"data.fold={fold}", f"trainer.seed={seed}", f"model.mixer={mixer}")
    return Row(f"tones-fold{fold}-seed{seed}-{mixer}", group, TONES, overrides)


def result(row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the results.json of a row, training it first if it is not there."""
    target = Path(arguments.output) / row.name / "results.json"
    if not target.is_file():
        overrides = [f"trainer.output_dir={arguments.output}", f"trainer.run_name={row.name}", "trainer.overwrite=true"]
        overrides += [f"trainer.num_threads={arguments.threads}", "trainer.baseline=true", *row.overrides]
        train(compose(row.config, overrides), name=row.config, console=Console(quiet=True))
    return json.loads(target.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("tones", "fsdd", "mixers", "folds"))
    parser.add_argument(
        "mixers",
        nargs="*",
        help="of the tables of tones; default: the config's own, or for the table mixers " + ", ".join(MIXERS),
    )
    parser.add_argument("--fsdd", default="../shared/data/fsdd_360.zip", help="the digits")
    parser.add_argument("--output", default="runs/audio_tables", help="folder of the runs")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    head = ("run", "parameters", "accuracy, %", *(f"{name}, %" for name in FLOORS), "seconds")
    title = f"{arguments.table}, {arguments.threads} thread(s), torch {torch.__version__}, {date.today()}"
    lines: list[tuple[str, ...]] = []
    scores: dict[str, list[list[float]]] = {}
    for row in rows_of(arguments.table, arguments):
        found = result(row, arguments)
        all_found = (found["metrics"], *(found["baselines"][name] for name in FLOORS))
        percent = [100 * one["accuracy"] for one in all_found]
        scores.setdefault(row.group, []).append(percent)
        cells = [f"{value:.2f}" for value in percent]
        lines.append((row.name, f"{found['parameters']:,}", *cells, f"{found['seconds']:.0f}"))
        print(" ".join(lines[-1]), flush=True)
    for group, rows in scores.items():
        if len(rows) > 1:
            ours, *floors = (f"{statistics.mean(values):.2f}" for values in zip(*rows, strict=True))
            spread = statistics.stdev(percent[0] for percent in rows)
            lines.append((f"mean, {group}", "", f"{ours} ± {spread:.2f}", *floors, ""))
    table = Table(*head, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=110).print(table)
    with (path := Path(arguments.output) / f"{arguments.table}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *lines])
    print(f"written: {path}")


if __name__ == "__main__":
    main()
