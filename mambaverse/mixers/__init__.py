"""Sequence mixers by name: every file here is one mixer; others register theirs with `register_mixer`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mambaverse.errors import UserError
from mambaverse.registry import Registry, RegistryError, check_arguments, check_complete, is_a, signatures

if TYPE_CHECKING:
    from mambaverse.mixers.base import Mixer

MEANT = {  # what the field calls some of them: suggested, not taken
    "mamba": "s6",
    "mamba1": "s6",
    "mamba2": "ssd",
    "s4": "s4d",
    "bimamba": "vim",
    "hydra": "bissd",  # the nearest: both directions of SSD, though not one quasi-separable matrix
    "vss": "ss2d",
    "vssd": "ncssd",
    "vmamba": "ss2d",
    "mha": "attention",
    "transformer": "attention",
    "retention": "retnet",
}
MIXERS: Registry[type[Mixer]] = Registry("mixer", builtins="mambaverse.mixers", group="mambaverse.mixers", meant=MEANT)

__all__ = ["MIXERS", "Mixer", "create_mixer", "describe_mixer", "list_mixers", "register_mixer"]


def __getattr__(name: str) -> Any:
    """Import the base class on first use: it loads torch, which listing names can do without."""
    if name != "Mixer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mambaverse.mixers.base import Mixer

    return Mixer


def register_mixer(name: str, *, overwrite: bool = False) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: make a `Mixer` available as `name` wherever a mixer is named.

    Raises:
        RegistryError: if the name is taken and `overwrite` is False, or the class is no `Mixer`.
    """
    from mambaverse.mixers.base import Mixer

    return MIXERS.register_class(name, Mixer, overwrite=overwrite)


def create_mixer(name: str, dim: int, **arguments: Any) -> Mixer:
    """Build the mixer `name` for sequences of `dim` channels.

    Args:
        name: A registered name, or "package.module:Class".
        dim: Channels of input and output, D in (B, L, D).
        arguments: The mixer's own (`d_state`, `expand`, ..., `device`, `dtype`).

    Raises:
        RegistryError: unknown mixer, or one whose import fails.
        UserError: an argument that this mixer does not have, or whose type is not the annotated one; one that it needs
            and was not given; `dim` below 1.
    """
    cls = mixer_class(name)
    if not is_a(dim, int) or dim < 1:
        raise UserError(f"mixer {name!r}: dim must be an int of at least 1, got {dim!r}")
    _check_contract(cls, arguments, f"mixer {name!r}")
    check_arguments(cls, arguments, f"mixer {name!r}")
    check_complete(cls, f"mixer {name!r}", dim, **arguments)
    return cls(dim, **arguments)


def mixer_class(name: str) -> type[Mixer]:
    """Return the class called `name`, or "package.module:Class".

    Raises:
        RegistryError: unknown mixer, one whose import fails, or what is no subclass of `Mixer`.
    """
    from mambaverse.mixers.base import Mixer

    cls = MIXERS.get(name)
    if not (isinstance(cls, type) and issubclass(cls, Mixer)):
        raise RegistryError(f"mixer {name!r}: expected a subclass of mambaverse.Mixer, got {cls!r}")
    return cls


def list_mixers(pattern: str = "*") -> list[str]:
    """Return the sorted names of the mixers that match `pattern`, plug-ins included, importing none of them."""
    return MIXERS.list(pattern)


def describe_mixer(name: str) -> dict[str, str]:
    """Return a mixer's name, source, summary and signature."""
    return MIXERS.describe(name)


def _check_contract(cls: type[Mixer], arguments: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a class that cannot be built as every mixer is: cls(dim, device=..., dtype=...)."""
    from mambaverse.mixers.base import Mixer

    places = {key: arguments[key] for key in ("device", "dtype") if key in arguments}
    try:
        inspect.signature(cls).bind_partial(0, **places)
        complete = cls.__init__ is not Mixer.__init__  # that one takes anything, and refuses it later
    except TypeError:
        complete = False
    if not complete:
        raise UserError(
            f"{where}: expected {cls.__name__}.__init__(self, dim, ..., device=None, dtype=None), "
            f"got {signatures(cls)['arguments']}"
        )
