"""Data sets that are built out of packages: what their raw files are read as, and what is written."""

import csv
import gzip
import lzma
import struct
from pathlib import Path
from random import Random

import numpy as np
import pytest

from mambaverse.datasets import get_dataset
from mambaverse.errors import UserError
from mambaverse.tasks.dna.datasets._rda import read_rda
from mambaverse.tasks.dna.genes import Gene, read_genes, splice_sites, windows
from tests.tasks.dna.conftest import letters, write


def gene_file(path: Path, name: str = "chr2R_1-300", location: str = "join(51..120,201..260)") -> str:
    sequence = letters(300, 7)
    body = "\n".join(
        f"{start + 1:>9} " + " ".join(sequence[i : i + 10].lower() for i in range(start, min(start + 60, 300), 10))
        for start in range(0, 300, 60)
    )
    text = (
        f"LOCUS       {name}   300 bp  DNA\nFEATURES             Location/Qualifiers\n     source          1..300\n"
        f'     CDS             {location}\n                     /gene="1"\nORIGIN\n{body}\n//\n'
    )
    write(path, text)
    return sequence


def test_genes_are_read_on_their_strand(tmp_path: Path) -> None:
    sequence = gene_file(tmp_path / "g.gb")
    (gene,) = read_genes(tmp_path / "g.gb")
    assert (gene.name, gene.letters, gene.exons) == ("chr2R_1-300", sequence, [(50, 120), (200, 260)])
    gene_file(tmp_path / "r.gb", location="complement(join(51..120,201..260))")
    (turned,) = read_genes(tmp_path / "r.gb")
    assert turned.reverse and turned.along()[1] == [(40, 100), (180, 250)]
    write(tmp_path / "bad.gb", "LOCUS       x 10 bp DNA\nFEATURES  Location/Qualifiers\n  CDS  1..\n")
    with pytest.raises(UserError, match=r"bad\.gb: not readable as GenBank"):
        read_genes(tmp_path / "bad.gb")


def test_splice_sites_are_at_the_borders_of_exons() -> None:
    gene = Gene("g", letters(400, 1), [(100, 150), (250, 300)], reverse=False)
    found = splice_sites(gene, Random(0))
    assert found[0] == (gene.letters[110:190], "donor") and found[1] == (gene.letters[210:290], "acceptor")
    decoys = [sequence for sequence, label in found if label == "decoy"]
    assert len(decoys) == 2 and all(s[40:42] == "GT" or s[38:40] == "AG" for s in decoys)


def test_windows_lie_in_one_kind_each() -> None:
    gene = Gene("g", letters(1300, 1), [(300, 600), (900, 1100)], reverse=False)
    found = windows(gene)
    kinds = [label for _, label in found]
    assert kinds == ["flank", "flank", "coding", "coding", "intron", "intron", "coding", "flank"]
    assert found[2][0] == gene.letters[300:500]


def test_fly_sets_are_built_from_the_genes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        gene_file(tmp_path / f"raw/usr/share/doc/augustus/tutorial/results/genes.gb.{part}", f"{part}_1-300")
    for name in ("fly_splice", "fly_windows"):
        data = get_dataset(name, "dna")
        raw = data.find_package(tmp_path / "raw")
        assert raw is not None and data.find_package(tmp_path / "nothing") is None
        (tmp_path / name).mkdir()
        data.build(raw, tmp_path / name)
        assert data.find(tmp_path / name) == tmp_path / name
    with gzip.open(tmp_path / "fly_splice/fly_splice_train.csv.gz", "rt") as file:
        built = list(csv.DictReader(file))
    assert {row["gene"] for row in built} == {"train_1-300"} and {row["label"] for row in built} >= {"donor"}


def test_16s_is_built_from_its_fasta(tmp_path: Path) -> None:
    head = ">S1\tx\tBacteria; Firmicutes; Bacilli; Lactobacillales; Lactobacillaceae; Lactobacillus\n"
    write(tmp_path / "usr/rRNA16S.gold.fasta", head + "acgt\n")
    data = get_dataset("rrna16s", "dna")
    raw = data.find_package(tmp_path)
    assert raw is not None
    data.build(raw, tmp_path)
    with lzma.open(tmp_path / "rrna16s_full.csv.xz", "rt") as file:
        assert file.read().splitlines()[1] == "ACGT,Firmicutes,Bacilli,Lactobacillales,Lactobacillaceae,Lactobacillus"
    write(tmp_path / "usr/rRNA16S.gold.fasta", ">S1\tBacteria; Firmicutes\nacgt\n")
    with pytest.raises(UserError, match="expected kingdom to genus in the header"):
        data.build(raw, tmp_path)


