"""The README's code runs: every Python block as it stands, every command (training ones for one epoch)."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.partition("  #")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.startswith("mambaverse ")
]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_block_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_run(tmp_path: Path) -> None:
    """In order and in one folder, so that a later command can use an earlier one's run."""
    assert COMMANDS
    for command in COMMANDS:
        arguments = shlex.split(command)[1:]
        if arguments[0] == "train":
            arguments.append("trainer.epochs=1")
        done = subprocess.run(
            [sys.executable, "-m", "mambaverse.cli", *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in t]
    assert [t for t in targets if not (root / t).exists()] == []
