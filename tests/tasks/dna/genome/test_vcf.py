"""VCF: what its records become, what is left out with a count, and what is wrong with a line."""

import gzip
import tracemalloc
from pathlib import Path

import pytest
from Bio import bgzf

from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.genome.skipped import Skipped
from mambaverse.tasks.dna.genome.variants import Variant
from mambaverse.tasks.dna.genome.vcf import read_vcf
from tests.tasks.dna.conftest import fails, write
from tests.tasks.dna.genome.conftest import make_genome

HEAD = "##fileformat=VCFv4.3\n##contig=<ID=1>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
SAMPLES = HEAD.rstrip() + "\tFORMAT\tNA1\n"


def line(chrom: str, pos: int | str, ref: str, alt: str, tail: str = "") -> str:
    return f"{chrom}\t{pos}\trs1\t{ref}\t{alt}\t50\tPASS\tAF=.5{tail}\n"


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    return make_genome(tmp_path, {"chr1": "ACGTacgtAC", "chr2": "TTTT"})


def as_bgzf(path: Path, text: str) -> Path:
    with bgzf.BgzfWriter(str(path), "wb") as file:
        file.write(text.encode())
    return path


@pytest.mark.parametrize("kind", ["plain", "crlf", "gzip", "bgzf"])
def test_a_record_becomes_one_variant_for_each_alternative(tmp_path: Path, genome: Genome, kind: str) -> None:
    text = HEAD + line("1", 2, "C", "G,CA") + "\n" + line("1", 5, "AC", "A")
    if kind == "bgzf":
        path = as_bgzf(tmp_path / "x.vcf.gz", text)
    else:
        text = text.replace("\n", "\r\n") if kind == "crlf" else text
        path = write(tmp_path / ("x.vcf.gz" if kind == "gzip" else "x.vcf"), text)
    one, two, three = read_vcf(path, genome=genome, in_order=True)
    where = f"{path}, line 4, 1:2"
    assert one == Variant("chr1", 1, "C", "G", "1", "rs1", "50", "PASS", "AF=.5", 1, where)
    assert (two.alt, two.allele, two.pos, two.end) == ("CA", 2, 2, 2)
    assert (three.start, three.ref, three.alt) == (4, "AC", "A") and three.where.startswith(f"{path}, line 6")
    assert next(read_vcf(path)).name == "1"


def test_samples_are_read_over(tmp_path: Path) -> None:
    (variant,) = read_vcf(write(tmp_path / "x.vcf", SAMPLES + line("1", 2, "C", "G", "\tGT\t0/1")))
    assert variant.alt == "G" and variant.info == "AF=.5"


def test_alleles_without_letters_are_left_out_with_a_count(
    tmp_path: Path, genome: Genome, capsys: pytest.CaptureFixture[str]
) -> None:
    alts = ["G,*", "<DEL>", "G]17:198]", "]13:1]T", ".", "<*>,G", "C."]
    path = write(tmp_path / "x.vcf", HEAD + "".join(line("chr1", 2, "C", alt) for alt in alts))
    skipped = Skipped(tmp_path / "skipped.tsv")
    assert [v.alt for v in read_vcf(path, genome=genome, skipped=skipped)] == ["G", "G"]
    skipped.close()
    assert skipped.counts == {"alleles *": 2, "symbolic alleles": 1, "breakends": 3, "records without ALT": 1}
    rows = (tmp_path / "skipped.tsv").read_text().splitlines()
    assert len(rows) == 8 and rows[2] == f"symbolic alleles\t{path}, line 5, chr1:2\tALT <DEL>"
    assert capsys.readouterr().err == ""
    list(read_vcf(path))
    assert "warning: skipped 7: breakends 3 (first: " in capsys.readouterr().err


BAD = [
    (line("chr1", 2, "A", "G"), "REF mismatches", "line 4, chr1:2: REF is A, "),
    (
        line("chr1", 9, "ACG", "A"),
        "positions past the end",
        "line 4, chr1:9: position 11 is past the end of chr1, which has",
    ),
    (line("chr3", 2, "A", "G"), "unknown chromosomes", "line 4, chr3:2: "),
    (line("chr1", "x", "A", "G"), "bad records", "line 4: POS 'x'; expected a whole number, counted from 1"),
    (line("chr1", "9" * 5000, "A", "G"), "bad records", "line 4: POS '999999999999...9999999999999'; expected a whole"),
    (line("chr1", 0, "A", "G"), "bad records", "position 0; positions count from 1"),
    (line("chr1", "00", "A", "G"), "bad records", "position 0; positions count from 1"),
    (line("chr1", 2, "", "G"), "bad records", "REF ''; expected letters"),
    (line("chr1", 2, "U", "G"), "bad records", "REF 'U'; expected letters"),
    (line("chr1", 2, "C", "Q"), "bad records", "ALT 'Q'; expected A, C, G, T or N"),
    (line("chr1", 2, "C", "c"), "bad records", "ALT c is REF: no variant"),
    (
        "chr1\t2\trs1\tC\tG\n",
        "bad records",
        "line 4: 5 columns; the header has 8: a line that was cut short, or spaces",
    ),
]


