"""The `data` and `task` sections of a run that pretrains a language model on a genome."""

from __future__ import annotations

from dataclasses import dataclass, field

from mambaverse.config import ConfigError, DataConfig, TaskConfig
from mambaverse.errors import suggest
from mambaverse.tasks.dna.config import check_strands

OBJECTIVES = {"mlm": "mlm", "next_token": "causal_lm"}  # each with the head of the model that learns it


@dataclass
class DnaLmDataConfig(DataConfig):
    """Which genome, how it is split, and which windows of it are read."""

    genome: str | None = None  # the FASTA file (plain or BGZF), by itself or within data.root
    bed: str | None = None  # chromosome, start, end, split: the intervals of each set; None: split as below
    aliases: str | None = None  # table of chromosome names such as chromAlias.txt
    valid_chromosomes: list[str] = field(default_factory=list)  # without a BED: held out whole, to choose the weights
    test_chromosomes: list[str] = field(default_factory=list)  # likewise, to be reported
    val_fraction: float = 0.05  # without either: the share of the genome that is held out in stretches, and
    test_fraction: float = 0.05  # that of a test set; 0: none
    split_seed: int = 0  # of the draw of the stretches
    length: int = 1024  # bases of a window
    length_warmup: int | None = None  # windows begin with so many bases, as many more of them in a batch, and are twice
    length_warmup_epochs: int = 1  # as long every so many epochs, until they have data.length
    epoch_windows: int | None = None  # an epoch's windows; None: as many as tile the training intervals
    eval_windows: int | None = None  # of a set, evenly spread, that are evaluated at most; None: all that tile it
    random_windows: bool = True  # while training a window lies anywhere in its part of the interval; else on its tile
    max_unknown: float = 0.5  # windows with a larger share of N and ambiguous letters are left out, with a count
    reverse_complement: float | None = None  # probability of the other strand in training; None: 0.5 (PS models: 0)
    strands: str = "one"  # both: evaluate on both strands
    strict: bool = False  # refuse all letters but A, C, G, T, N; else ambiguous ones (R, Y, ...) are read as N
    rna: bool = False  # read U as T

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        super().__post_init__()
        for key, least in (("length", 2), ("length_warmup", 2), ("length_warmup_epochs", 1), ("epoch_windows", 1),
                           ("eval_windows", 1), ("split_seed", 0)):  # fmt: skip
            if (value := getattr(self, key)) is not None and value < least:
                raise ConfigError(f"data.{key}: expected at least {least}, got {value}")
        for key in ("max_unknown", "reverse_complement"):
            if (share := getattr(self, key)) is not None and not 0 <= share <= 1:
                raise ConfigError(f"data.{key}: expected a number between 0 and 1, got {share}")
        if not (self.val_fraction > 0 and self.test_fraction >= 0 and self.val_fraction + self.test_fraction < 1):
            raise ConfigError(
                f"data.val_fraction={self.val_fraction:g}, data.test_fraction={self.test_fraction:g}: expected shares "
                "that leave something to learn from, the first above 0"
            )
        if self.bed is not None and (self.valid_chromosomes or self.test_chromosomes):
            raise ConfigError("data.bed says which intervals are held out; leave data.valid_chromosomes and "
                              "data.test_chromosomes out, or the BED file")  # fmt: skip
        if self.test_chromosomes and not self.valid_chromosomes:
            raise ConfigError("data.test_chromosomes needs data.valid_chromosomes, on which the weights are chosen")
        if self.length_warmup is not None and self.length_warmup not in _halvings(self.length):
            near = min(_halvings(self.length), key=lambda length: abs(length - (self.length_warmup or 0)))
            raise ConfigError(
                f"data.length_warmup={self.length_warmup}: doubling it does not lead to data.length={self.length}; "
                f"the nearest that does is {near}"
            )
        check_strands(self.strands)

    def pieces(self, epoch: int) -> int:
        """Return how many windows stand in for one of `length` bases in epoch number `epoch`, from 0: 1, 2, 4, ..."""
        if self.length_warmup is None:
            return 1
        return max(self.length // self.length_warmup >> epoch // self.length_warmup_epochs, 1)


@dataclass
class DnaLmTaskConfig(TaskConfig):
    """What of the windows is predicted, and what it counts."""

    objective: str = "mlm"  # mlm: masked bases; next_token: each base from those before it (causal models)
    mask_rate: float = 0.15  # share of the bases that are predicted by mlm: 80 % masked, 10 % random, 10 % as they are
    caduceus_compat: bool = False  # mask as Caduceus' code does: random ones from all 12 ids, N become [PAD]
    soft_mask_weight: float = 1.0  # of a lower-case base in the loss, beside 1 of the others; 0: it is not scored

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"task.objective: unknown {self.objective!r}{suggest(self.objective, OBJECTIVES)}")
        if not 0 < self.mask_rate < 1:
            raise ConfigError(f"task.mask_rate: expected a number between 0 and 1, got {self.mask_rate}")
        if self.soft_mask_weight < 0:
            raise ConfigError(f"task.soft_mask_weight: expected at least 0, got {self.soft_mask_weight}")
        if self.caduceus_compat and self.objective != "mlm":
            raise ConfigError("task.caduceus_compat says how bases are masked; task.objective=next_token masks none")


def _halvings(length: int) -> list[int]:
    """Return `length` and what halving it comes to, as long as it can be halved, down to 2."""
    found = [length]
    while found[-1] % 2 == 0 and found[-1] > 2:
        found.append(found[-1] // 2)
    return found
