"""The README's code runs: every Python block as it stands, every command (training ones for one epoch)."""

import math
import os
import random
import re
import shlex
import struct
import subprocess
import sys
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [  # block by block
    [line.partition("  #")[0].strip() for line in code.splitlines() if line.startswith("mambaverse ")]
    for language, code in BLOCKS
    if language == "bash"
]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_block_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """What the README's reader has: sequences in a FASTA, sounds in WAV files, two folders of photographs."""
    draw, records = random.Random(0), []
    for i in range(60):
        kind, weights = (("poor", (3, 1, 1, 3)), ("rich", (1, 3, 3, 1)))[i % 2]  # in G and C
        records.append(f">r{i} label={kind}\n{''.join(draw.choices('ACGT', weights, k=80))}\n")
    (tmp_path / "my.fa").write_text("".join(records))
    (tmp_path / "new.fa").write_text("".join(records[:4]))
    for i in range(24):
        name, hertz = (("low", 200), ("high", 900))[i % 2]
        (folder := tmp_path / "sounds" / name).mkdir(parents=True, exist_ok=True)
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            turns = (2 * math.pi * hertz * (1 + i / 100) * t / 16_000 for t in range(8_000))
            file.writeframes(b"".join(struct.pack("<h", round(9_000 * math.sin(turn))) for turn in turns))
    for root, kinds in (("photos", ["day", "night"]), ("birds", ["heron", "owl", "wren"])):
        for i in range(4 * len(kinds)):
            (folder := tmp_path / root / kinds[i % len(kinds)]).mkdir(parents=True, exist_ok=True)
            Image.effect_noise((96, 80), 20 + 60 * (i % len(kinds))).save(folder / f"{i}.jpg")
    Image.effect_noise((96, 80), 50).save(tmp_path / "new.jpg")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)  # a dozen processes, each of which imports torch
def test_commands_run(own_data: Path) -> None:
    """Each block in order, so that a later command can use an earlier one's run; two blocks at a time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(block: list[str]) -> list[str]:
        for command in block:
            arguments = shlex.split(command)[1:]
            if arguments[0] == "train":
                arguments.append("trainer.epochs=1")
            program = [sys.executable, "-m", "mambaverse.cli", *arguments]
            done = subprocess.run(program, cwd=own_data, capture_output=True, text=True, env=environment)
            if done.returncode != 0:
                return [f"{command}\n{done.stderr}"]
        return []

    assert sum(map(len, COMMANDS)) > 10
    with ThreadPoolExecutor(2) as two:
        assert [error for errors in two.map(run, sorted(COMMANDS, key=len, reverse=True)) for error in errors] == []


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in t]
    assert [t for t in targets if not (root / t).exists()] == []
