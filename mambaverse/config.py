"""A run as data: dataclass defaults < YAML (its `defaults:` first, then its body) < `key=value` arguments.

Each layer is merged alone, so that an error can name the file or the argument it came from. The program only ever sees
the dataclasses below; what a domain adds (`data.img_size`, `task.mixup`) is in its own subclasses of `DataConfig` and
`TaskConfig`, which its `Task` names and `compose` puts in place.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mambaverse.errors import UserError, of_import, suggest
from mambaverse.overrides import explain, take_as_written

MAX_THREADS = 8192  # as many processors as a Linux kernel is built for
CONFIGS = Path(__file__).parent / "configs"  # the shipped ones


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the layer, the key and what was expected."""


@dataclass
class TaskConfig:
    """What is learnt; each domain's task adds its own fields."""

    name: str = MISSING  # a registered task: vision


@dataclass
class ModelConfig:
    """What learns."""

    name: str = MISSING  # a registered model: vim_nano_patch4_32
    # a mixer's name, "package.module:Class", or a list of names, one a layer, repeated; with stages a list of names or
    # lists of names, one for each stage; None: the model's own
    mixer: Any = None
    mixer_args: dict[str, dict[str, Any]] = field(default_factory=dict)  # keyed by mixer: {ssd: {d_state: 64}}
    directions: int | None = None  # 1 leaves a causal mixer of a bidirectional backbone causal; None or 2 wraps it
    members: int = 1  # so many models, which learn by themselves from the same batches; their mean probability counts
    checkpoint: str | None = None  # a weights file to start from
    args: dict[str, Any] = field(default_factory=dict)  # further arguments of the model's factory

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        if self.mixer is not None and not isinstance(self.mixer, str | list):
            raise ConfigError(f"model.mixer: expected a name or a list of names, got {self.mixer!r}")
        if isinstance(self.mixer, list) and not (self.mixer and all(map(_is_pattern, self.mixer))):
            raise ConfigError(f"model.mixer: expected a list of names, got {self.mixer!r}")
        if self.directions not in (None, 1, 2):
            raise ConfigError(f"model.directions: expected 1 or 2, got {self.directions}")
        if self.members < 1:
            raise ConfigError(f"model.members: expected 1 or more, got {self.members}")


def _is_pattern(mixer: Any) -> bool:
    return isinstance(mixer, str) or (
        bool(mixer) and isinstance(mixer, list) and all(isinstance(m, str) for m in mixer)
    )


@dataclass
class DataConfig:
    """What it learns from; each domain's task adds its own fields."""

    name: str = MISSING  # a data set of the task's domain: digits
    root: str | None = None  # where its files are
    download: bool = False  # whether they may be fetched
    batch_size: int = 64  # samples a step and process
    eval_batch_size: int = 256  # samples a batch in evaluation and prediction
    num_workers: int = 0  # loading processes

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        _at_least("data", self, batch_size=1, eval_batch_size=1, num_workers=0)

    def changed(self, *names: str) -> list[tuple[str, Any]]:
        """Return which of the fields `names` it has do not hold their defaults, with what they hold."""
        own = [one for one in fields(self) if one.name in names]
        return [(one.name, value) for one in own if (value := getattr(self, one.name)) != one.default]


@dataclass
class SplitConfig(DataConfig):
    """The data of tables and folders that come without a split of their own (see mambaverse/splits.py)."""

    val_fraction: float = 0.2  # share that is held out for evaluation
    split_seed: int = 0  # of that draw
    folds: int | None = None  # k: hold out fold number `fold` of k instead of a share
    fold: int = 0  # from 0
    group: str | None = (
        None  # what stays on one side: a table's column, or a regex whose group 1 is read off file names
    )
    on_error: str = "raise"  # or skip: leave out what cannot be read, with a count

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        super().__post_init__()
        _at_least("data", self, folds=2, fold=0, split_seed=0)
        _at_most("data", self, split_seed=2**32 - 1)
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"data.val_fraction: expected a number between 0 and 1, got {self.val_fraction}")
        if self.folds is None and self.fold:
            raise ConfigError(f"data.fold={self.fold}: expected data.folds beside it, the number of folds")
        if self.folds is not None and self.fold >= self.folds:
            raise ConfigError(f"data.fold: expected a number from 0 to {self.folds - 1}, got {self.fold}")
        if self.on_error not in ("raise", "skip"):
            raise ConfigError(f"data.on_error: expected raise or skip, got {self.on_error!r}")


