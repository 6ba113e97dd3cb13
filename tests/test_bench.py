"""`mambaverse bench`: what is timed, printed, written and drawn on a CPU; a GPU's part with stand-ins."""

import csv
import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from mambaverse.bench import bench, lengths, list_ops, mixers, operators
from mambaverse.bench.plots import draw
from mambaverse.bench.report import Report, Row
from mambaverse.bench.timing import GpuClock, Times, floor_ms
from mambaverse.cli import main
from mambaverse.kernels.backend import BackendError
from mambaverse.kernels.norm import cases as norm_cases
from mambaverse.kernels.testing import outputs_and_gradients, relative_rms

H100 = "NVIDIA H100 80GB HBM3"
CPU = torch.device("cpu")


@dataclass
class FakeGpu:
    """A clock that says what a GPU's would and runs everything on the CPU."""

    name: str = H100
    device: torch.device = CPU
    kind: str = "cuda"

    def times(self, function: Any, *, graph: bool = True) -> Times:
        function()
        return Times(0.5, 0.25 if graph else math.nan)

    def peak_mb(self, function: Any) -> float:
        return 12.5


@pytest.fixture
def wide() -> Console:
    return Console(record=True, width=200)


@pytest.fixture
def small_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    case = norm_cases.Case((64, 32), 32, "small")
    monkeypatch.setattr(norm_cases, "TIMED", (case,))
    monkeypatch.setattr(norm_cases, "TIMED_GPU", (case,))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CHANNELS": 32, "HEADS": 2, "HEAD_DIM": 8, "CHECKED_LENGTH": 16}.items():
        monkeypatch.setattr(lengths, name, value)


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.convert("L").getextrema() != (255, 255)  # something is drawn
        return image.size


