"""A package of somebody else's brings a mixer: found by its entry point, checked by the kit, trained like any other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIXER = '''
"""A mixer in another package: a gated running mean."""
import torch
from torch import nn
from mambaverse.mixers.base import Mixer


class RunningMean(Mixer):
    """Gated mean of what came before."""

    causal = True

    def __init__(self, dim, expand=1, device=None, dtype=None):
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * expand * dim, device=device, dtype=dtype)
        self.out_proj = nn.Linear(expand * dim, dim, device=device, dtype=dtype)

    def mix(self, x):
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        return self.out_proj(u.cumsum(1) / count[:, None] * torch.sigmoid(gate))
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out an installed package `labmixers` with two entry points, one of them broken."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "labmixers.py").write_text(MIXER)
    info = folder / "labmixers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: labmixers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mambaverse.mixers]\nrunning_mean = labmixers:RunningMean\nunfinished = labmixers_missing:X\n"
    )
    return folder


def run(site: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site), **environment}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


def test_plugin_passes_the_kit_by_its_entry_point(site: Path) -> None:
    code = "import mambaverse; mambaverse.check_mixer('running_mean', expand=2)"
    done = run(site, "-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr


def test_plugin_is_listed_and_a_broken_one_stops_nothing(site: Path) -> None:
    done = run(site, "-m", "mambaverse.cli", "list", "mixers")
    assert {"running_mean", "unfinished", "s6"} <= set(done.stdout.split())
    verbose = run(site, "-m", "mambaverse.cli", "list", "mixers", "un*", "-v", COLUMNS="200")
    assert "broken" in verbose.stdout and "labmixers_missing" in verbose.stdout
    off = run(site, "-m", "mambaverse.cli", "list", "mixers", MAMBAVERSE_PLUGINS="off")
    assert "running_mean" not in off.stdout.split()


def test_broken_plugin_is_one_line_and_status_2(site: Path, tmp_path: Path) -> None:
    done = run(site, "-m", "mambaverse.cli", "train", "vision/digits", "model.mixer=unfinished",
               f"trainer.output_dir={tmp_path}")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: mixer 'unfinished' (entry point of package labmixers)")
    assert "Traceback" not in done.stderr


def second(folder: Path, name: str, points: str) -> Path:
    """Lay out another package called `name` with entry points for mixers."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mambaverse.mixers]\n{points}\n")
    return folder


def test_plugin_that_exits_when_imported_is_reported_as_broken(tmp_path: Path) -> None:
    (tmp_path / "leaver.py").write_text("raise SystemExit(0)\n")
    second(tmp_path, "leavers", "leaves = leaver:X")
    listed = run(tmp_path, "-m", "mambaverse.cli", "list", "mixers", "[ls]*", "-v", COLUMNS="200")
    assert listed.returncode == 0 and "broken" in listed.stdout and "SystemExit" in listed.stdout
    done = run(tmp_path, "-m", "mambaverse.cli", "train", "vision/digits", "plugins=[leaver]")
    assert done.returncode == 2
    assert "plugin 'leaver' cannot be imported: SystemExit: 0" in done.stderr


def test_packages_allowed_go_by_any_spelling_and_one_left_out_is_named(site: Path) -> None:
    code = "from mambaverse.mixers import MIXERS; MIXERS.entry('mine')"
    folder = second(site.parent / f"{site.name}_dots", "Lab.of_mine", "mine = labmixers:RunningMean [gpu]")
    for allowed in ("lab-of-mine", "lab.of.mine, other", "Lab_Of_Mine"):
        done = run(folder, "-c", code, MAMBAVERSE_PLUGINS=allowed)
        assert done.returncode == 0, done.stderr
    for refused in ("off", "labofmine"):
        done = run(folder, "-c", code, MAMBAVERSE_PLUGINS=refused)
        assert f"MAMBAVERSE_PLUGINS={refused} leaves out package Lab.of_mine, which has it" in done.stderr


def test_entry_point_may_name_extras_and_a_taken_name_says_by_whom(site: Path, tmp_path: Path) -> None:
    second(tmp_path, "others", "mean_too = labmixers:RunningMean [gpu]\nrunning_mean = others:X\ns6 = others:X")
    both = os.pathsep.join(map(str, (site, tmp_path)))
    done = run(tmp_path, "-c", "import mambaverse; mambaverse.create_mixer('mean_too', dim=8)", PYTHONPATH=both)
    assert done.returncode == 0, done.stderr
    assert "is ignored: the name is taken by entry point of package labmixers" in done.stderr
    assert "is ignored: the name is taken by built-in mambaverse.mixers.s6" in done.stderr


TRAIN = "import json, sys; from mambaverse.cli import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("vision/digits", ["running_mean", "labmixers:RunningMean"]),
        pytest.param("dna/rrna16s", ["running_mean"], marks=pytest.mark.slow),
        pytest.param("audio/mandarin_tones", ["running_mean"], marks=pytest.mark.slow),
    ],
)
def test_plugin_trains_in_every_domain(site: Path, tmp_path: Path, config: str, names: list[str]) -> None:
    overrides = ["trainer.epochs=1", "trainer.pictures=false", "model.args.depth=1", f"trainer.output_dir={tmp_path}"]
    commands = [
        ["train", config, *overrides, f"model.mixer={name}", f"model.mixer_args[{name}].expand=2"] for name in names
    ]
    done = run(site, "-c", TRAIN, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/best.safetensors"))) == len(names)
