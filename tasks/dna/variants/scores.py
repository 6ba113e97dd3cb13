"""Scores of variants by a model: how much likelier the other allele is, and how far the tokens around it move.

    llr                of masked-language models. A substitution: Σ log p(alt) - log p(ref) at its sites, masked
                       together. An indel: the pseudo-log-likelihood of ALT's window minus that of the reference's.
    delta              of causal models: Σ log p over the window with ALT minus Σ over the reference's.
    embedding_cosine   1 - cos of the mean tokens of both alleles, over the allele and `NEAR` bases on either side;
    embedding_l2       the length of their difference.

Below 0: the model expects the reference. Sums, not means; both windows have the same number of bases (windows.py). With
both strands each number is the mean of both.

Source: Brandes et al. 2023, "Genome-wide prediction of disease variant effects with a deep protein language model", for
the log-likelihood ratio of a masked site; Nguyen et al. 2024, "Sequence modeling and design from molecular to genome
scale with Evo", for the difference of log-likelihoods.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.likelihood import MASK_EVERY, masked_sites, next_base, pseudo
from mambaverse.tasks.dna.reader import Reader
from mambaverse.tasks.dna.tokens import reverse_complement_ids
from mambaverse.tasks.dna.variants.windows import Allele, Pair

NEAR = 16  # bases on either side of an allele whose tokens are compared
CACHE_BYTES = 1 << 28  # of what is kept of reference windows
SCORES = {"llr": ("llr",), "delta": ("delta",), "embedding": ("embedding_cosine", "embedding_l2")}
Parts = tuple[Tensor, ...]


class VariantScorer:
    """Scores pairs of windows; a reference window is read once for all variants in it, while it is remembered.

    Args:
        reader: The model.
        scores: Of "llr" (head "mlm"), "delta" (head "causal_lm") and "embedding"; None: all that the model has.

    Attributes:
        columns: What the numbers are called.
        note: What to say of a model that has no likelihoods; else empty.

    Raises:
        UserError: a score that this model has not.
    """

    def __init__(self, reader: Reader, scores: Sequence[str] | None = None) -> None:
        likelihood = {"mlm": "llr", "causal_lm": "delta"}.get(reader.head)
        known = [name for name in (likelihood, "embedding") if name and (name != "embedding" or reader.single)]
        self.note = ""
        if likelihood is None:
            self.note = (
                f"head {reader.head!r} gives no probabilities of bases: only the embedding's distance is scored; "
                "llr needs a run with head mlm, delta one with causal_lm"
            )
        if not known:
            raise UserError(f"score: an ensemble of the head {reader.head!r} has neither likelihoods nor one embedding")
        for name in scores or ():
            if name not in SCORES:
                raise UserError(f"--scores: unknown {name!r}{suggest(name, SCORES)}")
            if name not in known:
                has = self.note or f"this model has {' and '.join(known)}, by its head {reader.head!r}"
                raise UserError(f"--scores {name}: {has}")
        self.reader = reader
        self.chosen = tuple(name for name in known if scores is None or name in scores)
        self.columns = tuple(column for name in self.chosen for column in SCORES[name])
        self._cache = _Cache(CACHE_BYTES)

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the scores of variants, float64 (len(pairs), len(columns))."""
        turns = (False, True) if self.reader.both else (False,)
        total = sum(self._strand(pairs, turned) for turned in turns)
        assert isinstance(total, np.ndarray)
        return total / len(turns)

    def _strand(self, pairs: Sequence[Pair], turned: bool) -> np.ndarray:
        """Return the scores of one strand: `turned`, of the other."""
        out = np.zeros((len(pairs), len(self.columns)))
        refs, alts = ([_turned(a) if turned else a for a in side] for side in _sides(pairs))
        embeds = "embedding" in self.chosen
        if "llr" in self.chosen:
            self._masked(pairs, refs, alts, out[:, 0])
        if "delta" in self.chosen or embeds:
            likelihoods, means = self._read(refs, alts)
            if "delta" in self.chosen:
                out[:, 0] = likelihoods
            if embeds:
                ref, alt = means
                out[:, -2] = 1 - torch.cosine_similarity(ref, alt, dim=-1).numpy()
                out[:, -1] = (ref - alt).norm(dim=-1).numpy()
        return out

    def _masked(self, pairs: Sequence[Pair], refs: Sequence[Allele], alts: Sequence[Allele], out: np.ndarray) -> None:
        """Write the log-likelihood ratios of pairs (V,) into `out`."""
        reader = self.reader

        def at_sites(ids: Tensor, rows: list[int]) -> Parts:
            return (masked_sites(reader, ids, [keys[row][-1] for row in rows]),)

        sites = [tuple(np.flatnonzero(r.ids != a.ids).tolist()) for r, a in zip(refs, alts, strict=True)]
        ones = [i for i, pair in enumerate(pairs) if pair.is_substitution]
        jobs: dict[Any, np.ndarray] = {(_key(refs[i]), sites[i]): refs[i].ids for i in ones}
        keys = list(self._cache.missing(jobs))
        self._fill(keys, [jobs[key] for key in keys], at_sites)
        for i in ones:
            (log_probs,) = self._cache[(_key(refs[i]), sites[i])]
            at = range(len(sites[i]))
            ref, alt = (torch.from_numpy(side[i].ids[list(sites[i])]).long() for side in (refs, alts))
            out[i] = float((log_probs[at, alt] - log_probs[at, ref]).double().sum())
        indels = [i for i in range(len(pairs)) if not pairs[i].is_substitution]

        def whole(alleles: Sequence[Allele]) -> Callable[[Tensor, list[int]], Parts]:
            def say(ids: Tensor, rows: list[int]) -> Parts:
                places = torch.from_numpy(np.stack([alleles[row].places for row in rows])).to(ids.device)
                return (pseudo(reader, ids, places).sum(1),)

            return say

        windows = {(_key(refs[i]), "pseudo"): refs[i] for i in indels}
        names = list(self._cache.missing(windows))
        needed = [windows[name] for name in names]
        self._fill(names, [allele.ids for allele in needed], whole(needed))
        others = [alts[i] for i in indels]
        said = reader.ask([allele.ids for allele in others], whole(others))
        for i, (alt,) in zip(indels, said, strict=True):
            out[i] = float(alt - self._cache[(_key(refs[i]), "pseudo")][0])

    def _read(self, refs: Sequence[Allele], alts: Sequence[Allele]) -> tuple[np.ndarray, tuple[Tensor, Tensor]]:
        """Return the differences of log-likelihoods (V,), and the mean tokens near the alleles of both, (V, D)."""
        reader, embeds, causal = self.reader, "embedding" in self.chosen, "delta" in self.chosen

        def say(ids: Tensor) -> tuple[Tensor, Tensor | None]:
            """Return log-likelihoods (B,) and tokens."""
            if not embeds:
                return next_base(reader.log_probs(ids), ids).sum(1), None
            hidden = reader.hidden(ids)
            if not causal:
                return hidden.new_zeros(len(ids)), hidden
            log_probs = reader.first.token_scores(hidden).float().log_softmax(-1)
            return next_base(log_probs, ids).sum(1), hidden

        def reference(ids: Tensor, rows: list[int]) -> Parts:
            total, hidden = say(ids)
            return (total,) if hidden is None else (total, hidden)

        def alternative(ids: Tensor, rows: list[int]) -> Parts:
            total, hidden = say(ids)
            if hidden is None:
                return (total,)
            return total, torch.stack([self._mean(h, alts[row]) for h, row in zip(hidden, rows, strict=True)])

        windows = {_key(ref): ref.ids for ref in refs}
        keys = list(self._cache.missing(windows))
        self._fill(keys, [windows[key] for key in keys], reference)
        said = reader.ask([allele.ids for allele in alts], alternative)
        known = [self._cache[_key(ref)] for ref in refs]
        change = np.array([float(alt[0] - ref[0]) for alt, ref in zip(said, known, strict=True)])
        if not embeds:
            return change, (torch.empty(0), torch.empty(0))
        means = [self._mean(ref[1], allele) for ref, allele in zip(known, refs, strict=True)]
        return change, (torch.stack(means), torch.stack([alt[1] for alt in said]))

    def _fill(self, keys: Sequence[Hashable], windows: Sequence[np.ndarray], what: Any) -> None:
        for key, parts in zip(keys, self.reader.ask(windows, what), strict=True):
            self._cache[key] = parts

    def _mean(self, hidden: Tensor, allele: Allele) -> Tensor:
        """Return the mean (D,) of the tokens (M, D) near an allele; a token may stand for several bases."""
        stride = self.reader.first.stride
        first = max(allele.start - NEAR, 0) // stride
        return hidden[first : -(-min(allele.end + NEAR, len(allele.ids)) // stride)].mean(0)


class _Cache:
    """What is known of reference windows: those that were asked for last, up to so many bytes.

    What is in use is never dropped: room is made by `missing` alone, before anything is added.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[Hashable, Parts] = OrderedDict()

    def missing(self, keys: dict[Any, Any]) -> list[Any]:
        """Return the keys that are not known, and forget, if there is no room, others that are not among `keys`."""
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)
        while self._bytes > self._limit and next(iter(self._kept)) not in keys:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return [key for key in keys if key not in self._kept]

    def __setitem__(self, key: Hashable, parts: Parts) -> None:
        self._kept[key] = tuple(part.clone() for part in parts)  # not a view that keeps a whole batch
        self._bytes += _size(parts)

    def __getitem__(self, key: Hashable) -> Parts:
        return self._kept[key]


def _key(allele: Allele) -> tuple[bytes, int]:
    """Return what tells a window from others: its bases, and which of them are masked together."""
    return allele.ids.tobytes(), int(allele.places[0]) % MASK_EVERY


def _size(parts: Parts) -> int:
    return sum(part.numel() * part.element_size() for part in parts) + 64


def _sides(pairs: Sequence[Pair]) -> tuple[list[Allele], list[Allele]]:
    return [pair.ref for pair in pairs], [pair.alt for pair in pairs]


def _turned(allele: Allele) -> Allele:
    """Return an allele read from the other strand."""
    length = len(allele.ids)
    ids = reverse_complement_ids(allele.ids)
    return Allele(ids, allele.places[::-1].copy(), length - allele.end, length - allele.start)
