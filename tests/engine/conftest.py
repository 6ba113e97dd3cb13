from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from rich.console import Console

from tests.engine.toy import toy_config


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """Accelerate keeps one state a process, torch its threads."""
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(threads)


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended; tests copy it before they change anything."""
    from mambaverse.engine.run import train

    config = toy_config(tmp_path_factory.mktemp("finished"), "trainer.pictures=true")
    return train(config, console=Console(quiet=True)).folder
