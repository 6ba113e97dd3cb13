"""A genome in a FASTA file, plain or BGZF, read at any place by its index.

    letter i of a record lies at offset + i // linebases * linewidth + i % linebases      (.fai)

Memory is that of the index, whatever the genome's size. Letters come as the file has them, lower case (soft-masked
repeats) included; `ids` and `soft_mask` are its two channels. Threads, forked processes and pickled copies read at
once. An index that does not belong to the file is never read from: sizes are compared when it is opened, the header,
lines and end of a record at its first use, and the number of letters at each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mambaverse.errors import UserError
from mambaverse.tasks.dna.files import BOM
from mambaverse.tasks.dna.genome.regions import Aliases, Region, parse_region, resolve
from mambaverse.tasks.dna.genome.store import LONGEST_HEADER, has_letters, load_index, open_handle
from mambaverse.tasks.dna.tokens import encode, reverse_complement

LONGEST_LINE = 1 << 16  # bytes that are searched for the end of a line that the index says is longer


class Chromosome:
    """One record of a genome; `len` is its bases, and a slice its letters, read when they are asked for.

    Attributes:
        name: Of the record.
    """

    def __init__(self, genome: Genome, name: str) -> None:
        self._genome, self.name = genome, name

    def __len__(self) -> int:
        return self._genome.lengths[self.name]

    def __getitem__(self, places: int | slice) -> bytes:
        """Return letters, by Python's rules for slices; an index gives one letter."""
        if isinstance(places, slice):
            start, stop, step = places.indices(len(self))
            if step == 1:
                return self._genome.fetch(self.name, start, max(stop, start))
            low, high = (start, stop) if step > 0 else (stop + 1, start + 1)
            letters = self._genome.fetch(self.name, low, max(high, low))
            return letters[::step]
        place = places + len(self) if places < 0 else places
        if not 0 <= place < len(self):
            raise IndexError(f"base {places:,} of {self.name}, which has {len(self):,}")
        return self._genome.fetch(self.name, place, place + 1)

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self):,} bases of {self._genome.path}>"


