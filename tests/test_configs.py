"""The shipped configs: each composes, and every name in it is a real one."""

from pathlib import Path

import pytest
from timm.optim import list_optimizers

from mambaverse.config import CONFIGS, compose, list_configs
from mambaverse.datasets import list_datasets
from mambaverse.engine.task import TASKS
from mambaverse.mixers import list_mixers
from mambaverse.models import list_models


def test_those_that_the_readme_names_are_there() -> None:
    names = ("cifar10", "cifar100", "digits", "fashion_mnist", "folder")
    assert {f"vision/{name}" for name in names} <= set(list_configs())


@pytest.mark.parametrize("name", list_configs())
def test_every_name_is_a_real_one(name: str) -> None:
    config, domain = compose(name), name.partition("/")[0]
    assert config.task.name in TASKS
    assert f"{domain}/{config.data.name}" in list_datasets()
    assert config.model.name in list_models(domain=domain)
    assert config.optim.name in list_optimizers()
    mixers = [config.model.mixer] if isinstance(config.model.mixer, str) else config.model.mixer or []
    assert {*mixers, *config.model.mixer_args} <= set(list_mixers())


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_a_comment_opens_each_file(path: Path) -> None:
    assert path.read_text().startswith("# ")
