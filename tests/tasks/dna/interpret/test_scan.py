"""Scans: values of cells by hand, at chromosomes' ends, in N; both strands; a scan that is killed and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mambaverse.cli import main
from mambaverse.errors import UserError
from mambaverse.tasks.dna.genome import Genome, Region
from mambaverse.tasks.dna.interpret.scan import Scanner, scan_run
from mambaverse.tasks.dna.reader import Reader
from mambaverse.tasks.dna.tokens import MASK, encode, reverse_complement
from tests.tasks.dna.planted import model, save_run


def tensor(letters: str) -> torch.Tensor:
    return torch.from_numpy(encode(letters)).long()[None]


def test_a_class_is_scored_in_windows_around_cells(genome: Genome, letters: str) -> None:
    made = model("classifier")
    values = Scanner(Reader(made, batch_size=3), genome, 60, 20, target=1)(Region("chr2", 0, 600))
    assert values.shape == (30,)
    windows = [letters[:60], letters[280:340], letters[540:]]  # moved inwards at the ends
    with torch.no_grad():
        expected = [float(made(tensor(window)).softmax(-1)[0, 1]) for window in windows]
    np.testing.assert_allclose(values[[0, 15, 29]], expected, atol=1e-6)


def test_a_causal_model_scores_a_cell_after_what_is_before_it(genome: Genome, letters: str) -> None:
    made = model("causal_lm", causal=True)
    values = Scanner(Reader(made), genome, 60, 16)(Region("chr2", 0, 600))
    assert len(values) == 38  # the last cell has 8 bases
    for cell, (start, first, last) in {0: (0, 1, 16), 20: (276, 320, 336), 37: (540, 592, 600)}.items():
        ids = tensor(letters[start:last])
        with torch.no_grad():
            terms = made(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert values[cell] == pytest.approx(float(terms[first - start - 1 :].mean()), abs=1e-5)
    perplexity = Scanner(Reader(made), genome, 60, 16, "perplexity")(Region("chr2", 0, 600))
    np.testing.assert_allclose(perplexity, np.exp(-values))


def test_a_masked_model_masks_the_bases_of_a_cell_alone(genome: Genome, letters: str) -> None:
    made = model("mlm")
    values = Scanner(Reader(made), genome, 40, 4)(Region("chr2", 100, 108))
    window = tensor(letters[104 + 2 - 20 : 104 + 2 + 20])
    total = 0.0
    for place in range(18, 22):  # four bases, of four phases: each masked by itself
        masked = window.clone()
        masked[0, place] = MASK
        with torch.no_grad():
            total += float(made(masked).log_softmax(-1)[0, place, window[0, place]])
    assert values[1] == pytest.approx(total / 4, abs=1e-5)


@pytest.mark.parametrize(("head", "causal"), [("causal_lm", True), ("classifier", False), ("regression", True)])
def test_with_both_strands_the_other_strand_has_the_same_track(
    head: str, causal: bool, genome: Genome, letters: str, tmp_path: Path
) -> None:
    (tmp_path / "other.fa").write_text(f">chr2\n{reverse_complement(letters.encode()).decode()}\n")
    made = model(head, causal=causal)
    with Genome(tmp_path / "other.fa") as other:
        tracks = [Scanner(Reader(made, "both"), g, 60, 20)(Region("chr2", 0, 600)) for g in (genome, other)]
    np.testing.assert_allclose(tracks[0], tracks[1][::-1], atol=1e-5)


def test_batches_change_nothing(genome: Genome) -> None:
    made = model("mlm")
    one, seven = (Scanner(Reader(made, batch_size=n), genome, 60, 20)(Region("chr2", 0, 600)) for n in (1, 7))
    np.testing.assert_allclose(one, seven, atol=1e-5)


@pytest.mark.parametrize(("head", "causal"), [("mlm", False), ("causal_lm", True), ("classifier", False)])
def test_cells_of_n_have_no_value(head: str, causal: bool, genome: Genome) -> None:
    values = Scanner(Reader(model(head, causal=causal), "both"), genome, 20, 10)(Region("chr1", 0, 200))
    assert np.isnan(values[11:15]).all() and not np.isnan(values[:9]).any() and not np.isnan(values[17:]).any()


def test_the_command_writes_a_track_that_can_be_made_a_bigwig(
    genome: Genome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = save_run(tmp_path / "run", "classifier"), tmp_path / "t.bedgraph"
    given = ["scan", str(run), "--fasta", str(genome.path), "--out", str(out), "--window", "60", "--stride", "25"]
    assert main(given) == 0
    assert "probability of beta, 32 cells of 25 bases, windows of 60" in capsys.readouterr().out
    rows = [line.split("\t") for line in out.read_text().splitlines()]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)  # chr1, which comes second in the file, first
    assert all(0 <= float(row[3]) <= 1 for row in rows)
    assert (tmp_path / "t.chrom.sizes").read_text() == "chr1\t200\nchr2\t600\n"
    assert main(given) == 2 and "is there already" in capsys.readouterr().err
    assert main([*given, "--overwrite", "--class", "alpha"]) == 0
    first = float(out.read_text().split("\t")[3].split("\n")[0])
    assert first == pytest.approx(1 - float(rows[0][3]), abs=1e-5)


def test_a_killed_scan_goes_on_and_ends_with_the_same_bytes(
    genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mambaverse.tasks.dna.interpret.scan.PASSES", 1)
    run = save_run(tmp_path / "run", "causal_lm", causal=True)
    how: dict[str, Any] = {"window": 60, "stride": 10, "batch_size": 5, "bed": tmp_path / "where.bed"}
    how["bed"].write_text("chr2\t100\t203\nchr2\t150\t250\n1\t0\t120\n")
    cells = scan_run(run, genome.path, out=tmp_path / "whole.bedgraph", **how)
    assert cells == 12 + 15
    scanned: list[Region] = []
    call = Scanner.__call__

    def dies(self: Scanner, region: Region) -> np.ndarray:
        if len(scanned) == 4:
            raise KeyboardInterrupt
        scanned.append(region)
        return call(self, region)

    with monkeypatch.context() as patch:
        patch.setattr(Scanner, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            scan_run(run, genome.path, out=tmp_path / "cut.bedgraph", **how)
    assert "Stopped. To go on with cut.bedgraph.part: the same command\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="a track of another genome or other numbers"):
        scan_run(run, genome.path, out=tmp_path / "cut.bedgraph", **{**how, "window": 50})
    again: list[Region] = []

    def notes(self: Scanner, region: Region) -> np.ndarray:
        again.append(region)
        return call(self, region)

    monkeypatch.setattr(Scanner, "__call__", notes)
    scan_run(run, genome.path, out=tmp_path / "cut.bedgraph", **how)
    assert len(again) == 6 - 4 and not set(again) & set(scanned)
    assert (tmp_path / "cut.bedgraph").read_bytes() == (tmp_path / "whole.bedgraph").read_bytes()


def test_a_bed_row_on_the_minus_strand_is_refused_with_its_line(genome: Genome, tmp_path: Path) -> None:
    run, bed = save_run(tmp_path / "run", "mlm"), tmp_path / "genes.bed"
    bed.write_text("chr2\t100\t203\ta\t0\t+\nchr2\t150\t250\tb\t0\t-\n")
    with pytest.raises(UserError, match=r"--bed .*genes.bed, line 2: strand '-' in column 6; .* leave that column out"):
        scan_run(run, genome.path, out=tmp_path / "t.bedgraph", window=60, stride=20, bed=bed)
    bed.write_text("chr2\t100\t200\ta\t0\t+\nchr2\t300\t400\tb\t0\t.\n")
    assert scan_run(run, genome.path, out=tmp_path / "t.bedgraph", window=60, stride=20, bed=bed) == 10


@pytest.mark.parametrize(
    ("head", "change", "message"),
    [
        ("classifier", {"value": "perplexity"}, "--value perplexity: head 'classifier' has probability"),
        ("classifier", {"label": "gamma"}, "--class gamma: unknown; known: alpha, beta"),
        ("mlm", {"label": "alpha"}, "--class alpha: head 'mlm' has no classes"),
        ("tokens", {}, "scan: head 'tokens' speaks of each base"),
        ("mlm", {"stride": 200}, "--stride 200: longer than the window of 60 bases"),
        ("mlm", {"regions": ["chr3"]}, "chr3"),
        ("mlm", {"regions": ["chr1", "chr1:1-100(-)"]}, r"--regions chr1:1-100\(-\): give it on the [+] strand"),
        ("mlm", {"regions": ["chr1"], "bed": Path("x.bed")}, "give --regions or --bed, not both"),
        ("mlm", {"out": Path("x.bw")}, "--out x.bw: unknown format '.bw'"),
    ],
    ids=str,
)
def test_what_cannot_be_scanned_is_said(
    genome: Genome, tmp_path: Path, head: str, change: dict[str, Any], message: str
) -> None:
    run = save_run(tmp_path / "run", head)
    given = {"out": tmp_path / "t.bedgraph", "window": 60, "stride": 20, **change}
    with pytest.raises(UserError, match=message):
        scan_run(run, genome.path, **given)


def test_models_in_which_places_count_refuse_shorter_windows(genome: Genome, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", "classifier", args={"wide": 2, "pool": "mean"}, bases=(300, 320))
    given: dict[str, Any] = {"out": tmp_path / "t.bedgraph", "stride": 100}
    with pytest.raises(UserError, match="--window: 299 bases; places count in this model: expected 300 to 320"):
        scan_run(run, genome.path, window=299, **given)
    with pytest.raises(UserError, match="chr1, which --regions or --bed can leave out: 200 bases; places count"):
        scan_run(run, genome.path, window=300, **given)
    assert scan_run(run, genome.path, window=300, regions=["chr2"], **given) == 6
