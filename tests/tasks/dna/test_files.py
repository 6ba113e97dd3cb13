"""FASTA and tables, plain and compressed, and every way in which they can be wrong."""

import bz2
import errno
import gzip
import lzma
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from Bio import bgzf

from mambaverse.errors import UserError
from mambaverse.tasks.dna.files import Record, kind_of, read_records
from tests.tasks.dna.conftest import fails, letters, write, write_csv


def records(path: Path, **options: Any) -> list[Record]:
    return list(read_records(path, **options))


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_fasta_file_is_read_line_by_line(tmp_path: Path, ending: str, newline: str) -> None:
    text = newline.join(["; a comment", "", ">one first of all", "ACGT", "ac gt", "", ">two", "NNNN", ""])
    one, two = records(write(tmp_path / f"x.fa{ending}", text))
    assert (one.name, one.header, one.letters) == ("one", "one first of all", b"ACGTacgt")
    assert (two.name, two.letters) == ("two", b"NNNN")
    assert "line 7, record 'two'" in two.where and str(tmp_path) in two.where


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.csv.xz", "t.tsv"])
def test_a_table_is_read_row_by_row(tmp_path: Path, name: str) -> None:
    tab = "\t" if ".tsv" in name else ","
    text = f"\ufeffname{tab}sequence{tab}label\r\n a{tab}ACGT{tab}x\r\n\r\nb{tab}GG{tab}y\r\n"
    one, two = records(write(tmp_path / name, text))
    assert (one.letters, one.cells["label"], two.cells) == (b"ACGT", "x", {"name": "b", "sequence": "GG", "label": "y"})
    assert two.where.endswith("line 4")


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    (one,) = records(write(tmp_path / "x.csv", "sequence,label,,\nACGT,a,,\n"))
    assert (one.letters, one.cells["label"]) == (b"ACGT", "a")


def test_a_member_of_a_zip_file_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("mouse/0/train.csv", "sequence,label\nACGT,1\n")
    (record,) = read_records(zipfile.Path(tmp_path / "x.zip") / "mouse/0/train.csv")
    assert record.letters == b"ACGT" and "x.zip/mouse/0/train.csv, line 2" in record.where


def test_a_text_file_is_one_sequence(tmp_path: Path) -> None:
    (record,) = records(write(tmp_path / "12.txt", "ACGT\nAC\n"))
    assert (record.name, record.letters) == ("12", b"ACGTAC")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.FA", "fasta"), ("a.fna.gz", "fasta"), ("a.csv.xz", "table"), ("a.txt", "text"), ("a.gz", None), ("fa", None)],
)
def test_a_files_name_says_what_it_is(name: str, kind: str | None) -> None:
    assert kind_of(Path(name)) == kind


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.fa", "", "x.fa: holds no records; expected lines '>name'"),
        ("x.fa", "ACGT\n", "x.fa, line 1: not FASTA: expected '>name', got 'ACGT'"),
        ("x.csv", "", "x.csv: no column 'sequence'; there are none"),
        ("x.csv", "sequence,label\n\n", "x.csv: holds no usable sequences: no row below its header"),
        ("x.csv", 'sequence,"label\nACGT,a\nGG,b"\n', "x.csv, line 1: a column's name holds a line break; a quote"),
        ("x.csv", 'sequence,"label\nACGT,a\nGG,b\n', "x.csv, line 1: a column's name holds a line break; a quote"),
        ("x.csv", "sequnce,label\nACGT,a\n", "x.csv: no column 'sequence', did you mean 'sequnce'?"),
        ("x.csv", "label,sequence,label\na,ACGT,b\n", "x.csv: 2 columns 'label'; expected one: rename the others"),
        ("x.csv", '"sequence";label\nACGT;a\n', "x.csv: its columns are separated by semicolons; expected commas"),
        ("x.csv", "label\tsequence\nACGT\ta\n", "x.csv: its columns are separated by tabs; expected commas in a .csv"),
        ("x.tsv", "label, sequence\nACGT,a\n", "x.tsv: its columns are separated by commas; expected commas in a .csv"),
        ("x.csv", "\0s\0e\0q\0\n\0A\0", "x.csv: not UTF-8 text, but UTF-16 as it seems; save the file as UTF-8"),
        ("x.csv", "sequence,label\rACGT,a\r", "x.csv: its lines end in CR alone; expected LF or CR LF"),
        ("x.txt.doc", "", "not known as a sequence file; expected one of .fa, .fasta, .fna, .csv, .tsv"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    assert message in fails(lambda: records(path))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'no.fa'}: no such file" in fails(lambda: records(tmp_path / "no.fa"))
    assert "a folder; expected a file" in fails(lambda: records(tmp_path))
    assert "/dev/null: a pipe or a device; expected a file" in fails(lambda: records(Path("/dev/null")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">a\n>b\nACGT\n", "line 1, record 'a': an empty record"),
        (">\nACGT\n", "a record without a name"),
        ("> label=a\nACGT\n", "line 1, record '': a record without a name; expected '>name'"),
        (">a\nACGT\n>b\nAC\n>a x\nGG\n", "line 5, record 'a': record 1 has this name too; give each record its own"),
        (">a\nACGU\n", "record 'a': RNA: letter 'U' at position 4 of 4; data.rna=true"),
        (">a\nACGTXX\n", "record 'a': illegal letter 'X' at position 5"),
        (">p\nMKTAYIAKQRQISFVKSHFSRQLEERLGL\n", "record 'p': looks like a protein"),
    ],
)
def test_a_bad_record_is_named_with_its_line_and_stops_no_other(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "x.fa", text)
    bad = [record for record in records(path) if message in _problem(record)]
    assert len(bad) == 1 and str(path) in _problem(bad[0])


