"""BED as people write it, and what is wrong with a line."""

import gzip
from pathlib import Path

import pytest

from mambaverse.tasks.dna.genome import Genome, Region
from mambaverse.tasks.dna.genome.bed import read_bed, read_splits, split_named
from mambaverse.tasks.dna.genome.skipped import Skipped
from tests.tasks.dna.conftest import fails, write
from tests.tasks.dna.genome.conftest import make_genome

TEXT = """browser position chr1:1-9
track name="x y"
# a comment
chr1\t0\t10\tfirst\t5\t-

1\t10\t10\tempty one\t0\t.
chr2\t3\t8\tlast\t0\t+
"""


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    return make_genome(tmp_path, {"chr1": "A" * 20, "chr2": "C" * 8})


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_bed_file_is_read(tmp_path: Path, genome: Genome, ending: str, newline: str) -> None:
    path = write(tmp_path / f"x.bed{ending}", TEXT.replace("\n", newline))
    one, two, three = read_bed(path)
    assert (one.region, one.columns, one.label) == (Region("chr1", 0, 10, "-"), ("first", "5", "-"), "first")
    assert one.where.endswith("line 4") and (two.region, two.label) == (Region("1", 10, 10), "empty one")
    assert three.region == Region("chr2", 3, 8)
    assert [row.region.name for row in read_bed(path, genome=genome, in_order=True)] == ["chr1", "chr1", "chr2"]


def test_three_columns_between_spaces_are_read(tmp_path: Path) -> None:
    (row,) = read_bed(write(tmp_path / "x.bed", "chr1 5 9"))
    assert (row.region, row.columns, row.label, row.blocks()) == (Region("chr1", 5, 9), (), "", [Region("chr1", 5, 9)])


def test_a_chromosome_may_begin_as_a_header_does(tmp_path: Path) -> None:
    path = write(tmp_path / "x.bed", "track\nbrowser\thide all\r\nbrowser\r\ntrack1\t0\t5\nbrowser_2 1 5\n#1\t0\t5\n")
    assert [row.region for row in read_bed(path)] == [Region("track1", 0, 5), Region("browser_2", 1, 5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chr1\t1\t5\nchr1\t9\t3\n", "x.bed, line 2: start 9 behind end 3; expected start <= end, counted from 0"),
        ("chr1\t1\tx\n", "x.bed, line 1: start '1', end 'x': expected whole numbers from 0"),
        ("chr1\t-1\t5\n", "start '-1', end '5': expected whole numbers"),
        ("chr1\t1_0\t50\n", "start '1_0'"),
        ("chr1\t1\t5\na\nchr1\t1\n", "line 2: 1 columns; expected 3, as in the rows above: a line that was cut short?"),
        ("chr1\t1\n", "line 1: 2 columns; expected chromosome, start and end between tabs"),
        ("chr1\t1\t5\tx\t0\tplus\n", "line 1: strand 'plus' in column 6; expected +, - or ."),
        ("chr1\t1\t5" + "\tx" * 10 + "\n", "13 columns; BED has at most 12"),
        ("chr1\t1\t25\n", "line 1: end 25 is past the end of chr1, which has 20 bases in"),
        ("chr7\t1\t5\n", "no record 'chr7', did you mean"),
        ("chr1\t9\t10\nchr1\t3\t5\n", "line 2: not sorted: chr1:4 behind chr1:10; sort the file: sort -k1,1 -k2,2n"),
        ("chr1\t9\t10\nchr2\t3\t5\nchr1\t11\t12\n", "line 3: not sorted: chr1 was there before chr2"),
        ("# nothing\n", "x.bed: holds no rows; expected chromosome, start and end"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, genome: Genome, text: str, message: str) -> None:
    path = write(tmp_path / "x.bed", text)
    assert message in fails(lambda: list(read_bed(path, genome=genome, in_order=True)))


def test_a_missing_file_and_one_that_is_cut_short_are_named(tmp_path: Path) -> None:
    assert "no.bed: no such file; expected a BED file" in fails(lambda: list(read_bed(tmp_path / "no.bed")))
    path = tmp_path / "x.bed.gz"
    path.write_bytes(gzip.compress("".join(f"chr1\t{i}\t{i * i}\n" for i in range(1, 5000)).encode())[:-99])
    assert "damaged after line" in fails(lambda: list(read_bed(path)))
    assert "on_error 'skpi': expected raise or skip" in fails(lambda: list(read_bed(path, on_error="skpi")))


def test_bad_rows_are_skipped_and_counted_if_that_is_asked(
    tmp_path: Path, genome: Genome, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.bed", "chr1\t1\t5\nchr1\t9\t3\nchr9\t1\t2\nchr2\t1\t2\n")
    with Skipped(tmp_path / "skipped.tsv") as skipped:
        rows = list(read_bed(path, genome=genome, on_error="skip", skipped=skipped))
    assert [str(row.region) for row in rows] == ["chr1:2-5", "chr2:2-2"] and skipped.total == 2
    lines = (tmp_path / "skipped.tsv").read_text().splitlines()
    assert lines[0] == "kind\twhere\treason" and len(lines) == 3
    assert lines[1] == f"bad rows\t{path}, line 2\tstart 9 behind end 3; expected start <= end, counted from 0"
    assert capsys.readouterr().err == ""
    assert len(list(read_bed(path, genome=genome, on_error="skip"))) == 2
    assert "warning: skipped 2: bad rows 2 (first: " in capsys.readouterr().err


def test_blocks_are_the_exons_of_bed12(tmp_path: Path) -> None:
    def row(tail: str) -> str:
        return f"chr1\t100\t200\tg\t0\t-\t100\t200\t0\t{tail}\n"

    (good,) = read_bed(write(tmp_path / "x.bed", row("2\t10,20,\t0,80,")))
    assert good.blocks() == [Region("chr1", 100, 110, "-"), Region("chr1", 180, 200, "-")]
    for tail, message in [
        ("3\t10,20,\t0,80,", "2 block sizes and 2 starts; column 10 says 3"),
        ("2\t10,x\t0,80,", "expected numbers between commas"),
        ("2\t10,10,\t0,80,", "blocks do not go up from the row's start to its end"),
        ("2\t90,20,\t0,80,", "blocks do not go up"),
        ("1\t100,\t5,", "blocks do not go up"),
    ]:
        (bad,) = read_bed(write(tmp_path / "x.bed", row(tail)))
        assert message in fails(bad.blocks)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (row,) = read_bed(write(tmp_path / "x.bed", "\ufeffchr1\t0\t5\n"))
    assert row.region.name == "chr1"


def test_column_4_names_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "human-sequences.bed", "chr1\t0\t5\ttrain\nchr2\t0\t5\tvalid\nchr1\t5\t9\ttrain\n")
    splits = read_splits(path)
    assert splits == {"train": [Region("chr1", 0, 5), Region("chr1", 5, 9)], "valid": [Region("chr2", 0, 5)]}
    assert split_named(splits, "dev", "x") == splits["valid"]
    assert "x: no split 'test' in column 4; known: train, valid" in fails(lambda: split_named(splits, "test", "x"))
    short = write(tmp_path / "short.bed", "chr1\t0\t5\n")
    assert "short.bed, line 1: no column 4; expected the split" in fails(lambda: read_splits(short))
