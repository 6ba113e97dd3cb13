"""DNA classification: cross-entropy over sequences of any length, of any data set "dna/..."."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

from mambaverse.config import ConfigError, RunConfig
from mambaverse.datasets import get_dataset
from mambaverse.engine.audit import Audit
from mambaverse.engine.classifier import Classifier
from mambaverse.engine.task import Batch, Sample, SampleSet, fact, register_task
from mambaverse.ensemble import members_of
from mambaverse.errors import UserError, suggest, warn
from mambaverse.splits import write_digests, write_split
from mambaverse.tasks.dna.backbone import reverse
from mambaverse.tasks.dna.checkpoints import start_from
from mambaverse.tasks.dna.config import DnaDataConfig, DnaTaskConfig
from mambaverse.tasks.dna.figures import explained_record, read_sheet, saliency_sheet
from mambaverse.tasks.dna.files import Record, read_records, sequence_files
from mambaverse.tasks.dna.floors import floors
from mambaverse.tasks.dna.pretraining.corpus import GenomeDataset
from mambaverse.tasks.dna.sequences import Augment, DnaSamples, Sequences, mix, padded, tiles
from mambaverse.tasks.dna.strands import reads_both
from mambaverse.tasks.dna.tables import DnaSplits
from mambaverse.tasks.dna.tokens import COMPLEMENT, PAD

AUDITED, AUDITED_BASES = 50_000, 50_000_000  # up to so many sequences and bases a run is audited as it begins: seconds
TILES = 1024  # windows of long records that are scored at a time in predict


@register_task("dna")
class DnaTask(Classifier):
    """DNA classification, by any model that takes ids (B, L) and lengths (B,)."""

    data_config = DnaDataConfig
    task_config = DnaTaskConfig
    scores = ("accuracy", "macro_f1", "f1", "mcc", "top5")
    decided: ClassVar[Mapping[str, str]] = {**Classifier.decided, "max_length": "set data.window"}

    longest: int  # bases that the model sees of a sequence, at most
    shortest: int  # and at least, in training

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert isinstance(config.data, DnaDataConfig) and isinstance(config.task, DnaTaskConfig)
        self.data, self.options = config.data, config.task
        self._splits: DnaSplits | None = None
        self._complement = torch.from_numpy(COMPLEMENT.copy())
        self._told = False
        self._caveat: str | None = None

    def setup(self) -> None:
        """Open the data set."""
        data = self.data
        dataset = get_dataset(data.name, "dna")
        if isinstance(dataset, GenomeDataset):
            raise ConfigError(f"data.name={data.name}: a genome without labels, to pretrain on: dna/pretrain_mlm")
        splits: DnaSplits = dataset.open(data)
        lengths = np.concatenate([part.lengths() for part in (splits.train, splits.eval, splits.test) if part])
        limit = int(lengths.max()) if data.window is None else data.window
        self.longest, self.shortest = (min(limit, int(size)) for size in (lengths.max(), lengths.min()))
        if data.shift >= self.shortest:
            raise ConfigError(f"data.shift: {data.shift} is too much for sequences of {self.shortest} bases")
        augment = Augment(data.other_strand, data.shift, data.mutate, data.mask, data.random_windows)
        if data.fresh and splits.background is None:
            raise ConfigError(f"data.fresh={data.fresh:g}: {data.name} has no source of more sequences; set it to 0")
        make = partial(DnaSamples, window=data.window, window_seed=data.window_seed)
        more: dict[str, Any] = {"background": splits.background, "fresh": data.fresh}
        self.train_set, self.eval_set = make(splits.train, augment=augment, **more), make(splits.eval)
        self.test_set = None if splits.test is None else make(splits.test)
        self.classes, self._splits, self.skipped = list(splits.classes), splits, len(splits.skipped)
        self._caveat = None
        self.monitor = splits.monitor or type(self).monitor

    def facts(self) -> dict[str, Any]:
        """Return the classes and the range of lengths."""
        return {"classes": list(self.classes), "longest": self.longest, "shortest": self.shortest}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take them over from a run."""
        super().restore(facts)
        self.longest, self.shortest = fact(facts, "longest", int), fact(facts, "shortest", int)

    def save_split(self, folder: Path) -> Path | None:
        """Write which sequence is in which set to split.csv, or, if the data come split, a hash of each to sets.csv."""
        if self._splits is None:
            return None
        if not self._splits.drawn:
            return write_digests(folder / "sets.csv", self._splits.rows())
        return write_split(folder / "split.csv", self._splits.rows())

    def model_arguments(self) -> dict[str, Any]:
        """Return the number of classes and the longest sequence."""
        return super().model_arguments() | {"max_length": self.longest}

    def load_checkpoint(self, model: nn.Module, path: Path) -> None:
        """Start `model` from a weights file of ours, of Caduceus or of Mamba; a head for other classes starts anew."""
        self.load_for_classes(model, path, start_from, ("score", "wide"))

    def collate(self, samples: Sequence[Sample], generator: Generator | None) -> Batch:
        """Return "ids" uint8 (B, L), "lengths" (B,) if they differ, and "target" (B,), with mixup (B, classes).

        Of records that may be longer than the model reads (see `tiles`) B counts windows, and "rows" (B,) says which
        record each is of.
        """
        ids = [sample["ids"] for sample in samples]
        batch: dict[str, Any] = {}
        if isinstance(ids[0], list):
            batch["rows"] = torch.tensor([row for row, parts in enumerate(ids) for _ in parts])
            ids = [part for parts in ids for part in parts]
        batch["ids"], lengths = padded(ids, PAD)
        if lengths is not None:
            batch["lengths"] = lengths
        if "target" in samples[0]:
            batch["target"] = torch.tensor([sample["target"] for sample in samples])
        if generator is not None and self.options.mixup:
            how = (len(self.classes), self.options.mixup, generator, self.options.label_smoothing)
            batch |= mix(batch["ids"], batch["target"], *how)
        return batch

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (B, classes); of windows of long records the mean of each record's."""
        rows = batch.get("rows")
        if rows is None:
            return self._scores(model, batch["ids"], batch.get("lengths"))
        lengths = batch.get("lengths")
        parts = [
            self._scores(model, batch["ids"][i : i + TILES], None if lengths is None else lengths[i : i + TILES])
            for i in range(0, len(rows), TILES)
        ]
        scores = torch.cat(parts).float()
        total = scores.new_zeros(int(rows[-1]) + 1, scores.shape[1]).index_add_(0, rows, scores)
        return total / rows.bincount()[:, None]

    def labels_of(self, samples: SampleSet) -> np.ndarray:
        """Return the class numbers (N,) of a set."""
        assert isinstance(samples, DnaSamples)
        return samples.sequences.labels

    def baselines(self) -> dict[str, Callable[[], np.ndarray]]:
        """Return the most frequent class, and linear and kernel SVMs, on the windows that evaluation sees."""
        train, reported = self.train_set, self.reported_set
        assert isinstance(train, DnaSamples) and isinstance(reported, DnaSamples)
        return super().baselines() | floors(train, reported)

    def audit(self, similarity: float | None = None) -> Audit:
        """Return copies, overlaps and near neighbours of training sequences in the other sets (see audit.py)."""
        from mambaverse.tasks.dna.audit import audit_sets

        assert self._splits is not None
        others = {"eval": self._splits.eval, "test": self._splits.test}
        present = {name: part for name, part in others.items() if part is not None}
        return audit_sets(self._splits.train, present, self.classes, similarity)

    def caveat(self) -> str:
        """Return what the sets share, in one line; for more than `AUDITED` sequences or their bases how to find out."""
        if self._caveat is None:
            splits = self._splits
            assert splits is not None
            parts = [part for part in (splits.train, splits.eval, splits.test) if part is not None]
            total, bases = sum(map(len, parts)), sum(len(part.data) for part in parts)
            if not self.data.audit:
                self._caveat = ""
            elif total > AUDITED or bases > AUDITED_BASES:
                many = f"{total:,} sequences of {bases:,} bases in all"
                self._caveat = f"leakage: {many} are not audited here; `mambaverse audit CONFIG` does it"
            else:
                self._caveat = f"leakage: {self.audit().line()}"
        return self._caveat

    def describe(self) -> dict[str, str]:
        """Return what the head of a run says of the sequences and of their augmentation."""
        assert self._splits is not None
        sizes = [f"{len(part):,}" for part in (self.train_set, self.eval_set, self.test_set) if part is not None]
        span = f"{self.longest}" if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        text = f"{self.data.name}, {' + '.join(sizes)} sequences of {span} bases, {len(self.classes)} classes"
        notes = [self._splits.note] if self._splits.note else []
        if self.data.window is not None and self._splits.train.lengths().max() > self.data.window:
            notes.append("random windows" if self.data.random_windows else "one window a sequence")
        described = {"data": f"{text} ({', '.join(notes)})" if notes else text}
        data = self.data
        named = {
            f"other strand {data.other_strand:g}": data.other_strand,
            f"shift {data.shift}": data.shift,
            f"mutate {data.mutate:g}": data.mutate,
            f"mask {data.mask:g}": data.mask,
            f"{data.fresh:.0%} of one class cut anew": data.fresh,
            f"mixup {self.options.mixup:g}": self.options.mixup,
            f"label smoothing {self.options.label_smoothing:g}": self.options.label_smoothing,
        }
        if parts := [text for text, used in named.items() if used]:
            described["augmentation"] = ", ".join(parts)
        if data.strands == "both":
            described["evaluation"] = "mean of the scores of both strands"
        if caveat := self.caveat():
            described["leakage"] = caveat.removeprefix("leakage: ")
        return described

    def figures(self, folder: Path, model: nn.Module, outputs: Tensor, targets: Tensor) -> list[Path]:
        """Draw sequences with what is said of them, predictions.png, and what it is said for, saliency.png."""
        samples = self.reported_set
        assert isinstance(samples, DnaSamples)
        drawn = [read_sheet(folder / "predictions.png", samples, outputs, targets, self.classes)]
        if all(_has_saliency(member) for member in members_of(model)):
            drawn.append(saliency_sheet(folder / "saliency.png", self, model, samples, outputs, targets))
        return drawn

    def explain(self, path: Path, model: nn.Module, name: str, sample: Sample) -> None:
        """Draw the bases that speak for the class as a logo."""
        if not all(_has_saliency(member) for member in members_of(model)):
            raise UserError(f"explain: {self.config.model.name} has no embedding of bases that could be looked at")
        explained_record(path, self, model, name, sample)

    def load_inputs(self, paths: Sequence[str]) -> Iterator[tuple[str, Callable[[], Sample]]]:
        """Yield a loader for each record of FASTA files and tables, and of those in folders."""
        for path in map(Path, paths):
            files = sequence_files(path)
            if not files:
                raise UserError(f"{path}: a folder without sequence files (.fa, .fasta, .fna, .csv)")
            for file in files:
                try:
                    for record in read_records(file, self.data.sequence, keys={self.data.sequence: "data.sequence"}):
                        yield record.name, partial(self._load, record)
                except UserError as error:  # raised by its loader: raised here, it would lose the files behind it
                    yield str(file), partial(_refuse, error)

    def _load(self, record: Record) -> Sample:
        ids = record.ids(strict=self.data.strict, rna=self.data.rna, max_unknown=self.data.max_unknown)
        label = record.cells.get(self.data.label or "label")
        if label is not None and label.strip() not in self.classes:
            known = suggest(label.strip(), self.classes)
            raise UserError(f"{record.where}: label {label!r} is none of the run's{known}; take the column out")
        if self._places_count() and not self.shortest <= len(ids) <= self.longest:
            expected = f"{self.shortest}" + (f" to {self.longest}" if self.shortest < self.longest else "")
            raise UserError(f"{record.where}: {len(ids):,} bases; places count in this model: expected {expected}")
        parts = tiles(ids, self.longest, self.data.max_windows)
        if len(parts) > 1 and not self._told:
            self._told = True
            warn(
                f"{record.where}: {len(ids):,} bases, the model reads {self.longest:,} at a time: the mean of the "
                f"scores of {len(parts)} windows is given, as for other long records (data.max_windows: at most)"
            )
        return {"ids": parts}

    def _places_count(self) -> bool:
        arguments = self.config.model.args
        return bool(arguments.get("position") or arguments.get("wide") or arguments.get("pool") == "place")

    def _scores(self, model: nn.Module, ids: Tensor, lengths: Tensor | None) -> Tensor:
        scores = model(ids, lengths=lengths)
        if self.data.strands == "one" or model.training or reads_both(model):
            return scores
        other = reverse(self._complement.to(ids.device)[ids.long()], lengths)
        return (scores + model(other, lengths=lengths)) / 2


def _refuse(error: UserError) -> Sample:
    raise error


def _has_saliency(model: nn.Module) -> bool:
    return hasattr(getattr(model, "embeddings", None), "word_embeddings")


def sequences_of(samples: SampleSet) -> Sequences:
    """Return the sequences behind a set of this task."""
    assert isinstance(samples, DnaSamples)
    return samples.sequences