def _problem(record: Record) -> str:
    try:
        record.ids()
    except UserError as error:
        return str(error)
    return ""


def test_a_name_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    one, two, three = records(
        write(tmp_path / "x.fa", ">caf\xe9 x\nA\n>caf\xe8\nA\n> c na\xefve\nA\n".encode("latin-1"))
    )
    for record, line in ((one, 1), (two, 3)):
        assert f"x.fa, line {line}, " in _problem(record) and "its name is not UTF-8 text" in _problem(record)
    assert three.name == "c" and not _problem(three)


def test_a_row_with_too_few_cells_is_named(tmp_path: Path) -> None:
    one, two = records(write(tmp_path / "x.csv", "sequence,label\nACGT\nACGT,a\n"))
    assert "x.csv, line 2: 1 cells; the header has 2" in _problem(one) and not _problem(two)


@pytest.mark.parametrize(
    "text",
    [
        'ACGT,"a\nGGGG,b\nCCCC,c\n',
        'ACGT,"a\nGGGG,b\nCCCC,"c\n',
        'ACGT,"a\nGGGG,b\nCCCC,"\nTTTT,d\n',
        '"ACGT,a\nGGGG,b\nCCCC",c\n',
        'ACGT,"a\n' + "GGGG,b\n" * 9999,
    ],
)
def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path: Path, text: str) -> None:
    line, message = 3, "one cell holds further lines that look like rows, 'GGGG,b'"
    found = records(write(tmp_path / "x.csv", f"sequence,label\nAA,x\n{text}"))
    (bad,) = (_problem(record) for record in found if record.problem)
    assert f"x.csv, line {line}: " in bad and message in bad and "was probably not closed" in bad
    assert len(bad) < 250 + len(str(tmp_path)) and not _problem(found[0])
    lost = text.count("\n") - len(found) + 1
    assert f"({lost:,} more lines are lost with it)" in bad if lost else "lost" not in bad


def test_a_quoted_cell_may_have_several_lines(tmp_path: Path) -> None:
    text = 'sequence,label,note\nACGT,"heat\nshock, a","by\nhand"\nGG,"a ""b""",\n'
    one, two = records(write(tmp_path / "x.csv", text))
    assert (one.cells["label"], one.cells["note"]) == ("heat\nshock, a", "by\nhand")
    assert two.where.endswith("line 5") and two.cells["label"] == 'a "b"'
    (row,) = records(write(tmp_path / "y.csv", 'sequence,note\nACGT,"Lee, K.\nand, others" \n'))
    assert row.cells["note"] == "Lee, K.\nand, others " and not _problem(row)
    (row,) = records(write(tmp_path / "x.tsv", 'sequence\tnote\nACGT\t"putative" kinase\n'))
    assert row.cells["note"] == "putative kinase" and not _problem(row)


