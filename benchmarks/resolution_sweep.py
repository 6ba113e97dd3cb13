"""Images a second and memory of image models by resolution: ours beside DeiT with PyTorch's attention.

    python benchmarks/resolution_sweep.py [--models NAME[:MIXER[:KEY=VALUE]],...] [--sizes 224,512,...] [--csv FILE]
                                          [--plot FILE]

Under bf16 autocast; training is forward and backward, without an optimizer. Each is captured as a CUDA graph, so that
the host's launches, which could be hidden in other ways, are not in it; the eager rate stands beside it. A batch has
about as many pixels at each size (--pixels), so that the GPU is full.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

import mambaverse.timm  # noqa: F401 (makes our models known)
from mambaverse.bench.plots import COLOURS
from mambaverse.bench.timing import Clock, clock_for

MODELS = (
    "deit_tiny_patch16_224,deit_small_patch16_224,vim_tiny_patch16_224,vim_tiny_patch16_224:bissd,"
    "vim_tiny_patch16_224:ncssd,vim_tiny_patch16_224:ncssd:recompute=true,"
    "vim_small_patch16_224,vim_small_patch16_224:ncssd,strata_tiny_patch4_224,vmamba_tiny_s1l8_224"
)
SIZES = "224,384,512,768,1024,1248,1536"
PIXELS = 256 * 224 * 224
FIELDS = ("model", "size", "batch", "inference", "inference_eager", "inference_mb", "training", "training_eager",
          "training_mb")  # fmt: skip


def build(name: str, size: int, **options: Any) -> nn.Module:
    """Return a timm model for images of a size; NAME:MIXER swaps the mixer, NAME:MIXER:KEY=VALUE sets an argument too.

    A value is JSON, or else a word.
    """
    name, _, mixer = name.partition(":")
    mixer, _, argument = mixer.partition(":")
    if mixer:
        options["mixer"] = mixer
    if argument:
        key, _, text = argument.partition("=")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        options["mixer_args"] = {mixer: {key: value}}
    return timm.create_model(name, img_size=size, **options)


def measure(name: str, size: int, batch: int, clock: Clock) -> dict[str, Any]:
    """Return images a second and megabytes of one model at one size."""
    row: dict[str, Any] = {"model": name, "size": size, "batch": batch}
    images = torch.randn(batch, 3, size, size, device="cuda")

    model = build(name, size, num_classes=1000).cuda()

    def infer() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            model(images)

    model.eval()
    _add(row, "inference", infer, batch, clock)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def train() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(images).float().square().mean()
        torch.autograd.grad(loss, parameters, allow_unused=True)

    _add(row, "training", train, batch, clock)
    return row


def _add(row: dict[str, Any], what: str, function: Any, batch: int, clock: Clock) -> None:
    times = clock.times(function)
    row[what], row[f"{what}_eager"] = 1e3 * batch / times.ms, 1e3 * batch / times.eager_ms
    row[f"{what}_mb"] = clock.peak_mb(function)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw images a second and megabytes an image over the side of the images."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    names = list(dict.fromkeys(row["model"] for row in rows))
    for column, what in enumerate(("inference", "training")):
        for axes, key, label in (
            (panels[0][column], what, "images a second"),
            (panels[1][column], f"{what}_mb", "MB an image"),
        ):
            for name, colour in zip(names, COLOURS, strict=False):
                mine = [row for row in rows if row["model"] == name]
                values = [row[key] / (row["batch"] if key.endswith("mb") else 1) for row in mine]
                dashed = "--" if name.startswith("deit") else "-"
                axes.plot([r["size"] for r in mine], values, dashed, color=colour, marker="o", markersize=4, label=name)
            axes.set_yscale("log")
            axes.set_title(f"{what}: {label}", loc="left", fontsize=10)
            axes.set_xlabel("pixels a side")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=130)


def crossover(rows: list[dict[str, Any]], what: str, ours: str, theirs: str) -> str:
    """Return the least size from which `ours` is ahead at every larger one that was timed."""
    rate = {(row["model"], row["size"]): row[what] for row in rows}
    ahead = None
    for size in sorted({row["size"] for row in rows}, reverse=True):
        if not rate.get((ours, size), 0) > rate.get((theirs, size), float("inf")):
            break
        ahead = size
    return f"from {ahead} px" if ahead else "at no size"


def main() -> None:
    """Time every model at every size, and say from where ours are ahead."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--pixels", type=int, default=PIXELS, help="of a batch")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    console, clock = Console(), clock_for(torch.device("cuda"), 10)
    rows = []
    for size in map(int, options.sizes.split(",")):
        for name in options.models.split(","):
            batch = max(1, options.pixels // size**2)
            try:
                rows.append(measure(name, size, batch, clock))
            except torch.OutOfMemoryError:
                console.print(f"{name} at {size} px: out of memory")
                torch.cuda.empty_cache()
                continue
            torch.cuda.empty_cache()
            if options.csv:
                with options.csv.open("w", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    writer.writeheader()
                    writer.writerows(rows)
            console.print({k: round(v, 1) if isinstance(v, float) else v for k, v in rows[-1].items()}, width=200)
    table = Table("model", "px", "batch", "inference, images/s (eager)", "MB", "training, images/s (eager)", "MB")
    for row in rows:
        cells = [f"{row[w]:.0f} ({row[f'{w}_eager']:.0f})" for w in ("inference", "training")]
        table.add_row(row["model"], str(row["size"]), str(row["batch"]), cells[0], f"{row['inference_mb']:.0f}",
                      cells[1], f"{row['training_mb']:.0f}")  # fmt: skip
    console.print(f"{clock.name}, bf16", table)
    for name in options.models.split(","):
        peer = "deit_small_patch16_224" if "small" in name else "deit_tiny_patch16_224"
        if not name.startswith("deit"):
            text = [f"{what} {crossover(rows, what, name, peer)}" for what in ("inference", "training")]
            console.print(f"{name} is ahead of {peer}: {'; '.join(text)}", highlight=False)
    if options.plot:
        plot(rows, f"{clock.name}, bf16", options.plot)


if __name__ == "__main__":
    main()
