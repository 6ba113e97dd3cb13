"""Characters as ids, strands, k-mers and one-hot columns."""

import time

import numpy as np
import pytest
from Bio.Seq import Seq

from mambaverse.errors import UserError
from mambaverse.tasks.dna import tokens
from mambaverse.tasks.dna.encoders import (
    decode_kmers,
    kmer_numbers,
    kmer_tokens,
    kmer_vocab_size,
    kmers,
    one_hot,
    overlapping_tokens,
)
from mambaverse.tasks.dna.tokens import decode, encode, reverse_complement, reverse_complement_ids

IUPAC = "ACGTRYSWKMBDHVN"


def test_ids_are_those_of_hyenadna_and_caduceus() -> None:
    assert encode("ACGTN").tolist() == [7, 8, 9, 10, 11]
    assert (tokens.CLS, tokens.SEP, tokens.BOS, tokens.MASK, tokens.PAD, tokens.UNK) == (0, 1, 2, 3, 4, 6)
    assert len(tokens.VOCAB) == 12 and tokens.VOCAB_SIZE == 16
    assert encode("ACGTN").dtype == np.uint8


def test_case_does_not_matter_and_ambiguous_letters_are_n() -> None:
    assert encode("acgtn").tolist() == encode("ACGTN").tolist() == encode(b"AcGtN").tolist()
    assert set(encode("RYSWKMBDHVryswkmbdhv").tolist()) == {tokens.N}
    assert encode("").shape == (0,)


def test_u_is_read_as_t_if_asked() -> None:
    assert encode("GATUACA", rna=True).tolist() == encode("GATTACA").tolist()


def test_letters_come_back() -> None:
    assert decode(encode("GATTACAN")) == "GATTACAN"
    assert decode(np.array([0, 4, 7, 15])) == "[CLS][PAD]A[UNK]"


@pytest.mark.parametrize(
    ("sequence", "strict", "message"),
    [
        ("ACGU", False, "RNA: letter 'U' at position 4 of 4; data.rna=true reads U as T in training; or write T"),
        ("ACGR", True, "ambiguous letter 'R' at position 4 of 4; expected A, C, G, T, N, or data.strict=false"),
        ("ACJT", False, "illegal letter 'J' at position 3 of 4; expected A, C, G, T, N or one of R, Y,"),
        ("AC1T", True, "illegal letter '1' at position 3 of 4; expected A, C, G, T, N"),
        ("AC-GT", False, "a gap '-' at position 3 of 5: an alignment; take the gaps out"),
        ("MKTAYIAKQRQISFVKSHFSRQ", False, "looks like a protein (letter 'I' at position 6 of 22"),
        ("ACGé", False, "illegal letter"),
    ],
)
def test_what_is_no_dna_is_refused_with_its_place(sequence: str, strict: bool, message: str) -> None:
    with pytest.raises(UserError) as caught:
        encode(sequence, strict=strict, where="x.fa, line 3")
    assert str(caught.value).startswith("x.fa, line 3: ") and message in str(caught.value)


def test_the_other_strand_agrees_with_biopython_for_every_letter() -> None:
    for text in (IUPAC, IUPAC.lower(), "GATTACA", ""):
        assert reverse_complement(text.encode()).decode() == str(Seq(text).reverse_complement())


def test_the_other_strand_of_the_other_strand_is_the_sequence() -> None:
    assert reverse_complement(reverse_complement(IUPAC.encode())) == IUPAC.encode()
    ids = encode("GATTACANNC")
    assert decode(reverse_complement_ids(ids)) == "GNNTGTAATC"
    assert reverse_complement_ids(reverse_complement_ids(ids)).tolist() == ids.tolist()


def test_a_million_bases_are_turned_in_5_ms() -> None:
    sequence = letters_of(1_000_000)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        reverse_complement(sequence)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3


def letters_of(count: int) -> bytes:
    return np.random.default_rng(0).choice(np.frombuffer(b"ACGTN", np.uint8), count).tobytes()


def test_kmer_numbers_are_digits_of_base_4() -> None:
    assert kmer_numbers(encode("ACGT"), 2).tolist() == [0 * 4 + 1, 1 * 4 + 2, 2 * 4 + 3]
    assert kmer_numbers(encode("ACNGT"), 2).tolist() == [1, 11]  # those that touch N are left out
    assert kmer_numbers(encode("AC"), 3).tolist() == []


