"""Sequences in pieces: a causal model that reads chunk after chunk, and training on a million bases.

    forward_chunk    chunk k and the state behind chunk k - 1 -> what the model says of it, and the state behind it;
                     the pieces of any cut, joined, are the forward pass of the whole
    in_chunks        the stack over tokens (B, L, D), chunk by chunk; backward runs each chunk a second time

The gradient of `in_chunks` flows through the states from chunk to chunk: it is that of the whole pass, not truncated.
What is kept for it are the tokens that go in and come out, (B, L, D) each, and every layer's state at each boundary
((B, E, N) fp32 in S6: 32 kB at 256 channels); what stands beside that is one chunk's activations in all layers. The
arithmetic is that of two forward passes and one backward. Checkpoints of blocks (`grad_checkpointing`), for models that
read both ways, keep two tensors (B, L, D) for every layer instead.

Measured: forward and backward of dna_mamba_d64_n4, fp32, above the 0.8 GiB of the process before (AMD EPYC, one core;
torch 2.14.1, numba 0.68.1; 2026-11-26; glibc told to give memory back, MALLOC_MMAP_THRESHOLD_=65536, without which
1,048,576 bases took 6.5 GiB in chunks of 16,384). On a GPU: not measured.

    131,072 bases    as a whole 2.0 GiB, blocks 0.9 GiB, chunks of 16,384 0.32 GiB, of 4,096 0.15 GiB
    1,048,576        chunks of 16,384 1.0 GiB
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambaverse.errors import UserError
from mambaverse.kernels.backend import recomputed
from mambaverse.tasks.dna.heads import token_mask
from mambaverse.tasks.dna.stems import as_ids

if TYPE_CHECKING:
    from mambaverse.tasks.dna.backbone import DnaModel


def check_carries_state(model: DnaModel, what: str) -> None:
    """Raise UserError unless the stack of `model` can be run on from a state.

    Args:
        model: Whose blocks are looked at.
        what: Is asked for, for the message.
    """
    if not model.causal:
        raise UserError(f"{what} needs a causal model; this one reads both ways, so that its first base sees the last")
    for i, layer in enumerate(model.blocks()):
        if not layer.mixer.supports_state:
            kind = type(layer.mixer).__name__
            raise UserError(f"{what} needs mixers that carry a state; {kind}, in layer {i}, keeps none")


def check_streams(model: DnaModel) -> None:
    """Raise UserError unless `model` can read bases as they come."""
    check_carries_state(model, "a streaming forward pass")
    reasons = {
        "both_strands=True: the other strand begins with the last base": model.both_strands,
        f"stem={model.stem!r}: its tokens reach over the end of a chunk; use stem='embedding'": (
            model.stem != "embedding"
        ),
        "position=True: the model has places, and a chunk does not know its own": model.pos_embed is not None,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise UserError(f"no streaming forward pass with {found[0]}")


def forward_chunk(model: DnaModel, ids: Tensor, state: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    """Run on from `state`; see `DnaModel.forward_chunk`."""
    check_streams(model)
    if len(state) != model.depth:
        raise UserError(f"state: expected that of {model.depth} layers, as init_state(batch_size) makes it")
    hidden, after = model.forward_state(model.embed_drop(model.embeddings(as_ids(ids))), state)
    return (hidden if model.pools else model.token_scores(hidden)), after


def in_chunks(model: DnaModel, x: Tensor, lengths: Tensor | None, chunk_size: int) -> Tensor:
    """Return the tokens (B, L, D) after the last norm of x (B, L, D); zeros from `lengths` (B,) on."""
    states: list[Any] | None = None
    parts = []
    for chunk in x.split(chunk_size, dim=1):
        y, states = recomputed(model.forward_state, chunk, states)
        parts.append(y)
    hidden = torch.cat(parts, dim=1)
    return hidden if lengths is None else hidden * token_mask(hidden.shape[1], lengths)
