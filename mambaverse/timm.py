"""Makes the image models known to timm: `import mambaverse.timm`, then `timm.create_model("vim_tiny_patch16_224")`.

`python -m mambaverse.timm train.py ARGS...` runs a script of timm's, or any other, with the models registered;
`torchrun --nproc-per-node 8 -m mambaverse.timm train.py ARGS...` runs it on many GPUs. timm's train.py, validate.py and
others are in its repository, https://github.com/huggingface/pytorch-image-models, and not in the installed package.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from mambaverse.errors import UserError, suggest
from mambaverse.models import list_models

VISION_MODELS = list_models(domain="vision")  # importing a family registers it with timm too


def run_script(path: str, arguments: Sequence[str] = ()) -> None:
    """Run a Python script as `python PATH ARGUMENTS...` does, in this process.

    Raises:
        UserError: no such file.
    """
    script = Path(path)
    if not script.is_file():
        folder = script.parent
        known = [str(folder / found.name) for found in folder.glob("*.py")]
        hint = suggest(path, known) if known else f"; {str(folder)!r} holds no Python scripts"
        raise UserError(
            f"no script {path!r}{hint}. timm's own (train.py, validate.py) come with its repository, not with the "
            "installed package: git clone https://github.com/huggingface/pytorch-image-models"
        )
    sys.argv = [path, *arguments]
    sys.path[0] = str(script.parent.resolve())  # where Python looks for the modules beside a script
    runpy.run_path(path, run_name="__main__")


def main() -> None:
    """Run the script named by the first argument with the remaining ones."""
    if len(sys.argv) < 2:
        print("usage: python -m mambaverse.timm SCRIPT.py [ARGUMENT ...]", file=sys.stderr)
        raise SystemExit(2)
    try:
        run_script(sys.argv[1], sys.argv[2:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
