"""Sequences in pieces: any cut gives what the whole gives, and its gradients; what cannot be cut says so."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mambaverse
from mambaverse.errors import UserError
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.tokens import PAD, A, N

LENGTH = 17
MIXER_ARGS: dict[str, Any] = {
    "s6": {"d_state": 4},
    "ssd": {"d_state": 8, "headdim": 8, "chunk_size": 16},  # so that the kernel's own chunks and ours differ
    "mamba3": {"d_state": 8, "headdim": 8, "chunk_size": 16},
    "s4d": {"d_state": 4},
}
MIXERS: list[str | list[str]] = ["s6", "ssd", "mamba3", "s4d", ["s6", "ssd"], ["mamba3", "s4d"], ["ssd", "attention"]]
CUTS = [[1] * LENGTH, [LENGTH], [1, 5, 3, 7, 1], [7, 7, 3]]  # base by base, at once, ragged, a shorter last one


def small(mixer: str | Sequence[str] = "s6", **overrides: Any) -> DnaModel:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"dim": 16, "depth": 2, "head": "causal_lm", "mixer_args": MIXER_ARGS, **overrides}
    model: Any = mambaverse.create_model("dna_mamba_d64_n2", mixer=mixer, **arguments)
    with torch.no_grad():  # so that logits are far from 0
        model.embeddings.word_embeddings.weight.mul_(10)
    return model.eval()


def batch(rows: int = 2) -> Tensor:
    return torch.randint(A, N + 1, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def gradients(model: DnaModel, y: Tensor) -> list[Tensor]:
    y.square().mean().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert found and all(g.isfinite().all() for g in found)
    return found


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_chunks_of_any_size_are_the_whole(mixer: str | list[str]) -> None:
    model, ids = small(mixer), batch()
    with torch.no_grad():
        whole = model(ids)
        for cut in CUTS:
            state, parts = model.init_state(2), []
            for chunk in ids.to(torch.uint8).split(cut, dim=1):
                y, state = model.forward_chunk(chunk, state)
                parts.append(y)
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert whole.std() > 0.1


def test_a_state_is_not_used_up() -> None:
    model, ids = small(["s6", "mamba3"]), batch()
    with torch.no_grad():
        _, state = model.forward_chunk(ids[:, :9], model.init_state(2))
        first, _ = model.forward_chunk(ids[:, 9:], state)
        again, _ = model.forward_chunk(ids[:, 9:], state)
    assert torch.equal(first, again)


def test_heads_that_pool_give_the_tokens() -> None:
    model, ids = small(head="classifier"), batch()
    with torch.no_grad():
        hidden, _ = model.forward_chunk(ids, model.init_state(2))
        torch.testing.assert_close(hidden, model.forward_features(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mixer", "chunk_size"), [*((mixer, 7) for mixer in MIXERS), ("s6", 1), ("s6", 64)], ids=str)
def test_gradients_of_chunks_are_exact(mixer: str | list[str], chunk_size: int) -> None:
    model, ids = small(mixer), batch()
    expected = gradients(model, model(ids))
    model.set_grad_checkpointing(chunk_size=chunk_size)
    y = model(ids)
    model.set_grad_checkpointing(False)
    torch.testing.assert_close(y, model(ids), atol=1e-5, rtol=1e-5)
    model.set_grad_checkpointing(chunk_size=chunk_size)
    for here, there in zip(gradients(model, y), expected, strict=True):
        torch.testing.assert_close(here, there, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("head", ["classifier", "causal_lm"])
def test_padded_batches_are_cut_too(head: str) -> None:
    lengths = torch.tensor([LENGTH, 9, 1])
    model, ids = small(head=head), batch(3)
    ids[torch.arange(LENGTH) >= lengths[:, None]] = PAD
    y = model(ids, lengths)
    expected = gradients(model, y)
    model.set_grad_checkpointing(chunk_size=5)
    torch.testing.assert_close(model(ids, lengths), y, atol=1e-5, rtol=1e-5)
    for here, there in zip(gradients(model, model(ids, lengths)), expected, strict=True):
        torch.testing.assert_close(here, there, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "swap"), [("caduceus_ph_d32_n2", False), ("caduceus_ps_d32_n2", False), ("caduceus_ps_d32_n2", True)]
)
def test_gradients_with_checkpoints_of_blocks_are_the_same(name: str, swap: bool) -> None:
    torch.manual_seed(0)
    model: Any = mambaverse.create_model(name, dim=16, head="mlm", rcps_swap_halves=swap).train()
    ids, lengths = batch(), torch.tensor([LENGTH, 9])
    for sizes in (None, lengths):
        expected = gradients(model, model(ids, sizes))
        model.set_grad_checkpointing()
        found = gradients(model, model(ids, sizes))
        model.set_grad_checkpointing(False)
        for here, there in zip(found, expected, strict=True):
            torch.testing.assert_close(here, there)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("caduceus_ph_d32_n2", {}, "needs a causal model; this one reads both ways"),
        ("caduceus_ps_d32_n2", {}, "needs a causal model; this one reads both ways"),
        ("dna_mamba_d64_n2", {"stem": "kmer", "stem_kernel": 3}, "with stem='kmer': its tokens reach over"),
        ("dna_mamba_d64_n2", {"position": True, "max_length": 30}, "with position=True: the model has places"),
        ("dna_mamba_d64_n2", {"both_strands": True}, "with both_strands=True: the other strand begins with"),
    ],
)
def test_what_cannot_stream_says_why(name: str, overrides: dict[str, Any], message: str) -> None:
    model: Any = mambaverse.create_model(name, dim=16, **overrides)
    with pytest.raises(UserError) as caught:
        model.init_state(2)
    assert message in str(caught.value)
    with pytest.raises(UserError):
        model.forward_chunk(batch(), [None, None])


def test_mixers_without_a_state_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(["s6", "ssd"])
    monkeypatch.setattr(type(model.blocks()[1].mixer), "supports_state", False)
    for ask in (lambda: model.init_state(1), lambda: model.set_grad_checkpointing(chunk_size=4)):
        with pytest.raises(UserError, match="needs mixers that carry a state; SSD, in layer 1, keeps none"):
            ask()


def test_wrong_chunks_and_states() -> None:
    model = small()
    with pytest.raises(UserError, match="chunk_size: expected at least 1 token, got 0"):
        model.set_grad_checkpointing(chunk_size=0)
    with pytest.raises(UserError, match="state: expected that of 2 layers"):
        model.forward_chunk(batch(), [])
    bidirectional: Any = mambaverse.create_model("caduceus_ph_d32_n2")
    with pytest.raises(UserError, match="chunk_size=8 needs a causal model"):
        bidirectional.set_grad_checkpointing(chunk_size=8)
