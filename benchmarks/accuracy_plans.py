"""What `accuracy_grid.py` trains: the data sets, and the plans that say with which mixers and settings.

A run is told from others by its set, fold, mixer, seed and settings; where its data lie and what device it is run on is
written in its folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mambaverse.config import compose

MIXERS = ("s6", "ssd", "mamba3", "s4d", "vim", "attention")
PROMOTER = "dna/gue_promoter"
LONG = ("trainer.epochs=15",)  # of GUE's large tasks, as configs/dna/gue_gpu.yaml says


@dataclass(frozen=True)
class Set:
    """One row of a table: a data set, by its shipped config.

    Attributes:
        name: In the table, in `--sets` and in the names of folders.
        config: A shipped config.
        samples: It trains on, with a fold held out: by them the time of a run is estimated.
        file: In the folder of data; None: the data come with mambaverse.
        settings: Changes to the config.
        folds: So many, one after the other held out; 1: the split is given.
        score: What its table shows.
        goal: The score that is wanted, if one is.
        prefix: Of the names of its runs and floors, where its settings are not those of the grid.
        root_is_file: data.root names `file` itself, not the folder of data.
    """

    name: str
    config: str
    samples: int
    file: str | None = None
    settings: tuple[str, ...] = ()
    folds: int = 1
    score: str = "accuracy"
    goal: float | None = None
    prefix: str = ""
    root_is_file: bool = False

    def where(self, data: Path) -> list[str]:
        """Return the override that says where the data lie, if anything must."""
        if self.file is None:
            return []
        return [f"data.root={data / self.file if self.root_is_file else data}"]

    def fold(self, number: int) -> list[str]:
        """Return the override that holds out fold `number`, if there are folds."""
        return [f"data.fold={number}"] if self.folds > 1 else []

    def has_data(self, data: Path) -> bool:
        """Whether its data are there."""
        return self.file is None or (data / self.file).exists()

    @property
    def stem(self) -> str:
        """What the names of its files begin with."""
        return self.prefix + self.name.replace("/", "-")


@dataclass(frozen=True)
class Run:
    """One training run: its folder's name, its config, and what changes it; `steps` are the optimizer's, about."""

    name: str
    config: str
    settings: tuple[str, ...]  # what is asked
    where: tuple[str, ...]  # data and device; settings come after
    steps: int
    set: str
    fold: int
    mixer: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """Sets and mixers; a mixer "" is the model's own."""

    sets: Sequence[Set]
    mixers: Sequence[str]

    def runs(self, seeds: int, data: Path, device: str) -> Iterator[Run]:
        """Yield the runs: each set, fold, mixer and seed.

        Args:
            seeds: 0 to below it.
            data: The folder of data.
            device: cuda, where runs are in bf16, or cpu, where they are in fp32.
        """
        machine = [f"trainer.device={device}", f"trainer.precision={'bf16' if device == 'cuda' else 'fp32'}"]
        for part in self.sets:
            settings = list(part.settings)
            config = compose(part.config, settings)
            if part.config.startswith("dna/"):
                settings.append("data.audit=false")  # seconds of a run that change nothing in it
            batches = max(part.samples // config.data.batch_size, 1)
            for fold in range(part.folds):
                for mixer in self.mixers:
                    for seed in range(seeds):
                        names = [part.stem, f"fold{fold}" * (part.folds > 1), mixer, f"seed{seed}"]
                        swap = [f"model.mixer={mixer}"] if mixer else []
                        own = [*part.fold(fold), *swap, f"trainer.seed={seed}"]
                        yield Run(
                            name="-".join(filter(None, names)),
                            config=part.config,
                            settings=(*settings, *own),
                            where=(*machine, *part.where(data)),
                            steps=batches * config.trainer.epochs,
                            set=part.name,
                            fold=fold,
                            mixer=mixer,
                            seed=seed,
                        )


def _gue(task: str, samples: int, *settings: str, config: str = "dna/gue_gpu") -> Set:
    subset = (f"data.subset={task}", *settings)
    return Set(f"gue/{task}", config, samples, "gue8.zip", subset, score="mcc", root_is_file=True)


GUE = (
    _gue("mouse/0", 6478),
    _gue("mouse/2", 2620),
    _gue("mouse/3", 1904),
    _gue("mouse/4", 15064, *LONG),
    _gue("prom/prom_core_all", 47356, "trainer.epochs=6", config=PROMOTER),
    _gue("prom/prom_core_tata", 4904, config=PROMOTER),
    _gue("tf/0", 32378, *LONG),
    _gue("tf/1", 30672, *LONG),
)
ALONE = ("model.members=1",)  # of an ensemble: mixers compare as one model each
SETS = (
    Set("rrna16s", "dna/rrna16s", 3881, folds=5),
    Set("fly_splice", "dna/fly_splice", 7158, "fly_splice_train.csv.gz", ALONE),
    Set("splice_uci", "dna/splice_uci", 2700, "splice_uci.csv.gz", ALONE, folds=10),
    Set("fly_windows", "dna/fly_windows", 19713, "fly_windows_train.csv.gz", score="macro_f1"),
    Set("species3", "dna/species3", 12000, "species3_200bp.csv.gz"),
    Set("beta_lactamase", "dna/beta_lactamase", 4317, "amr_betalactamase.csv.xz", folds=5),
    *GUE,
    Set("mandarin_tones", "audio/mandarin_tones", 216, "mandarin_tones.zip", folds=5),
    Set("fsdd", "audio/fsdd", 300, "fsdd_360.zip", ALONE, folds=6),
    Set("drums", "audio/drums", 371, "drums.zip", folds=5),
)
BY_NAME = {part.name: part for part in SETS}


def _larger(name: str, *settings: str, config: str | None = None, goal: float | None = None) -> Set:
    part = BY_NAME[name]
    return replace(part, config=config or part.config, settings=settings, goal=goal, prefix="larger-")


RATE = ("model.args.drop_path_rate=0.1", "optim.lr=0.002")
WIDE = ("model.mixer_args.vim.d_state=16", "model.mixer_args.vim.expand=2")  # the sizes of Caduceus' blocks
WIDER = (*WIDE, *RATE, "model.name=caduceus_ph_d128_n4", "trainer.ema_decay=0.998")
LARGER = (
    _larger("rrna16s", config="dna/rrna16s_large", goal=97.0),
    _larger(
        "fly_splice", *WIDE, *RATE, "model.name=caduceus_ph_d64_n4", "model.members=5", "model.args.stem_stride=1",
        "trainer.epochs=30", goal=97.0,
    ),
    _larger(
        "fly_windows", *WIDER, "model.args.stem=conv", "model.args.stem_kernel=15", "model.args.stem_stride=2",
        "data.batch_size=128", "data.shift=4", "trainer.epochs=20", goal=75.0,
    ),
    _larger(
        "beta_lactamase", *WIDER, "model.args.stem_stride=3", "data.window=900", "data.mutate=0.05",
        "trainer.epochs=15",
    ),
)  # fmt: skip


def _images(name: str, *settings: str, config: str = "vision/cifar10") -> Set:
    every = ("trainer.compile=reduce-overhead", "trainer.select=last")  # no epoch is chosen by what is reported
    return Set(name, config, 50000, "cifar10_jpeg75.npz", (*settings, *every), root_is_file=True)


PEER = "model.name=benchmarks.cifar10_peers"
CIFAR10 = (
    _images("strata_nano_patch4_32"),
    _images("resnet18", f"{PEER}:resnet18", "model.args.drop_path_rate=null"),  # as in timm, which has no such rate
    _images("vit", f"{PEER}:vit"),
    _images("vim", config="vision/cifar10_vim"),
    _images("ncssd", "model.mixer=ncssd", "model.mixer_args.ncssd.conv=grid", config="vision/cifar10_vim"),
)
PLANS = {
    "grid": Plan(SETS, MIXERS),
    "gue": Plan(GUE, ("vim",)),  # runs of the grid, by the same names
    "larger": Plan(LARGER, ("",)),
    "cifar10": Plan(CIFAR10, ("",)),
}
