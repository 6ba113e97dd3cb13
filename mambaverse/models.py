"""Models by name, in timm's manner: `create_model("vim_tiny_patch16_224", num_classes=10)`.

Factories live with their domain, in tasks/<domain>/models/<family>.py; the registry finds them by listing the folders.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from mambaverse.errors import UserError, suggest
from mambaverse.registry import Registry, RegistryError, check_arguments, check_complete, signatures

Factory = TypeVar("Factory", bound=Callable[..., nn.Module])
MODELS: Registry[Callable[..., nn.Module]] = Registry(
    "model", builtins="mambaverse.tasks.*.models", group="mambaverse.models", module_is_name=False
)


def register_model(
    *given: Any,
    domain: str = "",
    model: Callable[..., nn.Module] | None = None,
    also: Sequence[str] = (),
    overwrite: bool = False,
) -> Callable[[Factory], Factory]:
    """Function decorator: register a factory `f(pretrained=False, **overrides) -> nn.Module` under its own name.

    Args:
        given: Nothing; what the bare `@register_model` gives is refused.
        domain: "vision", "dna", "audio", ...: what `list_models(domain=...)` filters by; needed.
        model: The class that the factory builds; overrides are checked against its signature; needed.
        also: Further arguments that the factory takes.
        overwrite: Replace a factory of the same name rather than raise.

    Raises:
        RegistryError: the name is taken and `overwrite` is False; what is no class, or no such factory.
    """
    if given:
        form = "@register_model(domain='vision', model=Class) above a factory"
        raise RegistryError(f"register_model: expected {form}, got {', '.join(map(repr, given))}")
    if not (isinstance(domain, str) and domain and domain == domain.strip()):
        raise RegistryError(f"register_model: expected domain to be a name such as 'vision', got {domain!r}")
    if not callable(model):
        raise RegistryError(f"register_model: expected model to be the class that the factory builds, got {model!r}")

    def add(factory: Factory) -> Factory:
        _check_factory(factory, "register_model")
        tags = {"domain": domain, "model": model, "also": tuple(also)}
        MODELS.register(factory.__name__, factory, overwrite=overwrite, **tags)
        return factory

    return add


def create_model(name: str, pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Build the model `name`.

    Args:
        name: A registered name, or "package.module:factory".
        pretrained: Load the published weights.
        overrides: Arguments of the family: `num_classes`, `mixer`, `mixer_args`, `drop_path_rate`, `device`, ...

    Raises:
        RegistryError: unknown model.
        UserError: an argument that the family or its mixer does not have, or of another type than is annotated; one
            that the factory needs and was not given; what is no factory of models.
    """
    factory, tags, where = MODELS.get(name), _tags(name), f"model {name!r}"
    _check_factory(factory, where)
    if "model" in tags:
        check_arguments(tags["model"], overrides, where, tags["also"])
    else:
        check_arguments(factory, overrides, where)
    check_complete(factory, where, pretrained=pretrained, **overrides)
    try:
        model: Any = factory(pretrained=pretrained, **overrides)
    except TypeError as error:  # of a factory that hands on whatever it is given
        if not any(str(error).endswith(f"unexpected keyword argument {name!r}") for name in overrides):
            raise
        raise UserError(f"{where}: {error}; its factory was given {', '.join(sorted(overrides))}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{where}: expected its factory to return a torch.nn.Module, got {model!r}")
    return model


def list_models(pattern: str = "*", domain: str | None = None) -> list[str]:
    """Return the sorted names of the models that match `pattern` (of one `domain`).

    Raises:
        UserError: no model is of that `domain`.
    """
    if domain is None:
        return MODELS.list(pattern)
    if domain not in (domains := MODELS.tag_values("domain")):
        raise UserError(f"unknown domain {domain!r}{suggest(str(domain), domains)}")
    return MODELS.list(pattern, domain=domain)


def describe_model(name: str) -> dict[str, str]:
    """Return a model's name, source, summary, the signature of its class, and what it costs.

    Of "package.module:factory" the signature is the factory's.

    "parameters" and "multiply_adds" (of one input forward, the scans included) are those of the defaults; the second
    is "" where a model does not say how large its inputs are, and both where it cannot be built of fake tensors.
    """
    from mambaverse.flops import model_cost  # which imports this module

    description = MODELS.describe(name)
    try:
        parameters, cost = model_cost(name)
    except Exception:  # a model that cannot be made without memory, or at all: it says so where it is built
        description |= {"parameters": "", "multiply_adds": ""}
    else:
        description |= {"parameters": str(parameters), "multiply_adds": "" if cost is None else str(cost.multiply_adds)}
    if "model" in (tags := _tags(name)):
        description |= signatures(tags["model"])
    return description


def _tags(name: str) -> dict[str, Any]:
    """Return what a model was registered with; nothing of "package.module:factory"."""
    return {} if ":" in name else MODELS.entry(name).tags


def _check_factory(factory: Any, where: str) -> None:
    """Raise RegistryError unless `factory` can be called as every factory is: f(pretrained=..., ...)."""
    try:
        inspect.signature(factory).bind_partial(pretrained=False)
    except (TypeError, ValueError):  # no such argument; nothing that is called, or of no known signature
        raise RegistryError(
            f"{where}: expected a factory f(pretrained=False, **overrides) -> torch.nn.Module, got {factory!r}"
        ) from None
