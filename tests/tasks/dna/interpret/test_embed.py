"""Embeddings: what each pool is, padding that changes nothing, strands, layers, windows, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mambaverse.cli import main
from mambaverse.ensemble import Ensemble
from mambaverse.errors import UserError
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.interpret.embed import Embedder, embed_run
from mambaverse.tasks.dna.interpret.store import open_store
from mambaverse.tasks.dna.reader import Reader
from mambaverse.tasks.dna.tokens import A, T, decode, reverse_complement_ids
from tests.tasks.dna.planted import model, save_run


def sequences(*lengths: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(A, T + 1, length).astype(np.uint8) for length in lengths]


def tokens(made: DnaModel, ids: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return made.forward_features(torch.from_numpy(ids).long()[None])[0]


def test_pools_are_what_they_say_whatever_is_read_beside() -> None:
    made = model("classifier", causal=True)
    for pool in ("mean", "last", "base"):
        found = Embedder(Reader(made, batch_size=3), pool)(sequences(5, 40, 17, 40, 1))
        for ids, value in zip(sequences(5, 40, 17, 40, 1), found, strict=True):
            hidden = tokens(made, ids)
            expected = {"mean": hidden.mean(0), "last": hidden[-1], "base": hidden}[pool]
            assert value.dtype == np.float32
            np.testing.assert_allclose(value, expected, atol=1e-5)


def test_the_cls_token_is_the_one_behind_the_last_base() -> None:
    made = model("classifier", pool="cls")
    found = Embedder(Reader(made), "cls")(sequences(9, 30))
    with torch.no_grad():
        for ids, value in zip(sequences(9, 30), found, strict=True):
            expected = made(torch.from_numpy(ids).long()[None])[0]
            np.testing.assert_allclose(made.score(torch.from_numpy(value)), expected, atol=1e-5)
    means = Embedder(Reader(made), "mean")(sequences(9, 30))
    np.testing.assert_allclose(means[0], tokens(made, sequences(9)[0]).mean(0), atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "last", "base"])
@pytest.mark.parametrize("ps", [False, True])
def test_both_strands_give_one_embedding(pool: str, ps: bool) -> None:
    made = model("mlm", both_strands=ps, causal=False)
    embedder = Embedder(Reader(made, "one" if ps else "both"), pool)
    ids = sequences(31, 12)
    here, there = embedder(ids), embedder([reverse_complement_ids(one) for one in ids])
    for one, other in zip(here, there, strict=True):
        assert one.shape[-1] == 16
        np.testing.assert_allclose(one, other[::-1] if pool == "base" else other, atol=1e-5)


def test_layers_are_sums_of_residuals() -> None:
    made, ids = model("mlm"), sequences(20, 33)
    first = Embedder(Reader(made), "base", 0)(ids)
    with torch.no_grad():
        for one, value in zip(ids, first, strict=True):
            np.testing.assert_allclose(value, made.embeddings(torch.from_numpy(one).long()[None])[0], atol=1e-6)
        second = Embedder(Reader(made), "base", 1)([ids[0]])[0]
        y, residual = made.blocks()[0](made.embeddings(torch.from_numpy(ids[0]).long()[None]))
        np.testing.assert_allclose(second, (y + residual)[0], atol=1e-5)
    assert made.depth == len(made.layers) == 2  # the model itself is as it was
    last = Embedder(Reader(made), "base", 2)([ids[0]])[0]
    np.testing.assert_allclose(last, tokens(made, ids[0]), atol=1e-5)


def test_long_sequences_are_read_in_windows() -> None:
    made, (ids,) = model("classifier", causal=True), sequences(50)
    parts = [ids[:20], ids[20:40], ids[40:]]
    whole = np.concatenate([tokens(made, part) for part in parts])
    np.testing.assert_allclose(Embedder(Reader(made), "base", window=20)([ids])[0], whole, atol=1e-5)
    np.testing.assert_allclose(Embedder(Reader(made), "mean", window=20)([ids])[0], whole.mean(0), atol=1e-5)
    both = Embedder(Reader(made, "both"), "last", window=20)([ids])[0]
    ends = (tokens(made, parts[2])[-1] + tokens(made, reverse_complement_ids(parts[0]))[-1]) / 2
    np.testing.assert_allclose(both, ends, atol=1e-5)


def test_tokens_of_several_bases_stand_for_each() -> None:
    made, (ids,) = model("classifier", stem="kmer", stem_kernel=3, stem_stride=4), sequences(10)
    found = Embedder(Reader(made), "base")([ids])[0]
    np.testing.assert_allclose(found, tokens(made, ids).repeat_interleave(4, 0)[:10], atol=1e-5)


def test_what_a_model_has_not_is_said() -> None:
    reader = Reader(model("mlm"))
    with pytest.raises(UserError, match="--layer 3: the model has 2 blocks; expected 0 to 2"):
        Embedder(reader, layer=3)
    with pytest.raises(UserError, match="--pool cls: this model has no cls token"):
        Embedder(reader, "cls")
    with pytest.raises(UserError, match="unknown 'men', did you mean 'mean'"):
        Embedder(reader, "men")
    with pytest.raises(UserError, match="an ensemble has no embedding of its own"):
        Embedder(Reader(Ensemble([model("mlm"), model("mlm")])))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path / "run", "classifier", strands="both")


@pytest.fixture
def records(tmp_path: Path) -> Path:
    text = "".join(f">r{n}\n{decode(ids)}\n" for n, ids in enumerate(sequences(30, 8, 55)))
    (tmp_path / "records.fa").write_text(text)
    return tmp_path / "records.fa"


def test_the_command_keeps_names_and_order(
    run: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mambaverse.tasks.dna.interpret.embed.BUFFER_BASES", 35)
    assert main(["embed", str(run), str(records), "--out", str(tmp_path / "x.npz"), "--batch-size", "2"]) == 0
    assert "3 sequences, mean of layer 2, 16 numbers, strands=both" in capsys.readouterr().out
    made = np.load(tmp_path / "x.npz", allow_pickle=False)
    assert made["names"].tolist() == ["r0", "r1", "r2"] and made["lengths"].tolist() == [30, 8, 55]
    assert made["embeddings"].shape == (3, 16) and json.loads(str(made["about"]))["pool"] == "mean"
    again = ["embed", str(run), str(records), "--out", str(tmp_path / "x.npz")]
    assert main([*again, "--pool", "last"]) == 2 and "is there already, finished; name" in capsys.readouterr().err
    assert json.loads(str(np.load(tmp_path / "x.npz")["about"]))["pool"] == "mean"
    assert main([*again, "--overwrite"]) == 0
    embed_run(run, [str(records)], out=tmp_path / "b.npz", pool="base")
    bases = np.load(tmp_path / "b.npz")
    offsets = bases["offsets"]
    for n in range(3):
        mine = bases["embeddings"][offsets[n] : offsets[n + 1]]
        np.testing.assert_allclose(mine.mean(0), made["embeddings"][n], atol=1e-5)
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["b.npz", "records.fa", "x.npz"]


def test_bad_records_stop_the_job_or_are_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.fa").write_text(">a\nACGT\n>b\nAC!T\n>c\n\n>d\nGGGA\n")
    with pytest.raises(UserError, match=r"bad.fa, line 3, record 'b': illegal letter '!'.*--on-error skip"):
        embed_run(run, [str(tmp_path / "bad.fa")], out=tmp_path / "x.npz")
    assert not list(tmp_path.glob("x.*"))  # nothing half written
    inputs = [str(tmp_path / "no.fa"), str(tmp_path / "bad.fa")]
    assert embed_run(run, inputs, out=tmp_path / "x.npz", on_error="skip") == 2
    assert np.load(tmp_path / "x.npz")["names"].tolist() == ["a", "d"]
    assert "3 of 5 inputs skipped" in capsys.readouterr().err
    with pytest.raises(UserError, match="no record is left"):
        embed_run(run, inputs[:1], out=tmp_path / "y.npz", on_error="skip")
    with pytest.raises(UserError, match="expected files or folders, got an empty path"):
        embed_run(run, ["", *inputs], out=tmp_path / "z.npz", on_error="skip")


@pytest.mark.parametrize("pool", ["mean", "base"])
def test_parquet_holds_the_same_numbers(run: Path, records: Path, tmp_path: Path, pool: str) -> None:
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    embed_run(run, [str(records)], out=tmp_path / "x.parquet", pool=pool)
    embed_run(run, [str(records)], out=tmp_path / "x.npz", pool=pool)
    table = parquet.read_table(tmp_path / "x.parquet").to_pydict()
    arrays = np.load(tmp_path / "x.npz")
    assert table["name"] == arrays["names"].tolist() and table["length"] == arrays["lengths"].tolist()
    found = table["embedding"] if pool == "mean" else [base for record in table["embedding"] for base in record]
    np.testing.assert_array_equal(np.array(found, np.float32), arrays["embeddings"])


def test_without_pyarrow_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow, which is not installed: pip install pyarrow; or name an .npz"):
        open_store(tmp_path / "x.parquet", 4, False, {})
