"""Sequence files, one record at a time: FASTA and tables, plain or compressed; a record knows its file and line.

A FASTA record is a line `>name further words` and lines of letters up to the next one; the name is the header's first
word (W. Pearson's format). Lines may end in CR LF. Memory is that of the longest record, whatever the file's size.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
import os
import re
import reprlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from mambaverse.datasets import files_below
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.tokens import encode

FASTA = (".fa", ".fasta", ".fna", ".ffn", ".frn", ".fas", ".fsa")
TABLES = (".csv", ".tsv")
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}  # of columns; the first two are read
OPENERS = {".gz": gzip.open, ".bgz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
GZIP = b"\x1f\x8b"
COMPRESSED = {GZIP: ("gzip", ".gz"), b"\xfd7zXZ\x00": ("xz", ".xz"), b"BZh": ("bzip2", ".bz2")}
DAMAGES = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what reading a file raises
BOM = b"\xef\xbb\xbf"  # UTF-8's byte order mark
MAGIC = GZIP + b"\x08\x04"  # deflate, with an extra field
END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")  # BGZF's last block
HEAD = 18  # bytes of a BGZF block before its data, when its extra field holds nothing else
AnyPath = Path | zipfile.Path  # of a file, or of a member of a .zip
MAX_NAMES = 1_000_000  # of a file that are compared for duplicates: memory stays bounded
MAX_FIELD = 2**31 - 1  # letters in a table's cell
UNCLOSED = 'a quote (") was probably not closed'
BASES = re.compile(r"[ACGTUN]{4,}", re.IGNORECASE)  # what a swallowed row has in its sequence's place
LOST = "\ufffd"  # what a byte that is not UTF-8 is read as


@dataclass(frozen=True)
class Record:
    """One sequence as the file has it.

    Attributes:
        name: The first word of the header; of a table its row number.
        letters: The sequence, as written.
        where: File, line and name, for messages.
        header: The whole header; of a table empty.
        cells: The row of a table, by column.
        problem: Why it cannot be used, if so; the records behind it still can.
    """

    name: str
    letters: bytes
    where: str
    header: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    def ids(self, *, strict: bool = False, rna: bool = False, max_unknown: float = 1.0) -> np.ndarray:
        """Return the ids of the letters, uint8 (L,).

        Raises:
            UserError: an empty record, one with a problem, a letter that is none of DNA's, too many N.
        """
        if self.problem:
            raise UserError(f"{self.where}: {self.problem}")
        if not self.letters:
            raise UserError(f"{self.where}: an empty record; give its sequence, or take it out")
        return encode(self.letters, strict=strict, rna=rna, max_unknown=max_unknown, where=self.where)


def kind_of(path: AnyPath) -> str | None:
    """Return "fasta", "table" or "text" (.txt: one sequence), by the name of a file; None for others."""
    name = path.name.lower()
    for suffix in OPENERS:
        name = name.removesuffix(suffix)
    ending = Path(name).suffix
    return "fasta" if ending in FASTA else "table" if ending in TABLES else "text" if ending == ".txt" else None


def stem_of(path: AnyPath) -> str:
    """Return the name of a file without what says its kind and its compression: E.coli of E.coli.fa.gz."""
    name = path.name
    for endings in (tuple(OPENERS), (*FASTA, *TABLES, ".txt")):
        name = next((name[: -len(ending)] for ending in endings if name.lower().endswith(ending)), name)
    return name


def check_file(path: AnyPath, expected: str) -> None:
    """Raise UserError unless `path` is a file, as one that was `expected`: "a VCF file"."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "no such file"
        raise UserError(f"{path}: {found}; expected {expected}")


def is_sequence_file(path: AnyPath) -> bool:
    """Whether `path` is a file that `read_records` reads, by its name."""
    return path.is_file() and not path.name.startswith(".") and kind_of(path) is not None


def sequence_files(path: Path) -> list[Path]:
    """Return the files below a folder that `read_records` reads, by their names; of a file itself."""
    return [file for file in files_below(path) if kind_of(file) is not None] if path.is_dir() else [path]