def rda(frame: dict[str, tuple[list[int], list[str]]], rows_: int) -> bytes:
    """Return an .rda file with a data frame DNA of factors."""

    def chars(text: str) -> bytes:
        return struct.pack(">ii", 9, len(text)) + text.encode()

    def strings(values: list[str]) -> bytes:
        return struct.pack(">ii", 16, len(values)) + b"".join(map(chars, values))

    def pair(tag: bytes, value: bytes) -> bytes:
        return struct.pack(">i", 2 | 1 << 10) + tag + value

    def symbol(text: str) -> bytes:
        return struct.pack(">i", 1) + chars(text)

    nil = struct.pack(">i", 254)
    levels_seen = False
    columns = []
    for values, levels in frame.values():
        tag = struct.pack(">i", 255 | 2 << 8) if levels_seen else symbol("levels")
        levels_seen = True
        head = struct.pack(">ii", 13 | 1 << 9, rows_) + struct.pack(f">{rows_}i", *values)
        columns.append(head + pair(tag, strings(levels)) + nil)
    body = struct.pack(">ii", 19 | 1 << 9, len(columns)) + b"".join(columns)
    body += pair(symbol("names"), strings(list(frame))) + nil
    return b"RDX2\nX\n" + struct.pack(">3i", 2, 0, 0) + pair(symbol("DNA"), body) + nil


def test_uci_is_built_from_rs_data_frame(tmp_path: Path) -> None:
    codes = np.array([[1, 2, 3] * 20, [0, 0, 0] * 20])  # 0 T, 1 A, 2 C, 3 G; 60 bases a row
    frame = {
        f"V{3 * place + bit + 1}": ([int(code == bit + 1) + 1 for code in codes[:, place]], ["0", "1"])
        for place in range(60)
        for bit in range(3)
    } | {"Class": ([2, 1], ["ei", "n"])}
    (tmp_path / "DNA.rda").write_bytes(gzip.compress(rda(frame, 2)))
    data = get_dataset("splice_uci", "dna")
    raw = data.find_package(tmp_path)
    assert raw is not None
    data.build(raw, tmp_path)
    with gzip.open(tmp_path / "splice_uci.csv.gz", "rt") as file:
        assert file.read().splitlines() == ["sequence,label", "ACG" * 20 + ",n", "TTT" * 20 + ",ei"]


@pytest.mark.parametrize("content", [b"", b"RDX9\nX\n", b"RDX2\nX\n" + bytes(30), gzip.compress(b"x", mtime=0)[:-4]])
def test_a_damaged_rda_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "DNA.rda").write_bytes(content)
    try:
        assert read_rda(tmp_path / "DNA.rda") == {}
    except UserError as error:
        assert "not readable as R data" in str(error)
    with pytest.raises(UserError, match=r"not readable as R data|expected a data frame DNA"):
        get_dataset("splice_uci", "dna").build(tmp_path / "DNA.rda", tmp_path)


def test_beta_lactamases_are_built_from_an_index_of_bwa(tmp_path: Path) -> None:
    folder = tmp_path / "AMRfior/databases/ncbi/bwa"
    about = [
        "blaTEM gene for class A beta-lactamase",
        "blaSIM gene for subclass B1 metallo-beta-lactamase",
        "tetA gene",
    ]
    lines = [line for i, text in enumerate(about) for line in (f"0 NG_{i} X {text}", f"{4 * i} 4 0")]
    write(folder / "sequence_dna_bwadb.ann", "\n".join(["12 3 11", *lines]) + "\n")
    (folder / "sequence_dna_bwadb.pac").write_bytes(bytes([0b00011011, 0b11111111, 0, 0]))
    data = get_dataset("beta_lactamase", "dna")
    raw = data.find_package(tmp_path)
    assert raw is not None and data.find_package(tmp_path / "no") is None
    data.build(raw, tmp_path)
    with lzma.open(tmp_path / "amr_betalactamase.csv.xz", "rt") as file:
        assert file.read().splitlines() == ["sequence,class,family", "ACGT,A,blaTEM", "TTTT,B,blaSIM"]
    write(folder / "sequence_dna_bwadb.ann", "1 1 1\n0 x\ny z\n")
    with pytest.raises(UserError, match=r"not an \.ann file of BWA"):
        data.build(raw, tmp_path)
