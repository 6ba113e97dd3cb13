"""Regions as people write them, and names of chromosomes."""

import random
from functools import partial
from pathlib import Path

import pytest

from mambaverse.tasks.dna.genome.regions import Aliases, Region, parse_region, resolve
from tests.tasks.dna.conftest import fails, write

LENGTHS = {"chr1": 5000, "HLA:01": 300, "HLA:01:5-9": 7, "odd(-)": 9, "chrX": 10}


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("chr1:1,000-2,000", Region("chr1", 999, 2000)),
        (" chr1:1-1 ", Region("chr1", 0, 1)),
        ("chr1:1000", Region("chr1", 999, 1000)),
        ("chr1:1000-", Region("chr1", 999, 5000)),
        ("chr1", Region("chr1", 0, 5000)),
        ("chr1(-)", Region("chr1", 0, 5000, "-")),
        ("chr1:5-9(+)", Region("chr1", 4, 9)),
        ("chr1:5-9:-", Region("chr1", 4, 9, "-")),
        ("HLA:01", Region("HLA:01", 0, 300)),
        ("HLA:01:5-8", Region("HLA:01", 4, 8)),
        ("HLA:01:5-9", Region("HLA:01:5-9", 0, 7)),
        ("odd(-)", Region("odd(-)", 0, 9)),
        ("odd(-):2-3(-)", Region("odd(-)", 1, 3, "-")),
    ],
)
def test_a_region_is_read(text: str, region: Region) -> None:
    assert parse_region(text, LENGTHS) == region


def test_str_and_parse_are_inverse() -> None:
    draw = random.Random(0)
    for _ in range(200):
        start = draw.randrange(10**9)
        region = Region(
            draw.choice(["chr1", "NC_1.11", "a:b"]), start, start + draw.randint(1, 10**6), draw.choice("+-")
        )
        assert parse_region(str(region)) == region
    assert len(Region("a", 3, 9)) == 6 and str(Region("chr1", 1000, 2000, "-")) == "chr1:1,001-2,000(-)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "chr1:2,000-1,000",
            "'chr1:2,000-1,000': starts at 2,000, behind its end at 1,000; expected chr1:1000-2000",
        ),
        ("chr1:0-5", "position 0; positions count from 1"),
        ("chr1:4000-5001", "position 5,001 is past the end of chr1, which has 5,000 bases"),
        ("chr1:6000", "position 6,000 is past the end of chr1"),
        (f"chr1:{'9' * 5000}", "no positions in '999"),
        (f"chr1:1-{'9' * 5000}", "no positions in '1-999"),
        ("chr1:x-9", "no positions in 'x-9'; expected a form such as chr1:1,000-2,000"),
        ("chr1:", "no positions in ''"),
        ("chrx", "no chromosome 'chrx', did you mean 'chrX'?"),
        (":5-9", "no chromosome"),
        ("", "no chromosome"),
    ],
)
def test_a_bad_region_is_one_line(text: str, message: str) -> None:
    assert message in fails(lambda: parse_region(text, LENGTHS))


def test_without_lengths_an_end_is_needed() -> None:
    assert "has no end" in fails(lambda: parse_region("chr1"))
    assert "has no end" in fails(lambda: parse_region("chr1:5-"))
    assert "start 9, end 3; expected 0 <= start <= end" in fails(lambda: Region("a", 9, 3))
    assert "strand '.'; expected '+' or '-'" in fails(lambda: Region("a", 1, 3, "."))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_table_of_names_is_read(tmp_path: Path, ending: str) -> None:
    new = write(tmp_path / f"chromAlias.txt{ending}", "# ucsc\tassembly\trefseq\nchr1\t1\tNC_1.1\nchrUn\t\tNT_5.1\r\n")
    old = write(
        tmp_path / f"old.txt{ending}", "1\tchr1\tensembl,genbank\nNC_1.1\tchr1\trefseq\nNT_5.1\tchrUn\trefseq\n"
    )
    for aliases in (Aliases.read(new), Aliases.read(old)):
        assert resolve("NC_1.1", ["chr1", "chrUn"], aliases, "x") == "chr1"
        assert resolve("1", ["NC_1.1"], aliases, "x") == "NC_1.1"
        assert resolve("chrUn", ["NT_5.1"], aliases, "x") == "NT_5.1"
        assert "no record 'chr2'" in fails(partial(resolve, "chr2", ["refseq", "NC_1.1"], aliases, "x"))
    short = write(tmp_path / "short.txt", "chr1\t1\nchr2\n")
    assert "short.txt, line 2: one name, 'chr2'; expected two or more" in fails(lambda: Aliases.read(short))
    assert "no such file" in fails(lambda: Aliases.read(tmp_path / "no.txt"))


def test_common_names_need_no_table() -> None:
    for name, known in [("1", "chr1"), ("chrX", "X"), ("MT", "chrM"), ("M", "MT"), ("chrM", "MT"), ("chrMT", "M")]:
        assert resolve(name, [known, "other"], Aliases(), "x") == known
    assert "'MT' could be 'chrM' or 'M'" in fails(lambda: resolve("MT", ["chrM", "M"], Aliases(), "x"))