@pytest.mark.usefixtures("small_norm")
def test_an_operator_is_checked_timed_written_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    table, plot = tmp_path / "norm.csv", tmp_path / "norm.png"
    assert main(["bench", "norm", "--device", "cpu", "--repeat", "2", "--csv", str(table), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "GB/s" in out and "faster than" in out
    assert not any(word in out for word in ("graph", "floor", "peak", "mamba_ssm"))  # a GPU's columns
    rows = read(table)
    assert [row["backend"] for row in rows] == ["reference", "cpu"]
    assert all(float(row["error"]) < 1e-5 and float(row["step_ms"]) > 0 for row in rows)
    assert not {"forward_graph_ms", "floor_ms", "peak_mb"} & set(rows[0])
    assert size(plot)[0] > 500


@pytest.mark.usefixtures("small_norm")
def test_a_fast_backend_that_cannot_run_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "numba" else find(name, *rest))
    assert main(["bench", "norm", "--device", "cpu", "--repeat", "1"]) == 0
    assert "cpu cannot run here: numba is not installed: `pip install numba`" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.usefixtures("small_norm")
def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, wide: Console) -> None:
    run = norm_cases.run

    def wrong(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        y, *others = run(inputs)
        return (y * (1 if y.dtype == torch.float64 else 1.01), *others)

    monkeypatch.setattr(norm_cases, "run", wrong)
    rows = bench("norm", device="cpu", console=wide).rows
    assert all(row.note == "wrong: not timed" and math.isnan(row.forward.ms) for row in rows)
    assert "over the 1e-05 that fp32 is allowed" in wide.export_text()


@pytest.mark.usefixtures("small_norm")
def test_a_gpu_has_graphs_floor_memory_and_peers(
    monkeypatch: pytest.MonkeyPatch, wide: Console, tmp_path: Path
) -> None:
    def plain(x: Tensor, weight: Tensor, _: None, *, residual: Tensor, **flags: Any) -> tuple[Tensor, Tensor]:
        return rms_norm(x + residual, x.shape[-1:], weight, 1e-5), x + residual

    def gated(x: Tensor, weight: Tensor, _: None, *, z: Tensor, **flags: Any) -> Tensor:
        return rms_norm(x * silu(z), x.shape[-1:], weight, 1e-5)

    found = {"rms_norm_fn": plain, "rmsnorm_fn": gated}
    monkeypatch.setattr(operators, "load", lambda target: found[target.partition(":")[2]])
    monkeypatch.setattr(operators, "installed", lambda package: package == "mamba_ssm")
    report = operators.run("norm", None, torch.float32, FakeGpu(), wide)
    report.print(wide)
    out = wide.export_text()
    assert all(word in out for word in ("graph ms", "floor", "peak", "faster than", "12.5", "0.500 / 0.500"))
    reference, cpu, peer = report.rows
    assert peer.name == "mamba_ssm" and not peer.note
    assert cpu.ratios == {"reference": (1, 1), "mamba_ssm": (1, 1)}  # graph beside graph, eager beside eager
    assert math.isnan(reference.forward.graph_ms)  # thousands of launches are not captured
    moved = 4 * (7 * 64 * 32 + 2 * 32)  # x, residual, x, z in and y, residual, y out; the weight twice
    assert cpu.gb_per_s == pytest.approx(moved / 0.25 / 1e6)
    assert cpu.floor_ms == pytest.approx(1e3 * moved / 3.0e12)
    report.write_csv(tmp_path / "norm.csv")
    assert float(read(tmp_path / "norm.csv")[1]["floor_share"]) == pytest.approx(cpu.floor_ms / 0.25, rel=1e-5)


@pytest.mark.usefixtures("small_norm")
def test_a_peer_that_fails_is_told_and_stops_nothing(monkeypatch: pytest.MonkeyPatch, wide: Console) -> None:
    def load(target: str) -> Any:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(operators, "load", load)
    monkeypatch.setattr(operators, "installed", lambda package: True)
    rows = operators.run("norm", None, torch.float32, FakeGpu("some other GPU"), wide).rows
    assert rows[-1].note == "ImportError: undefined symbol"
    assert rows[1].forward.graph_ms == 0.25 and math.isnan(rows[1].floor_ms)


def test_floor_is_the_larger_of_bytes_and_exponentials_on_one_device() -> None:
    assert floor_ms(f"{H100}, torch 2.11", 3 * 10**9, 0) == pytest.approx(1)
    assert floor_ms(H100, 3 * 10**9, 74 * 10**8) == pytest.approx(2)
    assert math.isnan(floor_ms("NVIDIA H100 PCIe", 1, 1)) and math.isnan(floor_ms("x86_64", 1, 1))


@pytest.mark.parametrize("op", list_ops())
def test_cases_of_a_gpu_keep_the_contract(op: str) -> None:
    cases: Any = __import__(f"mambaverse.kernels.{op}.cases", fromlist=["cases"])
    for case in getattr(cases, "TIMED_GPU", cases.TIMED):
        assert case.reason
        if hasattr(cases, "exponentials"):
            assert cases.exponentials(case) > 0
        if hasattr(cases, "checked_at"):
            small = cases.checked_at(case)
            assert small.dim == case.dim and small.length <= case.length


@pytest.mark.parametrize("op", list_ops())
def test_every_operator_is_checked_and_timed(op: str) -> None:
    cases: Any = __import__(f"mambaverse.kernels.{op}.cases", fromlist=["cases"])
    rows = operators._rows(cases, cases.TESTED[0], ["reference", "cpu"], torch.float32, FakeGpu())
    assert [row.name for row in rows] == ["reference", "cpu"]
    assert all(row.error <= 1e-5 and math.isfinite(row.forward.eager_ms) for row in rows)


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_a_peer_gets_its_own_layout(op: str) -> None:
    """Length last; the function is the reference of the same operator, turned around, so the results must agree."""
    cases: Any = __import__(f"mambaverse.kernels.{op}.cases", fromlist=["cases"])
    case = next(c for c in cases.TESTED if getattr(c, "groups", 2) and getattr(c, "width", 4) == 4)
    inputs = cases.make_inputs(case, dtype=torch.float64)

    def theirs(**given: Any) -> Tensor:
        turned = {k: v.movedim(-1, 1) if isinstance(v, Tensor) and v.ndim > 2 else v for k, v in given.items()}
        return getattr(cases, op)(**turned).transpose(1, 2)

    tensors, function = cases.peer(lambda target: theirs, inputs)
    zeros = {k: torch.zeros_like(v) if k == "initial_state" else v for k, v in inputs.items()}
    assert "initial_state" not in tensors
    assert relative_rms(function(**tensors).transpose(1, 2), cases.run(zeros)[0]) < 1e-12
    assert operators.functions(function, tensors)[1]() is None  # and can be differentiated


@contextmanager
def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def test_a_gpu_clock_times_calls_and_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that it makes of torch.cuda and triton, with stand-ins that count."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def elapsed_time(self, stop: "Event") -> float:
            return 0.125

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        synchronize=lambda: None, Event=Event, Stream=lambda: stream, current_stream=lambda: stream, stream=_nothing,
        graph=_nothing, CUDAGraph=lambda: SimpleNamespace(replay=lambda: calls.append("replay")),
        reset_peak_memory_stats=lambda: None, memory_allocated=lambda: 2 * 10**6,
        max_memory_allocated=lambda: 5 * 10**6,
    )  # fmt: skip
    monkeypatch.setattr("mambaverse.bench.timing.torch.cuda", cuda)
    monkeypatch.setattr("mambaverse.bench.timing.L2_BYTES", 16)
    testing = ModuleType("triton.testing")
    testing.do_bench = lambda f, warmup, rep, return_mode: 0.75  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    clock = GpuClock(CPU, 5)
    assert clock.times(lambda: calls.append("call")) == Times(0.75, 0.125)
    assert calls.count("replay") == 6 and calls.count("call") == 4  # compiles, is it slow, warms up, captured
    assert math.isnan(clock.times(lambda: None, graph=False).graph_ms)
    assert clock.peak_mb(lambda: None) == pytest.approx(3)
    monkeypatch.setattr("mambaverse.bench.timing.SLOW_S", -1.0)
    slow = clock.times(lambda: None)
    assert slow.eager_ms < 100 and math.isnan(slow.graph_ms)