@dataclass
class OptimConfig:
    """How it learns: names and arguments of timm's optimizers and schedulers."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None  # the rate of a layer, relative to that of the layer above it
    args: dict[str, Any] = field(default_factory=dict)  # further arguments of the optimizer: {betas: [0.9, 0.95]}
    schedule: str = "cosine"  # one of timm's, taken a step at every update
    schedule_args: dict[str, Any] = field(default_factory=dict)  # further arguments of it: {decay_rate: 0.5}
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        _at_least("optim", self, lr=0, weight_decay=0, warmup_epochs=0, warmup_lr=0, min_lr=0, layer_decay=0)
        _at_most("optim", self, layer_decay=1)


@dataclass
class TrainerConfig:
    """How long, how exactly and where."""

    epochs: int = 10
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "fp32"  # fp32 | bf16 | fp16 (autocast; the weights stay fp32)
    compile: str | None = None  # torch.compile what is trained: default | reduce-overhead (CUDA graphs) | max-autotune
    grad_checkpointing: bool = False  # compute activations twice rather than keep them: less memory, more time
    checkpoint_chunk: int | None = None  # with it, in pieces of so many tokens (causal models); None: block by block
    accumulate: int = 1  # batches an optimizer step
    clip_grad: float | None = 1.0  # largest norm of the gradient
    ema_decay: float | None = None  # keep (and evaluate) an exponential moving average of the weights
    eval_interval: int = 1  # evaluate, and write what that leaves, every so many epochs, and when training ends
    patience: int | None = None  # epochs without a better monitored metric after which training stops
    monitor: str | None = None  # the metric that chooses the best weights; None: the task's own
    select: str = "best"  # which weights are reported and kept for predict: best, by the evaluation set, or last
    baseline: bool = False  # fit the task's simple baselines on the same data and print them beside the result
    num_threads: int | None = None  # CPU threads; None: torch's choice
    tensorboard: bool = False
    pictures: bool = True  # draw curves.png, confusion.png and the task's own: some seconds at the end of a run
    log_every: int = 20  # optimizer steps between two lines of metrics.jsonl
    save_minutes: float | None = 15.0  # the state is saved this often; None: at evaluations only
    output_dir: str = "runs"  # a run gets its own folder in here
    run_name: str | None = None  # that folder's name; None: from the config's name and the time
    overwrite: bool = False  # replace the run of that name

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        _at_least("trainer", self, epochs=1, seed=0, accumulate=1, log_every=1, patience=1, num_threads=1)
        _at_least("trainer", self, checkpoint_chunk=1, eval_interval=1)
        _at_most("trainer", self, seed=2**63 - 1, num_threads=MAX_THREADS)
        if self.checkpoint_chunk is not None and not self.grad_checkpointing:
            raise ConfigError("trainer.checkpoint_chunk: needs trainer.grad_checkpointing=true")
        for key in ("clip_grad", "save_minutes"):
            if (value := getattr(self, key)) is not None and value <= 0:
                raise ConfigError(f"trainer.{key}: expected a number above 0, or null for none, got {value}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"trainer.device: expected auto, cpu or cuda, got {self.device!r}")
        if self.select not in ("best", "last"):
            raise ConfigError(f"trainer.select: expected best or last, got {self.select!r}")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ConfigError(f"trainer.precision: expected fp32, bf16 or fp16, got {self.precision!r}")
        if self.compile not in (None, "default", "reduce-overhead", "max-autotune"):
            raise ConfigError(
                f"trainer.compile: expected default, reduce-overhead, max-autotune or null, got {self.compile!r}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"trainer.ema_decay: expected a number between 0 and 1, got {self.ema_decay}")


@dataclass
class RunConfig:
    """Everything a run depends on; saved in its folder as config.yaml, which can be trained from again."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    plugins: list[str] = field(default_factory=list)  # modules imported before names are looked up


