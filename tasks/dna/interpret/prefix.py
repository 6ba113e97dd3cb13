"""In-silico mutagenesis of a causal model: what stands before a mutant is read once, and only what is behind it anew.

    state behind base c - 1    -> all mutants at places c .. c + k - 1, read from c on: 3 k rows of L - c bases
                               -> the reference, read k bases on: the state behind base c + k - 1

A causal model's state behind base t - 1 is all that a mutant at t shares with the reference, and nothing of it changes.
Mutants at k neighbouring places start from the same state, so that they are one batch of one length, at the cost of
reading up to k bases that are not mutated; k is a 64th of what is left. Only one state is held at a time.

3 n full forwards of L bases take 3 n L steps; mutants of the last n bases of a window take 3 n² / 2, of n bases at its
centre half.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mambaverse.errors import UserError
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.likelihood import is_base, next_base
from mambaverse.tasks.dna.streaming import check_streams
from mambaverse.tasks.dna.tokens import A, T

SHARE = 64  # of what is left of the window, that mutants are read too early at most
LEAST = 8  # places whose mutants are read together at least: fewer rows keep no machine busy


def why_not(model: DnaModel) -> str:
    """Return why mutants of `model` have to be read from the window's first base on; "" if they need not."""
    try:
        check_streams(model)
    except UserError as error:
        return str(error)
    if model.cls_token is not None:
        return "pool='cls' reads a token behind the last base"
    if model.wide is not None:
        return "wide= scores the k-mers of the whole window"
    if model.head == "tokens":
        return "head='tokens' has a score for each base"
    return "pool='place' weighs the tokens of the whole window" if model.place_weight is not None else ""


def mutants_of(ids: np.ndarray, places: range) -> tuple[np.ndarray, np.ndarray]:
    """Return the substitutions at some places that hold a base: ids (R, L), and (place, id put in) of each, (R, 2)."""
    rows = [(t, base) for t in places if A <= ids[t] <= T for base in range(A, T + 1) if base != ids[t]]
    which = np.array(rows, np.int64).reshape(-1, 2)
    out = np.repeat(ids[None], len(which), 0)
    out[np.arange(len(which)), which[:, 0]] = which[:, 1]
    return out, which


class PrefixScan:
    """Reads the mutants of one window on from the states of its reference.

    Args:
        model: A causal model, of which `why_not` has nothing to say.
        ids: The window (L,).
        target: The class or quantity whose score is asked for; of head "causal_lm" it is the log-likelihood.
        rows: Windows of L bases that a pass may hold; of what is shorter, more.
        chunk: k; None: by what is left.
    """

    def __init__(self, model: DnaModel, ids: np.ndarray, target: int, rows: int, chunk: int | None = None) -> None:
        self.model, self.ids, self.target, self.chunk = model, ids, target, chunk
        self.budget = rows * len(ids)
        self.device = next(model.parameters()).device
        self._whole = model.forward_features(self._tensor(ids[None]))[0]  # (L, D)
        self._language = model.head == "causal_lm"

    def __call__(self, start: int, end: int, done: Callable[[int], None]) -> np.ndarray:
        """Return the change of the score by each substitution at places `start` to `end`, float64 (end - start, 4).

        Args:
            start: First place.
            end: Behind the last one.
            done: Called with the number of places that were finished.
        """
        out = np.zeros((end - start, 4))
        state = self._advance(self.ids[:start], self.model.init_state(1))
        at = start
        while at < end:
            left = len(self.ids) - at
            size = min(self.chunk or max(left // SHARE, LEAST), end - at)
            mutants, which = mutants_of(self.ids[at:], range(size))
            values = self._values(at, mutants, state)
            out[at - start + which[:, 0], which[:, 1] - A] = values[1:] - values[0]
            state = self._advance(self.ids[at : at + size], state)
            at += size
            done(size)
        return out

    def _values(self, at: int, mutants: np.ndarray, state: Any) -> np.ndarray:
        """Return the score of the reference and of mutants (R, L - at), float64 (1 + R,), but for what they share."""
        tails = self._tensor(np.concatenate([self.ids[None, at:], mutants]))
        found = []
        for part in tails.split(max(1, self.budget // tails.shape[1])):
            states = tree_map_only(Tensor, partial(_repeated, count=len(part)), state)
            said, _ = self.model.forward_chunk(part, states)
            found.append(self._likelihood(at, said, part) if self._language else self._score(at, said))
        return torch.cat(found).cpu().numpy()

    def _likelihood(self, at: int, logits: Tensor, ids: Tensor) -> Tensor:
        """Return Σ log p of the bases from `at` on, (R,)."""
        total = next_base(logits.float().log_softmax(-1), ids).sum(1)
        if at:
            before = self.model.token_scores(self._whole[at - 1]).float().log_softmax(-1).double()
            total += torch.where(is_base(ids[:, 0]), before[ids[:, 0]], 0.0)
        return total

    def _score(self, at: int, hidden: Tensor) -> Tensor:
        """Return the head's score of the pooled tokens, of which `hidden` (R, L - at, D) are the last, (R,)."""
        model, whole = self.model, self._whole
        if model.pool == "mean":
            pooled = (hidden.sum(1) + whole[:at].sum(0)) / len(whole)
        elif model.pool == "last":
            pooled = hidden[:, -1]
        else:
            assert model.attention_pool is not None
            pooled = model.attention_pool(torch.cat([whole[:at].expand(len(hidden), -1, -1), hidden], dim=1))
        return model.token_scores(pooled)[:, self.target].double()

    def _advance(self, ids: np.ndarray, state: Any) -> Any:
        return self.model.forward_chunk(self._tensor(ids[None]), state)[1] if len(ids) else state

    def _tensor(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids)).to(self.device).long()


def _repeated(state: Tensor, count: int) -> Tensor:
    """Return the state of one sequence (1, ...) as that of `count`."""
    return state.expand(count, *state.shape[1:]).contiguous()
