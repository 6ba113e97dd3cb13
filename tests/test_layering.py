"""Imports point one way: kernels <- mambaverse <- tasks; only the command line and the timm bridge may name tasks."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"kernels": "mambaverse.kernels", "mambaverse": "mambaverse", "tasks": "mambaverse"}
MAY_NAME_TASKS = {ROOT / "mambaverse/cli.py", ROOT / "mambaverse/timm.py"}
KERNELS_MAY_IMPORT = {"torch", "numpy", "einops", "numba", "llvmlite", "triton"}  # test_import_cost.py says when
FILES = [path for layer in ALLOWED for path in (ROOT / layer).rglob("*.py")]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        if name.split(".")[0] != "mambaverse":
            continue
        assert name.startswith(ALLOWED[layer]), f"{layer} imports {name}"
        if layer == "mambaverse" and path not in MAY_NAME_TASKS:
            assert not name.startswith("mambaverse.tasks"), f"the core imports {name}"


@pytest.mark.parametrize("path", list((ROOT / "kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_need_torch_and_compilers_alone(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] in sys.stdlib_module_names | KERNELS_MAY_IMPORT | {"mambaverse"}, name


def test_no_package_file_in_the_owners_folders() -> None:
    """A regular package `kernels` in the working directory would shadow the one on PyPI that transformers imports."""
    for folder in ("kernels", "tasks", "configs"):
        assert not (ROOT / folder / "__init__.py").exists()
        assert (ROOT / "mambaverse" / folder).is_symlink()


def test_files_can_be_held_in_the_head() -> None:
    too_long = {
        str(path.relative_to(ROOT)): n
        for path in FILES
        if (n := len(path.read_text().splitlines())) > (700 if path.name.startswith("triton") else 400)
    }
    assert not too_long
