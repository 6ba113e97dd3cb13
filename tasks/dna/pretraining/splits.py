"""Which intervals of a genome are learnt from, choose the weights, and are reported.

    data.bed                     the file says so: chromosome, start, end, split (train, valid, test)
    data.valid_chromosomes       those, and data.test_chromosomes, are held out whole
    neither                      every record is cut in stretches of one size; data.val_fraction and data.test_fraction
                                 of all bases are held out, in stretches drawn by data.split_seed

No window of the last two reaches from one set into another. An interval of a BED file that is shorter than a window is
made as long as one, around its centre, moved inwards at the chromosome's ends, as Caduceus does with the intervals of
Basenji: what reaches into training intervals by that is counted (`shared`).

What a run uses is written to split.bed, which feeds back in as data.bed: the intervals, and in a fifth column the
SHA-256 of their letters, up to 2 GiB of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from mambaverse.engine.files import write_atomic
from mambaverse.errors import NO_TEXT, UserError, suggest
from mambaverse.splits import HASH_LIMIT_BYTES
from mambaverse.tasks.dna.genome import Genome, Region
from mambaverse.tasks.dna.genome.bed import read_bed
from mambaverse.tasks.dna.genome.intervals import Intervals, split_by_chromosome
from mambaverse.tasks.dna.pretraining.config import DnaLmDataConfig
from mambaverse.tasks.dna.tables import SETS

STRETCH, STRETCHES = 1_000_000, 200  # bases of a stretch; so many stretches make up a smaller genome,
LEAST_WINDOWS, LEAST = 8, 20  # each of so many windows at least, as long as there are 20 stretches


@dataclass
class GenomeSplit:
    """Intervals by set, "train", "eval" and "test"; `test` may be missing.

    Attributes:
        rows: As they are written down.
        regions: As windows tile them.
        note: How they came about, for the head of a run.
    """

    rows: dict[str, list[Region]]
    regions: dict[str, list[Region]]
    note: str

    def shared(self) -> dict[str, int]:
        """Return how many intervals of each other set overlap one of the training set."""
        train = Intervals.of(self.regions["train"]).merge()
        others = ((name, found) for name, found in self.regions.items() if name != "train")
        return {name: int((Intervals.of(found).count_overlaps(train) > 0).sum()) for name, found in others}


def split_genome(genome: Genome, config: DnaLmDataConfig, bed: Path | None, note: str = "") -> GenomeSplit:
    """Return the intervals of each set.

    Args:
        genome: What is split.
        config: How.
        bed: The file of intervals that `config.bed` names, or that comes with the data, which chromosomes overrule.
        note: What there is to say of such a file.

    Raises:
        UserError: a bad line, a chromosome that is not there, a set that is missing, a genome too small to be split.
    """
    if bed is not None and not config.valid_chromosomes:
        rows = _read(bed, genome)
        regions = {name: [_widened(r, config.length, genome) for r in found] for name, found in rows.items()}
        return GenomeSplit(rows, regions, note or f"split by {bed.name}")
    whole = [Region(name, 0, size) for name, size in genome.lengths.items()]
    if config.valid_chromosomes:
        held_out = {
            "eval": [_known(genome, name, "data.valid_chromosomes") for name in config.valid_chromosomes],
            "test": [_known(genome, name, "data.test_chromosomes") for name in config.test_chromosomes],
        }
        places = split_by_chromosome(whole, {name: found for name, found in held_out.items() if found})
        rows = {name: [whole[i] for i in found] for name, found in places.items()}
        if not rows["train"]:
            raise UserError(f"{genome.path}: every record is held out; nothing is left to learn from")
        said = ", ".join(f"{name} {', '.join(found[:3])}" for name, found in held_out.items() if found)
        return GenomeSplit(rows, rows, f"chromosomes held out: {said}")
    rows = _drawn(genome, config)
    said = f"{config.val_fraction:.0%} + {config.test_fraction:.0%} of it in stretches, seed {config.split_seed}"
    return GenomeSplit(rows, rows, f"held out: {said}")


def write_split_bed(target: Path, genome: Genome, rows: Mapping[str, Sequence[Region]]) -> Path:
    """Write the intervals of all sets, with hashes, as BED; returns `target`."""
    hashed = sum(len(region) for found in rows.values() for region in found) <= HASH_LIMIT_BYTES
    lines = ["# chromosome\tstart\tend\tsplit\tSHA-256 of the letters\n"]
    for name, found in rows.items():
        for region in found:
            digest = _sha256(genome, region) if hashed else "."
            lines.append(f"{region.name}\t{region.start}\t{region.end}\t{name}\t{digest}\n")
    write_atomic(target, "".join(lines))
    return target


def count_learnt(split: Path, genome: Genome, windows: Intervals) -> int:
    """Return how many of the `windows` of a genome overlap intervals that a split.bed gives to training.

    An interval counts if the genome has its letters there; of one without a hash, if it reaches so far.
    """
    found, digests = [], []
    for line in split.read_text(encoding="utf-8", errors=NO_TEXT).splitlines():
        name, start, end, label, digest, *_ = (*line.split("\t"), *[""] * 5)
        if label == "train" and start.isdecimal() and end.isdecimal() and int(end) <= genome.lengths.get(name, 0):
            found.append(Region(name, int(start), int(end)))
            digests.append(digest)
    near = Intervals.of(found).count_overlaps(windows) > 0  # of the others no letters are read
    learnt = [
        region
        for region, digest, is_near in zip(found, digests, near, strict=True)
        if is_near and (digest == "." or digest == _sha256(genome, region))
    ]
    return int((windows.count_overlaps(Intervals.of(learnt).merge()) > 0).sum())


def _read(bed: Path, genome: Genome) -> dict[str, list[Region]]:
    rows: dict[str, list[Region]] = {"train": [], "eval": [], "test": []}
    for row in read_bed(bed, genome=genome):
        label = row.label.strip().lower()
        if label not in SETS:
            said = f"split {row.label!r} in column 4{suggest(label, SETS)}" if label else "no column 4, the split"
            raise UserError(f"{row.where}: {said}; expected train, valid or test")
        if not len(row.region):
            raise UserError(f"{row.where}: an empty interval, from {row.region.start} to there; take it out")
        rows[SETS[label]].append(Region(row.region.name, row.region.start, row.region.end))
    if not rows["train"] or not (rows["eval"] or rows["test"]):
        have = ", ".join(name for name, found in rows.items() if found)
        raise UserError(f"{bed}: column 4 has only {have}; expected train and valid (and test)")
    if not rows["eval"]:
        rows["eval"] = rows.pop("test")
    return {name: found for name, found in rows.items() if found}


def _known(genome: Genome, name: str, key: str) -> str:
    try:
        return genome.resolve(name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _widened(region: Region, length: int, genome: Genome) -> Region:
    """Return an interval of at least `length` bases, as far as its chromosome has them."""
    whole = genome.lengths[region.name]
    size = min(max(length, len(region)), whole)
    if size == len(region):
        return region
    start = min(max((region.start + region.end - size) // 2, 0), whole - size)
    return Region(region.name, start, start + size)


def _drawn(genome: Genome, config: DnaLmDataConfig) -> dict[str, list[Region]]:
    total = sum(genome.lengths.values())
    size = max(min(max(min(STRETCH, total // STRETCHES), LEAST_WINDOWS * config.length), total // LEAST), 1)
    stretches = [region for name in genome for region in _stretches(name, genome.lengths[name], size)]
    order = torch.randperm(len(stretches), generator=torch.Generator().manual_seed(config.split_seed)).tolist()
    shares = {"eval": config.val_fraction, "test": config.test_fraction}
    sets = ["train"] * len(stretches)
    for name, share in shares.items():
        taken = 0
        while share and taken < share * total and order:
            at = order.pop()
            sets[at] = name
            taken += len(stretches[at])
    if (size < config.length and len(genome) < LEAST) or not order:
        raise UserError(
            f"{genome.path}: {total:,} bases are too few to hold stretches out for windows of {config.length:,}; set "
            "data.length smaller, or hold out whole records: data.valid_chromosomes"
        )
    named = {name: [r for r, own in zip(stretches, sets, strict=True) if own == name] for name in ("train", *shares)}
    return {name: list(_joined(found)) for name, found in named.items() if found}


def _stretches(name: str, length: int, size: int) -> list[Region]:
    bounds = np.linspace(0, length, max(round(length / size), 1) + 1).astype(np.int64).tolist()
    return [Region(name, a, b) for a, b in pairwise(bounds)]


def _joined(regions: Iterable[Region]) -> Iterable[Region]:
    """Yield neighbours that touch as one."""
    last: Region | None = None
    for region in regions:
        if last is not None and last.name == region.name and last.end == region.start:
            last = Region(last.name, last.start, region.end)
            continue
        if last is not None:
            yield last
        last = region
    if last is not None:
        yield last


def _sha256(genome: Genome, region: Region, step: int = 1 << 24) -> str:
    digest = hashlib.sha256()
    for start in range(region.start, region.end, step):
        digest.update(genome.fetch(region.name, start, min(start + step, region.end)))
    return digest.hexdigest()
