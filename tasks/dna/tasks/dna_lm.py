"""Pretraining on a genome: masked bases or the next base, by any DNA model whose head gives logits of each base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

from mambaverse.config import ConfigError, RunConfig
from mambaverse.engine.build import DECIDED, build_model
from mambaverse.engine.task import Batch, NoLabelsError, Sample, SampleSet, Task, register_task
from mambaverse.errors import UserError
from mambaverse.tasks.dna.checkpoints import start_from
from mambaverse.tasks.dna.genome import Region
from mambaverse.tasks.dna.genome.intervals import Intervals
from mambaverse.tasks.dna.pretraining.config import OBJECTIVES, DnaLmDataConfig, DnaLmTaskConfig
from mambaverse.tasks.dna.pretraining.corpus import Corpus, corpus_named
from mambaverse.tasks.dna.pretraining.masking import next_bases
from mambaverse.tasks.dna.pretraining.samples import GenomeSamples
from mambaverse.tasks.dna.pretraining.scoring import score_bases
from mambaverse.tasks.dna.pretraining.splits import count_learnt, write_split_bed
from mambaverse.tasks.dna.pretraining.windows import Windows, known_windows
from mambaverse.tasks.dna.sequences import padded
from mambaverse.tasks.dna.strands import reads_both, reverse
from mambaverse.tasks.dna.tokens import COMPLEMENT, PAD, VOCAB_SIZE

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

OTHER_STRAND = 0.5  # of the windows of training, for models that read one
NO_LABELS = (
    "a language model says no labels; `mambaverse eval` scores it, model.checkpoint= starts a classifier from it"
)


@register_task("dna_lm")
class DnaLmTask(Task):
    """A language model of DNA: a batch holds "ids" (B, L), and "lengths" (B,) if they differ."""

    data_config = DnaLmDataConfig
    task_config = DnaLmTaskConfig
    monitor = "perplexity"
    monitor_mode = "min"
    decided: ClassVar[Mapping[str, str]] = {
        **DECIDED,
        "head": "set task.objective",
        "num_classes": f"a language model has the {VOCAB_SIZE} ids of the vocabulary",
        "max_length": "set data.length",
    }

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert isinstance(config.data, DnaLmDataConfig) and isinstance(config.task, DnaLmTaskConfig)
        self.data, self.options = config.data, config.task
        self._corpus: Corpus | None = None
        self._left_out = 0
        self._reads_both = False
        self._complement = torch.from_numpy(COMPLEMENT.copy()).long()
        if config.model.members > 1:
            raise ConfigError("model.members: a language model is one model; set it to 1")

    def setup(self) -> None:
        """Open the genome, split it, and count the windows."""
        corpus = corpus_named(self.data.name).open(self.data)
        self._corpus, self._left_out = corpus, 0
        regions = corpus.split.regions
        self.train_set = self._samples("train", regions["train"], self.data.epoch_windows)
        self.eval_set = self._samples("eval", regions["eval"])
        self.test_set = self._samples("test", regions["test"]) if "test" in regions else None

    def facts(self) -> dict[str, Any]:
        """Return what was predicted, and the length of the windows."""
        return {"classes": [], "objective": self.options.objective, "length": self.data.length}

    def save_split(self, folder: Path) -> Path | None:
        """Write the intervals of each set to split.bed, with the hashes of their letters."""
        assert self._corpus is not None
        return write_split_bed(folder / "split.bed", self._corpus.genome, self._corpus.split.rows)

    def count_learnt(self, split: Path) -> int:
        """Return how many windows of the reported set overlap what a split.bed gives to training."""
        samples = genome_samples(self.reported_set)
        tiles = (samples.windows.tile(int(number)) for number in samples.kept)
        return count_learnt(split, samples.genome, Intervals.of(tiles))

    def build_model(self) -> nn.Module:
        """Return the model with the head of the objective."""
        objective = self.options.objective
        arguments = {"head": OBJECTIVES[objective], "max_length": self.data.length}
        try:
            model = build_model(self.config.model, arguments, self.decided)
        except UserError as error:
            raise type(error)(f"task.objective={objective}, model.name={self.config.model.name}: {error}") from None
        self._reads_both = reads_both(model)
        if isinstance(samples := getattr(self, "train_set", None), GenomeSamples):
            samples.other_strand = self._other_strand
        return model

    def load_checkpoint(self, model: nn.Module, path: Path) -> None:
        """Start `model` from a weights file of ours, of Caduceus or of Mamba."""
        start_from(model, path)

    def collate(self, samples: Sequence[Sample], generator: Generator | None) -> Batch:
        """Return "ids" uint8 (R, L), R >= B windows, and "lengths" (R,) if they differ.

        With mlm also "target" uint8 (R, L), and where soft-masked bases count otherwise "weight" float32 (R, L).
        """
        rows = {key: [row for sample in samples for row in sample[key]] for key in samples[0]}
        batch: dict[str, Any] = {}
        for key, parts in rows.items():
            batch[key], lengths = padded(parts, 0 if key == "weight" else PAD)
            if lengths is not None:
                batch["lengths"] = lengths
        return batch

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (R, L, 16)."""
        return model(batch["ids"], lengths=batch.get("lengths"))

    def step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the mean loss of the scored bases and, as "output", the sums of each window, (R, 5) (see metrics.py).

        In evaluation with data.strands=both: of mlm the logits of both strands are averaged; next bases are predicted
        on each strand, and both counted.
        """
        logits, lengths = self.forward(model, batch), batch.get("lengths")
        weights = batch.get("weight")
        both = self.data.strands == "both" and not model.training and not reads_both(model)
        other = reverse(self._complement.to(logits.device)[batch["ids"].long()], lengths) if both else None
        if self.options.objective == "mlm":
            if other is not None:
                there = reverse(model(other, lengths=lengths), lengths)
                logits = (logits + there[..., self._complement.to(logits.device)]) / 2
            rows, (total, count) = score_bases(logits, batch["target"], weights)
        else:
            rows, (total, count) = self._next(logits, batch["ids"], weights)
            if other is not None:
                turned = None if weights is None else reverse(weights, lengths)
                more, (also, beside) = self._next(model(other, lengths=lengths), other, turned)
                rows, total, count = rows + more, total + also, count + beside
        return {"loss": total / count.clamp(min=torch.finfo(count.dtype).tiny), "output": rows}

    def targets(self, batch: Batch) -> Tensor:
        """Return the lengths (B,) of the windows: outputs are compared with their targets in `step`."""
        ids = batch["ids"]
        return batch.get("lengths", torch.full((len(ids),), ids.shape[1], device=ids.device))

    def metrics(self) -> MetricCollection:
        """Return loss, perplexity and accuracy, means over all scored bases.

        Raises:
            UserError: a set that is evaluated has none.
        """
        for name in ("eval_set", "test_set"):
            samples = getattr(self, name, None)
            if isinstance(samples, GenomeSamples) and not samples.asks:
                rate, weight = self.options.mask_rate, self.options.soft_mask_weight
                raise UserError(
                    f"{samples.genome.path}: no base of the {name.removesuffix('_set')} set is scored, in "
                    f"{len(samples):,} windows of {self.data.length:,} bases (task.mask_rate={rate:g}, "
                    f"task.soft_mask_weight={weight:g}); hold out others, or more"
                )
        from mambaverse.tasks.dna.pretraining.metrics import language_metrics

        return language_metrics()

    def update(self, metrics: MetricCollection, output: Tensor, batch: Batch) -> None:
        """Add the sums of a batch."""
        metrics.update(output)

    def describe(self) -> dict[str, str]:
        """Return what the head of a run says of genome, split, windows, objective and augmentation."""
        assert self._corpus is not None
        data, options, genome = self.data, self.options, self._corpus.genome
        sizes = [f"{len(part):,}" for part in (self.train_set, self.eval_set, self.test_set) if part is not None]
        bases = sum(genome.lengths.values())
        windows = f"{' + '.join(sizes)} windows of {data.length:,} bases"
        if self._left_out:
            windows += f"; {self._left_out:,} with more than {data.max_unknown:.0%} N left out"
        tokens, epoch = data.batch_size * data.length, len(self.train_set) * data.length
        asked = f"masked bases, {options.mask_rate:.0%}" if options.objective == "mlm" else "the next base"
        notes = {
            "masked as Caduceus does": options.caduceus_compat,
            f"soft-masked bases count {options.soft_mask_weight:g}": options.soft_mask_weight != 1,
        }
        described = {
            "genome": f"{genome.path}, {len(genome):,} records of {bases:,} bases; {self._corpus.split.note}",
            "windows": windows,
            "tokens": f"{tokens:,} a batch, {epoch:,} an epoch, {epoch * self.config.trainer.epochs:,} in all",
            "objective": ", ".join([asked, *(text for text, holds in notes.items() if holds)]),
            "augmentation": ", ".join(self._augmentation()) or "none",
        }
        if data.length_warmup is not None:
            every = f"{data.length_warmup_epochs} epoch{'s' if data.length_warmup_epochs > 1 else ''}"
            described["length warm-up"] = (
                f"windows of {data.length_warmup:,} bases, {data.pieces(0)} for one, twice as long every {every}"
            )
            if (pieces := data.pieces(self.config.trainer.epochs - 1)) > 1:
                described["length warm-up"] += f"; {data.length // pieces:,} in the last epoch, never {data.length:,}"
        if data.strands == "both":
            described["evaluation"] = "on both strands"
        if caveat := self.caveat():
            described["overlaps"] = caveat.removeprefix("overlaps: ")
        return described

    def caveat(self) -> str:
        """Return how many held-out intervals overlap training ones, if any do."""
        if self._corpus is None:
            return ""
        split = self._corpus.split
        found = [f"{n:,} of {len(split.regions[name]):,} {name} intervals" for name, n in split.shared().items() if n]
        return f"overlaps: {' and '.join(found)} overlap training intervals" if found else ""

    def load_inputs(self, paths: Sequence[str]) -> Iterable[tuple[str, Callable[[], Sample]]]:
        """Raise NoLabelsError: there are none to predict."""
        raise NoLabelsError(f"predict: {NO_LABELS}")

    @property
    def _other_strand(self) -> float:
        if self._reads_both:
            return 0.0
        given = self.data.reverse_complement
        return OTHER_STRAND if given is None else given

    def _augmentation(self) -> list[str]:
        moved = ["windows anywhere in their part of an interval"] if self.data.random_windows else []
        if self._reads_both:
            return [*moved, "both strands in the model"]
        return [*moved, f"other strand {self._other_strand:g}"] if self._other_strand else moved

    def _samples(self, name: str, regions: Sequence[Region], size: int | None = None) -> GenomeSamples:
        assert self._corpus is not None
        data, genome = self.data, self._corpus.genome
        windows = Windows(regions, data.length)
        kept = np.arange(len(windows))
        if data.max_unknown < 1:
            kept = known_windows(genome, windows, data.max_unknown)
        self._left_out += len(windows) - len(kept)
        if not len(kept):
            raise UserError(
                f"{genome.path}: no window of the {name} set has at most {data.max_unknown:.0%} N (data.max_unknown)"
            )
        if name != "train" and data.eval_windows is not None and data.eval_windows < len(kept):
            kept = kept[np.linspace(0, len(kept) - 1, data.eval_windows).round().astype(np.int64)]
        return GenomeSamples(genome, windows, kept, data, self.options, len(kept) if size is None else size)

    def _next(self, logits: Tensor, ids: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Score the next base at each place of ids (R, L); a weight is that of the base that is predicted."""
        moved = None if weights is None else torch.cat([weights[:, 1:], torch.zeros_like(weights[:, :1])], dim=1)
        return score_bases(logits, next_bases(ids), moved)


def genome_samples(samples: SampleSet) -> GenomeSamples:
    """Return a set of this task, typed."""
    assert isinstance(samples, GenomeSamples)
    return samples
