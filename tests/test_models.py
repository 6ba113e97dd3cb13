"""What holds of the models of every family: what they cannot be built with, and how they leave the meta device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mambaverse
from mambaverse.datasets import register_dataset
from mambaverse.engine.task import register_task
from mambaverse.errors import UserError
from mambaverse.models import MODELS

SMALL: dict[str, dict[str, Any]] = {
    "test_vim": {},
    "test_vmamba": {},
    "test_strata": {},
    "caduceus_ps_d32_n2": {"dim": 16},
    "dna_mamba_d64_n2": {"dim": 16},
    "audio_raw_nano": {"embed_dim": 16, "depth": 2},
    "aum_nano_patch16_128x128": {"embed_dim": 16, "depth": 2},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [  # with every kind of parameter and constant that a family may have
    *((name, {}) for name in SMALL),
    ("caduceus_ps_d32_n2", {"pool": "cls", "position": True, "max_length": 20}),
    ("caduceus_ps_d32_n2", {"pool": "place", "stem": "conv", "wide": 2, "max_length": 20}),
    ("caduceus_ps_d32_n2", {"pool": "attention", "stem": "kmer", "stem_kernel": [1, 2], "stem_dim": 4}),
    ("caduceus_ps_d32_n2", {"head": "mlm", "tie_embeddings": False}),
    ("caduceus_ps_d32_n2", {"head": "tokens", "num_classes": 3, "class_complement": [1, 0, 2]}),
    ("caduceus_ps_d32_n2", {"head": "regression"}),
    ("aum_nano_patch16_128x128", {"wide": 3}),
]


@pytest.mark.parametrize("name", mambaverse.list_models())
def test_every_model_says_what_it_is_and_is_built_for_any_classes_without_memory(name: str) -> None:
    assert MODELS.describe(name)["summary"]
    model = mambaverse.create_model(name, num_classes=3, device="meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def build(name: str, **overrides: Any) -> nn.Module:
    return mambaverse.create_model(name, **SMALL[name], **overrides).eval()


def inputs(name: str) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if name.startswith("aum"):
            return torch.randn(2, 128, 128)
        if name.startswith("audio"):
            return torch.randn(2, 2000)
        return torch.randn(2, 3, 64, 64) if name.startswith("test") else torch.randint(7, 12, (2, 18))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("num_classes", "10", "num_classes must be int, got '10'"),
        ("num_classes", -1, "num_classes: expected at least 0, got -1"),
        ("mixer", 3, "mixer must be str | Sequence["),
        ("mixer_args", [4], "mixer_args must be Mapping[str, Mapping[str, Any]], got [4]"),
        ("mixer_args", {"vim": 4}, "mixer_args must be Mapping[str, Mapping[str, Any]], got {'vim': 4}"),
        ("directions", 3, "directions: expected 1, 2, or None for as many as the mixer needs, got 3"),
        ("mlp_ratio", -1, "mlp_ratio: expected 0 for no MLP, or more, got -1"),
        ("mlp_ratio", float("inf"), "mlp_ratio: expected 0 for no MLP, or more, got inf"),
        ("mlp_ratio", 0.001, " channels is none; expected 0 for no MLP, or more"),
        ("layer_scale", float("nan"), "layer_scale: expected a finite number, or None for no factor, got nan"),
        ("drop_rate", 1.5, "drop_rate: expected a probability, from 0 to 1, got 1.5"),
        ("drop_path_rate", -0.1, "drop_path_rate: expected a probability, from 0 to 1, got -0.1"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(name: str, argument: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        build(name, **{argument: value})


@pytest.mark.parametrize(
    ("domain", "expected"),
    [("vison", "unknown domain 'vison', did you mean 'vision'?"), ("", "unknown domain ''; known: ")],
)
def test_a_domain_that_no_model_is_of_is_named(domain: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        mambaverse.list_models(domain=domain)


def with_width(pretrained: bool = False, *, width: int) -> nn.Module:
    """Return a layer."""
    return nn.Linear(width, 1)


def handing_on(pretrained: bool = False, **overrides: Any) -> nn.Module:
    return nn.Linear(1, **overrides)


def of_no_module(pretrained: bool = False) -> Any:
    return 3


@pytest.mark.parametrize(
    ("path", "arguments", "expected"),
    [
        ("math:sin", {}, "model 'math:sin': expected a factory f(pretrained=False, **overrides) -> torch.nn.Module"),
        ("math:pi", {}, "expected a factory f(pretrained=False, **overrides) -> torch.nn.Module, got 3.14"),
        (f"{__name__}:with_width", {}, f"{__name__}.with_width: missing a required argument: 'width'"),
        (f"{__name__}:with_width", {"width": 2, "widht": 3}, "unknown argument 'widht', did you mean 'width'?"),
        (
            f"{__name__}:handing_on",
            {"out_features": 2, "img_size": 8},
            "unexpected keyword argument 'img_size'; its factory was given img_size, out_features",
        ),
        (f"{__name__}:of_no_module", {}, "expected its factory to return a torch.nn.Module, got 3"),
    ],
)
def test_what_is_no_factory_of_models_is_named(path: str, arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        mambaverse.create_model(path, **arguments)


def test_a_factory_by_its_path_is_built_and_described() -> None:
    path = f"{__name__}:with_width"
    assert isinstance(mambaverse.create_model(path, width=2), nn.Linear)
    about = mambaverse.describe_model(path)
    assert about["summary"] == "Return a layer." and about["arguments"] == "(pretrained=False, *, width)"


@pytest.mark.parametrize(
    ("domain", "model", "factory", "expected"),
    [
        ("", nn.Linear, with_width, "expected domain to be a name such as 'vision', got ''"),
        ("q", 3, with_width, "expected model to be the class that the factory builds, got 3"),
        ("q", nn.Linear, len, "expected a factory f(pretrained=False, **overrides) -> torch.nn.Module, got <built-in"),
    ],
)
def test_what_is_no_model_is_not_registered(domain: str, model: Any, factory: Any, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        mambaverse.register_model(domain=domain, model=model)(factory)


@pytest.mark.parametrize(
    "decorate", [mambaverse.register_model, mambaverse.register_mixer, register_dataset, register_task]
)
def test_a_decorator_without_its_arguments_says_what_it_expects(decorate: Any) -> None:
    with pytest.raises(UserError, match=r"(model|mixer|dataset|task): expected .*, got <function with_width"):
        decorate(with_width)


@pytest.mark.parametrize("pattern", [None, 3, ["vim*"]], ids=str)
def test_a_pattern_that_is_no_text_is_refused(pattern: Any) -> None:
    for list_names in (mambaverse.list_models, mambaverse.list_mixers):
        with pytest.raises(UserError, match=r"expected a pattern such as 'v\*', got "):
            list_names(pattern)


def test_arguments_of_mixers_are_keyed_by_names() -> None:
    with pytest.raises(UserError, match="mixer_args: expected the names of mixers as keys, got 3"):
        mambaverse.create_model("test_vim", mixer_args={3: {}})


@pytest.mark.parametrize("name", ["test_vim", "test_vmamba", "test_strata"])
@pytest.mark.parametrize(("classes", "expected"), [(-3, "at least 0, got -3"), ("3", "a whole number, got '3'")])
def test_a_head_of_no_number_of_classes_is_refused(name: str, classes: Any, expected: str) -> None:
    model: Any = mambaverse.create_model(name)
    head = model.get_classifier()
    with pytest.raises(UserError, match=f"num_classes: expected {expected}"):
        model.reset_classifier(classes)
    assert model.get_classifier() is head


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_weights_drawn_after_the_meta_device_are_all_drawn(name: str, overrides: dict[str, Any]) -> None:
    model = build(name, **overrides, device="meta")
    assert model(inputs(name).to("meta")).is_meta
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)
    reset: Any = getattr(model, "init_weights", None) or model.reset_parameters
    reset()
    left = [key for key, value in model.state_dict().items() if not torch.isfinite(value).all()]
    assert not left
    assert torch.isfinite(model(inputs(name))).all()


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_weights_loaded_after_the_meta_device_are_all_it_needs(
    name: str, overrides: dict[str, Any], assign: bool
) -> None:
    model = build(name, **overrides)
    with torch.device("meta"):
        loaded = build(name, **overrides)
    if not assign:
        loaded.to_empty(device="cpu")
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.data.fill_(0)
    loaded.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(loaded(inputs(name)), model(inputs(name)))


@pytest.mark.parametrize(
    ("name", "overrides", "sizes"),
    [
        ("aum_nano_patch16_128x128", {"wide": 3, "mixer": "attention"}, (5, 128, 128)),
        ("caduceus_ps_d32_n2", {"mixer": "vim"}, (5, 75)),  # traced shorter than a chunk of the scan, run longer
        ("dna_mamba_d64_n2", {"mixer": "s6"}, (5, 75)),
    ],
)
def test_an_exported_program_takes_other_batches_and_lengths(
    name: str, overrides: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    model, x = mambaverse.create_model(name, **{**SMALL[name], **overrides, "depth": 1}).eval(), inputs(name)
    free = {axis: torch.export.Dim.DYNAMIC for axis in range(2) if x.shape[axis] != sizes[axis]}
    program: Any = torch.export.export(model, (x,), dynamic_shapes=(free,)).module()
    other = torch.randn(sizes) if x.is_floating_point() else torch.randint(7, 12, sizes)
    expected = model(other)
    torch.testing.assert_close(program(other), expected)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    program(other).square().sum().backward()
    parameters = dict(program.named_parameters())
    for (key, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameters[key].grad, gradient)
