"""`mambaverse score RUN --vcf calls.vcf.gz --fasta genome.fa`: a table of what a model says of each variant.

    chrom <tab> pos <tab> id <tab> ref <tab> alt <tab> SCORES... <tab> n_share <tab> flags

One row an alternative allele, in the order of the file, chromosomes as the file calls them. What cannot be scored is
counted and written to the table beside it, scores.skipped.tsv.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console

from mambaverse.engine.files import output_path, saving
from mambaverse.engine.folder import RunFolder
from mambaverse.engine.inputs import Skips
from mambaverse.engine.progress import Counter, Screen
from mambaverse.engine.resumable import tells_how_to_go_on
from mambaverse.errors import warn
from mambaverse.tasks.dna.files import check_file
from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.genome.skipped import RecordError, Skipped
from mambaverse.tasks.dna.genome.vcf import read_vcf
from mambaverse.tasks.dna.reader import check_range, open_reader
from mambaverse.tasks.dna.variants.scores import VariantScorer
from mambaverse.tasks.dna.variants.table import ResumableTable, fingerprint
from mambaverse.tasks.dna.variants.windows import Pair, place

WINDOW = 1024  # bases, where none are given
LEAST_WINDOW = 16
FIRST = ("chrom", "pos", "id", "ref", "alt")
LAST = ("n_share", "flags")
RULES = 3  # of what is left out; a job goes on only by those that it began with


def score_run(
    path: Path,
    vcf: Path,
    fasta: Path,
    *,
    out: Path = Path("scores.tsv"),
    window: int = WINDOW,
    scores: Sequence[str] | None = None,
    strands: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    on_error: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> int:
    """Score the variants of a file; prints what came of it and returns the number of rows.

    Args:
        path: A run folder; its data set is not needed.
        vcf: The variants.
        fasta: Their genome.
        out: The table; a job that was cut off goes on with it.
        window: W, bases of the windows (see windows.py).
        scores: Of "llr", "delta" and "embedding"; None: all that the model has.
        strands: "one" or "both"; None: as the run evaluates.
        batch_size: Windows of one pass; None: see `Reader`.
        device: auto, cpu or cuda; None: as the run says.
        precision: fp32, bf16 or fp16; None: as the run says.
        on_error: "raise" stops at a record that cannot be used, "skip" leaves it out; None: the run's data.on_error.
        overwrite: Replace a finished table.
        console: Where to print; None: stdout.

    Raises:
        UserError: not a run of a DNA model, a score that it has not, a file that cannot be read or written.
        RecordError: with "raise", a record that cannot be used; the rows before it are kept for when the job goes on.
    """
    check_range("--window", window, LEAST_WINDOW)
    output_path("--out", out, (".tsv", ".txt") if out.suffix else (), (vcf, fasta))
    console = console or Screen()
    opening = open_reader(path, strands=strands, batch_size=batch_size, device=device, precision=precision)
    with opening as (config, _, reader), Genome(fasta) as genome:
        reader.check_window(window, "--window")
        scorer = VariantScorer(reader, scores)
        if scorer.note:
            warn(scorer.note)
        about = {
            "run": fingerprint(RunFolder(path).weights(config)), "vcf": _print_of(vcf), "fasta": fingerprint(fasta),
            "rules": RULES, "window": window, "strands": reader.strands, "precision": config.trainer.precision,
        }  # fmt: skip
        beside = out.with_name(out.name.removesuffix(".tsv") + ".skipped.tsv")
        counter, flags = Counter(Screen(stderr=True), "scored"), collections.Counter[str]()
        columns = (*FIRST, *scorer.columns, *LAST)
        skip = Skips(on_error, config).policy == "skip"
        table = ResumableTable(out, columns, about, overwrite=overwrite)
        with tells_how_to_go_on(out, overwrite=overwrite), Skipped(beside) as skipped, table:
            if table.rows:
                console.print(f"{out}: goes on behind {table.rows:,} rows", highlight=False, soft_wrap=True)
            every = _pairs(vcf, genome, window, reader.shortest, skip, skipped, flags)
            pairs = counter.watch(islice(every, table.rows, None))
            while some := list(islice(pairs, reader.rows(window))):
                numbers = scorer(some)
                table.write([_row(pair, row) for pair, row in zip(some, numbers.tolist(), strict=True)])
    if not skipped:  # what an earlier job skipped stays until this one is done
        with saving(beside):
            beside.unlink(missing_ok=True)
    said = f"{out}: {table.rows:,} variants, {', '.join(scorer.columns)}, windows of {window:,} bases"
    console.print(f"{said}, strands={reader.strands}", highlight=False, soft_wrap=True)
    if rich := flags["n_rich"]:
        console.print(f"{rich:,} of them in windows with many N (flag n_rich)", highlight=False)
    if skipped:
        console.print(skipped.summary(), highlight=False, soft_wrap=True)
    return table.rows


def _pairs(
    vcf: Path,
    genome: Genome,
    window: int,
    shortest: int,
    skip: bool,
    skipped: Skipped,
    flags: collections.Counter[str],
) -> Iterator[Pair]:
    """Yield what can be scored, and count its flags; the rest is counted, or raised where `skip` is not set."""
    for variant in read_vcf(vcf, genome=genome, on_error="skip" if skip else "raise", skipped=skipped):
        try:
            pair = place(variant, genome, window)
            if (bases := pair.window[2]) < shortest:
                reason = f"{bases:,} bases; places count in this model: expected {shortest:,} at least"
                raise RecordError("windows too short", variant.where, reason)
        except RecordError as error:
            if not skip:
                raise RecordError(error.kind, error.where, f"{error.reason}; --on-error skip goes on") from None
            skipped.add(error.kind, error.where, error.reason)
            continue
        flags.update(pair.flags)
        yield pair


def _row(pair: Pair, numbers: Sequence[float]) -> list[str]:
    variant = pair.variant
    first = (variant.chrom or variant.name, str(variant.pos), variant.id, variant.ref, variant.alt)
    return [*first, *(f"{x + 0.0:.6g}" for x in numbers), f"{pair.n_share:.4g}", ",".join(pair.flags) or "."]


def _print_of(vcf: Path) -> list[object]:
    check_file(vcf, "a VCF file")
    return fingerprint(vcf)
