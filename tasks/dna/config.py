"""The `data` and `task` sections of a DNA run."""

from __future__ import annotations

from dataclasses import dataclass

from mambaverse.config import ConfigError, SplitConfig
from mambaverse.engine.classifier import ClassifierConfig
from mambaverse.errors import suggest

STRANDS = ("one", "both")


@dataclass
class DnaDataConfig(SplitConfig):
    """Which sequences, which part of them, and how training varies them."""

    subset: str | None = None  # one of several data sets under a root: gue's mouse/0, genomic_benchmarks' folder
    genome: str | None = None  # FASTA of the genome, where the data set gives places in it
    sequence: str = "sequence"  # column of a table that holds the sequences
    label: str | None = None  # column of the labels (None: the data set's own); of a FASTA, the header's key=value
    label_pattern: str | None = None  # of a FASTA: a regex whose group 1 is the label, searched in the header
    dev_fraction: float = (
        0.0  # share of the training set that chooses the weights, where no dev set comes with the data
    )
    audit: bool = True  # look for copies of training sequences in the other sets as a run begins, if it takes seconds
    min_count: int = 1  # classes with fewer sequences are left out
    strict: bool = False  # refuse all letters but A, C, G, T, N; else ambiguous ones (R, Y, ...) are read as N
    rna: bool = False  # read U as T
    max_unknown: float = 1.0  # share of N and ambiguous letters that a sequence may have; more is an error
    window: int | None = None  # bases the model sees; longer sequences are cropped to it; None: whole sequences
    window_seed: int = 0  # of the one window that a sequence is evaluated on
    random_windows: bool = True  # another window of a sequence in each epoch; else the one of evaluation
    strands: str = "one"  # both: train on either strand, evaluate and predict with the mean of the scores of both
    reverse_complement: float | None = None  # probability of the other strand in training; None: 0.5 with both, else 0
    shift: int = 0  # bases, at most, that a training sequence is moved by; N is moved in
    mutate: float = 0.0  # share of bases replaced by random ones while training
    mask: float = 0.0  # share of bases replaced by N while training
    fresh: float = 0.0  # share of one class (fly_splice: decoys) that is cut out anew, each time, while training
    max_windows: int = 64  # of a record longer than `window` in predict: so many, evenly spread, are averaged at most

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        super().__post_init__()
        for key, least in (("window", 1), ("min_count", 1), ("shift", 0), ("max_windows", 1), ("window_seed", 0)):
            if (value := getattr(self, key)) is not None and value < least:
                raise ConfigError(f"data.{key}: expected at least {least}, got {value}")
        if not 0 <= self.dev_fraction < 1:
            raise ConfigError(f"data.dev_fraction: expected a number from 0 to below 1, got {self.dev_fraction}")
        for key in ("reverse_complement", "mutate", "mask", "fresh", "max_unknown"):
            if (value := getattr(self, key)) is not None and not 0 <= value <= 1:
                raise ConfigError(f"data.{key}: expected a number between 0 and 1, got {value}")
        check_strands(self.strands)

    @property
    def other_strand(self) -> float:
        """The probability that a training sequence is read from its other strand."""
        if self.reverse_complement is not None:
            return self.reverse_complement
        return 0.5 if self.strands == "both" else 0.0


@dataclass
class DnaTaskConfig(ClassifierConfig):
    """How labels are softened and sequences mixed while training."""

    mixup: float = 0.0  # α of Beta(α, α), from which a batch draws the share of bases that are a sequence's own; 0: off

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        super().__post_init__()
        if self.mixup < 0:
            raise ConfigError(f"task.mixup: expected at least 0, got {self.mixup}")


def check_strands(value: str) -> None:
    """Raise ConfigError unless `value` is a policy of strands.

    one: a sequence is read as it is written. both: training reads either strand of it, and what a model says of it is
    the mean over both (post-hoc conjoining). Models that read both strands themselves (caduceus_ps_*) need neither.
    """
    if value not in STRANDS:
        raise ConfigError(f"data.strands: expected {' or '.join(STRANDS)}, got {value!r}{suggest(value, STRANDS)}")
