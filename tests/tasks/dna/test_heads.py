"""Heads of the DNA models: what each returns, padding, both strands, and what does not fit what."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mambaverse
from mambaverse.errors import UserError
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.heads import HEADS
from mambaverse.tasks.dna.strands import complement, reverse
from mambaverse.tasks.dna.tokens import COMPLEMENT, PAD, A, N

MIXERS = [name for name in mambaverse.list_mixers() if not mambaverse.mixers.MIXERS.get(name).needs_spatial_shape]
MIXER_ARGS: dict[str, Any] = {"vim": {"d_state": 4}, "s6": {"d_state": 4}, "ssd": {"d_state": 8, "headdim": 8}}
CMAP = torch.tensor(COMPLEMENT.tolist())
LENGTHS = torch.tensor([13, 7, 1, 12])
NONE = torch.tensor([13, 13, 13, 13])


def small(name: str = "caduceus_ph_d32_n2", **overrides: Any) -> DnaModel:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"dim": 16, "num_classes": 3, "mixer_args": MIXER_ARGS, **overrides}
    model: Any = mambaverse.create_model(name, **arguments)
    with torch.no_grad():  # so that outputs are far from 0, and differences would show
        for parameter in model.score.parameters():
            parameter.mul_(50)
        model.embeddings.word_embeddings.weight.mul_(10)
    return model.eval()


def batch(lengths: Tensor = NONE, seed: int = 0, length: int = 13) -> Tensor:
    ids = torch.randint(A, N + 1, (4, length), generator=torch.Generator().manual_seed(seed))
    ids[torch.arange(length) >= lengths[:, None]] = PAD
    return ids


def close(here: Tensor, there: Tensor) -> None:
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        ("classifier", (4, 3)),
        ("regression", (4, 3)),
        ("tokens", (4, 13, 3)),
        ("mlm", (4, 13, 16)),
        ("causal_lm", (4, 13, 16)),
    ],
)
@pytest.mark.parametrize("name", ["caduceus_ph_d32_n2", "caduceus_ps_d32_n2", "dna_mamba_d64_n2"])
def test_every_head_of_every_family(name: str, head: str, shape: tuple[int, ...]) -> None:
    if head == "causal_lm" and name.startswith("caduceus"):
        with pytest.raises(UserError, match="predicts the next base, which this model sees"):
            small(name, head=head)
        return
    model = small(name, head=head)
    y = model(batch(LENGTHS), LENGTHS)
    assert y.shape == shape and y.std() > 0.01
    y.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("head", ["classifier", "regression", "tokens", "mlm"])
@pytest.mark.parametrize("name", ["caduceus_ph_d32_n2", "caduceus_ps_d32_n2"])
def test_padding_changes_nothing_and_says_nothing(name: str, head: str) -> None:
    model, ids = small(name, head=head, pool="attention" if head == "classifier" else "mean"), batch(LENGTHS)
    if model.attention_pool is not None:
        torch.nn.init.normal_(model.attention_pool.weight)
    with torch.no_grad():
        y = model(ids, LENGTHS)
        for row, length in enumerate(LENGTHS.tolist()):
            alone = model(ids[row : row + 1, :length])[0]
            torch.testing.assert_close(y[row] if model.pools else y[row, :length], alone, atol=1e-5, rtol=1e-4)
            assert model.pools or not y[row, length:].any()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
def test_rcps_is_equivariant_over_any_mixer(mixer: str, lengths: Tensor | None) -> None:
    ids = batch(NONE if lengths is None else LENGTHS)
    turned = reverse(CMAP[ids], lengths)
    with torch.no_grad():
        model = small("caduceus_ps_d32_n2", mixer=mixer, head="mlm")
        logits = model(ids, lengths)
        close(model(turned, lengths), reverse(logits, lengths)[..., CMAP])
        hidden = model.forward_features(ids, lengths)
        close(model.forward_features(turned, lengths), reverse(hidden, lengths).flip(-1))
        assert logits.std() > 0.1 and not torch.allclose(logits, reverse(logits, lengths)[..., CMAP])
        model = small("caduceus_ps_d32_n2", mixer=mixer)
        close(model(turned, lengths), model(ids, lengths))


@pytest.mark.parametrize("complement", [None, [1, 0, 2]])
def test_labels_of_bases_are_read_from_the_other_end_and_exchanged_if_asked(complement: list[int] | None) -> None:
    model, ids = small("caduceus_ps_d32_n2", head="tokens", class_complement=complement), batch(LENGTHS)
    with torch.no_grad():
        y, turned = model(ids, LENGTHS), model(reverse(CMAP[ids], LENGTHS), LENGTHS)
    close(turned, reverse(y, LENGTHS)[..., complement or [0, 1, 2]])
    assert y.std() > 0.1


@pytest.mark.parametrize("head", ["classifier", "regression"])
def test_classes_of_one_strand_are_exchanged_on_the_other(head: str) -> None:
    model, ids = small("caduceus_ps_d32_n2", head=head, class_complement=[1, 0, 2]), batch()
    with torch.no_grad():
        y = model(ids)
        close(model(CMAP[ids.flip(1)]), y[:, [1, 0, 2]])
    assert (y[:, 0] - y[:, 1]).abs().max() > 0.1


def test_language_models_share_the_embedding_or_have_vectors_of_their_own() -> None:
    tied = small(head="mlm", num_classes=5)
    assert "lm_head.weight" not in tied.state_dict() and tied.num_classes == 16
    expected = tied.forward_features(batch()) @ tied.embeddings.word_embeddings.weight.T  # type: ignore[operator]
    close(tied(batch()), expected)
    own = small(head="mlm", tie_embeddings=False)
    assert own.state_dict()["lm_head.weight"].shape == (16, 16)
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in tied.parameters()) + 256


def test_logits_of_both_strands_are_caduceuss_in_the_form_of_two_halves() -> None:
    model, ids = small("caduceus_ps_d32_n2", head="mlm"), batch()
    hidden = model.forward_features(ids)
    weight: Any = model.embeddings.word_embeddings.weight
    close(model(ids), hidden[..., :16] @ weight.T + hidden[..., 16:].flip(-1) @ weight[CMAP].T)


def test_next_bases_are_predicted_from_what_came_before() -> None:
    model, ids = small("dna_mamba_d64_n2", head="causal_lm"), batch()
    changed = ids.clone()
    changed[:, 6:] = batch(seed=1)[:, 6:]
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax((0, 2))
    assert difference[:6].max() < 1e-6 < difference[6:].min()


def test_attention_begins_as_the_mean_and_weighs_tokens_of_each_strand() -> None:
    ids = batch(LENGTHS)
    model, mean = small("caduceus_ps_d32_n2", pool="attention"), small("caduceus_ps_d32_n2")
    close(model(ids, LENGTHS), mean(ids, LENGTHS))
    torch.nn.init.normal_(model.attention_pool.weight)  # type: ignore[union-attr]
    with torch.no_grad():
        y = model(ids, LENGTHS)
        assert (y - mean(ids, LENGTHS)).abs().max() > 1e-2
        close(model(reverse(CMAP[ids], LENGTHS), LENGTHS), y)


def test_without_scores_the_head_returns_what_would_enter_it() -> None:
    assert small(head="tokens", num_classes=0)(batch()).shape == (4, 13, 16)
    assert small(head="regression", num_classes=0)(batch()).shape == (4, 16)


@pytest.mark.parametrize("mixer", ["s6", "ssd", "mamba3"])
def test_the_causal_family_takes_mamba_1_2_and_3(mixer: str) -> None:
    model: Any = mambaverse.create_model("dna_mamba_d64_n2", mixer=mixer, head="causal_lm")
    assert model(batch()).shape == (4, 13, 16)


def test_models_on_the_meta_device_know_the_other_strand() -> None:
    model: Any = mambaverse.create_model("caduceus_ps_d32_n2", head="mlm", device="meta").to_empty(device="cpu")
    assert torch.equal(complement(torch.arange(len(CMAP))), CMAP)
    assert torch.equal(torch.tensor(model.class_complement), CMAP)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head": "mln"}, "head: unknown 'mln', did you mean 'mlm'?"),
        ({"head": "tokens", "pool": "cls"}, "pool='cls' joins the tokens of a sequence; head='tokens'"),
        ({"head": "tokens", "stem": "conv", "stem_stride": 2}, "stem_stride=2 merges them; set it to 1"),
        ({"head": "mlm", "stem": "conv"}, "predicts bases, of which stem='conv' shows the neighbours"),
        ({"head": "regression", "wide": 2, "max_length": 9}, "wide=2 scores classes of sequences"),
        (
            {"head": "causal_lm", "causal": True, "mixer": "s6", "both_strands": True},
            "which the other strand begins with",
        ),
        ({"tie_embeddings": False}, "tie_embeddings=False is for the heads mlm and causal_lm"),
        ({"class_complement": [1, 0]}, "this model reads one (both_strands=False): leave it out"),
        ({"class_complement": [1, 2, 0], "num_classes": 3, "both_strands": True}, "each paired with another or itself"),
        ({"class_complement": [1, 0], "num_classes": 3, "both_strands": True}, "expected the 3 class numbers from 0"),
        ({"class_complement": [1, 0], "head": "mlm", "both_strands": True}, "head='mlm' knows that of bases"),
        ({"rcps_swap_halves": True}, "rcps_swap_halves is for models of both strands"),
        ({"rcps_swap_halves": True, "both_strands": True, "pool": "cls"}, "and pool no cls token"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        mambaverse.create_model("caduceus_ph_d32_n2", **overrides)
    assert message in str(caught.value)


def test_heads_are_told_in_the_signature() -> None:
    assert "head" in mambaverse.models.describe_model("dna_mamba_d64_n2")["signature"] and len(HEADS) == 5


@pytest.mark.parametrize("name", ["caduceus_ph_d32_n2", "caduceus_ps_d32_n2", "dna_mamba_d64_n2"])
@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        (batch()[0], None, r"ids: expected \(B, L\) of whole numbers.*got \(13,\) int64"),
        (batch() + 0.5, None, r"ids: expected \(B, L\) of whole numbers.*got \(4, 13\) float32"),
        ("ACGT", None, "ids: expected a tensor .* got 'ACGT'"),
        (batch() - 8, None, "ids: expected values from 0 to 15, got -1 to 3"),
        (batch() + 8, None, "ids: expected values from 0 to 15, got 15 to 19"),
        (batch()[:, :0], None, "ids: expected at least 1 base a sequence"),
        (batch(), [13, 7, 1, 12], r"lengths: expected a tensor \(4,\) of whole numbers"),
        (batch(), LENGTHS[:1], r"lengths: expected shape \(4,\)"),
        (batch(), LENGTHS - 1, r"lengths: expected values from 1 to L = 13, got \[12, 6, 0, 11\]"),
        (batch(), LENGTHS + 1, r"lengths: expected values from 1 to L = 13, got \[14, 8, 2, 13\]"),
    ],
)
def test_what_are_no_ids_or_lengths_is_named(name: str, ids: Any, lengths: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(name, stem="kmer", stem_kernel=3, stem_stride=4)(ids, lengths)


def test_ids_are_not_read_where_they_are_fake_or_recorded() -> None:
    model = small()
    with torch.no_grad():
        recorded = make_fx(model)(batch())
        close(recorded(batch(seed=1)), model(batch(seed=1)))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert model(fake.from_tensor(batch())).shape == (4, 3)
