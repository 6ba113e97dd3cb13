"""The .fai of samtools, byte for byte, and FASTA that has none."""

import random
import tracemalloc
from pathlib import Path

import pytest

from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.genome.index import BadIndexError, Index, IndexBuilder
from tests.tasks.dna.conftest import fails


def build(text: bytes, sizes: list[int] | None = None) -> bytes:
    builder = IndexBuilder("x.fa")
    at = 0
    for size in sizes or [len(text)]:
        builder.feed(text[at : at + size])
        at += size
    builder.feed(text[at:])
    return builder.finish().to_bytes()


@pytest.mark.parametrize(
    ("text", "fai"),
    [
        (b">one\nACGT\nACGT\nAC\n>two x y\nGG\n", b"one\t10\t5\t4\t5\ntwo\t2\t27\t2\t3\n"),
        (b">one\r\nACGT\r\nAC\r\n>two\r\nGGG\r\n", b"one\t6\t6\t4\t6\ntwo\t3\t22\t3\t5\n"),
        (b">one\nACGT\nAC", b"one\t6\t5\t4\t5\n"),  # no newline at the end
        (b">one\nACGT", b"one\t4\t5\t4\t5\n"),  # samtools counts the newline that is missing
        (b">one\nACGT\n\n\n>two\nA\n\n", b"one\t4\t5\t4\t5\ntwo\t1\t17\t1\t2\n"),
        (b"\n\n>one\tfirst\nA\n", b"one\t1\t13\t1\t2\n"),
        (b"> one\nACGT\n", b"one\t4\t6\t4\t5\n"),
        (">ä\u2028b x\nA\n".encode(), "ä\u2028b\t1\t10\t1\t2\n".encode()),
        (b">one\nAC\nGT\n>two\nACGTACGT\n", b"one\t4\t5\t2\t3\ntwo\t8\t16\t8\t9\n"),
    ],
    ids=["wrapped", "crlf", "cut", "one line cut", "blank lines", "blank start", "space", "utf-8", "widths"],
)
def test_an_index_is_that_of_samtools_however_the_file_is_cut(text: bytes, fai: bytes) -> None:
    assert build(text) == fai
    marked = b"\xef\xbb\xbf" + text  # UTF-8's byte order mark moves the letters on
    assert (Index.parse(build(marked)).table - Index.parse(fai).table == [0, 3, 0, 0]).all()
    assert build(marked, [1] * len(marked)) == build(marked, [2]) == build(marked)
    assert build(text, [1] * len(text)) == fai
    for size in (2, 3, 5, 7):
        assert build(text, [size] * (len(text) // size)) == fai
    assert Index.parse(fai).to_bytes() == fai


def test_random_files_are_indexed_as_a_loop_over_lines_would() -> None:
    draw = random.Random(0)
    for _ in range(60):
        newline = draw.choice(["\n", "\r\n"])
        text, expected = "", ""
        for number in range(draw.randint(1, 6)):
            width, length = draw.randint(1, 12), draw.randint(1, 40)
            letters = "".join(draw.choices("ACGTn", k=length))
            text += f">r{number} {'w' * draw.randint(0, 9)}{newline}"
            first = min(width, length)
            expected += f"r{number}\t{length}\t{len(text)}\t{first}\t{first + len(newline)}\n"
            text += "".join(letters[i : i + width] + newline for i in range(0, length, width))
        sizes = [draw.randint(1, 9) for _ in range(len(text) // 9)]
        assert build(text.encode(), sizes).decode() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b">a\nACGT\nACGTA\nAC\n",
            "x.fa, line 3, record 'a': 5 letters, longer than the lines above it; expected",
        ),
        (b">a\nACGT\nAC\nACGT\n>b\nA\n", "x.fa, line 4, record 'a': 4 letters, below a line that is shorter"),
        (b">a\nACGT\n\nAC\n", "x.fa, line 4, record 'a': 2 letters, below a line that is shorter"),
        (b">a\n\nACGT\n", "x.fa, line 3, record 'a': 4 letters, below a line that is shorter"),
        (
            b">a\nACGT\n>b\nA\n>a z\nAC\n",
            "line 5, record 'a': the record in line 1 has this name too; give each",
        ),
        (b">a\nAC GT\n", "x.fa, line 2, record 'a': white space among the letters"),
        (b">a\nAC\nGT\nAC \n", "x.fa, line 4, record 'a': white space among the letters"),
        (b">a\nACG\rT\n", "x.fa, line 2, record 'a': white space among the letters"),
        (b">a\rACGT\r", "x.fa, line 1: lines end in CR alone; expected LF or CR LF"),
        (b">\nACGT\n", "x.fa, line 1: a record without a name; expected '>name'"),
        (b">a\nA\n>caf\xe9 x\nA\n", "x.fa, line 3: byte 0xE9 in the record's name is not UTF-8 text; save the file"),
        (b"\nACGT\n>a\nA\n", "x.fa, line 2: not FASTA: expected '>name' before any letters"),
        (b"\n\n", "x.fa: holds no records"),
        (b">a\n>b\n", "x.fa: no record has letters"),
    ],
)
def test_what_cannot_be_indexed_is_named_by_line_and_record(text: bytes, message: str) -> None:
    assert message in fails(lambda: build(text))
    assert message in fails(lambda: build(text, [1] * len(text)))


def test_records_without_letters_are_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert build(b">a\n>b\nAC\n>c\n\n>d") == b"b\t2\t6\t2\t3\n"
    said = capsys.readouterr().err
    assert (
        "warning: x.fa, line 1, record 'a' and 2 more: no letters, left out; give its sequence, or take it out" in said
    )


@pytest.mark.parametrize(
    ("fai", "reason"),
    [
        (b"a\t4\t5\t4\n", "line 1 is not name"),
        (b"a\t4\t5\t4\t5\nb\t4\tx\t4\t5\n", "line 2 is not name"),
        (b"a\t4\t5\t4\t5\t9\n", "line 1 is not name"),  # of a FASTQ file
        (b"a\t4\t5\t0\t0\n", "line 1 is not name"),
        (b"a\t4\t9223372036854775808\t4\t5\n", "line 1 is not name"),  # beyond int64
        (b"a\t9223372036854775807\t5\t4\t5\n", "line 1 is not name"),  # its end is
        (b"a\t" + b"9" * 5000 + b"\t5\t4\t5\n", "line 1 is not name"),
        (b"a\t4\t5\t4\t5\n\xe9\t4\t5\t4\t5\n", "line 2 is not UTF-8 text"),
        (b"", "it is empty"),
        (b"a\t4\t5\t4\t5\na\t4\t5\t4\t5\n", "it has a name twice"),
    ],
)
def test_what_is_no_index_says_why(fai: bytes, reason: str) -> None:
    with pytest.raises(BadIndexError, match=reason):
        Index.parse(fai)


@pytest.mark.parametrize("width", [60, 30_000_000], ids=["wrapped", "one line"])
def test_indexing_takes_constant_memory(tmp_path: Path, width: int) -> None:
    path = tmp_path / "big.fa"
    with path.open("wb") as file:
        file.write(b">chr1\n")
        line = b"ACGT" * (min(width, 60_000) // 4) + (b"\n" if width == 60 else b"")
        for _ in range(30_000_000 // len(line)):
            file.write(line)
    tracemalloc.start()
    with Genome(path) as genome:
        assert genome.lengths["chr1"] > 29_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