@pytest.mark.parametrize("row", ["ACGT,café,x", "ACGé,a,x"])
def test_a_row_whose_label_or_sequence_is_not_utf_8_is_named(tmp_path: Path, row: str) -> None:
    text = f"sequence,label,note\nACGT,a,naïve\n{row}\nACGT,b,y\n"
    found = records(write(tmp_path / "x.csv", text.encode("latin-1")), needs=["label"])
    column = "label" if "café" in row else "sequence"
    assert f"x.csv, line 3: column {column!r} is not UTF-8 text; save the file as UTF-8" in _problem(found[1])
    assert not _problem(found[0]) and not _problem(found[2])
    assert records(write(tmp_path / "y.csv", text), needs=["label"])[1].cells["label"] in ("café", "a")


@pytest.mark.parametrize("name", ["x.fa.gz", "x.csv.gz"])
def test_a_gzip_file_that_is_cut_short_is_named_after_the_records_before(tmp_path: Path, name: str) -> None:
    many = [(letters(50, i), "a") for i in range(4000)]
    text = (
        write_csv(tmp_path / "t.csv", many).read_text()
        if "csv" in name
        else "".join(f">r{i}\n{s}\n" for i, (s, _) in enumerate(many))
    )
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode())[:-2000])
    found: list[Record] = []

    def read() -> None:
        for record in read_records(path):
            found.append(record)

    message = fails(read)
    assert "damaged after line" in message and "cut short; get the file again" in message and str(path) in message
    assert 100 < len(found) < 4000


@pytest.mark.parametrize("name", ["x.fa.gz", "x.fa.bgz", "x.csv.gz", "x.txt.gz"])
def test_a_bgzf_file_that_is_cut_between_two_blocks_is_no_shorter_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with bgzf.BgzfWriter(str(path), "wb") as file:
        file.write(b"sequence\n" if "csv" in name else b">r\n" if "fa" in name else b"")
        file.write(letters(70_000, 0).encode())  # more than a block holds
    assert len(records(path)[0].letters) == 70_000
    with path.open("rb") as file:
        ends = [start + size for start, size, *_ in bgzf.BgzfBlocks(file)]
    assert len(ends) == 3
    whole = path.read_bytes()
    for end in ends[:2]:
        path.write_bytes(whole[:end])
        assert f"{path}: cut short: BGZF's last block is not there; get the file again" in fails(lambda: records(path))


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (record,) = records(write(tmp_path / "x.fa.gz", "\ufeff>a\nACGT\n"))
    assert (record.name, record.letters) == ("a", b"ACGT")


@pytest.mark.parametrize("name", ["x.fa", "x.csv", "x.txt"])
@pytest.mark.parametrize(("pack", "kind"), [(gzip, "gzip"), (lzma, "xz"), (bz2, "bzip2")])
def test_a_compressed_file_whose_name_does_not_say_so(tmp_path: Path, name: str, pack: Any, kind: str) -> None:
    (tmp_path / name).write_bytes(pack.compress(b">a\nACGT\n"))
    ending = {"gzip": ".gz", "xz": ".xz", "bzip2": ".bz2"}[kind]
    message = f"{tmp_path / name}: {kind}, which its name does not say; name it {name}{ending}"
    assert fails(lambda: records(tmp_path / name)) == message


@pytest.mark.parametrize("name", ["x.fa", "x.csv", "x.fa.gz"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_what_the_system_refuses_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    path = write(tmp_path / name, ">a\nACGT\n")

    def refuse(self: Path, mode: str = "r") -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert fails(lambda: records(path)) == f"{path}: cannot be read: {os.strerror(code)}"


def test_what_is_no_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.fa.gz"
    path.write_bytes(b">a\nACGT\n")
    assert "damaged after line 0" in fails(lambda: records(path))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.fa"
    with path.open("w") as file:
        for i in range(3000):
            file.write(f">r{i}\n{'ACGTACGTACGTACGTACGT' * 100}\n")
    assert path.stat().st_size > 5e6
    tracemalloc.start()
    count = sum(1 for _ in read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000 and peak < 2e6
