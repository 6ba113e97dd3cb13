"""Slices of a genome: the letters that an independent reader finds, from any process; never wrong ones."""

import gzip
import os
import pickle
import random
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO, bgzf

from mambaverse import cli
from mambaverse.engine.files import SaveError
from mambaverse.errors import UserError
from mambaverse.tasks.dna.genome import Genome, Region, open_genome, store
from mambaverse.tasks.dna.genome.bgzf import main, to_bgzf
from mambaverse.tasks.dna.tokens import decode
from tests.tasks.dna.conftest import fails
from tests.tasks.dna.genome.conftest import fasta_text, make_genome, random_letters

RECORDS = {"chr1": random_letters(200_000, 1), "chr2": random_letters(61, 2), "MT": random_letters(60, 3)}


@pytest.fixture(params=["plain", "crlf", "bgzf", "one line"])
def genome(tmp_path: Path, request: pytest.FixtureRequest) -> Genome:
    newline, width = "\r\n" if request.param == "crlf" else "\n", 10**6 if request.param == "one line" else 60
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_text(RECORDS, width, newline))
    return open_genome(to_bgzf(path) if request.param == "bgzf" else path)


def test_random_slices_are_those_of_biopython(genome: Genome) -> None:
    opener = bgzf.open if genome.path.suffix == ".bgz" else open
    with opener(genome.path, "rt") as file:
        expected = {record.id: record.seq for record in SeqIO.parse(file, "fasta")}
    assert {name: len(seq) for name, seq in expected.items()} == genome.lengths and tuple(expected) == genome.names
    draw = random.Random(0)
    for _ in range(500):
        name = draw.choice(genome.names)
        start, end = sorted(draw.randint(0, genome.lengths[name]) for _ in range(2))
        end = min(end, start + draw.choice([0, 1, 59, 60, 61, 70_000]))
        part = expected[name][start:end]
        assert genome.fetch(name, start, end) == bytes(part)
        assert genome.fetch(Region(name, start, end, "-")) == bytes(part.reverse_complement())


def test_a_chromosome_is_sliced_as_a_string_is(genome: Genome) -> None:
    chromosome, text = genome["chr1"], RECORDS["chr1"]
    assert len(chromosome) == len(text) and repr(chromosome).startswith("<chr1: 200,000 bases")
    for places in (slice(5, 9), slice(None, 7), slice(-9, None), slice(9, 3), slice(3, 90, 7), slice(90, 3, -7)):
        assert chromosome[places].decode() == text[places]
    assert chromosome[::-1].decode() == text[::-1] and chromosome[-1].decode() == text[-1]
    with pytest.raises(IndexError, match="chr1, which has 200,000"):
        chromosome[200_000]


def test_ids_and_the_soft_mask_are_two_channels_of_one_slice(tmp_path: Path) -> None:
    genome = make_genome(tmp_path, {"a": "ACgtNnRrtt"})
    assert decode(genome.ids("a")) == "ACGTNNNNTT" and genome.ids("a").dtype == np.uint8
    assert genome.soft_mask("a").astype(int).tolist() == [0, 0, 1, 1, 0, 1, 0, 1, 1, 1]
    assert decode(genome.ids("a", 0, 5, "-")) == "NACGT"
    assert genome.soft_mask("a", 0, 5, "-").astype(int).tolist() == [0, 1, 1, 0, 0]
    message = fails(lambda: genome.ids("a", 4, 10, strict=True))
    assert "genome.fa, a:5-10: ambiguous letter 'R' at position 3 of 6" in message


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("chr2", 0, 62), "record 'chr2': end 62 is past its end; it has 61 bases"),
        (("chr2", 9, 3), "record 'chr2': start 9, end 3; expected 0 <= start <= end <= 61"),
        (("chr2", -1, 3), "record 'chr2': start -1, end 3"),
        (("chr2", 0, 3, "."), "record 'chr2': strand '.'; expected '+' or '-'"),
        (("chr22", 0, 3), "no record 'chr22', did you mean 'chr2'?; a table such as chromAlias.txt"),
    ],
)
def test_a_place_that_is_not_there_is_named(genome: Genome, place: tuple, message: str) -> None:
    assert message in fails(lambda: genome.fetch(*place)) and str(genome.path) in fails(lambda: genome.fetch(*place))


