"""In-silico mutagenesis: what each of the three substitutions at each place of a window changes.

    head         number                                                            passes for n places of L bases
    mlm          log p(alt) - log p(ref), the place masked                         n of L
    causal_lm    Σ log p over the window with the substitution minus without it    3 n of what is behind (prefix.py)
    classifier,  score of a class (its logit), or a quantity, with the             the same in causal models,
    regression   substitution minus without it                                     3 n of L in others

The value is 0 for the base that is there, and NaN where there is none (N). With both strands it is the mean of both.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mambaverse.errors import UserError
from mambaverse.tasks.dna.interpret.prefix import PrefixScan, mutants_of, why_not
from mambaverse.tasks.dna.likelihood import masked_sites, next_base
from mambaverse.tasks.dna.reader import Reader
from mambaverse.tasks.dna.tokens import A, T, reverse_complement_ids

Done = Callable[[int], None]


def mutagenesis(
    reader: Reader,
    ids: np.ndarray,
    start: int = 0,
    end: int | None = None,
    *,
    target: int = 0,
    reuse: bool = True,
    chunk: int | None = None,
    done: Done = lambda places: None,
) -> np.ndarray:
    """Return the changes by A, C, G and T at each place, float64 (end - start, 4).

    Args:
        reader: The model.
        ids: The window, uint8 (L,).
        start: First place that is mutated,
        end: and behind the last; None: the window's end.
        target: Class or quantity; language models have none.
        reuse: Read mutants on from the state before them where the model can, else each from the first base on.
        chunk: Places whose mutants are read on from one state; None: by what is left of the window.
        done: Called with the number of places that were finished, all of them once a strand.

    Raises:
        UserError: places outside of the window, an unknown target, a head that speaks of each base.
    """
    end = len(ids) if end is None else end
    if not 0 <= start < end <= len(ids):
        raise UserError(f"mutagenesis: places {start} to {end} of {len(ids):,}; expected 0 <= start < end <= length")
    if reader.head == "tokens":
        raise UserError("mutagenesis: head 'tokens' has a score for each base, not one of the window")
    if not reader.speaks and not 0 <= target < reader.first.num_classes:
        raise UserError(f"mutagenesis: target {target}; the model has {reader.first.num_classes}, from 0")
    changes = _strand(reader, ids, start, end, target, reuse, chunk, done)
    if reader.both:
        turned = reverse_complement_ids(ids)
        there = _strand(reader, turned, len(ids) - end, len(ids) - start, target, reuse, chunk, done)
        changes = (changes + there[::-1, ::-1]) / 2  # A C G T read from behind is the complement of A C G T
    changes[(ids[start:end] < A) | (ids[start:end] > T)] = np.nan
    return changes


def predicted(reader: Reader, ids: np.ndarray) -> int:
    """Return the class that the model says of a window (L,)."""
    windows = [ids, reverse_complement_ids(ids)] if reader.both else [ids]
    scores = [answer[0] for answer in reader.ask(windows, lambda rows, _: (reader.model(rows).float(),))]
    return int(torch.stack(scores).mean(0).argmax())


def _strand(
    reader: Reader, ids: np.ndarray, start: int, end: int, target: int, reuse: bool, chunk: int | None, done: Done
) -> np.ndarray:
    if reader.head == "mlm":
        return _masked(reader, ids, start, end, done)
    if reuse and reader.single and not why_not(reader.first):
        with torch.no_grad(), reader.autocast():
            return PrefixScan(reader.first, ids, target, reader.rows(len(ids)), chunk)(start, end, done)
    return _whole(reader, ids, start, end, target, done)


def _masked(reader: Reader, ids: np.ndarray, start: int, end: int, done: Done) -> np.ndarray:
    """Return the log-likelihood ratios of masked places."""

    def say(windows: Tensor, rows: list[int]) -> tuple[Tensor]:
        done(len(rows))
        return (masked_sites(reader, windows, [[start + row] for row in rows])[:, 0, A : T + 1],)

    said = torch.stack([answer[0] for answer in reader.ask([ids] * (end - start), say)]).double().numpy()
    known = (ids[start:end] >= A) & (ids[start:end] <= T)
    own = np.where(known, ids[start:end] - A, 0).astype(np.int64)
    return said - said[np.arange(end - start), own][:, None]


def _whole(reader: Reader, ids: np.ndarray, start: int, end: int, target: int, done: Done) -> np.ndarray:
    """Return the changes of the score, every mutant read from the first base on."""

    def say(windows: Tensor, rows: list[int]) -> tuple[Tensor]:
        if reader.head == "causal_lm":
            return (next_base(reader.log_probs(windows), windows).sum(1),)
        return (reader.model(windows)[:, target].double(),)

    out = np.zeros((end - start, 4))
    reference = float(reader.ask([ids], say)[0][0])
    step = max(1, reader.rows(len(ids)) // 3)
    for first in range(start, end, step):
        places = range(first, min(first + step, end))
        mutants, which = mutants_of(ids, places)
        values = [float(answer[0]) for answer in reader.ask(list(mutants), say)]
        out[which[:, 0] - start, which[:, 1] - A] = np.array(values) - reference
        done(len(places))
    return out
