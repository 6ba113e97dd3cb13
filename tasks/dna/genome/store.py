"""Opens a FASTA file with its index: found, checked, or made and kept where there is room for it.

    genome.fa  -> genome.fa.fai           genome.fa.bgz -> genome.fa.bgz.fai, genome.fa.bgz.gzi

An index that is older than its file, or whose sizes are not the file's, is made anew, with a warning: a wrong one reads
wrong letters in silence, and a right one is made in seconds. Where the folder cannot be written, the new index goes
into the user's cache folder, and where that cannot be either, into memory; both are said once a process.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import Progress

from mambaverse.datasets import data_home
from mambaverse.engine.files import SaveError, write_atomic
from mambaverse.engine.progress import Screen
from mambaverse.errors import UserError, warn
from mambaverse.tasks.dna.files import BOM, GZIP, HEAD, block_size
from mambaverse.tasks.dna.genome.bgzf import BgzfHandle
from mambaverse.tasks.dna.genome.handle import Handle
from mambaverse.tasks.dna.genome.index import BadIndexError, Index, IndexBuilder

PIECE = 1 << 22  # bytes that are indexed at a time
LONGEST_HEADER = 1 << 20  # bytes that are searched for a record's header
LONG = 1 << 28  # bytes from which on indexing shows its progress
OTHERS = {b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip", b"(\xb5/\xfd": "zstd"}
_said: set[Path] = set()


def open_handle(path: Path) -> Handle:
    """Open a FASTA file, plain or BGZF.

    Raises:
        UserError: no such file, an empty one, plain gzip or another compression that has no random access, FASTQ.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.is_dir() else f"{path}: a folder; expected a FASTA file")
    handle = Handle(path)
    head = handle.read(0, 1024)
    if not head:
        raise UserError(f"{path}: an empty file; expected FASTA, lines '>name' with a sequence below each")
    way = f"python -m mambaverse.tasks.dna.genome.bgzf {path}"
    if head.startswith(GZIP):
        if block_size(head) is not None and len(head) >= HEAD:
            handle.close()
            return BgzfHandle(path)
        named = path.suffix.lower() in (".gz", ".bgz")
        remedy = (
            f"write it as BGZF: {way} (or: gunzip {path}; bgzip {path.with_suffix('')})"
            if named
            else f"name it {path.name}.gz, and write that as BGZF: {way}.gz"
        )
        raise UserError(f"{path}: plain gzip, which can be read from its start only; {remedy}")
    for magic, kind in OTHERS.items():
        if head.startswith(magic):
            raise UserError(f"{path}: {kind}, which has no random access; expected plain or BGZF: {way}")
    if head.startswith(b"@"):
        raise UserError(f"{path}: begins with '@': FASTQ reads, no genome; expected FASTA, lines '>name'")
    return handle


def load_index(handle: Handle) -> Index:
    """Return the index of an open file, and give a BGZF file its own: read, or made and kept."""
    reason = ""
    for fai in (_beside(handle.path), _cached(handle.path)):
        try:
            return _read(handle, fai)
        except FileNotFoundError:
            continue
        except (BadIndexError, OSError) as error:
            reason = reason or f"{fai}: {error}"
    if reason:
        warn(f"{reason}; the index is made anew")
    index = _build(handle)
    _keep(handle, index)
    return index


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".fai")


def _cached(path: Path) -> Path:
    place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return data_home() / "indexes" / place / f"{path.name}.fai"


def _read(handle: Handle, fai: Path) -> Index:
    """Read an index.

    Raises:
        BadIndexError: it is older than its file, or not its.
        FileNotFoundError: there is none.
    """
    modified = [fai.stat().st_mtime_ns]
    if isinstance(handle, BgzfHandle):
        gzi = fai.with_suffix(".gzi")
        modified.append(gzi.stat().st_mtime_ns)
        handle.read_index(gzi.read_bytes())
    if min(modified) < handle.modified_ns:
        raise BadIndexError(f"older than {handle.path.name}")
    index = Index.parse(fai.read_bytes())
    check_sizes(handle, index)
    return index


def check_sizes(handle: Handle, index: Index) -> None:
    """Raise BadIndexError if letters stand in `handle` above the first record of `index` or behind the last."""
    end = int(index.ends().max())
    if end > handle.size:
        raise BadIndexError(f"its last record ends at byte {end:,}, {handle.path.name} has {handle.size:,}")
    if has_letters(handle.read(end, 1024)):
        raise BadIndexError(f"{handle.path.name} has letters behind its last record")
    if has_letters(handle.read(0, min(int(index.table[:, 1].min()), LONGEST_HEADER)).removeprefix(BOM)):
        raise BadIndexError(f"{handle.path.name} has letters above its first record")


def has_letters(text: bytes) -> bool:
    """Whether a line of `text` is no header: records without letters are in no index, their headers may stand there."""
    return any(line.strip() and not line.startswith(b">") for line in text.split(b"\n"))


def _build(handle: Handle) -> Index:
    builder = IndexBuilder(str(handle.path))
    with _progress(handle) as advance:
        if isinstance(handle, BgzfHandle):
            places, size = [], 0
            for at, data in handle.blocks():
                if data:
                    places.append((at, size))
                    size += len(data)
                builder.feed(data)
                advance(at)
            handle.index(places, size)
        else:
            for at in range(0, handle.size, PIECE):
                builder.feed(handle.read(at, PIECE))
                advance(at)
    return builder.finish()


def _keep(handle: Handle, index: Index) -> None:
    beside, cached = _beside(handle.path), _cached(handle.path)
    try:
        _write(handle, index, beside)
    except SaveError:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            _write(handle, index, cached)
            kept = f"its index is kept in {cached.parent}"
        except (SaveError, OSError):
            kept = "its index is kept in memory alone and made anew each time"
        if handle.path not in _said:
            _said.add(handle.path)
            warn(f"{handle.path}: its folder cannot be written; {kept}")


def _write(handle: Handle, index: Index, fai: Path) -> None:
    """Write an index; processes that do so at the same time each write all of it, and the last one's stays."""
    files = {fai: index.to_bytes()}
    if isinstance(handle, BgzfHandle):
        files = {fai.with_suffix(".gzi"): handle.index_bytes(), **files}
    for path, data in files.items():
        own = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        write_atomic(own, data)
        os.replace(own, path)


@contextmanager
def _progress(handle: Handle) -> Iterator[Callable[[int], None]]:
    console = Screen(stderr=True)
    if handle.file_size < LONG:
        yield lambda at: None
    elif not console.is_terminal:
        console.print(f"indexing {handle.path} ({handle.file_size / 1e9:.1f} GB)", highlight=False, soft_wrap=True)
        yield lambda at: None
    else:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(f"indexing {handle.path.name}", total=handle.file_size)
            yield lambda at: bar.update(task, completed=at)