def test_other_names_of_a_chromosome_are_understood(tmp_path: Path) -> None:
    table = tmp_path / "chromAlias.txt"
    table.write_text("# ucsc\tassembly\trefseq\nchr1\t1\tNC_000001.11\nchrM\tMT\tNC_012920.1\n")
    genome = make_genome(tmp_path, RECORDS, aliases=table)
    assert genome.fetch("NC_000001.11", 5, 9) == genome.fetch("1", 5, 9) == genome.fetch("chr1", 5, 9)
    assert genome.resolve("chrM") == genome.resolve("NC_012920.1") == "MT" and genome["2"].name == "chr2"
    assert Genome(genome.path, aliases={"X5": "chr2"}).resolve("X5") == "chr2"
    assert genome.region("1:1,001-2,000(-)") == Region("chr1", 1000, 2000, "-") and len(genome.region("chrM")) == 60


def test_the_index_is_written_beside_the_file_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_genome(tmp_path, RECORDS, bgzf=True).path
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"genome.fa", "genome.fa.bgz", "genome.fa.bgz.fai", "genome.fa.bgz.gzi"}
    monkeypatch.setattr(store, "_build", None)
    assert Genome(path).names == tuple(RECORDS)


def test_the_command_line_indexes_a_genome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_text(RECORDS))
    assert cli.main(["data", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 3 records, 200,121 bases\n"
    assert path.with_name("genome.fa.fai").read_text().startswith("chr1\t200000\t")
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert cli.main(["data", str(path)]) == 2 and "plain gzip" in capsys.readouterr().err


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("kind", ["fai", "gzi"])
def test_an_index_older_than_its_file_is_made_anew(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_genome(tmp_path, RECORDS, bgzf=True).path
    age(path.with_name(f"{path.name}.{kind}"), 100)
    assert Genome(path).fetch("chr2").decode() == RECORDS["chr2"]
    assert "genome.fa.bgz.fai: older than genome.fa.bgz; the index is made anew" in capsys.readouterr().err
    Genome(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fai", "reason"),
    [
        ("chr1\t999999\t18\t60\t61\n", "its last record ends at byte"),
        ("chr1\t200000\t18\t60\t61\n", "has letters behind its last record"),
        ("MT\t60\t203446\t60\t61\n", "has letters above its first record"),
        ("chr1\n", "line 1 is not name"),
    ],
)
def test_an_index_whose_sizes_are_not_the_files_is_made_anew(
    tmp_path: Path, fai: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_genome(tmp_path, RECORDS).path
    path.with_name("genome.fa.fai").write_text(fai)
    assert Genome(path).fetch("MT").decode() == RECORDS["MT"]
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"chrA": "A" * 8, "chrB": "C" * 4}, "record 'chr1': the header there is 'chrA'"),
        ({"chr1": "A" * 4, "chr2": "C" * 8}, "record 'chr2': no header stands where it should"),
    ],
)
def test_an_index_of_another_file_is_never_read_from(tmp_path: Path, records: dict[str, str], message: str) -> None:
    genome = make_genome(tmp_path, {"chr1": "A" * 8, "chr2": "C" * 4})
    index = genome.path.with_name("genome.fa.fai").read_bytes()
    genome.path.write_bytes(fasta_text(records))
    genome.path.with_name("genome.fa.fai").write_bytes(index)
    other = Genome(genome.path)

    def read() -> None:
        for name in other:
            other.fetch(name)

    found = fails(read)
    assert "the index genome.fa.fai is not this file's; delete it, it is made anew" in found
    assert str(genome.path) in found
    assert message in found or "letters" in found


