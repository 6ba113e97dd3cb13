"""The packages that ours are compared with; nothing of them is imported before it is timed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def installed(package: str) -> bool:
    """Return whether `package` can be found, without importing it."""
    return importlib.util.find_spec(package) is not None


def load(target: str) -> Any:
    """Import "package.module:name"."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