def compose(
    name: str,
    overrides: Sequence[str] = (),
    *,
    roots: Iterable[Path] = (CONFIGS,),
    schema: Callable[[str], RunConfig] | None = None,
) -> RunConfig:
    """Return the run that the YAML `name` and the `overrides` describe.

    Args:
        name: "vision/cifar10" (looked for in `roots`, in order) or a path that ends in .yaml.
        overrides: "key.subkey=value" each.
        roots: Folders of configs.
        schema: Task name to an empty `RunConfig` with that task's own `data` and `task` sections.

    Raises:
        ConfigError: unknown config, key or task; a value of the wrong type; a required value that is missing.
    """
    if schema is None:
        from mambaverse.engine.task import run_schema

        schema = run_schema
    arguments = list(argument_layers(overrides))
    layers = [*_yaml_layers(name, list(roots)), *arguments]
    plain: list[tuple[str, Any]] = [(source, OmegaConf.to_container(layer)) for source, layer in layers]
    for source, keys in plain:  # not resolved: plugins and the task are looked up before
        import_plugins(keys.get("plugins"), source)
    config: Any = OmegaConf.structured(schema(_task_name(name, plain)))
    for item, (_, layer) in zip(overrides, arguments, strict=True):
        take_as_written(layer, item, config)
    for source, layer in layers:
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {explain(error)}") from None
        except TypeError:  # OmegaConf's, which names no key
            raise ConfigError(f"{source}: a list where keys and values are expected, or the other way round") from None
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(f"{name}: {', '.join(missing)} is not set")
        _check_marked(plain)
        for key, value in _not_finite(OmegaConf.to_container(config, resolve=True)):  # no bound below would refuse nan
            if math.isnan(value) or key.startswith(("data.", "optim.", "task.")):
                raise ConfigError(f"{name}: {key}: expected a finite number, got {value}")
        run = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {explain(error)}") from None
    assert isinstance(run, RunConfig)
    return run


def import_plugins(names: Any, source: str = "plugins") -> None:
    """Import the modules `names`, which register what a config may then name.

    Raises:
        ConfigError: not a list of names, or a module that cannot be imported; `source` says where it was named.
    """
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{source}: plugins: expected a list of modules, got {names!r}")
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever a module may do when it is imported
            raise ConfigError(f"{source}: plugin {name!r} cannot be imported: {of_import(error, name)}") from error


