"""mambaverse: state-space models as timm is to image models.

Everything here is imported on first use, so that `import mambaverse.kernels.selective_scan` loads torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mambaverse._version import __version__

if TYPE_CHECKING:
    from mambaverse.kernels.backend import use_backend
    from mambaverse.mixers import create_mixer, describe_mixer, list_mixers, register_mixer
    from mambaverse.mixers.base import Mixer
    from mambaverse.models import create_model, describe_model, list_models, register_model
    from mambaverse.testing import check_mixer

_HOMES = {
    "Mixer": "mambaverse.mixers.base",
    "check_mixer": "mambaverse.testing",
    "create_mixer": "mambaverse.mixers",
    "create_model": "mambaverse.models",
    "describe_mixer": "mambaverse.mixers",
    "describe_model": "mambaverse.models",
    "list_mixers": "mambaverse.mixers",
    "list_models": "mambaverse.models",
    "register_mixer": "mambaverse.mixers",
    "register_model": "mambaverse.models",
    "use_backend": "mambaverse.kernels.backend",
}

__all__ = [
    "Mixer",
    "__version__",
    "check_mixer",
    "create_mixer",
    "create_model",
    "describe_mixer",
    "describe_model",
    "list_mixers",
    "list_models",
    "register_mixer",
    "register_model",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mambaverse' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *_HOMES})