def test_a_function_that_cannot_be_captured_has_no_graph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: GpuClock, function: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(GpuClock, "_capture", refuse)
    assert math.isnan(GpuClock(CPU, 1)._graph_ms(lambda: None))
    assert "not permitted when stream is capturing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "note"),
    [(torch.OutOfMemoryError(), "out of memory"), (BackendError("norm has no triton.py"), "norm has no triton.py")],
)
@pytest.mark.usefixtures("small_norm")
def test_what_cannot_run_is_a_note(error: Exception, note: str, wide: Console) -> None:
    class Full(FakeGpu):
        def times(self, function: Any, *, graph: bool = True) -> Times:
            raise error

    rows = operators.run("norm", None, torch.float32, Full(), wide).rows
    rows += mixers.run(["attention"], [(1, 8, 16)], torch.float32, Full(), wide).rows
    assert [row.note for row in rows] == [note] * 3
    assert all(math.isnan(row.gb_per_s) for row in rows)


def test_named_mixers_at_given_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "mixers.csv"
    command = ["bench", "mixer", "attention", "s6", "--sizes", "2x16x16,1x9x32", "--device", "cpu", "--repeat", "1"]
    assert main([*command, "--csv", str(table)]) == 0
    assert "batch 1, length 9, width 32" in capsys.readouterr().out
    rows = read(table)
    assert [(row["case"], row["mixer"]) for row in rows] == [
        ("2, 16, 16", "attention"), ("2, 16, 16", "s6"), ("1, 9, 32", "attention"), ("1, 9, 32", "s6")
    ]  # fmt: skip
    assert all(float(row["forward_ms"]) > 0 and float(row["step_ms"]) > 0 for row in rows)


def test_every_registered_mixer_is_timed_plug_ins_too(monkeypatch: pytest.MonkeyPatch, wide: Console) -> None:
    def fails(name: str, dim: int) -> Any:
        raise ValueError(f"{name} does not like {dim} channels")

    monkeypatch.setattr(mixers, "list_mixers", lambda: ["attention", "mine"])
    create = mixers.create_mixer
    monkeypatch.setattr(
        mixers, "create_mixer", lambda name, dim: fails(name, dim) if name == "mine" else create(name, dim)
    )
    rows = bench("mixer", device="cpu", sizes="1x8x16", repeat=1, console=wide).rows
    assert rows[0].forward.ms > 0 and rows[1].note == "mine does not like 16 channels"


def test_a_mixer_under_autocast_is_held_to_its_tolerance(wide: Console) -> None:
    (row,) = bench("mixer", ["attention"], device="cpu", dtype="bf16", sizes="1x8x16", repeat=1, console=wide).rows
    assert 1e-5 < row.error < 3e-2 and row.forward.ms > 0


def test_mixers_of_a_gpu_stand_beside_mamba_ssm(monkeypatch: pytest.MonkeyPatch, wide: Console) -> None:
    monkeypatch.setattr(mixers, "PEERS", {"attention": "mamba_ssm:Mamba"})
    monkeypatch.setattr(mixers, "load", lambda target: lambda dim: torch.nn.Linear(dim, dim))
    monkeypatch.setattr(mixers, "installed", lambda package: True)
    own, peer = mixers.run(["attention"], [(1, 8, 16)], torch.float32, FakeGpu(), wide).rows
    assert own.ratios == {"mamba_ssm": (1, 1)} and own.peak_mb == 12.5 and peer.name == "mamba_ssm:Mamba"


def test_grid_of_a_mixer_that_needs_one() -> None:
    assert [mixers._grid(length) for length in (1, 12, 197, 256)] == [(1, 1), (3, 4), (1, 197), (16, 16)]


