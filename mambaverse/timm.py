"""Makes the image models known to timm: `import mambaverse.timm`, then `timm.create_model("vim_tiny_patch16_224")`.

`python -m mambaverse.timm train.py ARGS...` runs a script of timm's, or any other, with the models registered.
"""

from __future__ import annotations

import runpy
import sys

from mambaverse.models import list_models

VISION_MODELS = list_models(domain="vision")  # importing a family registers it with timm too


def main() -> None:
    """Run the script named by the first argument with the remaining ones."""
    if len(sys.argv) < 2:
        print("usage: python -m mambaverse.timm SCRIPT.py [ARGUMENT ...]", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
