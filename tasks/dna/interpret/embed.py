"""`mambaverse embed RUN FILE... --out x.npz`: the tokens of a model as features of sequences, or of their bases.

    pool    of a sequence of L bases                                  with both strands
    mean    mean over its bases, (D,)                                 mean of both strands' means
    last    the token of its last base, (D,)                          and of the last one of the other strand
    cls     the token behind the last, of models with pool="cls"      mean of both
    base    each base, (L, D)                                         mean of a base and its partner

`layer` 0 is what enters the first block, i the sum of residuals behind block i, and the last one, by default, what is
behind the last norm too. Sequences longer than `window` are read in windows one behind the other, each by itself; the
mean is then that of all bases, cls that of the windows' tokens. A token of several bases (`stem_stride`) stands for
each of them. Models that read both strands (Caduceus-PS) give D channels as others do: the mean of both, the same for
either strand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from mambaverse.blocks import Sum
from mambaverse.config import RunConfig
from mambaverse.engine.files import output_path
from mambaverse.engine.inputs import REMEDY, BadInputError, Skips, check_inputs
from mambaverse.engine.progress import Counter, Screen
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.files import read_records, sequence_files
from mambaverse.tasks.dna.interpret.store import FORMATS, open_store
from mambaverse.tasks.dna.reader import Reader, check_range, open_reader
from mambaverse.tasks.dna.strands import complement, reverse
from mambaverse.tasks.dna.tokens import PAD
from mambaverse.tasks.dna.variants.table import refuse_finished

POOLS = ("mean", "last", "cls", "base")
BUFFER_BASES = 1 << 18  # of sequences that are sorted by length together, so that a pass has little padding
Named = tuple[str, np.ndarray]


class Embedder:
    """Embeds sequences.

    Args:
        reader: The model.
        pool: "mean", "last", "cls" or "base".
        layer: Number of blocks that the tokens have passed; None: all, and the last norm.
        window: Longest part of a sequence that is read at a time; None: whole sequences.

    Attributes:
        dim: D.

    Raises:
        UserError: an ensemble, an unknown pool or layer, "cls" of a model without such a token.
    """

    def __init__(self, reader: Reader, pool: str = "mean", layer: int | None = None, window: int | None = None) -> None:
        model = reader.first
        if not reader.single:
            raise UserError("embed: an ensemble has no embedding of its own; train with model.members=1")
        if pool not in POOLS:
            raise UserError(f"--pool: unknown {pool!r}{suggest(pool, POOLS)}")
        if pool == "cls" and model.cls_token is None:
            raise UserError("--pool cls: this model has no cls token (pool='cls'); use mean, last or base")
        if layer is not None and not 0 <= layer <= model.depth:
            raise UserError(f"--layer {layer}: the model has {model.depth} blocks; expected 0 to {model.depth}")
        self.reader, self.pool, self.window, self.dim = reader, pool, window, model.dim
        self.layer = model.depth if layer is None else layer
        self._model = model if self.layer == model.depth else up_to(model, self.layer)
        self._twice = reader.both or model.both_strands

    @torch.no_grad()
    def __call__(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the embedding of each sequence of ids (L,): float32 (D,), or (L, D) with "base"."""
        step = self.window
        parts = [(i, ids[at : at + (step or len(ids))]) for i, ids in enumerate(sequences) for at in _starts(ids, step)]
        found: list[np.ndarray] = [np.empty(0)] * len(parts)
        order = sorted(range(len(parts)), key=lambda n: len(parts[n][1]))
        while order:
            longest = len(parts[order[-1]][1])
            rows = [order.pop() for _ in range(min(self.reader.rows(longest), len(order)))]
            for row, value in zip(rows, self._pass([parts[row][1] for row in rows]), strict=True):
                found[row] = value
        mine: list[list[int]] = [[] for _ in sequences]
        for number, (i, _) in enumerate(parts):
            mine[i].append(number)
        return [self._joined([(parts[n][1], found[n]) for n in numbers]) for numbers in mine]

    def _pass(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return (strands, D) of each part of a sequence, or (bases, D) with "base"."""
        model, device = self._model, self.reader.device
        sizes = torch.tensor([len(part) for part in parts], device=device)
        padded = nn.utils.rnn.pad_sequence([torch.from_numpy(part.copy()) for part in parts], True, PAD)
        ids = padded.to(device).long()
        lengths = None if bool((sizes == ids.shape[1]).all()) else sizes
        strands = [ids, reverse(complement(ids), lengths)] if self._twice else [ids]
        several = None if lengths is None else lengths.repeat(len(strands))
        with self.reader.autocast():
            hidden, counts = model._tokens(torch.cat(strands), several)
        self.reader.windows_read += len(parts)
        hidden = hidden.float()
        if counts is None:
            counts = torch.full((len(hidden),), hidden.shape[1], device=device)
        cls = 0 if model.cls_token is None else 1
        at = torch.arange(len(hidden), device=device)
        if self.pool in ("cls", "last"):
            pooled = hidden[at, counts - (1 if self.pool == "cls" else 1 + cls)]
            return list(pooled.unflatten(0, (len(strands), -1)).transpose(0, 1).cpu().numpy())
        bases = hidden.repeat_interleave(model.stride, 1)[:, : ids.shape[1]]
        inside = torch.arange(ids.shape[1], device=device) < sizes.repeat(len(strands))[:, None]
        bases = torch.where(inside[..., None], bases, 0.0)  # a cls token stands behind the last base
        if self.pool == "mean":
            means = bases.sum(1) / sizes.repeat(len(strands))[:, None]
            return list(means.unflatten(0, (len(strands), -1)).transpose(0, 1).cpu().numpy())
        here = bases[: len(parts)]
        if self._twice:
            here = (here + reverse(bases[len(parts) :], lengths)) / 2
        return [row[:size] for row, size in zip(here.cpu().numpy(), sizes.tolist(), strict=True)]

    def _joined(self, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Return the embedding of a sequence from those of its windows, one behind the other."""
        values = [value for _, value in parts]
        if self.pool == "base":
            return np.concatenate(values)
        if self.pool == "last":  # the other strand ends where the sequence begins
            return np.stack([values[-1][0], *values[0][1:]]).mean(0)
        weights = [len(ids) for ids, _ in parts]
        return np.average(np.stack([value.mean(0) for value in values]), axis=0, weights=weights).astype(np.float32)


def up_to(model: DnaModel, layer: int) -> DnaModel:
    """Return a view of a model that ends behind so many blocks, without the last norm; its weights are shared."""
    part = copy.copy(model)
    part._modules = dict(model._modules)
    part.layers, part.norm_f, part.depth = model.layers[:layer], Sum(), layer
    return part


def embed_run(
    path: Path,
    inputs: Sequence[str],
    *,
    out: Path,
    pool: str = "mean",
    layer: int | None = None,
    window: int | None = None,
    strands: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    on_error: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> int:
    """Write the embeddings of all records of sequence files; prints and returns how many there are.

    Args:
        path: A run folder; its data set is not needed.
        inputs: FASTA files and tables, or folders of them.
        out: .npz or .parquet (see store.py).
        pool: "mean", "last", "cls" or "base".
        layer: Number of blocks; None: all, and the last norm.
        window: Longest part that is read at a time; None: the run's data.window, whole sequences where it has none.
        strands: "one" or "both"; None: as the run evaluates.
        batch_size: Sequences of one pass; None: see `Reader`.
        device: auto, cpu or cuda; None: as the run says.
        precision: fp32, bf16 or fp16; None: as the run says.
        on_error: "raise" stops at a bad record, "skip" leaves it out with a word; None: the run's data.on_error.
        overwrite: Replace a finished file.
        console: Where to print; None: stdout.

    Raises:
        UserError: not a run of a DNA model, an option that it has not, a bad record, a file that is there already.
    """
    check_inputs(inputs)
    check_range("--window", window, 1)
    output_path("--out", out, FORMATS)
    refuse_finished(out, overwrite)
    console = console or Screen()
    opening = open_reader(path, strands=strands, batch_size=batch_size, device=device, precision=precision)
    with opening as (config, _, reader):
        window = window or getattr(config.data, "window", None)
        if window is not None:
            reader.check_length(window, "--window")
        embedder = Embedder(reader, pool, layer, window)
        skips, counter = Skips(on_error, config), Counter(Screen(stderr=True), "embedded")
        about = {"run": path.name, "pool": pool, "layer": embedder.layer, "strands": reader.strands, "window": window}
        with open_store(out, embedder.dim, pool == "base", about) as store:
            records = counter.watch(_records(inputs, config, skips.on_bad))
            for some in _buffers(records):
                ids = [record for _, record in some]
                store.write([name for name, _ in some], [len(one) for one in ids], embedder(ids))
            if not counter.done:
                raise UserError("embed: no record is left to embed")
    said = f"{out}: {counter.done:,} sequences, {pool} of layer {embedder.layer}, {embedder.dim} numbers"
    console.print(f"{said}, strands={reader.strands}", highlight=False, soft_wrap=True)
    skips.report(counter.done)
    return counter.done


def _records(inputs: Sequence[str], config: RunConfig, on_bad: Callable[[UserError], None] | None) -> Iterator[Named]:
    """Yield (name, ids) of all records; what is wrong with one goes to `on_bad`, or is raised where that is None."""

    def bad(error: UserError) -> None:
        if on_bad is None:
            raise BadInputError(f"{error}; {REMEDY}") from None
        on_bad(error)

    data: Any = config.data
    letters = {key: getattr(data, key) for key in ("strict", "rna", "max_unknown") if hasattr(data, key)}
    column = getattr(data, "sequence", "sequence")
    for given in map(Path, inputs):
        files = sequence_files(given)
        if not files:
            bad(UserError(f"{given}: a folder without sequence files (.fa, .fasta, .fna, .csv)"))
        for file in files:
            records = read_records(file, column, keys={column: "data.sequence"})
            while True:
                try:
                    if (record := next(records, None)) is None:
                        break
                    ids = record.ids(**letters)
                except UserError as error:
                    bad(error)
                    continue
                yield record.name, ids


def _buffers(records: Iterator[Named]) -> Iterator[list[Named]]:
    """Yield records in lists of `BUFFER_BASES` bases, or a little more."""
    kept: list[Named] = []
    bases = 0
    for record in records:
        kept.append(record)
        bases += len(record[1])
        if bases >= BUFFER_BASES:
            yield kept
            kept, bases = [], 0
    if kept:
        yield kept


def _starts(ids: np.ndarray, window: int | None) -> range:
    """Return where the windows of a sequence begin."""
    return range(0, len(ids), window or len(ids))
