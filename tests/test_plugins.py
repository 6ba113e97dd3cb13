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
