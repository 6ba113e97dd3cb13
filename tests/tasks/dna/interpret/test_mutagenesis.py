"""Mutagenesis: the same numbers as one full forward a mutant, whatever is read once for all of them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mambaverse.cli import main
from mambaverse.ensemble import Ensemble
from mambaverse.errors import UserError
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.genome import Genome, Region
from mambaverse.tasks.dna.interpret.command import around, mutagenesis_run
from mambaverse.tasks.dna.interpret.mutagenesis import mutagenesis, predicted
from mambaverse.tasks.dna.interpret.pictures import worth
from mambaverse.tasks.dna.interpret.prefix import why_not
from mambaverse.tasks.dna.reader import Reader
from mambaverse.tasks.dna.tokens import MASK, A, N, T, reverse_complement_ids
from tests.tasks.dna.planted import model, save_run

LENGTH = 61
MIXERS: list[Any] = ["s6", "ssd", "mamba3", "s4d", ["s6", "attention"]]
MIXER_ARGS: dict[str, Any] = {
    "s6": {"d_state": 4, "expand": 1},
    "ssd": {"d_state": 8, "headdim": 8, "chunk_size": 16},
    "mamba3": {"d_state": 8, "headdim": 8, "chunk_size": 16},
    "s4d": {"d_state": 4},
}


def window(length: int = LENGTH, unknown: bool = True) -> np.ndarray:
    ids = np.random.default_rng(0).integers(A, T + 1, length).astype(np.uint8)
    if unknown:
        ids[[20, 33]] = N
    return ids


def by_hand(made: DnaModel, ids: np.ndarray, start: int, end: int, target: int = 0) -> np.ndarray:
    """Return the changes by one forward pass of each mutant."""

    def values(rows: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(rows).long()
        with torch.no_grad():
            said = made(tokens).double()
        if made.head != "causal_lm":
            return said[:, target].numpy()
        terms = said[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        return torch.where(tokens[:, 1:] <= T, terms, 0).sum(1).numpy()

    out = np.full((end - start, 4), np.nan)
    for t in range(start, end):
        if ids[t] <= T:
            changed = np.repeat(ids[None], 4, 0)
            changed[:, t] = np.arange(A, T + 1)
            out[t - start] = values(changed) - values(ids[None])
    return out


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@pytest.mark.parametrize(("start", "end", "chunk"), [(0, 61, 7), (17, 40, 1), (53, 61, None), (30, 31, 64)])
def test_read_on_from_the_state_before_is_the_full_forward(mixer: Any, start: int, end: int, chunk: int | None) -> None:
    made = model("causal_lm", causal=True, mixer=mixer, mixer_args=MIXER_ARGS, sharp=5.0)
    assert why_not(made) == ""
    found = mutagenesis(Reader(made), window(), start, end, chunk=chunk)
    np.testing.assert_allclose(found, by_hand(made, window(), start, end), atol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "last", "attention"])
def test_so_it_is_for_the_score_of_a_class(pool: str) -> None:
    made = model("classifier", causal=True, pool=pool, num_classes=3)
    if made.attention_pool is not None:
        torch.nn.init.normal_(made.attention_pool.weight)
    found = mutagenesis(Reader(made), window(), 11, 37, target=2, chunk=5)
    np.testing.assert_allclose(found, by_hand(made, window(), 11, 37, target=2), atol=1e-4)


def test_only_what_is_behind_a_mutant_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("causal_lm", causal=True)
    read: list[int] = []
    forward = made.forward_chunk

    def counts(ids: torch.Tensor, state: Any) -> Any:
        read.append(ids.numel())
        return forward(ids, state)

    monkeypatch.setattr(made, "forward_chunk", counts)
    mutagenesis(Reader(made), window(200, False), 190, 200, chunk=2)
    mutants = sum((1 + 3 * 2) * (200 - at) for at in range(190, 200, 2))
    assert sum(read) == mutants + 200  # the reference once, piece by piece


@pytest.mark.parametrize(
    "options",
    [{"pool": "cls"}, {"stem": "kmer", "stem_kernel": 3, "stem_stride": 2}, {"position": True, "max_length": LENGTH}],
    ids=str,
)
def test_models_that_cannot_be_read_on_are_read_whole(options: dict[str, Any]) -> None:
    made = model("regression", causal=True, num_classes=2, **options)
    assert why_not(made)
    found = mutagenesis(Reader(made, batch_size=11), window(), 25, 36, target=1)
    np.testing.assert_allclose(found, by_hand(made, window(), 25, 36, target=1), atol=1e-4)


@pytest.mark.parametrize("both_strands", [False, True])
def test_models_that_read_both_ways_too(both_strands: bool) -> None:
    made = model("classifier", both_strands=both_strands)
    found = mutagenesis(Reader(made), window(), 25, 36)
    np.testing.assert_allclose(found, by_hand(made, window(), 25, 36), atol=1e-4)


def test_reuse_can_be_turned_off_and_changes_nothing() -> None:
    made = model("causal_lm", causal=True)
    reader = Reader(made, batch_size=9)
    whole = mutagenesis(reader, window(), 5, 30, reuse=False)
    np.testing.assert_allclose(mutagenesis(reader, window(), 5, 30), whole, atol=1e-4)


def test_masked_models_say_a_ratio_for_each_place_in_one_pass() -> None:
    made, ids = model("mlm"), window()
    reader = Reader(made)
    found = mutagenesis(reader, ids, 18, 40)
    assert reader.windows_read == 22
    masked = torch.from_numpy(ids).long()[None].clone()
    masked[0, 19] = MASK
    with torch.no_grad():
        said = made(masked)[0, 19].double().log_softmax(-1)
    np.testing.assert_allclose(found[1], (said[A : T + 1] - said[ids[19]]).numpy(), atol=1e-5)
    assert np.isnan(found[[2, 15]]).all() and not np.isnan(np.delete(found, [2, 15], 0)).any()


@pytest.mark.parametrize(("head", "causal"), [("mlm", False), ("causal_lm", True), ("classifier", True)])
def test_with_both_strands_the_other_strand_says_the_same(head: str, causal: bool) -> None:
    reader, ids = Reader(model(head, causal=causal), "both"), window()
    here = mutagenesis(reader, ids, 10, 30)
    there = mutagenesis(reader, reverse_complement_ids(ids), LENGTH - 30, LENGTH - 10)
    np.testing.assert_allclose(here, there[::-1, ::-1], atol=1e-4)


def test_ensembles_are_read_whole() -> None:
    members = Ensemble([model("classifier", causal=True, seed=seed) for seed in (0, 1)]).eval()
    with torch.no_grad():
        ids = torch.from_numpy(window()).long()[None]
        changed = ids.clone()
        changed[0, 30] = base = A if ids[0, 30] != A else T
        expected = (members(changed) - members(ids))[0, 1].item()
    found = mutagenesis(Reader(members), window(), 30, 31, target=1)
    assert found[0, base - A] == pytest.approx(expected, abs=1e-4)


def test_what_cannot_be_asked_is_said() -> None:
    reader = Reader(model("classifier"))
    with pytest.raises(UserError, match=r"places 3 to 70 of 61; expected 0 <= start < end <= length"):
        mutagenesis(reader, window(), 3, 70)
    with pytest.raises(UserError, match="target 2; the model has 2, from 0"):
        mutagenesis(reader, window(), target=2)
    with pytest.raises(UserError, match="has a score for each base"):
        mutagenesis(Reader(model("tokens")), window())


def test_a_base_is_worth_what_its_substitutions_take_away() -> None:
    np.testing.assert_allclose(worth(np.array([[-1.0, 0, -2, -3], [0, 0, 0, 0]])), [2, 0])


def test_windows_lie_around_their_region_within_the_chromosome(genome: Genome) -> None:
    assert around(Region("c", 400, 420), 100, 1000) == (360, 460)
    assert around(Region("c", 0, 20), 100, 1000) == (0, 100)
    assert around(Region("c", 990, 1000), 100, 1000) == (900, 1000)
    assert around(Region("c", 10, 20), None, 50) == (0, 50)
    assert around(Region("c", 0, 3000), None, 5000) == (0, 3000)
    with pytest.raises(UserError, match=r"--window 10: the region c:1-20 has 20 bases"):
        around(Region("c", 0, 20), 10, 50)


@pytest.mark.parametrize(("head", "causal", "name"), [("causal_lm", True, "m"), ("classifier", False, "m.tsv")])
def test_the_command_writes_a_table_arrays_and_a_picture(
    head: str, causal: bool, name: str, genome: Genome, letters: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = save_run(tmp_path / "run", head, causal=causal)
    given = ["mutagenesis", str(run), "--fasta", str(genome.path), "--region", "2:101-130", "--window", "90"]
    assert main([*given, "--out", str(tmp_path / name)]) == 0
    with (tmp_path / "m.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert "".join(row["ref"] for row in rows) == letters[100:130] and rows[0]["pos"] == "101"
    assert all(row[row["ref"]] == "0" and row["chrom"] == "chr2" for row in rows)
    arrays = np.load(tmp_path / "m.npz")
    assert arrays["changes"].shape == (30, 4) and arrays["window"].tolist() == [70, 160]
    np.testing.assert_allclose(arrays["changes"][:, 0], [float(row["A"]) for row in rows], rtol=1e-4, atol=1e-6)
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.split() == [str(tmp_path / f"m.{kind}") for kind in ("tsv", "npz", "png")]


@pytest.mark.parametrize("kind", ["tsv", "npz", "png"])
def test_a_finished_file_is_replaced_if_that_is_asked(genome: Genome, tmp_path: Path, kind: str) -> None:
    run, kept = save_run(tmp_path / "run", "mlm"), tmp_path / f"m.{kind}"
    kept.write_text("of another command")
    with pytest.raises(UserError, match=f"m.{kind}: is there already, finished; name another .* or give --overwrite"):
        mutagenesis_run(run, genome.path, "chr2:9-10", out=tmp_path / "m")
    assert kept.read_text() == "of another command" and len(list(tmp_path.glob("m.*"))) == 1
    if kind == "tsv":
        given = ["mutagenesis", str(run), "--fasta", str(genome.path), "--region", "chr2:9-10", "--window", "40"]
        assert main([*given, "--out", str(tmp_path / "m"), "--overwrite"]) == 0
        assert kept.read_text().startswith("chrom\t")


def test_regions_with_n_and_longer_than_the_picture_are_drawn(genome: Genome, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", "mlm")
    mutagenesis_run(run, genome.path, "chr1", out=tmp_path / "n")
    mutagenesis_run(run, genome.path, "chr2", out=tmp_path / "long")
    assert np.isnan(np.load(tmp_path / "n.npz")["changes"]).sum() == 60 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"region": "chr2:590-700"}, "position 700 is past the end of chr2"),
        ({"region": "chr2:5-9(-)"}, "give it on the [+] strand"),
        ({"label": "gamma"}, "--class gamma: unknown; known: alpha, beta"),
        ({"label": "²"}, "--class ²: unknown; known: alpha, beta"),
        ({"label": "1" * 5000}, "1: unknown; known: alpha, beta"),
        ({"window": 5}, "--window 5: the region"),
        ({"out": "nowhere/m"}, "no folder 'nowhere'"),
    ],
    ids=str,
)
def test_what_the_command_cannot_do_is_said(
    genome: Genome, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run = save_run(tmp_path / "run", "classifier")
    given: dict[str, Any] = {"region": "chr2:100-110", "out": tmp_path / "m", **change}
    given["out"] = Path(given["out"])
    with pytest.raises(UserError, match=message):
        mutagenesis_run(run, genome.path, given.pop("region"), **given)


def test_models_in_which_places_count_refuse_shorter_windows(genome: Genome, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", "classifier", args={"wide": 2, "pool": "mean"}, bases=(60, 60))
    with pytest.raises(UserError, match="--window: 59 bases; places count in this model: expected 60"):
        mutagenesis_run(run, genome.path, "chr2:101-102", out=tmp_path / "m", window=59)
    assert mutagenesis_run(run, genome.path, "chr2:101-102", out=tmp_path / "m", window=60)
    run = save_run(tmp_path / "longer", "classifier", args={"wide": 2, "pool": "mean"}, bases=(300, 320))
    with pytest.raises(UserError, match=r"^chr1: 200 bases; places count in this model: expected 300 to 320"):
        mutagenesis_run(run, genome.path, "chr1:101-102", out=tmp_path / "n", window=300)


def test_the_class_that_is_explained_is_the_predicted_one() -> None:
    made, ids = model("classifier", num_classes=5), window()
    with torch.no_grad():
        expected = int(made(torch.from_numpy(ids).long()[None]).argmax())
    assert predicted(Reader(made), ids) == expected