def read_records(
    path: AnyPath,
    sequence: str = "sequence",
    needs: Sequence[str] = (),
    keys: Mapping[str, str] | None = None,
    *,
    unique: bool = True,
) -> Iterator[Record]:
    """Yield the records of a FASTA file or of a table.

    Args:
        path: The file; its name says what it is (.fa, .fasta, .fna; .csv, .tsv; .txt; each also .gz, .xz, .bz2).
        sequence: The column of a table with the sequences.
        needs: Further columns that a table must have.
        keys: The config's keys that name columns, {"sequence": "data.sequence"}, for messages.
        unique: Whether a name that a record of a FASTA file has already is a problem.

    Raises:
        UserError: no such file, of another kind, damaged, without records or the columns. What is wrong with one
            record alone is its `problem`: no name, a name that another has, too few cells, a quote that is not closed,
            bytes in its name, its sequence or in one of `needs` that are not UTF-8.
    """
    check_file(path, "a file")
    if (kind := kind_of(path)) is None:
        known = ", ".join((*FASTA[:3], *TABLES))
        raise UserError(f"{path}: not known as a sequence file; expected one of {known}, also compressed (.gz, .xz)")
    if kind == "table":
        yield from _table(path, sequence, needs, keys or {})
    elif kind == "text":
        yield Record(Path(path.name).stem, b"".join(b"".join(read_lines(path)).split()), str(path))
    else:
        yield from _unique(_fasta(path)) if unique else _fasta(path)


def block_size(head: bytes) -> int | None:
    """Return the size of the BGZF block that starts with `head`, None if it is none; `head` holds its extra field."""
    if not head.startswith(MAGIC) or len(head) < HEAD:
        return None
    at, end = 12, min(12 + int.from_bytes(head[10:12], "little"), len(head))
    while at + 4 <= end:
        size = int.from_bytes(head[at + 2 : at + 4], "little")
        if head[at : at + 2] == b"BC" and size == 2 and at + 6 <= end:
            return int.from_bytes(head[at + 4 : at + 6], "little") + 1
        at += 4 + size
    return None


def refuse_cut(path: Path) -> None:
    """Raise UserError if a BGZF file lacks its last block: cut between two blocks, it would read as a shorter file."""
    with path.open("rb") as file:
        if block_size(file.read(1024)) is None:
            return
        file.seek(-min(len(END), path.stat().st_size), os.SEEK_END)
        if file.read() != END:
            raise UserError(f"{path}: cut short: BGZF's last block is not there; get the file again")


@contextmanager
def open_binary(path: AnyPath) -> Iterator[IO[bytes]]:
    """Open a file, compressed or not, to be read as bytes.

    Raises:
        UserError: a BGZF file that lacks its last block, a compressed one whose name does not say so.
    """
    if isinstance(path, Path):  # a member of a .zip has the archive's checksum
        refuse_cut(path)
    with path.open("rb") as raw:
        suffix = Path(path.name).suffix.lower()
        opener: Any = OPENERS.get(suffix)
        if opener is None:
            head = raw.peek(8)  # type: ignore[attr-defined]  # both kinds of files have it
            for magic, (kind, ending) in COMPRESSED.items():
                if head.startswith(magic):
                    raise UserError(f"{path}: {kind}, which its name does not say; name it {path.name}{ending}")
            yield raw
            return
        with opener(raw) as file:
            yield file


def read_lines(path: AnyPath) -> Iterator[bytes]:
    """Yield the lines, without UTF-8's byte order mark, naming the line at which a compressed file breaks off."""
    number = 0
    try:
        with open_binary(path) as file:
            for line in file:
                number += 1
                yield line.removeprefix(BOM) if number == 1 else line
    except DAMAGES as error:
        raise UserError(f"{path}: {damage(error, f' after line {number:,}')}") from None


def damage(error: Exception, after: str = "") -> str:
    """Say what one of `DAMAGES` means: what the system says, or that the file is not whole."""
    if isinstance(error, OSError) and error.errno is not None:  # gzip's and bz2's own have none
        return f"cannot be read: {error.strerror}"
    reason = "cut short" if isinstance(error, EOFError) else " ".join(str(error).split())
    return f"damaged{after}: {reason}; get the file again"


def _fasta(path: AnyPath) -> Iterator[Record]:
    header: bytes | None = None
    parts: list[bytes] = []
    start = 0
    for number, line in enumerate(read_lines(path), 1):
        if line.startswith(b">"):
            if header is not None:
                yield _record(path, start, header, parts)
            header, parts, start = line[1:].rstrip(), [], number
        elif header is not None:
            parts.append(line)
        elif line.strip() and not line.startswith(b";"):
            text = line[:30].decode("latin-1").strip()
            raise UserError(f"{path}, line {number}: not FASTA: expected '>name', got {text!r}")
    if header is None:
        raise UserError(f"{path}: holds no records; expected lines '>name', each with a sequence below it")
    yield _record(path, start, header, parts)


