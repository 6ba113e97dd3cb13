"""Configs: layers merge in order, and every mistake names its layer, its key and what was expected."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from mambaverse.config import ConfigError, DataConfig, RunConfig, TaskConfig, compose, list_configs, to_yaml


@dataclass
class ToyData(DataConfig):
    size: int = 8
    std: list[float] | None = None


def schema(task: str) -> RunConfig:
    assert task == "toy"
    return RunConfig(task=TaskConfig(), data=ToyData())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/_base.yaml").write_text(
        "task: {name: toy}\nmodel: {name: m}\ndata: {name: d, size: 4}\noptim: {lr: 0.5}\n"
    )
    (tmp_path / "toy/run.yaml").write_text("defaults: [toy/_base]\noptim: {lr: 1e-2}\ntrainer: {epochs: 3}\n")
    return tmp_path


def run(root: Path, *overrides: str, name: str = "toy/run") -> RunConfig:
    return compose(name, overrides, roots=[root], schema=schema)


def fails(root: Path, *overrides: str, name: str = "toy/run") -> str:
    with pytest.raises(ConfigError) as caught:
        run(root, *overrides, name=name)
    return str(caught.value)


def test_later_layers_win(root: Path) -> None:
    config = run(root, "trainer.epochs=5", "data.size=16")
    assert (config.optim.lr, config.trainer.epochs) == (0.01, 5)
    assert isinstance(config.data, ToyData) and config.data.size == 16


def test_resolved_yaml_feeds_back_in(root: Path, tmp_path: Path) -> None:
    config = run(root, "model.mixer=[s6,attention]", "model.mixer_args.s6.d_state=8")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert run(root, name=str(path)) == config


@pytest.mark.parametrize("text", ["007", "1.10", "1_000", "12:30", "1e5", "0x10", "on", "true", "a #b", "&x", ".5"])
def test_a_text_is_what_was_written(root: Path, text: str) -> None:
    config = run(root, f"trainer.run_name={text}", f"data.root={text}")
    assert (config.trainer.run_name, config.data.root) == (text, text)
    (root / "again.yaml").write_text(to_yaml(config))
    assert run(root, name=str(root / "again.yaml")) == config


def test_a_text_may_be_quoted_none_or_taken_from_elsewhere(root: Path) -> None:
    for given, expected in (("'a b'", "a b"), ('"007"', "007"), ("", None), ("~", None), ("null", None)):
        assert run(root, f"trainer.run_name={given}").trainer.run_name == expected
    assert run(root, "trainer.run_name=m-${model.name}").trainer.run_name == "m-m"


def test_a_number_is_decimal(root: Path) -> None:
    config = run(root, "trainer.epochs=010", "trainer.seed=1_000", "optim.lr=1e-3", "optim.min_lr=00.5")
    assert (config.trainer.epochs, config.trainer.seed, config.optim.lr, config.optim.min_lr) == (10, 1000, 1e-3, 0.5)
    assert "'1:30' of type 'str' could not be converted to Integer" in fails(root, "trainer.epochs=1:30")


def test_defaults_are_found_beside_their_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "own").mkdir()
    (root / "own/base.yaml").write_text("defaults: [toy/run]\ntrainer: {epochs: 9}\n")
    (root / "own/mine.yaml").write_text("defaults: [base.yaml]\n")
    assert run(root, name=str(root / "own/mine.yaml")).trainer.epochs == 9
    (root / "own/mine.yaml").write_text("defaults: [own/base.yaml]\n")
    monkeypatch.chdir(root)
    assert run(root, name="own/mine.yaml").trainer.epochs == 9  # or where the command runs


def test_an_unknown_default_names_its_file(root: Path) -> None:
    (root / "toy/run.yaml").write_text("defaults: [toy/_bse]\n")
    assert fails(root).startswith(f"{root}/toy/run.yaml: defaults: no config 'toy/_bse'")


def test_a_key_that_demands_a_value_is_refused_unless_a_later_layer_gives_one(root: Path) -> None:
    demanded = "trainer.epochs is ???, which demands a value, and none is set after it"
    assert fails(root, "trainer.epochs=???") == f"argument 'trainer.epochs=???': {demanded}"
    assert run(root, "trainer.epochs=???", "trainer.epochs=7").trainer.epochs == 7
    (root / "toy/asks.yaml").write_text("defaults: [toy/run]\ntrainer: {epochs: '???'}\n")
    assert fails(root, name="toy/asks") == f"{root}/toy/asks.yaml: {demanded}"
    assert run(root, "trainer={epochs: 8}", name="toy/asks").trainer.epochs == 8


def test_scientific_notation_is_a_number(root: Path) -> None:
    assert run(root, "optim.lr=3e-4").optim.lr == 3e-4


def test_arguments_are_keyed_by_mixer_also_by_path(root: Path) -> None:
    config = run(root, "model.mixer_args.ssd.d_state=64", "model.mixer_args[pkg.module:Class].d_state=32")
    assert config.model.mixer_args == {"ssd": {"d_state": 64}, "pkg.module:Class": {"d_state": 32}}
    config = run(root, "[model][mixer_args][.module:Class][d_state]=4")
    assert config.model.mixer_args == {".module:Class": {"d_state": 4}}


def test_parts_are_not_listed(root: Path) -> None:
    assert list_configs([root]) == ["toy/run"]


def test_unknown_config(root: Path) -> None:
    assert fails(root, name="toy/rum") == "no config 'toy/rum', did you mean 'toy/run'?"


def test_unknown_key_in_an_argument(root: Path) -> None:
    assert fails(root, "trainer.epoch=5") == (
        "argument 'trainer.epoch=5': unknown key 'trainer.epoch', did you mean 'epochs'?"
    )


@pytest.mark.parametrize(
    ("given", "meant"), [("lr=1", "'optim.lr'"), ("epoch=5", "'trainer.epochs'"), ("optm.lr=1", "'optim'")]
)
def test_a_key_without_its_section_is_found(root: Path, given: str, meant: str) -> None:
    key = given.partition(".")[0].partition("=")[0]
    assert fails(root, given) == f"argument {given!r}: unknown key {key!r}, did you mean {meant}?"


def test_defaults_are_a_list(root: Path) -> None:
    for wrong in ("5", "toy/_base"):
        (root / "toy/run.yaml").write_text(f"defaults: {wrong}\n")
        assert "defaults: expected a list of configs, such as [vision/_base], got" in fails(root)


def test_unknown_key_in_a_file(root: Path) -> None:
    (root / "toy/run.yaml").write_text("defaults: [toy/_base]\nmodel: {nmae: x}\n")
    assert fails(root) == f"{root / 'toy/run.yaml'}: unknown key 'model.nmae', did you mean 'name'?"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("trainer.epochs=many", "'many' of type 'str' could not be converted to Integer"),
        ("trainer.epochs=0", "trainer.epochs: expected at least 1, got 0"),
        ("optim.weight_decay=nan", "toy/run: optim.weight_decay: expected a finite number, got nan"),
        ("model.args.rates=[1, .nan]", "toy/run: model.args.rates.1: expected a finite number, got nan"),
        ("optim.min_lr=inf", "toy/run: optim.min_lr: expected a finite number, got inf"),
        ("optim.args=[1]", "a list where keys and values are expected, or the other way round"),
        ("data.std=4.5", "argument 'data.std=4.5': data.std: expected a list, such as [1, 2]"),
        ("trainer.seed=9223372036854775808", "trainer.seed: expected at most 9223372036854775807, got"),
        ("trainer.num_threads=1000000000000", "trainer.num_threads: expected at most 8192, got"),
        ("trainer.epochs=${optim.lr}", "trainer.epochs: While dereferencing interpolation"),
        ("trainer.epochs=${nope}", "trainer.epochs: Interpolation key 'nope' not found"),
        ("plugins=${nope}", "plugins: expected a list of modules, got '${nope}'"),
        ("task.name=${nope}", "task.name is read before '${nope}' could be"),
        ("trainer.precision=fp8", "trainer.precision: expected fp32, bf16 or fp16, got 'fp8'"),
        ("model.mixer=3", "model.mixer: expected a name or a list of names, got 3"),
        ("model.mixer=[]", "model.mixer: expected a list of names, got []"),
        ("model.mixer=[s6,[ssd,3]]", "model.mixer: expected a list of names, got ['s6', ['ssd', 3]]"),
        ("model.directions=3", "model.directions: expected 1 or 2, got 3"),
        ("trainer.epochs", "expected key=value"),
        ("=3", "expected key=value"),
        ("trainer..epochs=1", "argument 'trainer..epochs=1': the key has an empty part, expected names such as"),
        (".trainer.epochs=1", "the key has an empty part"),
        ("trainer.epochs.=1", "the key has an empty part"),
        ("model.mixer_args[].d_state=1", "the key has an empty part"),
        ("model.mixer_args.d_state=8", "expected a mixer's name and its arguments, such as model.mixer_args.ssd"),
        ("model.mixer_args.[ssd].d_state=1", "the key has an empty part"),
        ("data.batch_size=-1", "data.batch_size: expected at least 1, got -1"),
        ("data={a: [1", "argument 'data={a: [1'"),
        ("optim=3", "argument 'optim=3': expected keys and values where there is a section, got 3"),
        ("data.root=[^/]+", "a text with such characters takes quotes of its own: data.root='\"...\"'"),
    ],
)
def test_wrong_values(root: Path, argument: str, message: str) -> None:
    assert message in fails(root, argument)


def test_required_values(root: Path) -> None:
    (root / "toy/run.yaml").write_text("task: {name: toy}\n")
    assert fails(root) == "toy/run: data.name, model.name is not set"


def test_broken_files(root: Path) -> None:
    path = root / "toy/run.yaml"
    path.write_text("a: [1\n")
    assert f"{path}: not readable as YAML" in fails(root)
    path.write_text("- a\n- b\n")
    assert "expected a mapping of sections" in fails(root)
    path.write_text("model: {name: x}\n")
    assert "task.name is not set" in fails(root)
    path.write_text("defaults: [toy/run]\n")
    assert "defaults form a loop: toy/run -> toy/run" in fails(root)
