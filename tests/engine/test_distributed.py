"""Two processes, started by torchrun, against one process with a batch as large as theirs together.

On gloo, or with `-m gpu` on the NCCL of two GPUs.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from mambaverse.engine.run import train
from tests.engine.toy import numbers, toy_config

# 101 training samples: the last batch of an epoch is left out. 37 to evaluate: the last batches are ragged.
OPTIONS = (
    "task.dropout=0", "task.mix=false", "data.noise=0", "data.num_train=101", "data.num_eval=37",
    "data.eval_batch_size=5", "trainer.accumulate=2", "trainer.ema_decay=0.9",
)  # fmt: skip

SCRIPT = """
import json, os, sys
from pathlib import Path
from rich.console import Console
from mambaverse.engine.evaluate import evaluate
from mambaverse.engine.run import resume, train
from tests.engine.toy import Toy, toy_config

folder = Path(sys.argv[1]) / os.environ["RANK"]
folder.mkdir()
options = sys.argv[2:]
quiet = Console(quiet=True)

def run(name, *more):
    return toy_config(folder, *options, *more, f"trainer.output_dir={sys.argv[1]}", name=name)

whole = train(run("whole"), console=quiet)
evaluated = evaluate(whole.folder)
dropout = ("task.dropout=0.2", "data.noise=0.1", "task.mix=true", "trainer.log_every=1")
pictures = "trainer.pictures=true"
train(run("dropout", *dropout), console=quiet)
Toy.signal_at = 8
cut = train(run("cut", *dropout, pictures), console=quiet)
again = resume(cut.folder, quiet)
seen = {"metrics": whole.metrics, "evaluated": evaluated, "signal": cut.signal, "again": again.metrics}
(folder / "seen.json").write_text(json.dumps(seen))
"""


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, TWO_GPUS))])
def device(request: pytest.FixtureRequest) -> str:
    return f"trainer.device={request.param}"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, device: str) -> Path:
    folder = tmp_path_factory.mktemp("two")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), *OPTIONS, device, "data.batch_size=8"],
        capture_output=True, text=True, timeout=200, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _seen(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / str(rank) / "seen.json").read_text())


def test_two_processes_learn_what_one_learns_from_batches_twice_as_large(
    both: Path, tmp_path: Path, quiet: Console, device: str
) -> None:
    one = train(toy_config(tmp_path, *OPTIONS, device, "data.batch_size=16", "data.eval_batch_size=10"), console=quiet)
    rows = [json.loads(line) for line in (both / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(one.history)
    for left, right in zip(numbers(one.history), numbers(rows), strict=True):
        assert right.pop("kind") == left.pop("kind")
        assert right == pytest.approx(left, rel=1e-4)
    weights = load_file(both / "whole" / "last.safetensors")
    torch.testing.assert_close(weights, load_file(one.folder / "last.safetensors"), rtol=1e-3, atol=1e-5)


def test_metrics_count_every_sample_once_and_agree_on_every_process(both: Path) -> None:
    first, second = _seen(both, 0), _seen(both, 1)
    assert first["metrics"] == second["metrics"] == first["evaluated"]
    counted = first["metrics"]["accuracy"] * 37
    assert counted == pytest.approx(round(counted), abs=1e-4)


def test_a_signal_to_one_process_stops_both_and_they_go_on_together(both: Path) -> None:
    assert _seen(both, 0)["signal"] == _seen(both, 1)["signal"] == 15
    whole, cut = (
        [json.loads(line) for line in (both / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("dropout", "cut")
    )
    assert numbers(whole) == numbers(cut)
    left, right = (load_file(both / name / "last.safetensors") for name in ("dropout", "cut"))
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_the_number_of_processes_may_not_change(both: Path, quiet: Console) -> None:
    from mambaverse.engine.run import resume
    from mambaverse.errors import UserError

    with pytest.raises(UserError, match="trained by 2 processes, not by 1"):
        resume(both / "cut", quiet)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # said of every layer that ends in a view
def test_fsdp2_shards_a_model_on_a_cpu_and_learns_the_same() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import mambaverse

    plain = mambaverse.create_model("dna_mamba_d64_n2", num_classes=3)
    sharded = copy.deepcopy(plain)
    ids = torch.randint(0, 4, (2, 30))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in sharded.get_submodule("layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for model in (plain, sharded):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):  # a second forward resizes what the first has read
                model(ids).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        weights = {name: value.full_tensor() for name, value in sharded.state_dict().items()}
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(weights, dict(plain.state_dict()))
