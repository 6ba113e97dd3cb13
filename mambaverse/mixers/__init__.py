"""Sequence mixers by name: every file here is one mixer; others register theirs with `register_mixer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mambaverse.mixers.base import Mixer
from mambaverse.registry import Registry, check_arguments

MIXERS: Registry[type[Mixer]] = Registry("mixer", builtins="mambaverse.mixers", group="mambaverse.mixers")

__all__ = ["MIXERS", "Mixer", "create_mixer", "describe_mixer", "list_mixers", "register_mixer"]


def register_mixer(name: str, *, overwrite: bool = False) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: make a `Mixer` available as `name` wherever a mixer is named.

    Raises:
        RegistryError: if the name is taken and `overwrite` is False.
    """
    return MIXERS.register(name, overwrite=overwrite)


def create_mixer(name: str, dim: int, **arguments: Any) -> Mixer:
    """Build the mixer `name` for sequences of `dim` channels.

    Args:
        name: A registered name, or "package.module:Class".
        dim: Channels of input and output, D in (B, L, D).
        arguments: The mixer's own (`d_state`, `expand`, ..., `device`, `dtype`).

    Raises:
        RegistryError: unknown mixer, or one whose import fails.
        UserError: an argument that this mixer does not have.
    """
    cls = MIXERS.get(name)
    check_arguments(cls, arguments, f"mixer {name!r}")
    return cls(dim, **arguments)


def list_mixers(pattern: str = "*") -> list[str]:
    """Return the sorted names of the mixers that match `pattern`, plug-ins included, importing none of them."""
    return MIXERS.list(pattern)


def describe_mixer(name: str) -> dict[str, str]:
    """Return a mixer's name, source, summary and signature."""
    return MIXERS.describe(name)
