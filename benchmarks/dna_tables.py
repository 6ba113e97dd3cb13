"""The tables of docs/dna.md: our models beside the simple floors, on the same splits and windows.

python benchmarks/dna_tables.py TABLE... [--data FOLDER] [--out FOLDER] [--threads 1]

    rrna16s      one 250-base window a sequence, unseen genera: fold 0 of 5, three seeds
    fly_splice   the official test genes, three seeds
    splice_uci   ten folds, once
    mixers       fly_splice with each mixer, one seed, one model rather than an ensemble
    others       fly_windows, species3, and beta-lactamase of unseen families (fold 0 of 5), one seed

A run that ended is not run again; delete its folder to have it anew. Tables are printed, and written to --out as CSV.
GUE, and every set with every mixer: accuracy_grid.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mambaverse.config import compose
from mambaverse.engine.baseline import fit_baselines
from mambaverse.engine.folder import make_task
from mambaverse.engine.run import train

MIXERS = ("vim", "s6", "ssd", "s4d", "attention")
SCORES = ("accuracy", "macro_f1", "mcc")
QUIET = Console(quiet=True)


@dataclass
class Line:
    """One line of a table: the mean over runs of one config, or a floor on the data of the same config."""

    name: str
    config: str
    overrides: Sequence[str] = ()
    runs: Sequence[Sequence[str]] = ((),)  # further overrides of each run, whose mean is given
    floors: bool = True  # whether the floors on these data go before it
    found: list[dict[str, float]] = field(default_factory=list)


def seeds(count: int) -> list[list[str]]:
    return [[f"trainer.seed={seed}"] for seed in range(count)]


def tables(data: Path) -> dict[str, list[Line]]:
    root = [f"data.root={data}"]
    folds = [[f"data.fold={fold}"] for fold in range(10)]
    return {
        "rrna16s": [Line("caduceus", "dna/rrna16s", [], seeds(3))],
        "fly_splice": [Line("caduceus", "dna/fly_splice", root, seeds(3))],
        "splice_uci": [Line("caduceus", "dna/splice_uci", root, folds)],
        "mixers": [
            Line(mixer, "dna/fly_splice", [*root, f"model.mixer={mixer}", "model.members=1"], floors=mixer == MIXERS[0])
            for mixer in MIXERS
        ],
        "others": [Line("caduceus", f"dna/{name}", root) for name in ("fly_windows", "species3", "beta_lactamase")],
    }


def run(config: str, overrides: Sequence[str], folder: Path, threads: int) -> dict[str, float]:
    """Return the metrics of a run, and its "seconds" and "parameters"; from its folder, if it ended before."""
    if not (folder / "results.json").is_file():
        where = [f"trainer.output_dir={folder.parent}", f"trainer.run_name={folder.name}", "trainer.overwrite=true"]
        given = compose(config, [*overrides, *where, f"trainer.num_threads={threads}"])
        if (signal := train(given, name=config, console=QUIET).signal) is not None:
            raise SystemExit(128 + signal)
    results = json.loads((folder / "results.json").read_text())
    found = {**results["metrics"], "seconds": results["seconds"], "parameters": results["parameters"]}
    print(f"{folder.name}: accuracy {found['accuracy']:.4f}, {found['seconds']:.0f} s", flush=True)
    return found


def floors(config: str, overrides: Sequence[str], file: Path) -> dict[str, dict[str, float]]:
    """Return what the floors reach; from a file, if they were fitted before."""
    if not file.is_file():
        task = make_task(compose(config, overrides))
        task.setup()
        file.write_text(json.dumps(fit_baselines(task, QUIET)))
    return json.loads(file.read_text())


def fill(title: str, lines: Sequence[Line], out: Path, threads: int) -> list[list[str]]:
    """Run what is missing of a table; returns its rows: model, data, each score, seconds, parameters."""
    rows: list[list[str]] = []
    for number, line in enumerate(lines):
        stem = f"{title}-{number}-{line.name}"
        given = [[*line.overrides, *extra] for extra in line.runs]
        what = line.config.partition("/")[2]
        if line.floors:
            varied = given if any("fold" in key for extra in line.runs for key in extra) else given[:1]
            fitted = [floors(line.config, keys, out / f"{stem}-floors{i}.json") for i, keys in enumerate(varied)]
            for name in fitted[0]:
                rows.append([name, what, *row([one[name] for one in fitted])])
        line.found = [run(line.config, keys, out / f"{stem}-run{i}", threads) for i, keys in enumerate(given)]
        rows.append([line.name, what, *row(line.found)])
    return rows


def row(found: Sequence[dict[str, float]]) -> list[str]:
    """Return the mean (and with several runs the deviation) of each score in %, seconds a run, parameters, runs."""
    cells = []
    for key in SCORES:
        values = [100 * one[key] for one in found]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.2f}{spread}")
    seconds = statistics.mean(one["seconds"] for one in found)
    parameters = found[0].get("parameters")
    return [*cells, f"{seconds:.0f}", "" if parameters is None else f"{parameters:,}", str(len(found))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", metavar="TABLE", help=", ".join(tables(Path())))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the prepared files")
    parser.add_argument("--out", type=Path, default=Path("runs/dna_tables"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    known = tables(arguments.data)
    if unknown := set(arguments.tables) - set(known):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    header = ("model", "data", *(f"{key}, %" for key in SCORES), "seconds", "parameters", "runs")
    for title in arguments.tables:
        rows = fill(title, known[title], arguments.out, arguments.threads)
        note = f"{title}: {arguments.threads} thread, torch {torch.__version__}, {date.today()}"
        table = Table(*header, title=note)
        for cells in rows:
            table.add_row(*cells)
        Console(width=140).print(table)
        with (arguments.out / f"{title}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    main()