@pytest.mark.usefixtures("narrow")
def test_scan_beside_attention(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "CPU_BYTES", lengths.plain_bytes(1, 16)[1])
    monkeypatch.setenv("COLUMNS", "200")  # in 80, long numbers of milliseconds break the note into lines
    table, plot = tmp_path / "lengths.csv", tmp_path / "lengths.png"
    command = ["bench", "scan_vs_attention", "--lengths", "32,1,16", "--device", "cpu", "--repeat", "1"]
    assert main([*command, "--csv", str(table), "--plot", str(plot)]) == 0
    rows = read(table)
    assert [row["function"] for row in rows] == ["scan", "attention", "PyTorch scan"] * 3
    assert [row["note"] for row in rows] == [""] * 8 + ["fwd+bwd skipped: 0.0 GB"]
    assert rows[0]["step_ratio_attention"] and not rows[8]["step_ms"]
    assert "fwd+bwd skipped" in capsys.readouterr().out
    assert size(plot)[0] > 500


@pytest.mark.usefixtures("narrow")
def test_scan_in_plain_torch_gives_up_where_it_was_too_slow(monkeypatch: pytest.MonkeyPatch, wide: Console) -> None:
    monkeypatch.setattr(lengths, "PATIENCE_MS", 0.0)
    rows = bench("scan_vs_attention", device="cpu", lengths="4,8", repeat=1, console=wide).rows
    assert rows[2].step.ms > 0 and rows[5].note == "fwd skipped: too slow; fwd+bwd skipped: too slow"


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("length", [2, 7, 32])
def test_scan_in_plain_torch_is_the_selective_scan(length: int) -> None:
    inputs = lengths._inputs(1, length, torch.float32, CPU)
    expected = outputs_and_gradients(lengths._scan, {k: v.double() for k, v in inputs.items()})
    for name, value in outputs_and_gradients(lengths.plain_scan, inputs).items():
        assert relative_rms(value, expected[name]) < 1e-5, name


def test_a_plot_bears_what_was_not_measured(tmp_path: Path) -> None:
    rows = [Row("a", "x", forward=Times(1.0)), Row("a", "y", note="out of memory"), Row("b", "x")]
    draw(Report("what", "fp32", "device", "backend", rows), tmp_path / "bars.svg")
    for i, row in enumerate(rows):
        row.x = 2**i
    draw(Report("what", "fp32", "device", "backend", rows, lines=True), tmp_path / "lines.png")
    assert (tmp_path / "bars.svg").read_text().count("<svg") == 1 and size(tmp_path / "lines.png")[0] > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mixers"], "unknown operator 'mixers', did you mean 'mixer'?"),
        (["scan_vs_atention"], "did you mean 'scan_vs_attention'?"),
        (["mixer", "s66"], "unknown mixer 's66', did you mean 's6'?"),
        (["mixer", "no_such.module:Class"], "cannot be imported"),
        (["mixer", "s6", "--sizes", "2x64"], "expected batch x length x width, such as 8x2048x1024, got '2x64'"),
        (["mixer", "s6", "--sizes", "2x0x64"], "--sizes 2x0x64: expected a whole number from 1, got '0'"),
        (["scan_vs_attention", "--lengths", "512,long"], "--lengths: expected a whole number from 1, got 'long'"),
        (["norm", "--lengths", "512"], "takes no --lengths ('512' was given): that is for `bench scan_vs_attention`"),
        (["norm", "s6"], "takes no name ('s6' was given): that is for `bench mixer`"),
        (["mixer", "--case", "x"], "takes no --case ('x' was given): that is for operators"),
        (["norm", "--device", "cdua"], "unknown device 'cdua', did you mean 'cuda'?"),
        (["norm", "--dtype", "bp16"], "unknown dtype 'bp16', did you mean"),
        (["norm", "--repeat", "0"], "--repeat: expected a whole number from 1, got '0'"),
        (["norm", "--csv", "no/such/times.csv"], "no folder 'no/such'"),
        (["norm", "--csv", "."], "expected a file's name"),
        (["norm", "--plot", "times.bmp"], "unknown format '.bmp'; expected .pdf, .png, .svg"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_was_given_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "norm", "--device", "cuda"]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu(tmp_path: Path) -> None:
    table = tmp_path / "norm.csv"
    assert main(["bench", "norm", "--device", "cuda", "--case", "*16384*", "--csv", str(table)]) == 0
    row = next(row for row in read(table) if row["backend"] == "triton")
    assert all(float(row[key]) > 0 for key in ("forward_ms", "forward_graph_ms", "step_graph_ms", "peak_mb"))
    assert main(["bench", "mixer", "s6", "--device", "cuda", "--sizes", "1x64x64"]) == 0
    assert main(["bench", "scan_vs_attention", "--device", "cuda", "--lengths", "512"]) == 0
