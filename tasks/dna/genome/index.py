"""The index of a FASTA file, .fai as samtools writes it: where each record's letters lie.

    name <tab> length <tab> offset <tab> linebases <tab> linewidth
    letter i is at offset + i // linebases * linewidth + i % linebases

It is made in one pass, in memory that neither the file's size nor its longest line changes. That needs lines of one
length in each record (the last may be shorter); LF and CR LF both work, since `linewidth` counts the line's end. As in
samtools, records without letters are left out, offsets in a BGZF file are those of its content, and the last line
counts as ended though the file breaks off before its newline.

Source: samtools' manual page faidx(5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mambaverse.errors import UserError, warn
from mambaverse.tasks.dna.files import BOM

NEWLINE, RETURN, HEADER = 10, 13, ord(">")
LARGEST = int(np.iinfo(np.int64).max)
REWRAP = "python -c \"from Bio import SeqIO; SeqIO.convert('OLD.fa', 'fasta', 'NEW.fa', 'fasta')\" wraps it anew"


class BadIndexError(Exception):
    """An index that does not belong to its file, or that is damaged; it is then made anew."""


@dataclass(frozen=True)
class Index:
    """Where the records of a FASTA file lie.

    Attributes:
        names: Of the records, in the order of the index.
        table: length, offset, linebases, linewidth of each, int64 (N, 4).
    """

    names: tuple[str, ...]
    table: np.ndarray

    @classmethod
    def parse(cls, data: bytes) -> Index:
        """Read the content of an index.

        Raises:
            BadIndexError: a line that is none of an index's.
        """
        names, rows = [], []
        try:
            lines = data.decode().split("\n")
        except UnicodeDecodeError as error:
            number = data.count(b"\n", 0, error.start) + 1
            raise BadIndexError(f"line {number:,} is not UTF-8 text") from None
        for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
            name, *cells = line.split("\t")
            try:
                row = [int(cell) for cell in cells]
            except ValueError:
                row = []
            good = len(row) == 4 and min(row) >= 0 and 0 < row[2] < row[3]
            if not good or row[1] + (row[0] // row[2] + 1) * row[3] > LARGEST:  # `ends` counts in int64
                raise BadIndexError(f"line {number:,} is not name, length, offset, linebases, linewidth")
            names.append(name)
            rows.append(row)
        if not names or len(set(names)) < len(names):
            raise BadIndexError("it has a name twice" if names else "it is empty")
        return cls(tuple(names), np.array(rows, np.int64))

    def to_bytes(self) -> bytes:
        """Return the content of the file, as samtools writes it."""
        lines = ("\t".join([name, *map(str, row)]) for name, row in zip(self.names, self.table.tolist(), strict=True))
        return "".join(f"{line}\n" for line in lines).encode()

    def ends(self) -> np.ndarray:
        """Return the place behind the last letter of each record, int64 (N,)."""
        length, offset, bases, width = self.table.T
        last = length - 1
        return offset + last // bases * width + last % bases + 1


class IndexBuilder:
    """Makes an index from the pieces of a file, in order: `feed` each, then `finish`.

    Args:
        where: The file's name, for messages.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._offset = 0  # in the file, of the next piece
        self._first_bytes = b""  # that may be those of a byte order mark
        self._line = 1  # the line that is being read: its number,
        self._start = 0  # its place in the file,
        self._first = 0  # its first byte, once that is known,
        self._header = b""  # its text so far, if it is a header
        self._last = 0  # byte that was read
        self._blank: int | None = None  # the first line with white space among its letters
        self._seen: dict[str, int] = {}  # line of each record
        self._rows: dict[str, tuple[int, int, int, int]] = {}
        self._name: str | None = None  # of the open record; of it:
        self._begins = self._length = self._bases = self._width = 0
        self._closed = False  # a shorter line has been there: no letters may follow

    def feed(self, chunk: bytes) -> None:
        """Read the next piece of the file, of any size.

        Raises:
            UserError: what this piece shows to be no FASTA, or FASTA that cannot be indexed.
        """
        if not self._offset:
            chunk = self._first_bytes + chunk
            self._first_bytes = chunk if BOM.startswith(chunk) else b""  # it may come in pieces
            if self._first_bytes:
                return
            if chunk.startswith(BOM):
                chunk = chunk.removeprefix(BOM)
                self._offset = self._start = len(BOM)
        if not chunk:
            return
        data = np.frombuffer(chunk, np.uint8)
        blanks = np.flatnonzero(data <= 32)
        breaks = blanks[data[blanks] == NEWLINE]
        starts = np.concatenate(([self._start], self._offset + breaks + 1))  # of the lines; the last one is unfinished
        firsts = np.zeros(len(starts), np.uint8)
        firsts[0] = self._first or data[0]
        firsts[1:] = data[np.minimum(breaks + 1, len(data) - 1)]
        before = np.where(breaks > 0, data[breaks - 1], self._last)
        returns = (before == RETURN) & (self._offset + breaks > starts[:-1])
        widths = self._offset + breaks - starts[:-1] + 1
        bases = widths - 1 - returns
        if self._blank is None:
            self._blank = self._find_blank(data, blanks, breaks, firsts)
        done = 0
        for at in np.flatnonzero(firsts[:-1] == HEADER).tolist():
            self._take(bases[done:at], widths[done:at], self._line + done)
            text = self._header if at == 0 else b""
            self._begin(text + chunk[max(int(starts[at]) - self._offset, 0) : breaks[at]], int(starts[at + 1]), at)
            done = at + 1
        self._take(bases[done:], widths[done:], self._line + done)
        self._line += len(breaks)
        tail = int(starts[-1]) - self._offset
        unfinished = tail < len(chunk)
        header = unfinished and firsts[-1] == HEADER
        kept = self._header if not len(breaks) else b""
        self._header = kept + chunk[max(tail, 0) :] if header else b""
        self._first = int(firsts[-1]) if unfinished else 0
        self._start, self._last = int(starts[-1]), int(data[-1])
        self._offset += len(chunk)

    def finish(self) -> Index:
        """Return the index.

        Raises:
            UserError: no record, none with letters, or a last line that does not fit.
        """
        if self._first == HEADER:
            self._begin(self._header, self._offset, 0)
        elif self._offset > self._start:
            bases = self._offset - self._start - (self._last == RETURN)
            self._take(np.array([bases]), np.array([bases + 1]), self._line)
        self._end()
        if not self._seen:
            raise UserError(f"{self._where}: holds no records; expected lines '>name', each with a sequence below it")
        if not self._rows:
            raise UserError(f"{self._where}: no record has letters; get the file again")
        if empty := [name for name in self._seen if name not in self._rows]:
            more = f" and {len(empty) - 1:,} more" if len(empty) > 1 else ""
            warn(
                f"{self._where}, line {self._seen[empty[0]]:,}, record {empty[0]!r}{more}: no letters, left out; "
                "give its sequence, or take it out"
            )
        return Index(tuple(self._rows), np.array(list(self._rows.values()), np.int64))

    def _begin(self, header: bytes, begins: int, line: int) -> None:
        """Open the record of a header, whose letters begin at `begins`; `line` counts from the piece's first."""
        self._end()
        number = self._line + line
        text = header[1:].strip()
        if RETURN in text:
            raise UserError(f"{self._where}, line {number:,}: lines end in CR alone; expected LF or CR LF")
        if not text:
            raise UserError(f"{self._where}, line {number:,}: a record without a name; expected '>name'")
        try:
            name = text.split(maxsplit=1)[0].decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._where}, line {number:,}: byte 0x{error.object[error.start]:02X} in the record's name is not "
                "UTF-8 text; save the file as UTF-8, or give the record another name"
            ) from None
        if (other := self._seen.get(name)) is not None:
            raise UserError(
                f"{self._where}, line {number:,}, record {name!r}: the record in line {other:,} has this name too; "
                "give each record its own"
            )
        self._seen[name] = number
        self._name, self._begins, self._length, self._bases, self._width = name, begins, 0, 0, 0
        self._closed = False

    def _end(self) -> None:
        if self._name is not None and self._length:
            self._rows[self._name] = (self._length, self._begins, self._bases, self._width)

    def _take(self, bases: np.ndarray, widths: np.ndarray, line: int) -> None:
        """Count lines of the open record: letters and bytes of each; the first is line number `line`."""
        if not len(bases):
            return
        if self._name is None:
            if bases.any():
                at = line + int((bases > 0).argmax())
                raise UserError(f"{self._where}, line {at:,}: not FASTA: expected '>name' before any letters")
            return
        if not self._bases and not self._closed:
            self._bases, self._width = int(bases[0]), int(widths[0])
            self._closed = not self._bases  # an empty line below the header
        if self._blank is not None and line <= self._blank < line + len(bases):
            raise UserError(
                f"{self._where}, line {self._blank:,}, record {self._name!r}: white space among the letters; "
                f"take it out: {REWRAP}"
            )
        last = -1  # the line that ends the record, if it is among these
        if not self._closed:
            whole = (bases == self._bases) & (widths == self._width)
            last = len(bases) if whole.all() else int(whole.argmin())
            if last < len(bases) and bases[last] > self._bases:
                self._refuse_line(int(bases[last]), line + last, "longer than the lines above it")
            self._closed = last < len(bases)
        if len(late := np.flatnonzero(bases[last + 1 :])):
            at = last + 1 + int(late[0])
            self._refuse_line(
                int(bases[at]), line + at, "below a line that is shorter, empty or ends otherwise (CR LF)"
            )
        self._length += int(bases.sum())

    def _refuse_line(self, letters: int, line: int, why: str) -> None:
        raise UserError(
            f"{self._where}, line {line:,}, record {self._name!r}: {letters:,} letters, {why}; expected lines "
            f"of {self._bases:,} letters, the last alone may be shorter; {REWRAP}"
        )

    def _find_blank(self, data: np.ndarray, blanks: np.ndarray, breaks: np.ndarray, firsts: np.ndarray) -> int | None:
        """Return the number of the first line with white space among letters: an index would count it as letters."""
        others = blanks[data[blanks] != NEWLINE]
        lines = np.searchsorted(breaks, others)
        ends_line = (data[others] == RETURN) & ((others + 1 == len(data)) | (data[(others + 1) % len(data)] == NEWLINE))
        wrong = np.flatnonzero((firsts[lines] != HEADER) & ~ends_line)
        if self._last == RETURN and data[0] != NEWLINE and firsts[0] != HEADER and self._offset > self._start:
            return self._line  # the last piece ended in a CR
        return self._line + int(lines[wrong[0]]) if len(wrong) else None