def test_an_index_without_a_record_in_the_middle_is_refused_at_the_next_one(tmp_path: Path) -> None:
    genome = make_genome(tmp_path, {"chr1": "A" * 8, "chr2": "C" * 4, "chr3": "G" * 4, "chr4": "T" * 4})
    fai = genome.path.with_name("genome.fa.fai")
    fai.write_text("".join(line for line in fai.read_text().splitlines(True) if not line.startswith("chr2")))
    other = Genome(genome.path)
    assert [other.fetch(name) for name in ("chr1", "chr4")] == [b"A" * 8, b"T" * 4]
    found = fails(lambda: other.fetch("chr3"))
    assert "record 'chr3': letters of another record stand above it: the index genome.fa.fai is not" in found


def test_an_index_with_wrong_numbers_never_gives_wrong_letters(tmp_path: Path) -> None:
    """Any number of any row, wrong by a little: found when the file is opened, or at the read, or harmless."""
    draw, refused = random.Random(0), 0
    for case in range(300):
        records = {f"c{i}": random_letters(draw.randint(1, 60), 10 * case + i, "ACGT") for i in range(3)}
        path = tmp_path / f"{case}.fa"
        path.write_bytes(fasta_text(records, draw.randint(1, 15)))
        Genome(path)
        fai = path.with_name(path.name + ".fai")
        rows = [line.split("\t") for line in fai.read_text().splitlines()]
        row, column = draw.choice(rows), draw.randint(1, 4)
        row[column] = str(max(int(row[column]) + draw.choice([-7, -2, -1, 1, 2, 7]), 0))
        if draw.random() < 0.3:
            row[4] = str(int(row[3]) + draw.choice([1, 2]))
        fai.write_text("".join("\t".join(row) + "\n" for row in rows))
        genome = Genome(path)
        for name, letters in records.items():
            for start in range(0, genome.lengths[name], 3):
                end = draw.randint(start, genome.lengths[name])
                try:
                    assert genome.fetch(name, start, end).decode() == letters[start:end]
                except UserError as error:
                    assert "delete it, it is made anew" in str(error)
                    refused += 1
    assert refused > 300


