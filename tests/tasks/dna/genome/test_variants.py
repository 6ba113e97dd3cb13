"""Normal forms: variants that give the same haplotype have the same one, and it gives that haplotype."""

import itertools
import random
from pathlib import Path

import pytest

from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.genome.variants import Variant, check_reference, normalise
from tests.tasks.dna.conftest import fails
from tests.tasks.dna.genome.conftest import make_genome


def haplotype(variant: Variant, reference: str) -> str:
    assert reference[variant.start : variant.end].upper() == variant.ref.upper()
    return (reference[: variant.start] + variant.alt + reference[variant.end :]).upper()


@pytest.mark.parametrize("reference", ["GGGCACACACAGGG", "AAAAAAAA", "CATCATCATG", "ACGTTGCAAC", "acACacAC"])
def test_one_haplotype_has_one_normal_form(tmp_path: Path, reference: str) -> None:
    """All deletions, insertions and substitutions of up to three bases, with every way of padding them."""
    genome = make_genome(tmp_path, {"a": reference})
    forms: dict[str, tuple[int, str, str]] = {}
    for start, size in itertools.product(range(len(reference)), range(1, 5)):
        ref = reference[start : start + size]
        for alt in map("".join, itertools.chain.from_iterable(itertools.product("ACGT", repeat=k) for k in (1, 2, 3))):
            if len(ref) < size or alt == ref.upper():
                continue
            variant = Variant("a", start, ref, alt)
            expected = haplotype(variant, reference)
            form = normalise(variant, genome)
            assert haplotype(form, reference) == expected and form.ref and form.alt
            assert forms.setdefault(expected, (form.start, form.ref, form.alt)) == (form.start, form.ref, form.alt)
            assert normalise(form, genome) == form
    assert len(forms) > 100


def test_long_random_variants_have_one_normal_form(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(60):
        unit = "".join(draw.choices("ACGT", k=draw.randint(1, 5)))
        reference = (
            "".join(draw.choices("ACGT", k=draw.choice([0, 7]))) + unit * 90 + "".join(draw.choices("ACGT", k=9))
        )
        genome = make_genome(tmp_path, {"a": reference})
        k = len(unit) * draw.randint(1, 3)
        copies = []
        for _ in range(5):  # the same deletion, written at several places of the repeat
            lead = reference.index(unit * 90) + len(unit) * draw.randint(0, 80)
            before, after = draw.randint(0, min(lead, 9)), draw.randint(1, 9)
            ref = reference[lead - before : lead + k + after]
            copies.append(Variant("a", lead - before, ref, ref[:before] + ref[before + k :]))
        forms = {(f.start, f.ref, f.alt) for f in (normalise(variant, genome) for variant in copies)}
        assert len(forms) == 1
        insertion = [Variant("a", v.start, v.alt, v.ref) for v in copies if reference.startswith(v.alt, v.start)]
        assert len({(f.start, f.ref, f.alt) for f in (normalise(v, genome) for v in insertion)}) <= 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((8, "CAC", "C"), (2, "GCA", "G")),  # the example of Tan et al., figure 1
        ((3, "GCACACACAG", "GCACACAG"), (2, "GCA", "G")),
        ((0, "GGGC", "GGGT"), (3, "C", "T")),
        ((3, "CAC", "CTC"), (4, "A", "T")),
        ((2, "G", "GCA"), (2, "G", "GCA")),
        ((1, "GG", "G"), (0, "GG", "G")),
        ((0, "GG", "G"), (0, "GG", "G")),
        ((3, "CA", "TG"), (3, "CA", "TG")),
    ],
)
def test_normal_forms_of_the_paper(tmp_path: Path, given: tuple, expected: tuple) -> None:
    reference = "GGGCACACACAGGG"
    start = given[0] if reference.startswith(given[1], given[0]) else reference.index(given[1])
    form = normalise(Variant("a", start, *given[1:]), make_genome(tmp_path, {"a": reference}))
    assert (form.start, form.ref, form.alt) == expected


def test_the_rest_of_a_variant_stays(tmp_path: Path) -> None:
    genome = make_genome(tmp_path, {"a": "GGGCACACACAGGG"})
    variant = Variant("a", 7, "CAC", "C", "a", "rs1", "9", "PASS", "AF=1", 2, "x.vcf, line 3")
    form = normalise(variant, genome)
    assert (form.id, form.qual, form.filter, form.info, form.allele) == ("rs1", "9", "PASS", "AF=1", 2)
    assert (form.pos, form.end, form.is_snv, str(form)) == (3, 5, False, "a:3:GCA>G")
    assert "ALT CAC is REF: no variant" in fails(lambda: normalise(Variant("a", 7, "CAC", "CAC"), genome))
    whole = make_genome(tmp_path, {"b": "ACG"})
    assert "it deletes all of b" in fails(lambda: normalise(Variant("b", 0, "ACG", ""), whole))


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    return make_genome(tmp_path, {"chr1": "ACgtNRYnAC"})


@pytest.mark.parametrize(
    ("start", "ref"), [(0, "acG"), (2, "GT"), (4, "A"), (4, "N"), (5, "R"), (5, "A"), (5, "G"), (5, "N"), (6, "T")]
)
def test_ref_agrees_in_either_case_and_with_what_an_ambiguous_letter_stands_for(
    genome: Genome, start: int, ref: str
) -> None:
    check_reference(Variant("1", start, ref, "C"), genome)


@pytest.mark.parametrize(
    ("start", "ref", "message"),
    [
        (0, "G", "x.vcf, line 9: REF is G, "),
        (0, "G", "genome.fa has A at chr1:1; is it the right genome, and are positions counted from 1?"),
        (0, "N", "REF is N"),
        (5, "C", "REF is C"),
        (5, "Y", "REF is Y"),
        (8, "ACG", "position 11 is past the end of chr1, which has 10 bases in"),
    ],
)
def test_another_ref_is_named_with_what_the_genome_has(genome: Genome, start: int, ref: str, message: str) -> None:
    variant = Variant("chr1", start, ref, "T", where="x.vcf, line 9")
    assert message in fails(lambda: check_reference(variant, genome))
