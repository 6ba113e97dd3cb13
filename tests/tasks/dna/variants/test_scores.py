"""Scores of variants: their signs where the answer is known, their symmetry, and what is computed how often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mambaverse.ensemble import Ensemble
from mambaverse.errors import UserError
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.genome.variants import Variant
from mambaverse.tasks.dna.reader import Reader
from mambaverse.tasks.dna.tokens import MASK, reverse_complement
from mambaverse.tasks.dna.variants.scores import VariantScorer
from mambaverse.tasks.dna.variants.windows import Pair, place
from tests.tasks.dna.planted import Counting, model
from tests.tasks.dna.variants.conftest import UNIT

SIZE = 48


def others(letter: str) -> list[str]:
    return [base for base in "ACGT" if base != letter]


def pairs_of(genome: Genome, letters: str, starts: range, size: int = SIZE) -> list[Pair]:
    """Return all substitutions, an insertion and a deletion at each place."""
    found = []
    for start in starts:
        ref = letters[start]
        changes = [(ref, alt) for alt in others(ref)] + [(ref, ref + "GT"), (letters[start : start + 3], ref)]
        found += [place(Variant("chr1", start, *change), genome, size) for change in changes]
    return found


def test_a_change_of_what_was_learnt_is_unlikely_and_its_repair_likely(trained: DnaModel, periodic: Genome) -> None:
    letters = UNIT * 20
    scorer = VariantScorer(Reader(trained))
    pairs = pairs_of(periodic, letters, range(60, 76))
    numbers = scorer(pairs)
    assert scorer.columns[0] == {"mlm": "llr", "causal_lm": "delta"}[trained.head]
    substitutions = np.array([pair.is_substitution for pair in pairs])
    assert (numbers[substitutions, 0] < -1).all()
    indels = numbers[~substitutions, 0]  # some of them look like the sequence itself, two bases on
    assert np.median(indels) < -1 and (indels < 0.1).mean() > 0.9
    assert (numbers[:, 1:] > 0).all()  # and the tokens move


def test_a_repair_is_as_likely_as_the_change_is_unlikely(trained: DnaModel, tmp_path: Path, periodic: Genome) -> None:
    letters = UNIT * 20
    broken = letters[:70] + others(letters[70])[0] + letters[71:]
    (tmp_path / "broken.fa").write_text(f">chr1\n{broken}\n")
    scorer = VariantScorer(Reader(trained), ["llr" if trained.head == "mlm" else "delta"])
    with Genome(tmp_path / "broken.fa") as genome:
        repair = scorer([place(Variant("chr1", 70, broken[70], letters[70]), genome, SIZE)])
    change = scorer([place(Variant("chr1", 70, letters[70], broken[70]), periodic, SIZE)])
    assert repair[0, 0] > 1 and repair[0, 0] == pytest.approx(-change[0, 0], rel=1e-5)


def test_llr_is_the_difference_of_masked_log_probabilities(genome: Genome, letters: str) -> None:
    made = model("mlm")
    pair = place(Variant("chr1", 300, letters[300:302], "".join(others(c)[0] for c in letters[300:302])), genome, SIZE)
    ids = torch.from_numpy(pair.ref.ids).long()
    sites = [pair.ref.start, pair.ref.start + 1]
    masked = ids.clone()
    masked[sites] = MASK
    with torch.no_grad():
        said = made(masked[None])[0].log_softmax(-1)
    alt = torch.from_numpy(pair.alt.ids).long()
    expected = sum(float(said[site, alt[site]] - said[site, ids[site]]) for site in sites)
    assert VariantScorer(Reader(made), ["llr"])([pair])[0, 0] == pytest.approx(expected, abs=1e-5)


def test_delta_is_the_difference_of_sums_over_as_many_bases(genome: Genome, letters: str) -> None:
    made = model("causal_lm", causal=True)
    pairs = pairs_of(genome, letters, range(300, 303))
    numbers = VariantScorer(Reader(made), ["delta"])(pairs)[:, 0]
    for pair, number in zip(pairs, numbers.tolist(), strict=True):
        sums = []
        for allele in (pair.alt, pair.ref):
            ids = torch.from_numpy(allele.ids).long()[None]
            with torch.no_grad():
                said = made(ids).double().log_softmax(-1)
            sums.append(float(said[0, :-1].gather(1, ids[0, 1:, None]).sum()))
        assert number == pytest.approx(sums[0] - sums[1], abs=2e-4)


@pytest.mark.parametrize(
    ("head", "causal", "ps"), [("mlm", False, False), ("mlm", False, True), ("causal_lm", True, False)]
)
def test_scores_of_both_strands_do_not_depend_on_the_strand(
    head: str,
    causal: bool,
    ps: bool,
    genome: Genome,
    letters: str,
    tmp_path: Path,
) -> None:
    """Windows are whole chromosomes here: those of indels differ from strand to strand at their far ends."""
    other = reverse_complement(letters.encode()).decode()
    (tmp_path / "other.fa").write_text(f">chr1\n{other}\n")
    made = model(head, causal=causal, both_strands=ps)
    scorer = VariantScorer(Reader(made, strands="both"))
    here = [place(Variant("chr1", s, letters[s], others(letters[s])[0]), genome, 700) for s in (9, 350, 699)]
    with Genome(tmp_path / "other.fa") as turned:
        there = []
        for pair in here:
            start, alt = 699 - pair.variant.start, reverse_complement(pair.variant.alt.encode()).decode()
            there.append(place(Variant("chr1", start, other[start], alt), turned, 700))
    np.testing.assert_allclose(scorer(here), scorer(there), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("strands", ["one", "both"])
@pytest.mark.parametrize("head", ["mlm", "causal_lm", "classifier"])
def test_a_reference_window_is_read_once_for_all_its_variants(
    head: str, strands: str, genome: Genome, letters: str
) -> None:
    reader = Counting(model(head, causal=head == "causal_lm"), strands)
    scorer, pairs = VariantScorer(reader), pairs_of(genome, letters, range(300, 312))
    whole = scorer(pairs)
    refs = {pair.ref.ids.tobytes() for pair in pairs}
    alts = [pair.alt.ids.tobytes() for pair in pairs]
    for ref in refs - set(alts):
        mine = [pair for pair in pairs if pair.ref.ids.tobytes() == ref]
        sites = len({pair.variant.start for pair in mine if pair.is_substitution})
        indels = any(not pair.is_substitution for pair in mine)
        masked = sites + indels if head == "mlm" else 0  # each site by itself, for all its alternatives
        assert reader.asked.count(ref) == masked + 1
    before = len(reader.asked)
    np.testing.assert_allclose(scorer(pairs), whole, atol=1e-6)  # the references are remembered
    per_pair = {"mlm": 1 + 2 / 5, "causal_lm": 1, "classifier": 1}[head] * (2 if strands == "both" else 1)
    assert len(reader.asked) - before == round(per_pair * len(pairs))


def test_batches_and_their_order_change_nothing(genome: Genome, letters: str) -> None:
    made, pairs = model("causal_lm", causal=True), pairs_of(genome, letters, range(300, 306))
    whole = VariantScorer(Reader(made))(pairs)
    scorer = VariantScorer(Reader(made, batch_size=3))
    apart = np.concatenate([scorer([pair]) for pair in pairs[::-1]])[::-1]
    np.testing.assert_allclose(apart, whole, atol=1e-4)


def test_a_little_memory_for_references_changes_nothing(
    genome: Genome, letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, pairs = model("mlm"), pairs_of(genome, letters, range(200, 400, 20))
    whole = VariantScorer(Reader(made))(pairs)
    monkeypatch.setattr("mambaverse.tasks.dna.variants.scores.CACHE_BYTES", 1)
    scorer = VariantScorer(Reader(made))
    np.testing.assert_allclose(np.concatenate([scorer([pair]) for pair in pairs]), whole, atol=1e-5)


def test_a_model_without_probabilities_says_so_and_scores_the_embedding(genome: Genome, letters: str) -> None:
    scorer = VariantScorer(Reader(model("classifier", stem="conv", stem_kernel=7, stem_stride=3)))
    assert scorer.columns == ("embedding_cosine", "embedding_l2")
    assert "llr needs a run with head mlm" in scorer.note
    assert (scorer(pairs_of(genome, letters, range(300, 303))) > 0).all()
    with pytest.raises(UserError, match="--scores llr: head 'classifier' gives no probabilities"):
        VariantScorer(Reader(model("classifier")), ["llr"])
    with pytest.raises(UserError, match="unknown 'lr', did you mean 'llr'"):
        VariantScorer(Reader(model("mlm")), ["lr"])


def test_an_ensemble_of_language_models_has_likelihoods_alone(genome: Genome, letters: str) -> None:
    pair = place(Variant("chr1", 300, letters[300], others(letters[300])[0]), genome, SIZE)
    scorer = VariantScorer(Reader(Ensemble([model("mlm", seed=0), model("mlm", seed=1)])))
    assert scorer.columns == ("llr",) and np.isfinite(scorer([pair])).all()
    with pytest.raises(UserError, match="neither likelihoods nor one embedding"):
        VariantScorer(Reader(Ensemble([model("classifier"), model("classifier")])))


def test_indels_are_scored_alike_wherever_their_bases_are_masked_with(trained: DnaModel, periodic: Genome) -> None:
    """A whole unit put in or taken out of a repeat changes next to nothing but the window's far end."""
    letters = UNIT * 20
    inside = VariantScorer(Reader(trained))
    unit = place(Variant("chr1", 70, letters[70], letters[70] + letters[71:79]), periodic, SIZE)
    half = place(Variant("chr1", 70, letters[70], letters[70] + letters[71:75]), periodic, SIZE)
    same, odd = inside([unit, half])[:, 0]
    assert abs(same) < 0.5 and odd < -1
