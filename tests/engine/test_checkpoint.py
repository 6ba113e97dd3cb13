from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambaverse.engine.checkpoint import CheckpointError, load_state, load_weights, read_weights
from mambaverse.engine.files import write_weights
from tests.engine.toy import Net


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "state_dict_ema"])
def test_weights_are_found_where_training_scripts_keep_them(tmp_path: Path, wrapper: str | None) -> None:
    weights = Net(0.0).state_dict()
    path = tmp_path / "w.pth"
    content = {wrapper: weights, "args": argparse.Namespace(lr=1.0), "epoch": 3} if wrapper else weights
    torch.save(content, path)
    assert all(torch.equal(value, weights[key]) for key, value in read_weights(path).items())


class Payload:
    """Unpickling this would run code."""


def test_a_file_that_would_run_code_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save({"model": Net(0.0).state_dict(), "thing": Payload()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"refused, since reading it would run code.*torch\.save\("):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(Net(0.0).state_dict(), path)
    else:
        write_weights(path, Net(0.0).state_dict(), {})
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not weights at all, just some text that somebody wrote"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{name}: damaged"):
            read_weights(path)


def test_a_missing_file_and_one_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights file"):
        read_weights(tmp_path / "none.pth")
    write_weights(tmp_path / "best.safetensors", Net(0.0).state_dict(), {})
    with pytest.raises(CheckpointError, match=r"did you mean '.*best\.safetensors'"):
        read_weights(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"notes\.txt: damaged, or not written by torch\.save: not a pickle"):
        read_weights(tmp_path / "notes.txt")
    torch.save({"epoch": 1}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no weights; expected a state dict"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [b"sequence,label\nACGT,a\n", b"M1", b")R"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.csv").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"some\.csv: damaged, or not written by torch\.save"):
        read_weights(tmp_path / "some.csv")


def test_weights_of_another_model_are_refused_by_the_first_names_and_change_nothing(tmp_path: Path) -> None:
    other: Any = nn.ModuleDict({"stem": nn.Linear(2, 8), "extra": nn.Linear(1, 1), "norm": nn.LayerNorm(16)})
    write_weights(tmp_path / "w.safetensors", other.state_dict(), {})
    model = Net(0.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(model, tmp_path / "w.safetensors")
    text = str(error.value)
    assert "w.safetensors: weights of another model: 2 missing (head.weight, head.bias)" in text
    assert "2 unexpected (extra.bias, extra.weight)" in text
    assert "2 of another shape (stem.weight (8, 2), expected (16, 2), stem.bias (8,), expected (16,))" in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_ensembles_weights_are_said_to_be_such() -> None:
    several = {f"members.{i}.{name}": value for i in range(3) for name, value in Net(0.0).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"here: weights of an ensemble of 3 .*; expected those of one model"):
        load_state(Net(0.0), several, "here")


def test_long_lists_of_names_are_cut() -> None:
    with pytest.raises(CheckpointError, match=r"6 missing \(stem\.weight, stem\.bias, norm\.weight, \.\.\.\)"):
        load_state(Net(0.0), {}, "here")


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        (lambda x: x.to(torch.int8), "is of int8, expected float32 or other floats"),
        (lambda x: x.to(torch.complex64), "is of complex64, expected float32 or other floats"),
        (lambda x: x.to("meta"), "has no values: it was saved from the device meta"),
        (lambda x: x.to_sparse(), "is sparse or quantized, expected a dense tensor"),
        (lambda x: torch.full_like(x, torch.nan), "holds numbers that are not finite"),
        (lambda x: torch.full_like(x, torch.nan).to(torch.float8_e4m3fn), "holds numbers that are not finite"),
    ],
)
def test_weights_that_would_not_mean_the_same_are_refused_and_change_nothing(
    change: Callable[[Tensor], Tensor], flaw: str
) -> None:
    model = Net(0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_state(model, before | {"head.bias": change(before["head.bias"])}, "w.pth")
    assert f"w.pth: 1 of 6 weights cannot be used: head.bias {flaw}" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_weights_of_other_floats_are_rounded(dtype: torch.dtype) -> None:
    model = Net(0.0)
    weights = {name: value.to(dtype) for name, value in Net(0.0).state_dict().items()}
    load_state(model, weights, "w.pth")
    assert all(torch.equal(value, weights[name].float()) for name, value in model.state_dict().items())