@pytest.mark.parametrize("k", [0, 13])
def test_kmers_of_impossible_sizes_are_refused(k: int) -> None:
    with pytest.raises(UserError, match="expected k from 1 to 12"):
        kmer_numbers(encode("ACGT"), k)


def test_kmer_counts_stand_side_by_side() -> None:
    counts = kmers([encode("AAAC"), encode("NN")], (1, 2))
    assert counts.shape == (2, 4 + 16)
    assert counts[0].toarray()[0, :4].tolist() == [3, 1, 0, 0]
    assert counts[0].toarray()[0, 4:6].tolist() == [2, 1]  # AA, AC
    assert counts[1].nnz == 0
    assert kmers([encode("AAAC")], (1,), binary=True).toarray().tolist() == [[1, 1, 0, 0]]
    assert kmers([], (2,)).shape == (0, 16)


def test_one_hot_columns_are_acgt_and_zeros() -> None:
    assert one_hot(encode("ACGT")).tolist() == np.eye(4).tolist()
    assert one_hot(np.array([tokens.N, tokens.PAD, tokens.CLS])).sum() == 0
    assert one_hot(np.stack([encode("AC"), encode("GT")])).shape == (2, 2, 4)


def test_one_hot_stands_in_both_layouts_and_n_may_be_a_quarter_of_each() -> None:
    ids = np.stack([encode("ACGTN"), encode("NNGCA")])
    last, first = one_hot(ids, unknown=0.25), one_hot(ids, channels_first=True, unknown=0.25)
    assert last.shape == (2, 5, 4) and first.shape == (2, 4, 5) and first.flags.c_contiguous
    assert (first == last.swapaxes(1, 2)).all() and (last.sum(-1) == 1).all()
    assert last[0, 4].tolist() == [0.25] * 4 and one_hot(ids)[0, 4].tolist() == [0.0] * 4
    assert one_hot(np.array([tokens.PAD, tokens.MASK, 15]), unknown=0.25).sum() == 0


def test_k_mers_stand_one_after_the_other_and_single_bases_at_n_and_at_the_end() -> None:
    ids = encode("GATTACAGATNTGATTACA")
    found = kmer_tokens(ids)
    assert decode_kmers(found, 6) == ["GATTAC", "A", "G", "A", "T", "N", "TGATTA", "C", "A"]
    assert "".join(decode_kmers(found, 6)) == decode(ids)
    assert kmer_tokens(encode("A" * 12)).tolist() == [16, 16]
    assert kmer_tokens(encode("T" * 6)).tolist() == [kmer_vocab_size(6) - 1] == [16 + 4**6 - 1]
    assert kmer_tokens(encode("ACGTA")).tolist() == encode("ACGTA").tolist()
    assert kmer_tokens(encode("")).tolist() == [] and kmer_tokens(encode("NN")).tolist() == [tokens.N] * 2


@pytest.mark.parametrize("k", [1, 3, 6])
def test_k_mer_tokens_lose_no_base(k: int) -> None:
    draw = np.random.default_rng(k)
    for length in (0, 1, k, 50, 101):
        ids = draw.choice([tokens.A, tokens.C, tokens.G, tokens.T, tokens.N], length, p=[0.24] * 4 + [0.04])
        assert "".join(decode_kmers(kmer_tokens(ids, k), k)) == decode(ids)


def test_overlapping_k_mers_stand_at_each_base() -> None:
    found = overlapping_tokens(encode("GATTACANG"), 3)
    assert decode_kmers(found, 3) == ["GAT", "ATT", "TTA", "TAC", "ACA", "[UNK]", "[UNK]"]
    assert overlapping_tokens(encode("AC"), 3).tolist() == []


def test_k_mer_tokens_of_impossible_sizes_are_refused() -> None:
    for make in (kmer_tokens, overlapping_tokens):
        with pytest.raises(UserError, match="expected k from 1 to 12, got 13"):
            make(encode("ACGT"), 13)


def test_too_many_unknown_bases_are_refused_with_their_share() -> None:
    assert len(encode("ACNN", max_unknown=0.5)) == 4 and encode("", max_unknown=0.0).shape == (0,)
    with pytest.raises(UserError) as caught:
        encode("ACGTACNR", max_unknown=0.2, where="x.fa, line 3")
    assert str(caught.value) == (
        "x.fa, line 3: 2 of 8 bases (25.0%) are N or ambiguous; data.max_unknown=0.2 allows 20.0%"
    )
