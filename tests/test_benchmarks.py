"""Programs of benchmarks/: each has a help, which needs no peer; a peer that is not installed is said in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text())


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program where neither transformers nor mambapy is installed, whatever is installed here."""
    hidden = "import runpy, sys; sys.modules['transformers'] = sys.modules['mambapy'] = None"
    start = f"del sys.argv[0]; sys.path.insert(0, {str(FOLDER)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", f"{hidden}; {start}", str(FOLDER / f"{program}.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_no_peer(program: str) -> None:
    done = run(program, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_nothing_to_compare_with_is_one_line() -> None:
    done = run("cpu_models")
    expected = "nothing to time ours beside: not installed: transformers, mambapy; install them with `pip install"
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith(expected), done.stderr


def test_unknown_operators_are_named_before_any_is_timed() -> None:
    done = run("cpu_first_calls", "norm", "nrom")
    assert done.returncode == 2 and "no such operator: nrom; choose from " in done.stderr and not done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "without"), [("cpu_ssd", "transformers"), ("cpu_selective_scan", "transformers, mambapy")]
)
def test_a_peer_that_is_not_installed_is_left_out(program: str, without: str) -> None:
    done = run(program, "--quick")
    assert done.returncode == 0, done.stderr
    assert f"not installed: {without}; install them with `pip install '.[bench]'`" in " ".join(done.stdout.split())
    assert "ours" in done.stdout


def test_audio_tables_have_both_floors(tmp_path: Path) -> None:
    for seed, ours in enumerate((0.97, 0.98, 0.99)):
        (folder := tmp_path / f"tones-fold0-seed{seed}-vim").mkdir()
        floors = {"MFCC 20 x 20, SVM": {"accuracy": 0.5}, "MFCC statistics, SVM": {"accuracy": 0.75}}
        found = {"metrics": {"accuracy": ours}, "baselines": floors, "parameters": 1000, "seconds": 1.0}
        (folder / "results.json").write_text(json.dumps(found))
    done = run("audio_tables", "tones", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tones.csv").read_text().splitlines()[-1] == '"mean, fold 0, vim",,98.00 ± 1.00,50.00,75.00,'
