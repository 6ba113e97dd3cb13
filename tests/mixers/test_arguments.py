"""What a mixer cannot be built with, it says in one line."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import mambaverse
from mambaverse.errors import UserError
from mambaverse.mixers import MEANT, create_mixer

INF, NAN = float("inf"), float("nan")


class WithoutInit(mambaverse.Mixer):
    pass


class WithoutDevice(mambaverse.Mixer):
    def __init__(self, dim: int) -> None:
        super().__init__()


class WithMore(mambaverse.Mixer):
    def __init__(self, dim: int, *, k: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()


class NoMixer(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "WithoutInit",
            "expected WithoutInit.__init__(self, dim, ..., device=None, dtype=None), got (*args, **kwargs)",
        ),
        ("WithoutDevice", "expected WithoutDevice.__init__(self, dim, ..., device=None, dtype=None), got (dim)"),
        ("WithMore", f"{__name__}.WithMore: missing a required argument: 'k'"),
        ("NoMixer", "expected a subclass of mambaverse.Mixer"),
    ],
)
def test_a_class_that_keeps_not_to_the_contract_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        mambaverse.create_model("vim_nano_patch4_32", mixer=f"{__name__}:{name}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ssd", {"headdim": 7}, "headdim must divide expand · dim = 32, got 7"),
        ("ssd", {"headdim": 16, "ngroups": 3}, "ngroups must divide the number of heads 2"),
        ("s6", {"A_init": "s4d_reel"}, "did you mean 's4d_real'"),
        ("s6", {"A_init": "s4d_lin", "d_state": 5}, "d_state must be even"),
        ("s6", {"dt_init": "zero"}, "expected dt_init 'random' or 'constant', got 'zero'"),
        ("s6", {"d_state": 0}, "s6: d_state must be at least 1, got 0"),
        ("s6", {"d_state": "many"}, "mixer 's6': d_state must be int, got 'many'"),
        ("s6", {"d_state": True}, "d_state must be int, got True"),
        ("s6", {"dt_max": "0.1"}, "dt_max must be float, got '0.1'"),
        ("s6", {"dt_rank": "half"}, "dt_rank must be 'auto' or at least 1, got 'half'"),
        ("s6", {"dt_min": 0.2}, "[dt_min, dt_max] must be two finite numbers, 0 < low <= high, got [0.2, 0.1]"),
        ("s4d", {"dt_max": INF}, "[dt_min, dt_max] must be two finite numbers, 0 < low <= high, got [0.001, inf]"),
        ("ssd", {"A_init_range": [1]}, "A_init_range must be two finite numbers, 0 < low <= high, got [1]"),
        ("bissd", {"dt_limit": [INF, INF]}, "dt_limit must be two numbers, -1 < low <= high, got [inf, inf]"),
        ("ssd", {"A_init_range": ["a", "b"]}, "A_init_range must be tuple[float, float], got ['a', 'b']"),
        ("ssd", {"dt_limit": 3}, "dt_limit must be tuple[float, float], got 3"),
        ("ssd", {"rmsnorm": "yes"}, "rmsnorm must be bool, got 'yes'"),
        ("ssd", {"headdim": 0}, "headdim must be at least 1, got 0"),
        ("ssd", {"chunk_size": 0}, "ssd: chunk_size must be at least 1, got 0"),
        ("bissd", {"chunk_size": -8}, "bissd: chunk_size must be at least 1, got -8"),
        ("mamba3", {"chunk_size": 0}, "mamba3: chunk_size must be at least 1, got 0"),
        ("s6", {"headdim": 4}, "unknown argument 'headdim'"),
        ("s4d", {"init": "hippo"}, "unknown init 'hippo'"),
        ("s4d", {"init": "legs", "d_state": 5}, "d_state must be even"),
        ("vim", {"merge": "concat"}, "expected merge 'mean' or 'add', got 'concat'"),
        ("vim", {"init": "oficial"}, "expected init 'default' or 'official', got 'oficial'"),
        ("ss2d", {"gate": "siluu"}, "ss2d: unknown gate 'siluu', did you mean 'silu'"),
        ("ss2d", {"d_conv": 4}, "d_conv must be odd, so that the convolution has a middle, got 4"),
        ("ss2d", {"expand": 0.01}, "expand · dim must be at least 1, got 0.01 · 16"),
        ("ss2d", {"dt_init": "zero"}, "expected dt_init 'random' or 'constant', got 'zero'"),
        ("bidirectional", {"mixer": "vim"}, "expected a causal mixer, got 'vim'"),
        ("bidirectional", {"mixer": "attention"}, "expected a causal mixer, got 'attention'"),
        ("bidirectional", {"merge": "men"}, "did you mean 'mean'"),
        ("bidirectional", {"mixer": "s7"}, "unknown mixer 's7'"),
        ("bidirectional", {"mixer_args": {"d_stat": 4}}, "did you mean 'd_state'"),
        ("bidirectional", {"mixer_args": [4]}, "mixer_args must be Mapping[str, Any], got [4]"),
        ("attention", {"num_heads": 3}, "num_heads · headdim must be dim = 16, got 3 · 5"),
        ("attention", {"headdim": 1, "rotary": True}, "headdim must be even, got 1"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        create_mixer(name, 16, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("name", mambaverse.list_mixers())
@pytest.mark.parametrize("dim", [0, -4, True, "16", 16.0, None])
def test_a_number_of_channels_that_is_none_is_named(name: str, dim: Any) -> None:
    with pytest.raises(UserError, match=re.escape(f"mixer {name!r}: dim must be an int of at least 1, got {dim!r}")):
        create_mixer(name, dim)


@pytest.mark.parametrize(
    ("names", "argument", "least"),
    [
        (["s6", "vim", "ss2d"], "dt_scale", "of at least 0"),
        (["s6", "vim", "ss2d", "ssd", "bissd", "ncssd", "mamba3"], "dt_init_floor", "of at least 0"),
        (["ssd", "bissd", "ncssd", "retnet"], "norm_eps", "of at least 0"),
        (["linear_attention"], "eps", "of at least 0"),
        (["ss2d"], "expand", "of at least 0"),
        (["mamba3"], "rope_fraction", "of at least 0"),
        (["mamba3"], "A_floor", "above 0"),
        (["attention", "retnet"], "rotary_base", "above 0"),
    ],
)
@pytest.mark.parametrize("value", [-1.0, NAN, INF])
def test_a_number_that_means_nothing_is_named(names: list[str], argument: str, least: str, value: float) -> None:
    for name in names:
        expected = f"{name}: {argument} must be a finite number {least}, got {value:g}"
        with pytest.raises(UserError, match=re.escape(expected)):
            create_mixer(name, 16, **{argument: value})


@pytest.mark.parametrize("name", mambaverse.list_mixers())
@pytest.mark.parametrize(
    ("bounds", "given"),
    [
        ([0, 6], r"as a tensor \(S \+ 1,\) int32, got \[0, 6\]"),
        (torch.tensor([0.0, 6.0]), r"got \(2,\) float32"),
        (torch.tensor([0, 6], dtype=torch.int16), r"got \(2,\) int16"),
        (torch.tensor([[0, 6]]), r"got \(1, 2\) int64"),
        (torch.tensor([0]), r"got \(1,\) int64"),
        (torch.tensor([], dtype=torch.int32), r"got \(0,\) int32"),
    ],
    ids=["list", "float", "int16", "two axes", "one", "none"],
)
def test_boundaries_that_are_none_are_named(name: str, bounds: Any, given: str) -> None:
    mixer = create_mixer(name, 16, **({"mixer": "s6"} if name == "bidirectional" else {}))
    with pytest.raises(ValueError, match=f"{type(mixer).__name__}: expected cu_seqlens .*{given}"):
        mixer(torch.zeros(1, 6, 16), cu_seqlens=bounds)


PARTS = {
    "s6": "a state (window, h) of tensors",
    "ssd": "a state (window, h) of tensors",
    "mamba3": "a state (θ, h, k, x) of tensors",
    "attention": "a state (k, v, length) of tensors",
    "s4d": "the tensor h as a state",
    "linear_attention": "the tensor h as a state",
    "retnet": "a state (h, tokens so far) of tensors",
}


@pytest.mark.parametrize("name", PARTS)
def test_a_state_that_is_none_of_the_mixers_is_named(name: str) -> None:
    mixer, x = create_mixer(name, 16, **({"causal": True} if name == "attention" else {})), torch.zeros(1, 3, 16)
    for state, said in (((torch.zeros(2),), "tuple (a tensor (2,))"), (3, "int")):
        with pytest.raises(
            ValueError, match=re.escape(f"{name}: expected {PARTS[name]}, got ") + ".*" + re.escape(said)
        ):
            mixer(x, state=state)
    for recorded in (True, False):
        with (
            torch.set_grad_enabled(recorded),
            pytest.raises(ValueError, match="expected a state, got None; init_state"),
        ):
            mixer.step(x[:, 0], None)


@pytest.mark.parametrize("name", PARTS)
def test_a_state_of_other_sequences_is_refused_and_both_numbers_named(name: str) -> None:
    mixer = create_mixer(name, 16, **({"causal": True} if name == "attention" else {}))
    x, bounds = torch.zeros(3, 4, 16), torch.tensor([0, 5, 5, 12])
    packed = x.reshape(1, 12, 16)
    for rows in (1, 2, 4):
        state = mixer.init_state(rows)
        with pytest.raises(ValueError, match=rf"\b3\b.*\b{rows}\b|\b{rows}\b.*\b3\b"):
            mixer(x, state=state)
        with pytest.raises(ValueError, match=rf"\b3\b.*\b{rows}\b|\b{rows}\b.*\b3\b"):
            mixer(packed, state=state, cu_seqlens=bounds)
        with torch.no_grad(), pytest.raises(ValueError, match=rf"\b3\b.*\b{rows}\b|\b{rows}\b.*\b3\b"):
            mixer.step(x[:, 0], state)


def test_what_is_no_mixer_is_named() -> None:
    with pytest.raises(UserError, match=r"mixer 'm': expected a subclass of .*\.Mixer, got 3"):
        mambaverse.register_mixer("m")(3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"expected a subclass of mambaverse.Mixer, got <class 'torch"):
        create_mixer("torch.nn:Linear", 16)
    with pytest.raises(UserError, match=r"'torch.nn:Linear': expected a subclass of mambaverse.Mixer"):
        mambaverse.create_model("test_vim", mixer="torch.nn:Linear")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("mamba", "s6"), ("Mamba1", "s6"), ("mamba-2", "ssd"), ("s4", "s4d"), ("Hydra", "bissd"), ("VSSD", "ncssd")],
)
def test_what_the_field_calls_a_mixer_is_suggested_and_not_taken(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"unknown mixer {name!r}, did you mean {meant!r}?")):
        create_mixer(name, 16)
    with pytest.raises(UserError, match=re.escape(f"no mixer is called {name!r}, did you mean {meant!r}?")):
        mambaverse.create_model("vim_nano_patch4_32", mixer_args={name: {}})


def test_what_may_be_meant_is_a_mixer() -> None:
    assert {*MEANT.values()} <= {*mambaverse.list_mixers()}
