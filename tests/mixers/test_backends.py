"""Mixers run on the backend that is in force."""

from __future__ import annotations

import os

import pytest
import torch

from mambaverse.kernels.backend import BackendError, use_backend
from mambaverse.kernels.testing import assert_close
from mambaverse.testing import Subject


@pytest.mark.parametrize("name", ["s4d", "s6", "ssd", "mamba3", "vim", "bissd", "ncssd", "bidirectional"])
def test_the_backend_in_force_reaches_the_operators(name: str) -> None:
    subject = Subject(name, 16)
    mixer, x = subject.build(), subject.tokens()
    with use_backend("reference"):
        expected = mixer(x=x)
    assert_close("y", mixer(x=x), expected)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with use_backend("triton"), pytest.raises(BackendError):
            mixer(x=x)


def test_float64_runs_in_float64() -> None:
    for name in ("s6", "ssd", "mamba3", "vim", "bissd", "ncssd"):
        subject = Subject(name, 16)
        mixer, x = subject.build().double(), subject.tokens().double()
        y = mixer(x=x)
        assert y.dtype == torch.float64
        assert_close("y", subject.build()(x=x.float()), y)
