"""What all tests share: random numbers, one thread for each of several workers, and what backend an operator ran on."""

from __future__ import annotations

import os
import sys
import zlib
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported, and by the processes that tests start. The workers fill the cores already; the tests
    # of what several threads compute ask for them by torch.set_num_threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _own_random_numbers(request: pytest.FixtureRequest) -> None:
    """Draw the same numbers in every run of a test, whatever ran before it, so that what fails fails again."""
    if "torch" in sys.modules:  # most tests that need no torch do not wait for it
        import torch

        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return a list that grows by the name and the backend of each operator that runs."""
    from mambaverse.kernels import backend

    seen: list[tuple[str, str]] = []
    load = backend.load

    def spy(op: str, name: str, tensor: Any) -> Any:
        seen.append((op, name))
        return load(op, name, tensor)

    monkeypatch.setattr(backend, "load", spy)
    return seen
