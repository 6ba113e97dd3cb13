"""The conformance kit says what is wrong with mixers that are wrong in one respect, or under one condition, alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambaverse.mixers import Mixer
from mambaverse.testing import check_mixer
from tests.test_testing_kit import Decay


class ReadsItsInputDense(Decay):
    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x if x.stride(-1) == 1 else x.as_strided(x.shape, torch.empty(x.shape).stride()))


BROKEN = [
    (ReadsItsInputDense, "shapes", "y of a strided x, channels before length"),
]


@pytest.mark.parametrize(("mixer", "check", "message"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_a_mixer_that_is_all_but_sound_is_caught(mixer: type[Mixer], check: str, message: str) -> None:
    with pytest.raises(AssertionError) as error:
        check_mixer(mixer, dim=8, checks=[check])
    text = str(error.value)
    assert f"\n  {check}: " in text and message in text and "the contract: " in text