@pytest.mark.parametrize(("text", "kind", "message"), BAD)
def test_a_bad_record_is_named_by_line_and_place_or_skipped_with_a_count(
    tmp_path: Path, genome: Genome, text: str, kind: str, message: str
) -> None:
    path = write(tmp_path / "x.vcf", HEAD + text + line("chr1", 2, "C", "G"))
    found = fails(lambda: list(read_vcf(path, genome=genome)))
    assert message in found and str(path) in found
    skipped = Skipped()
    assert [v.alt for v in read_vcf(path, genome=genome, on_error="skip", skipped=skipped)] == ["G"]
    assert skipped.counts == {kind: 1} and message.partition(": ")[2] in skipped.summary()


def test_a_chromosome_that_is_not_utf_8_is_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "x.vcf"
    path.write_bytes(HEAD.encode() + line("caf\xe9", 2, "C", "G").encode("latin-1") + line("1", 2, "C", "G").encode())
    assert f"{path}, line 4: CHROM 'caf\ufffd' is not UTF-8 text" in fails(lambda: list(read_vcf(path)))
    assert len(list(read_vcf(path, on_error="skip"))) == 1


def test_a_bad_allele_is_left_out_alone(tmp_path: Path, genome: Genome) -> None:
    path = write(tmp_path / "x.vcf", HEAD + line("chr1", 2, "C", "A,R,G") + line("chr1", 2, "C", "C,T"))
    with Skipped(tmp_path / "skipped.tsv") as skipped:
        found = [(v.alt, v.allele) for v in read_vcf(path, genome=genome, on_error="skip", skipped=skipped)]
    assert found == [("A", 1), ("G", 3), ("T", 2)] and skipped.counts == {"bad records": 2}
    assert (tmp_path / "skipped.tsv").read_text().splitlines()[1:] == [
        f"bad records\t{path}, line 4, chr1:2\tALT 'R'; expected A, C, G, T or N",
        f"bad records\t{path}, line 5, chr1:2\tALT C is REF: no variant",
    ]
    assert "line 4, chr1:2: ALT 'R'; expected" in fails(lambda: list(read_vcf(path, genome=genome)))


def test_unsorted_records_are_named_where_order_is_asked(tmp_path: Path, genome: Genome) -> None:
    path = write(tmp_path / "x.vcf", HEAD + line("1", 3, "G", "T") + line("1", 2, "C", "G"))
    assert len(list(read_vcf(path, genome=genome))) == 2
    message = fails(lambda: list(read_vcf(path, genome=genome, in_order=True)))
    assert "line 5, 1:2: not sorted: chr1:2 behind chr1:3; sort the file" in message and "bcftools sort" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line("chr1", 2, "C", "G"), "x.vcf, line 1: no header before this record; expected a line #CHROM POS ID"),
        ("##fileformat=VCFv4.3\n", "x.vcf: no header; expected a line #CHROM POS ID REF ALT"),
        ("#CHROM\tPOS\tREF\tALT\n", "line 1: no column ID where it should be; expected #CHROM POS ID"),
        ("#CHROM POS ID REF\n", "no header before this record"),
        ("BCF\x02\x02", "line 1: BCF, the binary form; expected VCF: bcftools view -O z"),
        ("", "no header"),
    ],
)
def test_a_file_without_header_says_what_it_needs(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "x.vcf", text)
    assert message in fails(lambda: list(read_vcf(path)))


def test_a_byte_order_mark_is_skipped_and_what_is_no_vcf_is_told(tmp_path: Path) -> None:
    text = HEAD + line("1", 2, "C", "G")
    assert len(list(read_vcf(write(tmp_path / "x.vcf", "\ufeff" + text)))) == 1
    for name, message in (("y.vcf", "gzip, which its name does not say; name it y.vcf.gz"), ("y.bcf", "BCF, the bi")):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert f"{tmp_path / name}: {message}" in fails(lambda name=name: list(read_vcf(tmp_path / name)))
    assert f"{tmp_path}: a folder; expected a VCF file" in fails(lambda: list(read_vcf(tmp_path)))


def test_a_file_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    text = HEAD + "".join(line("1", i, "C", "G") for i in range(1, 20_000))
    path = as_bgzf(tmp_path / "x.vcf.gz", text)
    data = path.read_bytes()
    path.write_bytes(data[:-28])  # between two blocks, where gzip alone sees a whole file
    assert "cut short: BGZF's last block is not there" in fails(lambda: list(read_vcf(path)))
    path.write_bytes(gzip.compress(text.encode())[:-999])
    assert "damaged after line" in fails(lambda: list(read_vcf(path, on_error="skip")))
    assert "no.vcf: no such file; expected a VCF file" in fails(lambda: list(read_vcf(tmp_path / "no.vcf")))


def test_reading_takes_constant_memory(tmp_path: Path) -> None:
    info = ";" + "X" * 300
    text = HEAD + "".join(line("1", i, "C", "G,<DEL>").rstrip() + info + "\n" for i in range(1, 4000))
    path = write(tmp_path / "x.vcf", text)
    assert path.stat().st_size > 1e6
    tracemalloc.start()
    assert sum(1 for _ in read_vcf(path, skipped=Skipped())) == 3999
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e5
