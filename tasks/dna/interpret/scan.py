"""`mambaverse scan RUN --fasta genome.fa --out x.bedgraph`: what a model says along a genome, `stride` bases a value.

    head           value of a cell of `stride` bases                        window of W bases
    classifier     probability of a class                                   the cell in its middle
    regression     a quantity                                               likewise
    mlm            mean log p of the cell's bases, each masked once          likewise
    causal_lm      mean log p of the cell's bases after those before them    ends with the cell

`perplexity` is exp(-mean log p). Windows are moved inwards at a chromosome's ends, where a causal model sees what there
is before a cell. With both strands a causal model reads the other one likewise, from behind the cell. A cell has no
value where its window is N by more than half, or, of language models, where it has no base.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mambaverse.engine.files import output_path
from mambaverse.engine.folder import RunFolder
from mambaverse.engine.progress import Counter, Screen
from mambaverse.engine.resumable import tells_how_to_go_on
from mambaverse.engine.task import Task
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.genome import Genome, Region
from mambaverse.tasks.dna.genome.bed import read_bed
from mambaverse.tasks.dna.genome.intervals import Intervals
from mambaverse.tasks.dna.genome.tracks import BedGraphWriter, scan_order
from mambaverse.tasks.dna.interpret.command import class_number
from mambaverse.tasks.dna.likelihood import is_base, next_base, pseudo
from mambaverse.tasks.dna.reader import Reader, check_range, open_reader
from mambaverse.tasks.dna.tokens import N, reverse_complement_ids
from mambaverse.tasks.dna.variants.table import fingerprint

WINDOW, STRIDE = 1024, 128  # bases, where none are given
PASSES = 8  # of windows a piece of the track
VALUES = {
    "classifier": ("probability",),
    "regression": ("quantity",),
    "mlm": ("log_likelihood", "perplexity"),
    "causal_lm": ("log_likelihood", "perplexity"),
}


class Scanner:
    """Says a value for each cell of a region.

    Args:
        reader: The model.
        genome: What is scanned.
        window: W, bases that the model sees.
        stride: Bases of a cell.
        value: Of `VALUES`; None: the first that the head has.
        target: The class or quantity.

    Raises:
        UserError: a head that speaks of each base, a value that it has not, a stride longer than the window.
    """

    def __init__(
        self, reader: Reader, genome: Genome, window: int, stride: int, value: str | None = None, target: int = 0
    ) -> None:
        known = VALUES.get(reader.head, ())
        if not known:
            raise UserError(f"scan: head {reader.head!r} speaks of each base; expected one of {', '.join(VALUES)}")
        if value is not None and value not in known:
            raise UserError(f"--value {value}: head {reader.head!r} has {' and '.join(known)}{suggest(value, known)}")
        if stride > window:
            raise UserError(f"--stride {stride}: longer than the window of {window} bases, which would leave gaps")
        self.reader, self.genome, self.window, self.stride = reader, genome, window, stride
        self.value, self.target = value or known[0], target

    def __call__(self, region: Region) -> np.ndarray:
        """Return the values of a region's cells, float64 (ceil(bases / stride),), NaN for none."""
        starts = range(region.start, region.end, self.stride)
        cells = [(start, min(start + self.stride, region.end)) for start in starts]
        if not self.reader.speaks:
            return self._scores(region.name, cells)
        total, count = np.zeros(len(cells)), np.zeros(len(cells))
        for turned in (False, True) if self.reader.both else (False,):
            for at, (said, bases) in enumerate(self._likelihoods(region.name, cells, turned)):
                total[at], count[at] = total[at] + said, count[at] + bases
        with np.errstate(invalid="ignore"):
            mean = total / count
        return np.exp(-mean) if self.value == "perplexity" else mean

    def _around(self, name: str, cell: tuple[int, int]) -> tuple[int, int]:
        """Return the window with a cell in its middle."""
        length = self.genome.lengths[name]
        size = min(self.window, length)
        start = min(max((sum(cell) - size) // 2, 0), length - size)
        return start, start + size

    def _scores(self, name: str, cells: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return probabilities of the class, or quantities, of cells (C,)."""
        reader = self.reader
        out = np.full(len(cells), np.nan)
        windows = {at: self.genome.ids(name, *self._around(name, cell)) for at, cell in enumerate(cells)}
        windows = {at: ids for at, ids in windows.items() if (ids == N).mean() <= 0.5}
        total: float | Tensor = 0.0
        for turned in (False, True) if reader.both else (False,):
            read = [reverse_complement_ids(ids) if turned else ids for ids in windows.values()]
            said = reader.ask(read, lambda ids, rows: (reader.model(ids).double(),))
            total = total + torch.stack([answer[0] for answer in said]) if said else 0.0
        if isinstance(total, Tensor):
            scores = total / (2 if reader.both else 1)
            chosen = scores.softmax(1) if self.value == "probability" else scores
            out[list(windows)] = chosen[:, self.target].numpy()
        return out

    def _likelihoods(self, name: str, cells: Sequence[tuple[int, int]], turned: bool) -> Iterator[tuple[float, float]]:
        """Yield Σ log p of the bases of each cell, read from one strand, and how many they are."""
        reader, length = self.reader, self.genome.lengths[name]
        windows, within = [], []
        for first, last in cells:
            if reader.head == "mlm":
                start, end = self._around(name, (first, last))
            elif turned:
                start, end = first, min(first + self.window, length)
            else:
                start, end = max(last - self.window, 0), last
            ids = self.genome.ids(name, start, end)
            at = slice(first - start, last - start)
            if turned:
                ids, at = reverse_complement_ids(ids), slice(end - last, end - first)
            windows.append(ids)
            within.append(at)

        def say(ids: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
            inside = torch.zeros_like(ids, dtype=torch.bool)
            for at, row in enumerate(rows):
                inside[at, within[row]] = True
            counted = is_base(ids) & inside
            if reader.head == "causal_lm":
                said = next_base(reader.log_probs(ids), ids)
                counted[:, 0] = False
            else:
                said = pseudo(reader, ids, torch.arange(ids.shape[1], device=ids.device), counted)
            return (said * counted).sum(1), counted.sum(1)

        full = [row for row, (ids, at) in enumerate(zip(windows, within, strict=True)) if (ids[at] != N).any()]
        windows, within = [windows[row] for row in full], [within[row] for row in full]
        found = dict(zip(full, reader.ask(windows, say), strict=True))
        for row in range(len(cells)):
            said, bases = found.get(row, (0.0, 0.0))
            yield float(said), float(bases)


def scan_run(
    path: Path,
    fasta: Path,
    *,
    out: Path,
    regions: Sequence[str] = (),
    bed: Path | None = None,
    window: int | None = None,
    stride: int = STRIDE,
    value: str | None = None,
    label: str | None = None,
    strands: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> int:
    """Write a track of what a run says along a genome; prints and returns the number of its cells.

    Args:
        path: A run folder; its data set is not needed.
        fasta: The genome.
        out: The track, .bedgraph; beside it .chrom.sizes. A scan that was cut off goes on with it.
        regions: Where, such as chr1:1,000,001-2,000,000; with `bed` none: everywhere.
        bed: A BED file of where, none on the - strand; regions that touch or overlap are one.
        window: W; None: the run's data.window, 1,024 where it has none.
        stride: Bases of a cell.
        value: "probability", "quantity", "log_likelihood" or "perplexity"; None: the first that the model has.
        label: The class, by name or number; None: the last of two classes, else it has to be given.
        strands: "one" or "both"; None: as the run evaluates.
        batch_size: Windows of one pass; None: see `Reader`.
        device: auto, cpu or cuda; None: as the run says.
        precision: fp32, bf16 or fp16; None: as the run says.
        overwrite: Replace a finished track.
        console: Where to print; None: stdout.

    Raises:
        UserError: not a run of a DNA model, a value that it has not, a region that is not in the genome.
    """
    check_range("--window", window, 1)
    check_range("--stride", stride, 1)
    output_path("--out", out, (".bedgraph", ".bdg"), (bed,))
    if bed is not None and regions:
        raise UserError("scan: give --regions or --bed, not both")
    console = console or Screen()
    opening = open_reader(path, strands=strands, batch_size=batch_size, device=device, precision=precision)
    with opening as (config, task, reader), Genome(fasta) as genome:
        window = window or getattr(config.data, "window", None) or WINDOW
        reader.check_window(window, "--window")
        target = 0 if reader.speaks or reader.head == "tokens" else _target(task, reader, label)
        if reader.speaks and label is not None:
            raise UserError(f"--class {label}: head {reader.head!r} has no classes; leave it out")
        scanner = Scanner(reader, genome, window, stride, value, target)
        places = _places(genome, regions, bed)
        for name in {place.name: None for place in places}:
            reader.check_window(min(window, genome.lengths[name]), f"{name}, which --regions or --bed can leave out")
        about = {
            "run": fingerprint(RunFolder(path).weights(config)), "fasta": fingerprint(fasta), "window": window,
            "stride": stride, "value": scanner.value, "target": target, "strands": reader.strands,
            "precision": config.trainer.precision, "where": [str(place) for place in places],
        }  # fmt: skip
        cells = sum(-(-len(place) // stride) for place in places)
        counter = Counter(Screen(stderr=True), "scanned", cells)
        told = json.dumps(about)
        track = BedGraphWriter(out, genome.lengths, resume=not overwrite, overwrite=overwrite, about=told)
        with tells_how_to_go_on(out, overwrite=overwrite), track:
            for piece in _pieces(places, stride * PASSES * reader.rows(window)):
                if not track.has(piece):
                    track.write(piece, scanner(piece), stride)
                counter.add(-(-len(piece) // stride))
        counter.clear()
    named = f" of {task.classes[target]}" if scanner.value == "probability" else ""
    said = f"{out}: {scanner.value}{named}, {cells:,} cells of {stride} bases, windows of {window:,}"
    console.print(f"{said}, strands={reader.strands}", highlight=False, soft_wrap=True)
    return cells


def _places(genome: Genome, regions: Sequence[str], bed: Path | None) -> list[Region]:
    """Return what is scanned, in the order of a track."""
    if bed is not None:
        asked = list(_plus_regions(bed, genome))
    elif regions:
        asked = [genome.region(text) for text in regions]
        for text, region in zip(regions, asked, strict=True):
            if region.strand == "-":
                raise UserError(f"--regions {text}: give it on the + strand; --strands both averages both")
    else:
        asked = [Region(name, 0, length) for name, length in genome.lengths.items()]
    merged = list(Intervals.of([region for region in asked if len(region)]).merge())
    if not merged:
        raise UserError("scan: the regions hold no base")
    order = {name: number for number, name in enumerate(scan_order(genome.names))}
    return sorted(merged, key=lambda region: (order[region.name], region.start))


def _plus_regions(bed: Path, genome: Genome) -> Iterator[Region]:
    for row in read_bed(bed, genome=genome):
        if row.region.strand == "-":
            raise UserError(
                f"--bed {row.where}: strand '-' in column 6; a track is of the + strand, so leave that column out; "
                "--strands both averages both"
            )
        yield row.region


def _pieces(places: Sequence[Region], bases: int) -> Iterator[Region]:
    """Yield the places in pieces of so many bases, cut at cells."""
    for place in places:
        for start in range(place.start, place.end, bases):
            yield Region(place.name, start, min(start + bases, place.end))


def _target(task: Task, reader: Reader, label: str | None) -> int:
    count = reader.first.num_classes
    if label is not None:
        return class_number(label, task, count)
    if count > 2:
        names = ", ".join(map(str, task.classes)) or f"0 to {count - 1}"
        raise UserError(f"scan: the model has {count} classes; say which with --class: {names}")
    return count - 1
