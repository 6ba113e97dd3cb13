"""The conformance kit accepts a sound mixer and says what is wrong with each broken one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambaverse.mixers import MIXERS, Mixer, register_mixer
from mambaverse.testing import MIXER_CHECKS, check_mixer


class Decay(Mixer):
    """h[t] = a h[t-1] + W x[t], y = h: a sound mixer with a state, in a few lines."""

    supports_state = True

    def __init__(self, dim: int, a: float = 0.5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.a = a
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def mix(self, x: Tensor) -> Tensor:
        return self.mix_sequence(x)[0]

    def mix_sequence(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
        h, outputs = torch.zeros_like(x[:, 0]) if state is None else state, []
        for x_t in self.proj(x).unbind(1):
            h = self.a * h + x_t
            outputs.append(h)
        return torch.stack(outputs, 1), h

    def init_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        weight = self.proj.weight
        return torch.zeros(batch_size, weight.shape[0], device=device or weight.device, dtype=dtype or weight.dtype)


class Grid(Mixer):
    """Adds up the rows of a grid, and all of it: bidirectional, needs a spatial shape, keeps no state."""

    causal = False
    needs_spatial_shape = True

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def mix_sequence(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
        grid = self.proj(x).unflatten(1, spatial_shape)
        return (grid + grid.mean(1, keepdim=True) + grid.mean((1, 2), keepdim=True)).flatten(1, 2), None


@pytest.mark.parametrize("mixer", [Decay, Grid])
def test_a_sound_mixer_passes_every_check(mixer: type[Mixer]) -> None:
    results = check_mixer(mixer, dim=8)
    assert list(results) == list(MIXER_CHECKS)
    assert all(result == "passed" or result.startswith("skipped: ") for result in results.values())
    assert results["direction"] == results["refusals"] == "passed"
    assert (results["step"] == "passed") == mixer.supports_state


def test_a_sound_mixer_of_torchs_own_layers_is_made_anew_in_two_directions() -> None:
    check_mixer("bidirectional", dim=8, checks=["meta"], mixer=f"{__name__}:Decay", merge="concat")


def test_arguments_and_registered_names_reach_the_mixer() -> None:
    register_mixer("kit_decay")(Decay)
    try:
        assert check_mixer("kit_decay", dim=8, checks=["step"], a=0.9) == {"step": "passed"}
    finally:
        MIXERS._entries.pop("kit_decay")
    with pytest.raises(ValueError, match="did you mean 'chunks'"):
        check_mixer(Decay, checks=["chunk"])


class Leaks(Decay):
    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) + 1e-2 * self.proj(x).mean(1, keepdim=True)


class StepsWrongly(Decay):
    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, h = super().step(x_t, state)
        return 1.001 * y, h


class StepsWithoutGradients(Decay):
    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, h = super().step(x_t, state.detach())
        return y, h


class ForgetsTheState(Decay):
    def mix_sequence(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
        y, h = super().mix_sequence(x, state)
        return y, h.detach()


class OverwritesTheState(Decay):
    def mix_sequence(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
        y, h = super().mix_sequence(x, state)
        if state is not None and not h.requires_grad:
            state.copy_(h)
        return y, h


class SeesOneEnd(Decay):
    causal = False
    supports_state = False


class MixesNothing(Decay):
    supports_state = False

    def mix(self, x: Tensor) -> Tensor:
        return self.proj(x)


class MixesRows(Decay):
    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) + self.proj(x).mean(0)


class HasAnIdleParameter(Decay):
    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        self.idle = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))


class CutsItsGradient(Decay):
    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) + self.proj(x.detach())


class ReturnsFp32(Decay):
    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x).float()


class IgnoresDevice(Decay):
    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim)


class DrawsNothingAnew(Decay):
    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        self.gain = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def mix_sequence(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
        y, h = super().mix_sequence(x, state)
        return y * self.gain, h


class BreaksTheGraph(Decay):
    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) if x.sum() < 1e9 else x


class PacksWithoutCare(Decay):
    supports_cu_seqlens = True


class AnswersForGoneState(Decay):
    supports_state = False

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        return x_t, state


class NamesNothing(Decay):
    def no_weight_decay(self) -> set[str]:
        return {"A_log"}


BROKEN = [
    (Leaks, "direction", "tokens before 1 depend on later ones"),
    (Leaks, "chunks", "in chunks of 1 and 11, against one"),
    (Leaks, "padding", "5 tokens, padded to 12"),
    (StepsWrongly, "step", "step by step, against forward"),
    (StepsWithoutGradients, "step", "gradient of x step by step, against forward"),
    (ForgetsTheState, "chunks", "gradient of"),
    (OverwritesTheState, "chunks", "forward wrote to the state"),
    (SeesOneEnd, "direction", "token 0 does not see token 11"),
    (MixesNothing, "direction", "nothing is mixed along the length"),
    (MixesRows, "shapes", "the first row of a batch, run alone"),
    (HasAnIdleParameter, "gradients", "idle gets no gradient"),
    (CutsItsGradient, "gradients", "differ from finite differences"),
    (ReturnsFp32, "dtypes", "is torch.float32"),
    (IgnoresDevice, "meta", "although device='meta' was given"),
    (DrawsNothingAnew, "meta", "reset_parameters leaves gain as it was"),
    (BreaksTheGraph, "compile", ""),
    (PacksWithoutCare, "packed", "packed, against separate"),
    (AnswersForGoneState, "refusals", "init_state: expected a ValueError, got an answer"),
    (NamesNothing, "state_dict", "no_weight_decay names parameters that do not exist: ['A_log']"),
]


def assert_named(mixer: type[Mixer], check: str, message: str) -> None:
    """Raise AssertionError unless the kit finds `mixer` to fail `check`, and says `message`."""
    with pytest.raises(AssertionError) as error:
        check_mixer(mixer, dim=8, checks=[check])
    text = str(error.value)
    assert text.startswith(f"{mixer.__name__}(dim=8) breaks 1 promise(s):") and f"\n  {check}: " in text
    assert message in text and "the contract: " in text


@pytest.mark.parametrize(("mixer", "check", "message"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_a_broken_promise_is_named(mixer: type[Mixer], check: str, message: str) -> None:
    assert_named(mixer, check, message)


def test_the_kit_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_mixer(Decay, dim=8, checks=["shapes", "gradients", "meta"])
    assert torch.equal(torch.get_rng_state(), before)


def test_without_docstrings_the_kit_still_finds_what_is_broken() -> None:
    program = (
        "import torch, mambaverse\n"
        "class Reversed(mambaverse.Mixer):\n"
        "    def __init__(self, dim, device=None, dtype=None):\n"
        "        super().__init__()\n"
        "        self.proj = torch.nn.Linear(dim, dim, device=device, dtype=dtype)\n"
        "    def mix(self, x):\n"
        "        return self.proj(x).flip(1)\n"
        "mambaverse.register_mixer('reversed')(Reversed)\n"
        "mambaverse.check_mixer('reversed', checks=['direction'])\n"
    )
    done = subprocess.run([sys.executable, "-OO", "-c", program], capture_output=True, text=True)
    assert "AssertionError: reversed(dim=16) breaks 1 promise(s):" in done.stderr
    assert "the contract: (a docstring, which python -OO strips)" in done.stderr
