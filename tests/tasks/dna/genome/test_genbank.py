"""GenBank features: their regions, and their sequences beside biopython's own extraction."""

import random
import warnings
from pathlib import Path

import pytest
from Bio import SeqIO
from Bio.Seq import Seq
from Bio.SeqFeature import BeforePosition, CompoundLocation, SeqFeature, SimpleLocation
from Bio.SeqRecord import SeqRecord

from mambaverse.tasks.dna.files import END
from mambaverse.tasks.dna.genome import Region
from mambaverse.tasks.dna.genome.bgzf import to_bgzf
from mambaverse.tasks.dna.genome.genbank import Feature, read_genbank
from mambaverse.tasks.dna.genome.skipped import Skipped
from tests.tasks.dna.conftest import fails, write
from tests.tasks.dna.genome.conftest import make_genome, random_letters

LETTERS = random_letters(240, 5, "ACGTRY")


def place(start: int, end: int, strand: int = 1) -> SimpleLocation:
    return SimpleLocation(start, end, strand)


def record(*features: SeqFeature, letters: str = LETTERS) -> SeqRecord:
    annotations: dict[str, str | int] | None = {"molecule_type": "DNA", "topology": "circular"}
    return SeqRecord(Seq(letters), id="AB1.2", name="AB1", features=list(features), annotations=annotations)


def save(path: Path, *records: SeqRecord) -> Path:
    SeqIO.write(records, path.with_suffix(".tmp"), "genbank")
    return write(path, path.with_suffix(".tmp").read_bytes())


def feature(location: object, kind: str = "CDS", **qualifiers: str) -> SeqFeature:
    return SeqFeature(location, type=kind, qualifiers={key: [value] for key, value in qualifiers.items()})


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_features_become_regions_in_reading_order(tmp_path: Path, ending: str) -> None:
    path = save(
        tmp_path / f"x.gb{ending}",
        record(
            feature(place(4, 20), "gene", gene="abc", locus_tag="t0"),
            feature(CompoundLocation([place(39, 45, -1), place(29, 35, -1)]), locus_tag="t1"),
            feature(CompoundLocation([place(54, 60), place(0, 4)]), product="across the origin"),
            feature(SimpleLocation(BeforePosition(2), 9, 1)),
        ),
    )
    (found,) = read_genbank(path, ("gene", "CDS"))
    gene, minus, origin, partial = found.features
    assert (found.name, found.letters.decode(), found.circular) == ("AB1.2", LETTERS, True)
    assert (gene.type, gene.name, gene.parts, gene.strand) == ("gene", "abc", (Region("AB1.2", 4, 20),), "+")
    assert minus.parts == (Region("AB1.2", 39, 45, "-"), Region("AB1.2", 29, 35, "-")) and minus.name == "t1"
    assert minus.span == Region("AB1.2", 29, 45, "-") and minus.joined and not minus.partial
    assert origin.parts == (Region("AB1.2", 54, 60), Region("AB1.2", 0, 4)) and origin.name == "across the origin"
    assert partial.partial and partial.name == "" and partial.parts == (Region("AB1.2", 2, 9),)
    assert [f.type for r in read_genbank(path) for f in r.features] == ["gene"]


def test_sequences_are_those_that_biopython_extracts(tmp_path: Path) -> None:
    draw = random.Random(0)
    features = []
    for _ in range(40):
        ends = sorted(draw.sample(range(240), 2 * draw.randint(1, 4)))
        parts = [place(a, b, draw.choice([1, -1])) for a, b in zip(ends[::2], ends[1::2], strict=True)]
        if draw.random() < 0.6:  # the usual gene: one strand
            strand = draw.choice([1, -1])
            parts = [place(int(p.start), int(p.end), strand) for p in parts][::strand]
        features.append(feature(parts[0] if len(parts) == 1 else CompoundLocation(parts)))
    path = save(tmp_path / "x.gb", record(*features))
    (found,) = read_genbank(path, ["CDS"])
    expected = [f.extract(Seq(LETTERS)) for f in features]
    assert [f.extract(found).decode() for f in found.features] == expected
    genome = make_genome(tmp_path, {"AB1.2": LETTERS})
    assert [f.extract(genome).decode() for f in found.features] == expected
    assert {f.strand for f in found.features} == {"+", "-", "."}


def test_parts_that_are_not_one_sequence_are_not_joined(tmp_path: Path) -> None:
    path = save(tmp_path / "x.gb", record(feature(CompoundLocation([place(0, 3), place(6, 9)], operator="order"))))
    (found,) = read_genbank(path, ["CDS"])
    assert "its parts are given by order(...)" in fails(lambda: found.features[0].extract(found))


def test_a_feature_that_cannot_be_used_is_named_or_skipped_with_a_count(tmp_path: Path) -> None:
    path = save(tmp_path / "x.gb", record(feature(place(0, 3), gene="far"), feature(place(6, 9), gene="near")))
    text = path.read_text()
    for location, message in [
        ("J00194.1:1..3", "a part lies in record 'J00194.1'"),
        ("x..y", "its place cannot be read"),
    ]:
        write(path, text.replace("     CDS             1..3", f"     CDS             {location}"))
        found = fails(lambda: list(read_genbank(path, ["CDS"])))
        assert f"{path}, record 'AB1.2', CDS far: {message}" in found
        skipped = Skipped()
        (rest,) = read_genbank(path, ["CDS"], on_error="skip", skipped=skipped)
        assert [f.name for f in rest.features] == ["near"] and skipped.total == 1


def test_files_that_are_not_whole_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "x.gb", record(feature(place(0, 3))), record(feature(place(0, 3))))
    text = path.read_text()
    write(path, text[: text.rindex("       61")])
    assert "x.gb: cut short after 1 records: " in fails(lambda: list(read_genbank(path)))
    write(path, text[: text.rindex("     CDS")])
    assert "x.gb: not readable as GenBank after 1 records: " in fails(lambda: list(read_genbank(path)))
    write(path, ">a\nACGT\n")
    assert "x.gb: holds no GenBank records; expected a line LOCUS" in fails(lambda: list(read_genbank(path)))
    assert "no such file" in fails(lambda: list(read_genbank(tmp_path / "no.gb")))
    zipped = save(tmp_path / "y.gb.gz", *[record()] * 200)
    zipped.write_bytes(zipped.read_bytes()[:-50])
    assert "y.gb.gz: damaged after" in fails(lambda: list(read_genbank(zipped)))
    cut = to_bgzf(path, tmp_path / "z.gb.gz")
    cut.write_bytes(cut.read_bytes()[: -len(END)])
    assert "z.gb.gz: cut short: BGZF's last block is not there" in fails(lambda: list(read_genbank(cut)))


def test_a_record_without_its_sequence_says_so(tmp_path: Path) -> None:
    path = save(tmp_path / "x.gb", record(feature(place(0, 3))))
    text = path.read_text()
    write(path, text[: text.index("ORIGIN")] + "CONTIG      join(X1:1..240)\n//\n")
    (found,) = read_genbank(path, ["CDS"])
    (only,) = found.features
    assert isinstance(only, Feature) and found.letters == b""
    assert "holds no sequence (CONTIG alone?)" in fails(lambda: only.extract(found))
    (whole,) = read_genbank(write(path, text))
    assert "other:1-3 is not in this record of 240 bases" in fails(lambda: whole.fetch(Region("other", 0, 3)))


def test_the_callers_warnings_stay_as_they_were(tmp_path: Path) -> None:
    path = save(tmp_path / "x.gb", record(), record())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        for _ in read_genbank(path):
            assert warnings.filters == before
