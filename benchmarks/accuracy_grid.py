"""The accuracy grid: every DNA and audio set that ships, all folds, several seeds, one mixer after the other; CIFAR-10.

python benchmarks/accuracy_grid.py PLAN [--data FOLDER] [--out FOLDER] [--gpus 4] [--workers 12] [--minutes 8] ...

    grid     each set by its shipped config with s6, ssd, mamba3, s4d, vim and attention
    gue      GUE's eight tasks by dna/gue_gpu and dna/gue_promoter, beside the k-mer floor, with the paired bootstrap,
             and DNABERT-2
    larger   fly_splice, fly_windows and beta_lactamase with settings for a GPU, and dna/rrna16s_large
    cifar10  vision/cifar10 with Strata, timm's ResNet-18 and ViT, and vision/cifar10_vim with its scans and with
             ncssd: JPEG copies, compiled, the last weights; for a GPU, and with --workers 1 a run has a card for
             itself, which its minutes are of

Of a config only model.mixer, seed, fold, device and precision (bf16 on a GPU) are changed, and model.members=1 where it
is an ensemble, so that mixers compare as one model each; arguments that a config gives to a mixer stay with that mixer.
GUE's large tasks get trainer.epochs=15, or 6; data.audit=false saves the seconds of an audit. The runs of `gue` are
those of `grid` with vim: one --out serves both.

Runs are trained side by side, the longest first, `--workers` on each GPU. What ended is not run again; what was stopped
by --minutes or SIGTERM goes on where it was. `--floors` fits the simple floors instead (scikit-learn, on the CPU) and
writes them to OUT/floors, which may be copied to another --out. The table (OUT/PLAN.md, .csv) is made at the end, from
what is there, or by `--table` alone. Sets whose file is not in --data are left out, such as that of drums, which has to
be built.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from accuracy_plans import PLANS, Plan, Set
from accuracy_pool import Pool
from accuracy_tables import fit_floors, write_tables

from mambaverse.errors import UserError

A_GPU = 12  # processes: small models keep a GPU waiting for their launches


def chosen(plan: Plan, arguments: argparse.Namespace) -> Plan:
    """Return the plan with the sets, of those whose data are there, and the mixers that were asked for."""
    sets: list[Set] = []
    for part in plan.sets:
        if arguments.sets and not any(part.name == s or part.name.startswith(f"{s}/") for s in arguments.sets):
            continue
        if part.has_data(arguments.data):
            sets.append(replace(part, settings=(*part.settings, *arguments.set)))
        else:
            print(f"{part.name}: no {arguments.data / str(part.file)}, left out", flush=True)
    return replace(plan, sets=sets, mixers=arguments.mixers or plan.mixers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the prepared files")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--sets", type=names, help="of the plan's, by commas; gue stands for its eight tasks")
    parser.add_argument("--mixers", type=names, help="in place of the plan's, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all runs; may be repeated")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="0: the CPU")
    parser.add_argument("--workers", type=int, help=f"processes, on each GPU ({A_GPU}) or in all (one a core)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then")
    parser.add_argument("--floors", action="store_true", help="fit the floors, and nothing else")
    parser.add_argument("--table", action="store_true", help="make the table, and nothing else")
    arguments = parser.parse_args()
    known = {part.name for part in PLANS[arguments.plan].sets}
    for name in arguments.sets or ():
        if name not in known and not any(other.startswith(f"{name}/") for other in known):
            parser.error(f"no set {name!r}; there are {', '.join(sorted(known))}")
    if not (arguments.table or arguments.floors) and arguments.gpus > torch.cuda.device_count():
        parser.error(f"--gpus {arguments.gpus}: torch finds {torch.cuda.device_count()}")
    return arguments


def main() -> None:
    began = time.monotonic()
    arguments = parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TRITON_CACHE_DIR", str((arguments.out / "triton").absolute()))
    plan = chosen(PLANS[arguments.plan], arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.floors:
        torch.set_num_threads(1)
        fit_floors(plan.sets, arguments.data, arguments.out)
        return
    device = "cuda" if arguments.gpus else "cpu"
    runs = list(plan.runs(arguments.seeds, arguments.data, device))
    if not arguments.table:
        workers = arguments.workers or (A_GPU if arguments.gpus else os.cpu_count() or 1)
        deadline = began + 60 * arguments.minutes
        Pool(arguments.out, arguments.gpus, workers * max(arguments.gpus, 1), deadline).run(runs)
    write_tables(arguments.plan, plan, runs, arguments.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"accuracy_grid: {error}") from None
