"""timm's own tests, from its source distribution (they are not in the wheel), run on our models in another process."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import pytest
import timm

ENVIRONMENT = "MAMBAVERSE_TIMM_SDIST"
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[4]
NAME = f"timm-{timm.__version__}"


class Outcome(NamedTuple):
    """What became of one test: "passed", "skipped" or "failed", and why."""

    test: str
    parameters: str
    outcome: str
    reason: str


def unpacked_sdist(cache: pytest.Cache) -> Path:
    """Return the folder of the installed timm's source distribution; skip the test where there is none to be had.

    It is looked for in the environment variable MAMBAVERSE_TIMM_SDIST (the .tar.gz, or its folder), then in pytest's
    cache, then asked of pip, once.
    """
    given = os.environ.get(ENVIRONMENT)
    if given and Path(given).is_dir():
        return Path(given)
    folder = cache.mkdir("timm-sdist")
    if not given and (folder / NAME / "tests").is_dir():
        return folder / NAME
    archive = Path(given) if given else folder / f"{NAME}.tar.gz"
    if not given:
        command = [sys.executable, "-m", "pip", "download", f"timm=={timm.__version__}", "--no-deps", "--quiet"]
        arguments = ["--no-binary", "timm", "--dest", str(folder)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240, check=False)
        if done.returncode:
            pytest.skip(
                f"{NAME}.tar.gz, which holds timm's tests, is not in reach of pip here; fetch it elsewhere with "
                f"`{' '.join(['pip', *command[3:], *arguments[:2]])}` and run with {ENVIRONMENT}=that file "
                f"(pip: {done.stderr.strip().splitlines()[-1:]})"
            )
    with tarfile.open(archive) as tar:
        wanted = (f"{NAME}/tests/", f"{NAME}/pyproject.toml")
        tar.extractall(folder, [m for m in tar.getmembers() if m.name.startswith(wanted)], filter="data")
    return folder / NAME


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a process that finds this checkout and the plugin."""
    kept = {
        key: value for key, value in os.environ.items() if key != "GITHUB_ACTIONS"
    }  # timm runs less where it is set
    paths = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "TIMEOUT": "3600", **changes}


def run(folder: Path, models: str, report: Path, *files: str) -> list[Outcome]:
    """Run timm's test `files` on the models that match the wildcard `models`."""
    command = [sys.executable, "-m", "pytest", "-p", "mambaverse_in_timm", "-p", "no:cacheprovider", "-q"]
    process = subprocess.run(
        [*command, f"--junitxml={report}", *(f"tests/{file}" for file in files)],
        cwd=folder, env=environment(MAMBAVERSE_TIMM_MODELS=models), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode in (0, 1), process.stdout[-4000:] + process.stderr[-2000:]
    outcomes = []
    for case in ElementTree.parse(report).iter("testcase"):
        name, _, parameters = case.attrib["name"].partition("[")
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                reason = (child.text or child.attrib.get("message", "")) if outcome == "failed" else str(child.attrib)
        outcomes.append(Outcome(name, parameters.rstrip("]"), outcome, reason))
    return outcomes