def to_yaml(config: RunConfig) -> str:
    """Return the YAML of `config`, from which `compose` makes an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def list_configs(roots: Iterable[Path] = (CONFIGS,)) -> list[str]:
    """Return the names of the configs that can be run; files whose name starts with "_" are only parts of others."""
    found = (path.relative_to(root) for root in roots for path in root.rglob("*.yaml"))
    return sorted({p.with_suffix("").as_posix() for p in found if not p.name.startswith("_")})


def _task_name(name: str, layers: Sequence[tuple[str, Any]]) -> str:
    for source, keys in reversed(layers):
        section = keys.get("task")
        found = section.get("name") if isinstance(section, dict) else None
        if isinstance(found, str):
            if "${" in found:
                raise ConfigError(f"{source}: task.name is read before {found!r} could be; write the task's own name")
            return found
    raise ConfigError(f"{name}: task.name is not set; it names the task, such as 'vision'")


def _yaml_layers(
    name: str, roots: list[Path], parents: tuple[str, ...] = (), by: Path | None = None
) -> Iterator[tuple[str, DictConfig]]:
    """Yield (source, layer) for `name` and everything its `defaults:` name, depth first, base before derived.

    A file that the defaults of another, `by`, name is looked for beside that one too.
    """
    if name in parents:
        raise ConfigError(f"defaults form a loop: {' -> '.join((*parents, name))}")
    path = _find(name, roots, by)
    try:
        body = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(body, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of sections (task, model, data, ...)")
    bases = body.pop("defaults", None)
    if bases is not None and not OmegaConf.is_list(bases):
        raise ConfigError(f"{path}: defaults: expected a list of configs, such as [vision/_base], got {bases!r}")
    for base in bases or []:
        yield from _yaml_layers(str(base), roots, (*parents, name), path)
    yield str(path), body


def _check_marked(layers: Sequence[tuple[str, Any]]) -> None:
    """Raise ConfigError for a key that is ??? in one layer and not set behind it: OmegaConf keeps an earlier value."""
    for number, (source, keys) in enumerate(layers):
        for path in _marked(keys):
            if not any(_sets(later, path) for _, later in layers[number + 1 :]):
                raise ConfigError(
                    f"{source}: {'.'.join(map(str, path))} is ???, which demands a value, and none is set after it"
                )


def _marked(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if value == MISSING:
        yield path
    for name, part in value.items() if isinstance(value, dict) else ():
        yield from _marked(part, (*path, name))


def _sets(value: Any, path: tuple[Any, ...]) -> bool:
    if path and isinstance(value, dict):
        return path[0] in value and _sets(value[path[0]], path[1:])
    return value != MISSING


def _not_finite(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield the dotted keys of `value` that are infinite or no number, with what they are."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from _not_finite(part, f"{key}.{name}" if key else str(name))


def _find(name: str, roots: list[Path], by: Path | None = None) -> Path:
    candidates = [root / f"{name}.yaml" for root in roots]
    if name.endswith((".yaml", ".yml")):
        candidates = [Path(name)] if by is None else [by.parent / name, Path(name)]
    for path in candidates:
        if path.is_file():
            return path
    source = "" if by is None else f"{by}: defaults: "
    from mambaverse.datasets import list_datasets  # which imports this module

    domain, _, dataset = name.partition("/")
    known = suggest(name, list_configs(roots), limit=30)
    if name in list_datasets():
        known = f", but a data set; data.name={dataset} trains on it with another config of {domain}"
    raise ConfigError(f"{source}no config {name!r}{known}")


def argument_layers(overrides: Sequence[str]) -> Iterator[tuple[str, DictConfig]]:
    """Yield (source, layer) for each `key=value`."""
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"argument {item!r}: expected key=value, such as trainer.epochs=5")
        if re.search(r"^\.|\.\.|\.\[|\.$|\[\]", re.sub(r"\[[^]]+\]", "[name]", key)):
            raise ConfigError(f"argument {item!r}: the key has an empty part, expected names such as trainer.epochs")
        try:
            yield f"argument {item!r}", OmegaConf.from_dotlist([item])
        except yaml.YAMLError as error:
            remedy = f"; a text with such characters takes quotes of its own: {key}='\"...\"'"
            raise ConfigError(f"argument {item!r}: {' '.join(str(error).split())}{remedy}") from None
        except OmegaConfBaseException as error:
            raise ConfigError(f"argument {item!r}: {' '.join(str(error).split())}") from None


def _at_least(section: str, config: Any, **bounds: float) -> None:
    for key, bound in bounds.items():
        value = getattr(config, key)
        if value is not None and value != MISSING and value < bound:
            raise ConfigError(f"{section}.{key}: expected at least {bound}, got {value}")


def _at_most(section: str, config: Any, **bounds: int) -> None:
    for key, bound in bounds.items():
        if (value := getattr(config, key)) is not None and value > bound:
            raise ConfigError(f"{section}.{key}: expected at most {bound}, got {value}")
