"""BGZF with its .gzi: the bytes of bgzip's index, Bio.bgzf's content, and damage that is found."""

import importlib
import struct
import sys
from pathlib import Path

import pytest
from Bio import bgzf

import mambaverse.tasks.dna
from mambaverse.tasks.dna.files import END, block_size
from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.genome.bgzf import BgzfHandle, to_bgzf
from mambaverse.tasks.dna.genome.index import BadIndexError
from tests.tasks.dna.conftest import fails
from tests.tasks.dna.genome.conftest import fasta_text, random_letters

RECORDS = {"chr1": random_letters(300_000, 1), "chr2": random_letters(70_000, 2)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "x.fa").write_bytes(fasta_text(RECORDS))
    return to_bgzf(tmp_path / "x.fa")


def blocks(path: Path) -> list[tuple[int, int, int, int]]:
    with path.open("rb") as file:
        return list(bgzf.BgzfBlocks(file))


def test_the_gzi_holds_all_blocks_but_the_first(path: Path) -> None:
    Genome(path)
    expected = [(raw, start) for raw, _, start, size in blocks(path) if size and raw]
    data = struct.pack("<Q", len(expected)) + b"".join(struct.pack("<QQ", *pair) for pair in expected)
    assert len(expected) > 4 and path.with_name("x.fa.bgz.gzi").read_bytes() == data


def test_offsets_in_the_fai_are_those_of_the_content(path: Path) -> None:
    Genome(path), Genome(path.with_suffix(""))
    assert path.with_name("x.fa.bgz.fai").read_bytes() == path.with_name("x.fa.fai").read_bytes()


def test_a_gzi_that_counts_the_empty_last_block_is_read(path: Path) -> None:
    """Htslib of some years ago wrote it."""
    Genome(path)
    gzi = path.with_name("x.fa.bgz.gzi")
    pairs = gzi.read_bytes()[8:] + struct.pack("<QQ", path.stat().st_size - len(END), len(fasta_text(RECORDS)))
    gzi.write_bytes(struct.pack("<Q", len(pairs) // 16) + pairs)
    handle = BgzfHandle(path)
    handle.read_index(gzi.read_bytes())
    assert handle.size == len(fasta_text(RECORDS))
    assert Genome(path).fetch("chr2").decode() == RECORDS["chr2"]


def test_empty_blocks_and_small_ones_are_read_over(tmp_path: Path) -> None:
    path = tmp_path / "x.fa.gz"
    text = fasta_text(RECORDS)
    with path.open("wb") as file:
        writer = bgzf.BgzfWriter(fileobj=file)
        for at in range(0, len(text), 9_999):
            writer.write(text[at : at + 9_999])
            writer.flush()
            writer.flush()  # an empty block
        writer.close()
    genome = Genome(path)
    assert genome.fetch("chr1").decode() == RECORDS["chr1"] and genome.fetch("chr2", 60_000, 60_010)


@pytest.mark.parametrize("place", [30, 70_000, -60])
def test_a_damaged_block_is_named_by_its_place(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(bytes(data))
    assert "x.fa.bgz: damaged: " in fails(lambda: Genome(path))


def test_damage_is_found_when_it_is_read(path: Path) -> None:
    genome = Genome(path)
    raw = blocks(path)[2][0]
    index = {file: file.read_bytes() for file in path.parent.glob("*.bgz.*i")}
    data = bytearray(path.read_bytes())
    data[raw + 100] ^= 0xFF
    path.write_bytes(bytes(data))
    for file, content in index.items():
        file.write_bytes(content)
    genome = Genome(path)
    assert genome.fetch("chr1", 0, 100)
    assert f"damaged: block at byte {raw:,}" in fails(lambda: genome.fetch("chr1", 140_000, 150_000))


def test_a_file_that_is_cut_short_is_named(path: Path) -> None:
    data = path.read_bytes()
    for end in (len(data) - 28, len(data) - 5, 50_000):
        path.write_bytes(data[:end])
        assert "cut short: BGZF's last block is not there; get the file again" in fails(lambda: Genome(path))


def test_a_gzi_of_another_file_is_made_anew(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Genome(path)
    gzi = path.with_name("x.fa.bgz.gzi")
    right = gzi.read_bytes()
    count = len(right) // 16
    for wrong in (
        right[:-3],
        right[:8],
        struct.pack("<Q", count) + right[24:] + right[8:24],
        right[:8] + b"\1" + right[9:],
    ):
        gzi.write_bytes(wrong)
        assert Genome(path).fetch("chr2").decode() == RECORDS["chr2"]
        assert ".gzi: " in capsys.readouterr().err and gzi.read_bytes() == right
    gzi.write_bytes(right[:32] + struct.pack("<Q", 131_000) + right[40:])  # the sizes of two blocks are not theirs
    broken = Genome(path)
    assert "does not fit the block" in fails(lambda: broken.fetch("chr1"))
    with pytest.raises(BadIndexError, match="not a count"):
        BgzfHandle(path).read_index(b"")


def test_the_size_of_a_block_is_found_among_other_fields() -> None:
    head = bytes.fromhex("1f8b0804000000000 0ff".replace(" ", ""))
    other = b"XX\x03\x00abc" + b"BC\x02\x00\x10\x00"
    assert block_size(head + len(other).to_bytes(2, "little") + other) == 17
    assert (
        block_size(head + b"\x06\x00XX\x02\x00\x10\x00") is None
        and block_size(b"\x1f\x8b\x08\x00" + b"\0" * 20) is None
    )


def test_the_package_leaves_the_module_that_is_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `python -m mambaverse.tasks.dna.genome.bgzf`, which an error names, warns that it is imported already."""
    package, module = "mambaverse.tasks.dna.genome", "mambaverse.tasks.dna.genome.bgzf"
    monkeypatch.setattr(mambaverse.tasks.dna, "genome", sys.modules[package])  # put back at the end, as these are
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module(package)
    assert module not in sys.modules
