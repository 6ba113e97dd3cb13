"""What an import loads: the scan alone needs torch alone, and listing names does without torch."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def loaded_by(statement: str, *, modules: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*(m for m in {modules.split()!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_an_operator_loads_torch_alone() -> None:
    """One after the other in a process: what an operator loads would be there after the first that does."""
    operators = [path.parent.name for path in (ROOT / "kernels").glob("*/cases.py")]
    assert {"causal_conv1d", "lti_conv", "norm", "selective_scan", "ssd"} <= {*operators}
    statement = "; ".join(f"import mambaverse.kernels.{name}" for name in operators)
    modules = "torch triton timm numba llvmlite torchvision omegaconf einops"
    assert loaded_by(statement, modules=modules) == {"torch"}


def test_import_mambaverse_loads_nothing() -> None:
    assert loaded_by("import mambaverse", modules="torch timm numba numpy omegaconf") == set()


def test_listing_mixers_imports_none() -> None:
    modules = "torch mambaverse.mixers.s6 numba timm"
    assert loaded_by("import mambaverse; mambaverse.list_mixers()", modules=modules) == set()


@pytest.mark.parametrize("kind", ["mixers", "datasets", "configs"])
def test_listing_does_without_torch(kind: str) -> None:
    statement = f"from mambaverse.cli import main; main(['list', '{kind}'])"
    modules = "torch mambaverse.mixers.s6 numba timm"
    assert not loaded_by(statement, modules=modules) & set(modules.split())  # the names are printed too


def test_audio_models_do_without_the_engine() -> None:
    statement = "import mambaverse.tasks.audio.models.aum, mambaverse.tasks.audio.models.audio_raw"
    assert loaded_by(statement, modules="torch mambaverse.engine omegaconf") == {"torch"}


def test_what_predicts_loads_neither_metrics_nor_plots() -> None:
    """Of torchmetrics and matplotlib, which take seconds to import."""
    tasks = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "tasks").glob("*/task.py")]
    tasks += [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "tasks").glob("*/tasks/[a-z]*.py")]
    assert len(tasks) >= 4
    statement = "; ".join(f"import mambaverse.{'.'.join(task.parts)}" for task in tasks)
    statement = f"import mambaverse.engine.evaluate; {statement}"
    assert loaded_by(statement, modules="torchmetrics scipy.signal matplotlib.figure torch") == {"torch"}


@pytest.mark.parametrize(("code", "bound_s"), [("import mambaverse", 0.3)])
def test_import_is_quick(code: str, bound_s: float) -> None:
    def seconds(statement: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        return time.perf_counter() - start

    assert min(seconds(code) - seconds("pass") for _ in range(3)) < bound_s