class Genome:
    """A FASTA file whose records are read at any place; opening it makes its index if need be.

    Args:
        path: The file: .fa, .fasta, .fna, plain or BGZF, which .gz or .bgz ends the name of.
        aliases: A table of chromosome names such as UCSC's chromAlias.txt, or {other name: name in the file}. chr1 = 1
            and chrM = MT are known without one.

    Attributes:
        path: Of the file.
        names: Of the records, in the file's order.
        lengths: Bases of each record.

    Raises:
        UserError: no such file, plain gzip, no FASTA, or FASTA that cannot be indexed (lines of several lengths in one
            record, two records of one name): file, line, record and remedy.
    """

    def __init__(self, path: str | Path, aliases: str | Path | Mapping[str, str] | Aliases | None = None) -> None:
        self.path = Path(path).expanduser()
        self._handle = open_handle(self.path)
        index = load_index(self._handle)
        self.names: tuple[str, ...] = index.names
        self.lengths: dict[str, int] = dict(zip(index.names, index.table[:, 0].tolist(), strict=True))
        self._numbers = {name: number for number, name in enumerate(index.names)}
        self._table = index.table
        ends = np.sort(np.append(index.ends(), 0))
        self._before = ends[np.searchsorted(ends, index.table[:, 1], side="right") - 1]  # the end of the record above
        if isinstance(aliases, Mapping):
            aliases = Aliases(aliases.items())
        elif aliases is not None and not isinstance(aliases, Aliases):
            aliases = Aliases.read(Path(aliases).expanduser())
        self._aliases = aliases or Aliases()
        self._resolved: dict[str, str] = {}
        self._checked: set[str] = set()

    def fetch(self, name: str | Region, start: int = 0, end: int | None = None, strand: str = "+") -> bytes:
        """Return letters as the file has them, on either strand.

        Args:
            name: Of the chromosome, or another of its names; or a region, and then nothing else.
            start: First base, from 0.
            end: Behind the last base; None: the chromosome's end.
            strand: "-": the reverse complement of these bases, case kept.

        Raises:
            UserError: an unknown chromosome, a start behind the end or an end behind the chromosome's; an index that
                turns out to be another file's; a file that has changed or is damaged.
        """
        name, start, end, strand = self._place(name, start, end, strand)
        if name not in self._checked:
            self._check_record(name)
        if start == end:
            return b""
        _, offset, bases, width = self._table[self._numbers[name]].tolist()
        first = offset + start // bases * width + start % bases
        behind = offset + (end - 1) // bases * width + (end - 1) % bases + 1
        letters = self._handle.read(first, behind - first).translate(None, b"\r\n")
        if len(letters) != end - start:
            raise self._foreign(name, f"bases {start + 1:,} to {end:,} are not in lines of {bases:,} letters")
        return letters if strand == "+" else reverse_complement(letters)

    def ids(
        self,
        name: str | Region,
        start: int = 0,
        end: int | None = None,
        strand: str = "+",
        *,
        strict: bool = False,
        rna: bool = False,
    ) -> np.ndarray:
        """Return what `fetch` returns as ids, uint8 (end - start,); `strict` and `rna` are those of `encode`.

        Raises:
            UserError: what `fetch` raises; a letter that is none of DNA's.
        """
        place = self._place(name, start, end, strand)
        letters = self.fetch(*place)
        where = f"{self.path}, {Region(*place)}"
        return encode(letters, strict=strict, rna=rna, where=where)

    def soft_mask(self, name: str | Region, start: int = 0, end: int | None = None, strand: str = "+") -> np.ndarray:
        """Return where the letters that `fetch` returns are lower case, bool (end - start,): repeats, by custom.

        Raises:
            UserError: what `fetch` raises.
        """
        letters = np.frombuffer(self.fetch(name, start, end, strand), np.uint8)
        return (letters >= ord("a")) & (letters <= ord("z"))

    def region(self, text: str) -> Region:
        """Read a region such as chr1:1,000-2,000; its chromosome may be named as elsewhere, its end is checked.

        Raises:
            UserError: what `parse_region` raises.
        """
        name = text.strip()
        for _ in range(3):  # the text without strand, without positions
            if name in self.lengths:
                break
            head = name[:-3] if name.endswith(("(+)", "(-)")) else name.rpartition(":")[0]
            if not head:
                break
            name = head
        known = resolve(name, self.lengths, self._aliases, str(self.path))
        return parse_region(known + text.strip().removeprefix(name), self.lengths)

    def resolve(self, name: str) -> str:
        """Return the name that a chromosome has in this file.

        Raises:
            UserError: it has none; the message says the nearest.
        """
        if name in self.lengths:
            return name
        if name not in self._resolved:
            self._resolved[name] = resolve(name, self.lengths, self._aliases, str(self.path))
        return self._resolved[name]

    def __getitem__(self, name: str) -> Chromosome:
        return Chromosome(self, self.resolve(name))

    def __contains__(self, name: object) -> bool:
        return name in self.lengths

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"<Genome {self.path}: {len(self):,} records, {sum(self.lengths.values()):,} bases>"

    def __enter__(self) -> Genome:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; it closes by itself with the object too."""
        self._handle.close()

    def _place(self, name: str | Region, start: int, end: int | None, strand: str) -> tuple[str, int, int, str]:
        """Return where to read, checked."""
        if isinstance(name, Region):
            start, end, strand = name.start, name.end, name.strand
        name = self.resolve(name.name if isinstance(name, Region) else name)
        length = self.lengths[name]
        end = length if end is None else end
        if not 0 <= start <= end <= length:
            wrong = (
                f"end {end:,} is past its end; it has {length:,} bases"
                if 0 <= start <= end
                else f"start {start:,}, end {end:,}; expected 0 <= start <= end <= {length:,}"
            )
            raise UserError(f"{self.path}, record {name!r}: {wrong}")
        if strand not in ("+", "-"):
            raise UserError(f"{self.path}, record {name!r}: strand {strand!r}; expected '+' or '-'")
        return name, int(start), int(end), strand

    def _check_record(self, name: str) -> None:
        """Raise UserError unless the record lies in the file as the index says: header, lines, end."""
        number = self._numbers[name]
        length, offset, bases, width = self._table[number].tolist()
        before = int(self._before[number])
        first = max(before, offset - LONGEST_HEADER)
        above = self._handle.read(first, offset - first).removeprefix(b"" if first else BOM)
        between, _, header = above.rstrip(b"\r\n").rpartition(b"\n")
        words = header[1:].split(maxsplit=1)
        if not above.endswith(b"\n") or not header.startswith(b">") or not words:
            raise self._foreign(name, "no header stands where it should")
        if words[0] != name.encode():
            raise self._foreign(name, f"the header there is {words[0].decode('utf-8', 'replace')!r}")
        if has_letters(between if first == before else between.partition(b"\n")[2]):
            raise self._foreign(name, "letters of another record stand above it")
        end = offset + (length - 1) // bases * width + (length - 1) % bases + 1
        below = self._handle.read(end, 64)
        if below[:1] not in (b"", b"\n", b"\r") or below.lstrip(b"\r\n")[:1] not in (b"", b">"):
            raise self._foreign(name, "letters follow where it should end")
        line = self._handle.read(offset, min(bases, LONGEST_LINE))
        behind = self._handle.read(offset + bases, width - bases) if length > bases else b"\n"
        if b"\n" in line or behind not in (b"\n", b"\r\n"):
            raise self._foreign(name, f"its lines are not of {bases:,} letters")
        self._checked.add(name)

    def _foreign(self, name: str, why: str) -> UserError:
        return UserError(
            f"{self.path}, record {name!r}: {why}: the index {self.path.name}.fai is not this file's; delete it, "
            "it is made anew"
        )


def open_genome(path: str | Path, aliases: str | Path | Mapping[str, str] | Aliases | None = None) -> Genome:
    """Open a genome: `Genome(path, aliases)`."""
    return Genome(path, aliases)
