"""mambaverse score: its table, what it leaves out, and a job that is killed and goes on."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mambaverse.cli import main
from mambaverse.errors import UserError
from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.genome.skipped import RecordError
from mambaverse.tasks.dna.variants import command
from mambaverse.tasks.dna.variants.command import score_run
from mambaverse.tasks.dna.variants.scores import VariantScorer
from mambaverse.tasks.dna.variants.table import ResumableTable
from mambaverse.tasks.dna.variants.windows import Pair
from tests.tasks.dna.planted import save_run

HEAD = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


@pytest.fixture
def vcf(tmp_path: Path, letters: str) -> Path:
    """Substitutions with several alternatives, and indels; two symbolic alleles among them."""
    rows = []
    for start in range(20, 660, 40):
        ref, far = letters[start], letters[start : start + 3]
        alts = ",".join(base for base in "ACGT" if base != ref)
        rows += [f"1\t{start + 1}\trs{start}\t{ref}\t{alts}", f"1\t{start + 1}\t.\t{far}\t{ref},<DEL>"]
    path = tmp_path / "calls.vcf"
    path.write_text(HEAD + "".join(row + "\t.\tPASS\t.\n" for row in rows[:30]))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path / "run", "mlm", strands="both")


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("name", ["s.tsv", "s"])  # a name without an ending promises no other format
def test_the_command_writes_a_row_for_each_allele(
    name: str, run: Path, vcf: Path, genome: Genome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    given = ["score", str(run), "--vcf", str(vcf), "--fasta", str(genome.path), "--window", "64", "--out", str(out)]
    assert main(given) == 0
    rows = read(out)
    assert len(rows) == 15 * 4
    scores = ["llr", "embedding_cosine", "embedding_l2"]
    assert list(rows[0]) == ["chrom", "pos", "id", "ref", "alt", *scores, "n_share", "flags"]
    assert [row["alt"] for row in rows[:3]] == sorted(row["alt"] for row in rows[:3]) and rows[0]["chrom"] == "1"
    assert {row["flags"] for row in rows} == {"edge", "."}
    printed = capsys.readouterr().out
    assert "60 variants" in printed and "strands=both" in printed and "symbolic alleles 15" in printed
    assert len(read(tmp_path / "s.skipped.tsv")) == 15
    assert sorted(p.name for p in tmp_path.glob("s*")) == sorted(["s.skipped.tsv", name])
    assert main(given) == 2 and "is there already" in capsys.readouterr().err
    assert len(read(tmp_path / "s.skipped.tsv")) == 15  # the refused job took nothing away


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(
    run: Path, vcf: Path, genome: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    how = {"window": 64, "batch_size": 7}
    real = command.place
    monkeypatch.setattr(command, "place", lambda *given: replace(real(*given), flags=("n_rich",)))
    score_run(run, vcf, genome.path, out=tmp_path / "whole.tsv", **how)  # type: ignore[arg-type]
    scored, calls = VariantScorer.__call__, []

    def dies(self: VariantScorer, pairs: list[Pair]) -> object:
        calls.append(len(pairs))
        if len(calls) > after:
            raise KeyboardInterrupt
        return scored(self, pairs)

    with monkeypatch.context() as patch:
        patch.setattr(VariantScorer, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            score_run(run, vcf, genome.path, out=tmp_path / "cut.tsv", **how)  # type: ignore[arg-type]
    assert "Stopped. To go on with cut.tsv.part: the same command\n" in capsys.readouterr().err
    assert not (tmp_path / "cut.tsv").exists()
    with (tmp_path / "cut.tsv.part").open("a") as part:
        part.write("half a row that was written behind the checkp")
    with pytest.raises(UserError, match="with another window"):
        score_run(run, vcf, genome.path, out=tmp_path / "cut.tsv", window=128)
    done = calls[:after]

    def counts(self: VariantScorer, pairs: list[Pair]) -> object:
        done.append(len(pairs))
        return scored(self, pairs)

    monkeypatch.setattr(VariantScorer, "__call__", counts)
    score_run(run, vcf, genome.path, out=tmp_path / "cut.tsv", **how)  # type: ignore[arg-type]
    assert sum(done) == 60  # what was scored is not scored again
    assert "60 of them in windows with many N" in capsys.readouterr().out.rpartition("goes on behind")[2]
    assert (tmp_path / "cut.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert (tmp_path / "cut.skipped.tsv").read_text().replace("cut", "whole") == (
        tmp_path / "whole.skipped.tsv"
    ).read_text()


def test_bad_records_stop_the_job_or_are_skipped_and_counted(
    run: Path, genome: Genome, letters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = next(base for base in "ACGT" if base != letters[99])
    rows = [
        f"chr1\t50\t.\t{letters[49]}\tN", f"chr1\t100\t.\t{wrong}\t{letters[99]}", f"chr1\t9000\t.\t{wrong}\tA",
        f"chrX\t5\t.\t{wrong}\tA", f"chr1\t200\t.\t{letters[199]}\t{letters[199] + 'A' * 40}",
        f"chr1\t300\t.\t{letters[299]}\t{letters[299]}GA", "chr1\t300\t.",
    ]  # fmt: skip
    vcf = tmp_path / "bad.vcf"
    vcf.write_text(HEAD + "".join(row + "\t.\t.\t.\n" for row in rows))
    how = {"window": 64, "out": tmp_path / "bad.tsv"}
    with pytest.raises(RecordError, match=r"line 3.*no probability without a letter; --on-error skip goes on"):
        score_run(run, vcf, genome.path, **how)  # type: ignore[arg-type]
    assert score_run(run, vcf, genome.path, on_error="skip", **how) == 1  # type: ignore[arg-type]
    kinds = sorted(row["kind"] for row in read(tmp_path / "bad.skipped.tsv"))
    assert kinds == [
        "REF mismatches", "alleles too long", "alleles with N", "bad records", "positions past the end",
        "unknown chromosomes",
    ]  # fmt: skip
    assert "skipped 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vcf": "no.vcf"}, "no.vcf: no such file; expected a VCF file"),
        ({"fasta": "no.fa"}, "no.fa: no such file"),
        ({"window": 4}, "--window: expected at least 16, got 4"),
        ({"out": "nowhere/s.tsv"}, "--out .*nowhere"),
        ({"out": "s.tsv.gz"}, r"--out s.tsv.gz: unknown format '.gz'; expected .tsv, .txt"),
        ({"batch_size": 0}, "batch size: expected at least 1"),
        ({"scores": ["delta"]}, "--scores delta: this model has llr and embedding, by its head 'mlm'"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said(
    run: Path, vcf: Path, genome: Genome, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    given: dict[str, object] = {"vcf": vcf, "fasta": genome.path, "out": tmp_path / "s.tsv", **change}
    paths = {key: Path(str(given.pop(key))) for key in ("vcf", "fasta", "out")}
    with pytest.raises(UserError, match=message):
        score_run(run, paths["vcf"], paths["fasta"], out=paths["out"], **given)  # type: ignore[arg-type]


def test_a_vcf_without_its_header_is_an_error(run: Path, genome: Genome, tmp_path: Path) -> None:
    (tmp_path / "bare.vcf").write_text("chr1\t5\t.\tA\tC\t.\t.\t.\n")
    with pytest.raises(UserError, match="no header before this record"):
        score_run(run, tmp_path / "bare.vcf", genome.path, out=tmp_path / "s.tsv", window=64)


def test_models_with_places_refuse_longer_windows(vcf: Path, genome: Genome, tmp_path: Path) -> None:
    run = save_run(tmp_path / "places", "classifier", args={"position": True})
    with pytest.raises(UserError, match=r"--window: 5,000 bases; the model has places for 4,096 only"):
        score_run(run, vcf, genome.path, out=tmp_path / "s.tsv", window=5000)


def test_models_in_which_places_count_refuse_shorter_windows(genome: Genome, letters: str, tmp_path: Path) -> None:
    run = save_run(tmp_path / "places", "classifier", args={"wide": 2, "pool": "mean"}, bases=(60, 60))
    vcf, ref = tmp_path / "one.vcf", letters[299]
    vcf.write_text(f"{HEAD}1\t300\t.\t{ref}\t{'A' if ref != 'A' else 'C'}\t.\tPASS\t.\n")
    with pytest.raises(UserError, match=r"--window: 59 bases; places count in this model: expected 60$"):
        score_run(run, vcf, genome.path, out=tmp_path / "s.tsv", window=59)
    assert score_run(run, vcf, genome.path, out=tmp_path / "s.tsv", window=60) == 1
    (tmp_path / "short.fa").write_text(f">1\n{letters[280:330]}\n")
    vcf.write_text(vcf.read_text().replace("\t300\t", "\t20\t"))
    with pytest.raises(RecordError, match="50 bases; places count in this model: expected 60 at least; --on-error"):
        score_run(run, vcf, tmp_path / "short.fa", out=tmp_path / "t.tsv", window=60)


def test_a_job_that_a_wrong_file_stopped_leaves_nothing_in_the_way(
    run: Path, vcf: Path, genome: Genome, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.vcf"
    wrong.write_text(">not a VCF\nACGT\n")
    with pytest.raises(UserError, match="no header"):
        score_run(run, wrong, genome.path, out=tmp_path / "s.tsv", window=64)
    assert score_run(run, vcf, genome.path, out=tmp_path / "s.tsv", window=64) == 60
    with pytest.raises(UserError, match="no header"):
        score_run(run, wrong, genome.path, out=tmp_path / "s.tsv", window=64, overwrite=True)
    assert len(read(tmp_path / "s.tsv")) == 60 and len(read(tmp_path / "s.skipped.tsv")) == 15
    vcf.write_text(HEAD + next(row for row in vcf.read_text().splitlines(True) if "rs20" in row))  # skips nothing
    assert score_run(run, vcf, genome.path, out=tmp_path / "s.tsv", window=64, overwrite=True) == 3
    assert not (tmp_path / "s.skipped.tsv").exists()


def test_two_processes_do_not_write_one_table(tmp_path: Path) -> None:
    hold = "import sys, pathlib; from mambaverse.tasks.dna.variants.table import ResumableTable as T\n"
    hold += "with T(pathlib.Path(sys.argv[1]), ['a'], {}) as t: print('held', flush=True); sys.stdin.read()"
    path = tmp_path / "t.tsv"
    with subprocess.Popen(
        [sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another job writes it"):
            ResumableTable(path, ["b"], {})
        other.communicate()
    assert path.read_text() == "a\n"
    with ResumableTable(tmp_path / "u.tsv", ["a"], {}) as table:  # nor do two of one process
        with pytest.raises(UserError, match="another job writes it"):
            ResumableTable(tmp_path / "u.tsv", ["b"], {})
        table.write([["1"]])
    assert (tmp_path / "u.tsv").read_text() == "a\n1\n"


def test_a_damaged_checkpoint_of_a_table_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ResumableTable(tmp_path / "t.tsv", ["a"], {}) as table:
        table.write([["1"]])
        raise KeyboardInterrupt
    mark = tmp_path / "t.tsv.checkpoint"
    kept = mark.read_text()
    mark.write_text(kept[:9])
    with pytest.raises(UserError, match=r"damaged; delete it and .*\.part, or give --overwrite"):
        ResumableTable(tmp_path / "t.tsv", ["a"], {})
    mark.write_text(kept)
    (tmp_path / "t.tsv.part").write_text("")
    with pytest.raises(UserError, match="shorter than"):
        ResumableTable(tmp_path / "t.tsv", ["a"], {})
