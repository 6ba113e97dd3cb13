"""DNA as numbers: the character ids of HyenaDNA and Caduceus, and the reverse complement.

    [CLS] 0  [SEP] 1  [BOS] 2  [MASK] 3  [PAD] 4  [RESERVED] 5  [UNK] 6  A 7  C 8  G 9  T 10  N 11;   12 to 15 unused

Letters are read in either case. The ambiguous letters of IUPAC (R, Y, S, W, K, M, B, D, H, V) become N, since the
models know no other "one of several". U is RNA and an error, unless it is asked to be read as T.

Source: Nguyen et al. 2023, "HyenaDNA" (character tokenizer); Schiff et al. 2024, "Caduceus" (the padding to 16 ids).
IUPAC letters and their complements: Cornish-Bowden 1985, Nucleic Acids Research 13(9).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mambaverse.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    Ids = TypeVar("Ids", np.ndarray, Tensor)

CLS, SEP, BOS, MASK, PAD, RESERVED, UNK, A, C, G, T, N = range(12)
VOCAB = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N")
VOCAB_SIZE = 16  # of the embedding: a multiple of 8
AMBIGUOUS = b"RYSWKMBDHV"
FROM, TO = b"ACGTURYSWKMBDHVNacgturyswkmbdhvn", b"TGCAAYRSWMKVHDBNtgcaayrswmkvhdbn"
BAD = 255  # in a lookup table: no letter of DNA
PROTEIN = frozenset(b"EFILPQXZ*")  # letters that no nucleotide code has

COMPLEMENT = np.arange(VOCAB_SIZE, dtype=np.uint8)  # of ids: A <-> T, C <-> G, all others stay
COMPLEMENT[[A, C, G, T]] = [T, G, C, A]
_COMPLEMENT_LETTERS = bytes.maketrans(FROM, TO)


@lru_cache
def _table(strict: bool, rna: bool) -> np.ndarray:
    """Return the ids of all 256 bytes, `BAD` for those that are no letters of DNA."""
    table = np.full(256, BAD, np.uint8)
    letters = {b"A": A, b"C": C, b"G": G, b"T": T, b"N": N}
    if rna:
        letters[b"U"] = T
    if not strict:
        letters |= {bytes([letter]): N for letter in AMBIGUOUS}
    for letter, number in letters.items():
        table[ord(letter)] = table[ord(letter.lower())] = number
    table.flags.writeable = False
    return table


def encode(
    sequence: bytes | str,
    *,
    strict: bool = False,
    rna: bool = False,
    max_unknown: float = 1.0,
    where: str = "sequence",
) -> np.ndarray:
    """Return the ids of a sequence, uint8 (L,).

    Args:
        sequence: Letters, in either case.
        strict: Refuse all letters but A, C, G, T and N, rather than read the ambiguous ones as N.
        rna: Read U as T.
        max_unknown: Share of the bases that may be N, ambiguous letters that are read as N among them.
        where: What the sequence is, for messages: its file and record.

    Raises:
        UserError: a letter that is none of DNA's; the message names it and its position, counted from 1. More N than
            `max_unknown`.
    """
    letters = sequence.encode("utf-8", "replace") if isinstance(sequence, str) else sequence
    ids = _table(strict, rna)[np.frombuffer(letters, np.uint8)]
    if ids.size and ids.max() == BAD:
        raise UserError(f"{where}: {_explain(letters, int((ids == BAD).argmax()), strict)}")
    if max_unknown < 1 and (unknown := int((ids == N).sum())) > max_unknown * len(ids):
        share = f"{unknown:,} of {len(ids):,} bases ({unknown / len(ids):.1%}) are N or ambiguous"
        raise UserError(f"{where}: {share}; data.max_unknown={max_unknown:g} allows {max_unknown:.1%}")
    return ids


def is_base(ids: Ids) -> Ids:
    """Return which ids, an array or tensor of any shape, are A, C, G or T: bool of the same shape."""
    return (ids >= A) & (ids <= T)


def decode(ids: np.ndarray) -> str:
    """Return the letters of ids (L,); ids that stand for no letter become their names, such as [PAD]."""
    return "".join(VOCAB[i] if i < len(VOCAB) else "[UNK]" for i in np.asarray(ids).tolist())


def reverse_complement(sequence: bytes) -> bytes:
    """Return the other strand of a sequence, case kept; ambiguous letters too are complemented (R <-> Y), U as A."""
    return sequence.translate(_COMPLEMENT_LETTERS)[::-1]


def reverse_complement_ids(ids: np.ndarray) -> np.ndarray:
    """Return the ids of the other strand, for ids (..., L) without padding."""
    return COMPLEMENT[ids[..., ::-1]]


def _explain(letters: bytes, at: int, strict: bool) -> str:
    """Say what is wrong with the letter at place `at`, and what to do about it."""
    letter, place = chr(letters[at]), f"at position {at + 1:,} of {len(letters):,}"
    if letter in "Uu":
        return f"RNA: letter {letter!r} {place}; data.rna=true reads U as T in training; or write T for U"
    kinds = set(letters.upper())
    if len(kinds & PROTEIN) >= 2:
        return f"looks like a protein (letter {letter!r} {place}, {len(kinds)} kinds of letters); expected DNA"
    if letter == "-" or letter == ".":
        return f"a gap {letter!r} {place}: an alignment; take the gaps out"
    if strict and letters[at : at + 1].upper() in AMBIGUOUS:
        return f"ambiguous letter {letter!r} {place}; expected A, C, G, T, N, or data.strict=false, which reads it as N"
    allowed = "A, C, G, T, N" if strict else f"A, C, G, T, N or one of {', '.join(AMBIGUOUS.decode())}"
    return f"illegal letter {letter!r} {place}; expected {allowed}"
