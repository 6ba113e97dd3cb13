"""`mambaverse mutagenesis RUN --fasta genome.fa --region chr1:1,000-1,200`: a table, arrays and a picture.

NAME.tsv    chrom <tab> pos <tab> ref <tab> A <tab> C <tab> G <tab> T     what each base there changes
NAME.npz    changes float64 (n, 4), ref (n,), chrom, start (from 0), window (start, end), head, target
NAME.png    logo and heat map
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from rich.console import Console

from mambaverse.engine.files import output_path, write_atomic
from mambaverse.engine.progress import Counter, Screen
from mambaverse.engine.task import Task
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.genome import Genome, Region
from mambaverse.tasks.dna.interpret.mutagenesis import mutagenesis, predicted
from mambaverse.tasks.dna.interpret.pictures import draw_mutagenesis
from mambaverse.tasks.dna.reader import Reader, check_range, open_reader
from mambaverse.tasks.dna.tokens import decode
from mambaverse.tasks.dna.variants.table import refuse_finished

ENDINGS = (".tsv", ".npz", ".png")
WINDOW = 1024  # bases, where none are given and the region is no longer


def mutagenesis_run(
    path: Path,
    fasta: Path,
    region: str,
    *,
    out: Path | None = None,
    window: int | None = None,
    label: str | None = None,
    strands: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[Path]:
    """Write and draw what each substitution in a region changes; prints and returns the paths of the files.

    Args:
        path: A run folder; its data set is not needed.
        fasta: The genome.
        region: Such as chr1:1,000-1,200.
        out: What the files are called, without an ending or with one of theirs; None: by the region.
        window: Bases that the model sees, the region in their middle; moved inwards at a chromosome's ends. None:
            1,024, or the region where that is longer.
        label: The class whose score is asked for, by name or number; None: the one that the model says of the window.
        strands: "one" or "both"; None: as the run evaluates.
        batch_size: Windows of one pass; None: see `Reader`.
        device: auto, cpu or cuda; None: as the run says.
        precision: fp32, bf16 or fp16; None: as the run says.
        overwrite: Replace finished files.
        console: Where to print; None: stdout.

    Raises:
        UserError: not a run of a DNA model, a region that is not in the genome or longer than the window, a file that
            is there already.
    """
    check_range("--window", window, 1)
    console = console or Screen()
    opening = open_reader(path, strands=strands, batch_size=batch_size, device=device, precision=precision)
    with opening as (_, task, reader), Genome(fasta) as genome:
        place = genome.region(region)
        if place.strand == "-":
            raise UserError(f"--region {region}: give it on the + strand; --strands both averages both")
        named = out or Path(re.sub(r"[^\w.-]+", "_", f"mutagenesis-{place.name}-{place.start + 1}-{place.end}"))
        named = named.with_suffix("") if named.suffix in ENDINGS else named
        files = [named.with_name(named.name + ending) for ending in ENDINGS]
        output_path("--out", files[0])
        for file in files:
            refuse_finished(file, overwrite)
        start, end = around(place, window, genome.lengths[place.name])
        too_short = genome.lengths[place.name] < reader.shortest
        reader.check_window(end - start, place.name if too_short else "--window")
        ids = genome.ids(place.name, start, end)
        target, what = _target(reader, task, ids, label)
        counter = Counter(Screen(stderr=True), "mutated", len(place) * (2 if reader.both else 1))
        first, last = place.start - start, place.end - start
        changes = mutagenesis(reader, ids, first, last, target=target, done=counter.add)
        counter.clear()
    letters = decode(ids[first:last])
    rows = [f"{place.name}\t{place.start + i + 1}\t{letters[i]}\t" + _cells(row) for i, row in enumerate(changes)]
    write_atomic(files[0], "\n".join(["chrom\tpos\tref\tA\tC\tG\tT", *rows]) + "\n")
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, changes=changes, ref=np.array(list(letters)), chrom=place.name, start=place.start,
        window=np.array([start, end]), head=reader.head, target=what,
    )  # fmt: skip
    write_atomic(files[1], buffer.getvalue())
    title = (
        f"{place}, {path.name}: {what} by each substitution; letters: what a base adds, window {end - start:,} bases"
    )
    draw_mutagenesis(files[2], ids[first:last], changes, place.start + 1, title, what)
    for file in files:
        console.print(str(file), highlight=False, soft_wrap=True, markup=False)
    return files


def around(region: Region, window: int | None, length: int) -> tuple[int, int]:
    """Return start and end of the window around a region: in its middle, moved inwards at the chromosome's ends.

    Args:
        region: What it is about.
        window: Bases; None: 1,024, or those of the region where that is longer.
        length: Of the chromosome.

    Raises:
        UserError: an empty region, or one that is longer than the window.
    """
    if not len(region):
        raise UserError(f"region {region}: holds no base")
    if window is not None and window < len(region):
        raise UserError(f"--window {window:,}: the region {region} has {len(region):,} bases; expected at least those")
    size = min(window or max(WINDOW, len(region)), length)
    start = min(max((region.start + region.end - size) // 2, 0), length - size)
    return start, start + size


def class_number(label: str, task: Task, count: int) -> int:
    """Return the number of a class that is given by its name, or by its number from 0.

    Raises:
        UserError: no such class.
    """
    names = [str(name) for name in task.classes] if len(task.classes) == count else []
    if label in names:
        return names.index(label)
    numbers = [str(number) for number in range(count)]
    if label in numbers:
        return numbers.index(label)
    raise UserError(f"--class {label}: unknown{suggest(label, names or numbers)}")


def _target(reader: Reader, task: Task, ids: np.ndarray, label: str | None) -> tuple[int, str]:
    """Return which score is asked for, and what the numbers are called."""
    if reader.speaks:
        if label is not None:
            raise UserError(f"--class {label}: head {reader.head!r} has no classes; leave it out")
        return 0, "change of log p(base)" if reader.head == "mlm" else "change of log p(window)"
    count = reader.first.num_classes
    chosen = predicted(reader, ids) if label is None else class_number(label, task, count)
    name = task.classes[chosen] if len(task.classes) == count else str(chosen)
    return chosen, f"change of the score of {name}"


def _cells(row: np.ndarray) -> str:
    return "\t".join("" if np.isnan(x) else f"{x + 0.0:.6g}" for x in row)
