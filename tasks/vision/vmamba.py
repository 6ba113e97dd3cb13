"""VMamba: a pyramid of token grids, read in four orders by SS2D.

Source: Liu et al. 2024, "VMamba: Visual State Space Model" (arXiv 2401.10166), section 4.3. Weights of its authors load
by `load_state_dict`, under the names of any of their versions (see vmamba_weights.py).
"""

# No `from __future__ import annotations`: see pyramid.py.
from typing import Any

from mambaverse.tasks.vision.pyramid import Pyramid
from mambaverse.tasks.vision.vmamba_weights import rename


class VMamba(Pyramid):
    """A hierarchical image classifier; any mixer by name. Images of any size, not only square ones.

    It is a `Pyramid`, with its arguments, that reads the checkpoints of VMamba's authors.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Give parameters of an original checkpoint our names, in place, before they are loaded."""
        own = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        renamed = rename({name.removeprefix(prefix): value for name, value in own.items()})
        for name in own:
            del state_dict[name]
        state_dict.update({prefix + name: value for name, value in renamed.items()})
        super()._load_from_state_dict(state_dict, prefix, *others)