@pytest.mark.slow
def test_a_thousand_random_slices_are_quick(tmp_path: Path) -> None:
    bases = 20_000_000
    path = make_genome(tmp_path, {"chr1": "ACGTTGCAAC" * (bases // 10)}).path
    starts = np.random.default_rng(0).integers(0, bases - 1000, 1000).tolist()
    for file, bound_s in ((path, 0.020), (to_bgzf(path), 0.5)):
        times = []
        for _ in range(5):
            genome = Genome(file)
            began = time.perf_counter()
            for start in starts:
                genome.fetch("chr1", start, start + 1000)
            times.append(time.perf_counter() - began)
        assert min(times) < bound_s


def test_a_file_that_changes_while_it_is_open_is_an_error(genome: Genome) -> None:
    genome.fetch("chr1", 0, 10)
    copy = pickle.dumps(genome)
    with genome.path.open("ab") as file:
        file.write(b">more\nACGT\n")
    assert "has changed since it was opened" in fails(lambda: genome.fetch("chr1", 150_000, 150_010))
    assert "has changed since it was opened" in fails(lambda: pickle.loads(copy))


def test_a_closed_genome_says_so(genome: Genome) -> None:
    with genome:
        genome.fetch("MT")
    assert "was closed; open it again" in fails(lambda: genome.fetch("chr1", 150_000, 150_010))


@pytest.mark.parametrize("cache", [True, False])
def test_a_folder_that_cannot_be_written_still_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    real = store.write_atomic

    def refuse(path: Path, data: bytes) -> None:
        if not cache or "cache" not in path.parts:
            raise SaveError(f"cannot write {path}: read-only")
        real(path, data)

    monkeypatch.setattr(store, "write_atomic", refuse)
    path = make_genome(tmp_path, RECORDS, bgzf=True).path
    said = capsys.readouterr().err
    assert "its folder cannot be written" in said and ("cache" if cache else "in memory alone") in said
    if cache:
        monkeypatch.setattr(store, "_build", None)
    assert Genome(path).fetch("chr2").decode() == RECORDS["chr2"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "x.fa.gz",
            gzip.compress(b">a\nACGT\n", mtime=0),
            "plain gzip, which can be read from its start only; write",
        ),
        ("x.fa", b"\xfd7zXZ\x00..", "xz, which has no random access; expected plain or BGZF: python -m"),
        ("x.fq", b"@r\nACGT\n+\n!!!!\n", "begins with '@': FASTQ reads, no genome"),
        ("x.fa", b"", "an empty file; expected FASTA"),
    ],
)
def test_a_file_without_random_access_says_the_way_out(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert message in fails(lambda: Genome(tmp_path / name))
    assert "no such file" in fails(lambda: Genome(tmp_path / "no.fa"))
    assert "a folder" in fails(lambda: Genome(tmp_path))


@pytest.mark.parametrize("bgzf", [False, True])
def test_a_byte_order_mark_is_skipped(tmp_path: Path, bgzf: bool) -> None:
    path = tmp_path / "x.fa"
    path.write_bytes(b"\xef\xbb\xbf" + fasta_text({"a": "ACGTT", "b": "GGA"}, 2))
    path = to_bgzf(path) if bgzf else path
    for _ in range(2):  # with an index of its own, and with the one that is there
        with Genome(path) as genome:
            assert genome.names == ("a", "b")
            assert (genome.fetch("a"), genome.fetch("b", 1)) == (b"ACGTT", b"GA")


def test_gzip_whose_name_does_not_say_so_is_told_what_to_be_called(tmp_path: Path) -> None:
    path = tmp_path / "x.fa"
    path.write_bytes(gzip.compress(fasta_text(RECORDS)))
    message = fails(lambda: Genome(path))
    assert f"name it x.fa.gz, and write that as BGZF: python -m mambaverse.tasks.dna.genome.bgzf {path}.gz" in message
    assert f"{path}: gzip, which its name does not say; name it x.fa.gz" in fails(lambda: to_bgzf(path))


def test_plain_gzip_is_converted_by_the_command_that_the_error_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.fa.gz"
    path.write_bytes(gzip.compress(fasta_text(RECORDS)))
    assert main([str(path)]) == 0
    target = Path(capsys.readouterr().out.strip())
    assert target.name == "x.fa.bgz" and Genome(target).fetch("chr1").decode() == RECORDS["chr1"]
    assert main([str(path)]) == 2 and "is there already" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-2000])
    assert "damaged: cut short" in fails(lambda: to_bgzf(path, tmp_path / "y.bgz"))
    assert not (tmp_path / "y.bgz").exists() and not list(tmp_path.glob("*.part"))


def slices(genome: Genome, seed: int) -> list[bytes]:
    draw = random.Random(seed)
    return [genome.fetch("chr1", start, start + 500) for start in (draw.randrange(199_000) for _ in range(100))]


def test_threads_forks_and_pickled_copies_read_at_once(genome: Genome) -> None:
    expected = [slices(genome, seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(slices, [genome] * 8, range(8))) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, Python 3.12
        with get_context("fork").Pool(2) as pool:
            assert pool.starmap(slices, [(genome, seed) for seed in range(8)]) == expected
    assert slices(pickle.loads(pickle.dumps(genome)), 3) == expected[3]


def test_open_files_go_with_their_objects(tmp_path: Path) -> None:
    path = make_genome(tmp_path, RECORDS, bgzf=True).path
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(20):
        Genome(path).fetch("chr1", 5, 9)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before


def test_memory_is_that_of_the_index(tmp_path: Path) -> None:
    path = tmp_path / "big.fa"
    with path.open("wb") as file:
        file.write(b">chr1\n")
        for _ in range(1000):
            file.write(b"ACGTACGTAC\n" * 3000)
    Genome(path).close()
    tracemalloc.start()
    genome = Genome(path)
    for start in range(0, 29_000_000, 100_000):
        genome.fetch("chr1", start, start + 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