def _record(path: AnyPath, line: int, header: bytes, parts: list[bytes]) -> Record:
    text = header.decode("utf-8", "replace")
    name = next(iter(text.split(maxsplit=1)), "")
    problem = ""
    if not name or (text[0].isspace() and "=" in name):  # "> label=a"
        name, problem = "", "a record without a name; expected '>name'"
    elif LOST in name:
        problem = "its name is not UTF-8 text; save the file as UTF-8"
    letters = b"".join(parts).translate(None, b" \t\r\n")
    return Record(name, letters, f"{path}, line {line:,}, record {name!r}", text.strip(), problem=problem)


def _unique(records: Iterator[Record]) -> Iterator[Record]:
    seen: dict[str, int] = {}
    for number, record in enumerate(records, 1):
        if not record.problem and (other := seen.get(record.name)) is not None:
            record = replace(record, problem=f"record {other:,} has this name too; give each record its own")
        elif len(seen) < MAX_NAMES:
            seen[record.name] = number
        yield record


def _table(path: AnyPath, sequence: str, needs: Sequence[str], keys: Mapping[str, str]) -> Iterator[Record]:
    csv.field_size_limit(MAX_FIELD)
    delimiter = "\t" if re.search(r"\.tsv(\.\w+)?$", path.name.lower()) else ","
    text = (line.decode("utf-8", "replace") for line in read_lines(path))
    rows = csv.reader(text, delimiter=delimiter)
    try:
        header = [name.strip() for name in next(rows, [])]
        if any("\n" in name for name in header):
            raise UserError(f"{path}, line 1: a column's name holds a line break; {UNCLOSED}")
        for column in (sequence, *needs):
            if column not in header:
                if strange := _strange(header, column, delimiter):
                    raise UserError(f"{path}: {strange}")
                key = keys.get(column)
                remedy = f"; {key} names another" if key else ""
                raise UserError(f"{path}: no column {column!r}{suggest(column, header)}{remedy}")
        if twice := [name for name, count in Counter(header).items() if name and count > 1]:
            raise UserError(f"{path}: {header.count(twice[0])} columns {twice[0]!r}; expected one: rename the others")
        at, number = header.index(sequence), 0
        for number, line, row in _rows(rows):
            where = f"{path}, line {line:,}"
            if problem := row if isinstance(row, str) else _misread(row, len(header), delimiter, at):
                if below := rows.line_num - line:
                    problem += f" ({below:,} more lines are lost with it)"
                yield Record(str(number), b"", where, problem=problem)
                continue
            letters = row[at].strip().encode("utf-8", "replace")
            cells = dict(zip(header, row, strict=True))
            lost = next((column for column in (sequence, *needs) if LOST in cells[column]), None)
            problem = f"column {lost!r} is not UTF-8 text; save the file as UTF-8" if lost is not None else ""
            yield Record(str(number), letters, where, "", cells, problem)
        if not number:
            raise UserError(f"{path}: holds no usable sequences: no row below its header")
    except csv.Error as error:  # of the header
        if "new-line character" in str(error):
            raise UserError(f"{path}: its lines end in CR alone; expected LF or CR LF") from None
        raise UserError(f"{path}, line 1: not a table: {error}") from None


def _strange(header: Sequence[str], column: str, delimiter: str) -> str:
    """Return why a header that has no `column` may not be one: other separators, or UTF-16; "" if neither is."""
    line = delimiter.join(header)
    if "\0" in line:
        return "not UTF-8 text, but UTF-16 as it seems; save the file as UTF-8"
    for other, name in SEPARATORS.items():
        if other != delimiter and column in (cell.strip().strip('"') for cell in line.split(other)):
            return f"its columns are separated by {name}; expected commas in a .csv, tabs in a .tsv"
    return ""


def _rows(rows: Any) -> Iterator[tuple[int, int, list[str] | str]]:
    """Yield (number, line at which it begins, cells) of the rows of a reader below its header, but for empty ones.

    What is wrong with a row stands in the place of its cells; the reader goes on behind it.
    """
    number = 0
    while True:
        line = rows.line_num + 1
        row: list[str] | str | None
        try:
            row = next(rows, None)
        except csv.Error as error:
            row = f"not a row of a table: {error}; {UNCLOSED}"
        if row is None:
            return
        number += 1
        if row:
            yield number, line, row


def _misread(row: Sequence[str], columns: int, delimiter: str, at: int) -> str:
    """Return what is wrong with the cells of a row, whose sequence is at place `at`; "" if nothing is."""
    for cell in row:
        for line in cell.split("\n")[1:]:
            cells = line.split(delimiter)
            if len(cells) == columns > 1 and BASES.fullmatch(cells[at].strip()):
                return f"one cell holds further lines that look like rows, {reprlib.repr(line.strip())}; {UNCLOSED}"
    return "" if len(row) == columns else f"{len(row)} cells; the header has {columns}"
