"""The DNA models: sizes and names of the papers, equivariance for any mixer, padding that changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mambaverse
from mambaverse.ensemble import Ensemble, joined
from mambaverse.errors import UserError
from mambaverse.tasks.dna.backbone import DnaModel, mutated, reverse
from mambaverse.tasks.dna.saliency import saliency
from mambaverse.tasks.dna.tokens import COMPLEMENT, PAD, A, N

MIXERS = [name for name in mambaverse.list_mixers() if not mambaverse.mixers.MIXERS.get(name).needs_spatial_shape]
MIXER_ARGS: dict[str, Any] = {"vim": {"d_state": 4}, "s6": {"d_state": 4}, "ssd": {"d_state": 8, "headdim": 8}}
LENGTHS = torch.tensor([20, 7, 1, 13])
STEMS: list[dict[str, Any]] = [
    {"stem": "embedding"},
    {"stem": "conv", "stem_kernel": 5, "stem_stride": 3},
    {"stem": "kmer", "stem_kernel": 3, "stem_stride": 2},
    {"stem": "kmer", "stem_kernel": [1, 3], "stem_stride": 2, "stem_dim": 4},
]


def small(name: str = "caduceus_ph_d32_n2", **overrides: Any) -> DnaModel:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"dim": 16, "num_classes": 3, "mixer_args": MIXER_ARGS, **overrides}
    model = mambaverse.create_model(name, **arguments)
    assert isinstance(model, DnaModel)
    with torch.no_grad():  # so that scores are far from 0, and differences would show
        for parameter in model.score.parameters():
            parameter.mul_(50)
    return model.eval()


def batch(length: int = 20, lengths: Tensor | None = None, seed: int = 0) -> Tensor:
    ids = torch.randint(A, N + 1, (4, length), generator=torch.Generator().manual_seed(seed))
    if lengths is not None:
        ids[torch.arange(length) >= lengths[:, None]] = PAD
    return ids


def other_strand(ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    return reverse(torch.from_numpy(COMPLEMENT.copy()).long()[ids], lengths)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("caduceus_{}_d118_n4", 470_702), ("caduceus_{}_d128_n4", 541_312), ("caduceus_{}_d256_n4", 1_934_592),
        ("caduceus_{}_d256_n8", 3_864_832), ("caduceus_{}_d256_n16", 7_725_312),
        ("dna_mamba_d64_n8", 262_720), ("dna_mamba_d96_n10", 684_192), ("dna_mamba_d128_n12", 1_401_472),
        ("dna_mamba_d192_n14", 3_527_232), ("dna_mamba_d256_n16", 7_012_608), ("dna_mamba_d384_n20", 19_291_008),
        ("dna_mamba_d512_n24", 40_694_272), ("dna_mamba_d128_n4", 468_608),
    ],
)  # fmt: skip
def test_parameter_counts_equal_the_papers(name: str, count: int) -> None:
    for variant in {name.format("ph"), name.format("ps")}:
        model = mambaverse.create_model(variant, num_classes=0, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count


def test_names_in_the_state_dict_are_those_of_caduceus() -> None:
    model = mambaverse.create_model("caduceus_ps_d256_n16", num_classes=5, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rest = {name: shape for name, shape in shapes.items() if not name.startswith("layers.")}
    assert rest == {"embeddings.word_embeddings.weight": (16, 256), "norm_f.weight": (256,), "score.weight": (5, 256)}
    layer = {name.removeprefix("layers.15."): shape for name, shape in shapes.items() if name.startswith("layers.15.")}
    assert layer["norm.weight"] == (256,) and layer["mixer.in_proj.weight"] == (1024, 256)
    assert layer["mixer.A_log"] == (512, 16) and layer["mixer.x_proj.weight"] == (48, 512)


def test_sizes_are_listed_by_domain() -> None:
    names = mambaverse.list_models(domain="dna")
    assert {"dna_mamba_d64_n2", "caduceus_ph_d118_n4", "caduceus_ps_d64_n2"} <= set(names)


def test_caduceus_adds_its_directions_and_what_is_set_stands() -> None:
    model: Any = mambaverse.create_model("caduceus_ph_d32_n2")
    assert model.layers[0].mixer.merge == "add"
    model = mambaverse.create_model("caduceus_ph_d32_n2", mixer="s6", mixer_args={"s6": {"d_state": 2}})
    assert model.layers[0].mixer.merge == "add" and model.layers[0].mixer.fwd.d_state == 2
    model = mambaverse.create_model("caduceus_ph_d32_n2", mixer_args={"vim": {"merge": "mean"}})
    assert model.layers[0].mixer.merge == "mean"


@pytest.mark.parametrize("mixer", [*MIXERS, ["vim", "attention"]])
def test_ps_is_equivariant_for_any_mixer(mixer: str | list[str]) -> None:
    model, ids = small("caduceus_ps_d32_n2", mixer=mixer), batch()
    with torch.no_grad():
        here, there = model(ids), model(other_strand(ids))
        hidden, turned = model.forward_features(ids), model.forward_features(other_strand(ids))
    torch.testing.assert_close(here, there, atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.flip(1, 2), turned, atol=1e-5, rtol=0)
    assert hidden.shape == (4, 20, 32) and here.std() > 0.1
    assert (here - model(batch(seed=1))).abs().max() > 1e-2


@pytest.mark.parametrize("pool", ["mean", "last", "cls", "place"])
@pytest.mark.parametrize("stem", STEMS, ids=lambda s: "-".join(map(str, s.values())))
def test_ps_is_equivariant_with_padding_for_any_stem_and_pool(stem: dict[str, Any], pool: str) -> None:
    model = small("caduceus_ps_d32_n2", pool=pool, position=True, max_length=20, **stem)
    ids = batch(lengths=LENGTHS)
    turned = other_strand(ids, LENGTHS)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, LENGTHS), model(turned, LENGTHS), atol=1e-5, rtol=0)
        hidden = model.forward_features(ids, LENGTHS)
        tokens = (LENGTHS + model.stride - 1) // model.stride
        torch.testing.assert_close(
            reverse(hidden, tokens).flip(-1), model.forward_features(turned, LENGTHS), atol=1e-5, rtol=0
        )
    assert not hidden[torch.arange(hidden.shape[1]) >= tokens[:, None]].any()


@pytest.mark.parametrize("pool", ["mean", "last", "cls", "place"])
@pytest.mark.parametrize("stem", STEMS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("name", ["caduceus_ph_d32_n2", "dna_mamba_d64_n2"])
def test_padding_changes_nothing(name: str, stem: dict[str, Any], pool: str) -> None:
    model = small(name, pool=pool, position=True, max_length=20, **stem)
    ids = batch(lengths=LENGTHS)
    with torch.no_grad():
        together = model(ids, LENGTHS)
        alone = torch.cat([model(ids[i : i + 1, :size]) for i, size in enumerate(LENGTHS.tolist())])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_any_mixer_learns(mixer: str) -> None:
    model = small(mixer=mixer, stem="conv", stem_kernel=5).train()
    model(batch(lengths=LENGTHS), LENGTHS).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []


def test_a_causal_model_does_not_look_ahead_and_refuses_mixers_that_do() -> None:
    model, ids = small("dna_mamba_d64_n2"), batch()
    changed = ids.clone()
    changed[:, 12:] = batch(seed=1)[:, 12:]
    difference = (model.forward_features(ids) - model.forward_features(changed)).abs().amax((0, 2))
    assert difference[:12].max() < 1e-6 < difference[13]
    with pytest.raises(UserError, match="looks ahead"):
        small("dna_mamba_d64_n2", mixer="vim")


def test_a_mixer_that_needs_a_grid_is_refused() -> None:
    with pytest.raises(UserError, match="a mixer here needs its tokens to be a grid; DNA is a line"):
        small(mixer="ss2d")


def test_ids_may_be_of_any_integer_type() -> None:
    model, ids = small(), batch()
    assert model(ids.to(torch.uint8)).equal(model(ids)) and model(ids.int()).equal(model(ids))


def test_without_a_head_the_pooled_token_is_returned() -> None:
    assert small(num_classes=0)(batch()).shape == (4, 16)


def test_weight_decay_leaves_the_mixers_own_alone() -> None:
    model = small(pool="cls", position=True, max_length=20)
    names = {name for name, _ in model.named_parameters()}
    assert {"cls_token", "pos_embed", "layers.0.mixer.A_log"} <= model.no_weight_decay() <= names


def test_kmers_are_numbered_and_those_with_n_are_none() -> None:
    model: Any = small(stem="kmer", stem_kernel=2)
    ids = torch.tensor([[A, A + 1, N, A + 3, A + 3]])
    assert model.embeddings.numbers(ids)[:, :, 0].tolist() == [[1, 16, 16, 15, 16]]
    model = small(stem="kmer", stem_kernel=[2, 1])
    assert model.embeddings.numbers(ids)[0].tolist() == [[1, 16], [20, 17], [20, 20], [15, 19], [20, 19]]


@pytest.mark.parametrize("name", ["caduceus_ph_d32_n2", "caduceus_ps_d32_n2"])
@pytest.mark.parametrize("stem", STEMS, ids=lambda s: "-".join(map(str, s.values())))
def test_saliency_is_the_first_order_effect_of_a_base(name: str, stem: dict[str, Any]) -> None:
    model, ids = small(name, **stem), batch(lengths=LENGTHS)
    shares = saliency(model, ids, LENGTHS)
    assert shares.shape == (4, 20) and shares.isfinite().all() and shares.std() > 0
    assert not shares[torch.arange(20) >= LENGTHS[:, None]].any()


def test_saliency_of_a_linear_model_adds_up_to_its_score() -> None:
    model = small(depth=0, stem="embedding")
    model.norm_f.forward = lambda x, residual=None: (x, x)  # type: ignore[method-assign]
    ids = batch()
    shares = saliency(model, ids, target=torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(shares.sum(1), model(ids)[torch.arange(4), torch.tensor([0, 1, 2, 0])])


def test_the_saliency_of_both_strands_is_turned_with_the_sequence() -> None:
    model, ids = small("caduceus_ps_d32_n2", stem="conv", stem_kernel=5), batch()
    torch.testing.assert_close(saliency(model, ids).flip(1), saliency(model, other_strand(ids)), atol=1e-5, rtol=1e-4)


def widened(name: str = "caduceus_ph_d32_n2", **overrides: Any) -> Any:
    """A model whose k-mers at places have weights."""
    model: Any = small(name, wide=2, max_length=20, **overrides)
    torch.nn.init.normal_(model.wide.weight)
    return model


def test_wide_adds_the_weights_of_kmers_at_their_places() -> None:
    model = widened()
    ids = torch.tensor([[A, A + 1, N, A + 3, A + 3]])
    weight = model.wide.weight  # rows: A, C, G, T, AA, AC, ...
    expected = weight[0, 0] + weight[0, 4 + 1] + weight[1, 1] + weight[3, 3] + weight[3, 4 + 15] + weight[4, 3]
    torch.testing.assert_close(model.wide(ids)[0], expected)
    deep = small(max_length=20)
    deep.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("wide.")})
    both = deep(ids).softmax(-1), expected[None].softmax(-1)
    torch.testing.assert_close(model(ids).softmax(-1), (both[0] + both[1]) / 2)
    torch.testing.assert_close(model.train()(ids), torch.stack([deep(ids), expected[None]], dim=1))


def test_wide_knows_nothing_of_padding_and_reads_both_strands() -> None:
    model, ids = widened(), batch(lengths=LENGTHS)
    with torch.no_grad():
        alone = torch.cat([model(ids[i : i + 1, :size]) for i, size in enumerate(LENGTHS.tolist())])
        torch.testing.assert_close(model(ids, LENGTHS), alone, atol=2e-5, rtol=1e-5)
        both = widened("caduceus_ps_d32_n2")
        torch.testing.assert_close(both(ids, LENGTHS), both(other_strand(ids, LENGTHS), LENGTHS), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="the model has places for 20 only"):
        model(torch.cat([ids, ids], dim=1))


@pytest.mark.parametrize("name", ["caduceus_ph_d32_n2", "caduceus_ps_d32_n2"])
def test_saliency_has_what_wide_says(name: str) -> None:
    model, ids, rows = widened(name), batch(), torch.arange(4)
    torch.nn.init.zeros_(model.score.weight)  # the deep scores are 0, whatever the bases
    classes = torch.tensor([0, 1, 2, 0])
    strands = [ids, other_strand(ids)] if model.both_strands else [ids]
    said = torch.stack([model.wide(strand) for strand in strands]).detach().requires_grad_()
    scores = joined([torch.zeros_like(said).flatten(0, 1), said.flatten(0, 1)], training=False)
    (gradient,) = torch.autograd.grad(scores.unflatten(0, (len(strands), -1)).mean(0)[rows, classes].sum(), said)
    expected = (said * gradient).sum((0, 2)).detach()
    torch.testing.assert_close(saliency(model, ids, target=classes).sum(1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["caduceus_ph_d32_n2", "caduceus_ps_d32_n2"])
def test_saliency_of_an_ensemble_is_the_mean_of_its_members(name: str) -> None:
    members, ids = [widened(name), widened(name)], batch()
    model = Ensemble(members).eval()
    classes = model(ids).argmax(1)
    expected = sum(saliency(member, ids, target=classes) for member in members) / 2
    torch.testing.assert_close(saliency(model, ids), expected)


def test_mutations_are_bases_and_leave_everything_else() -> None:
    torch.manual_seed(0)
    ids = torch.full((100, 100), A)
    ids[:, :3] = torch.tensor([N, PAD, A + 3])
    changed = mutated(ids, 0.2)
    assert torch.equal(changed[:, :2], ids[:, :2])
    assert set(changed[:, 2:].unique().tolist()) == {A, A + 1, A + 2, A + 3}
    assert abs((changed != ids)[:, 2:].float().mean() - 0.2 * 3 / 4) < 0.01
    noisy = small(mutate_rate=1.0)
    torch.testing.assert_close(noisy(ids[:2]), noisy(ids[:2]))  # in training alone
    assert not torch.equal(noisy.train()(ids[:2]), noisy(ids[:2]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"wide": 6, "max_length": 20}, "wide: expected k from 1 to 5, or 0 for none, got 6"),
        ({"wide": 2}, "need the longest sequence: max_length"),
        ({"pool": "max"}, "pool: unknown 'max'"),
        ({"stem": "cnov"}, "stem: unknown 'cnov', did you mean 'conv'"),
        ({"stem": "conv", "stem_kernel": 4}, "stem_kernel: expected an odd number of bases, got 4"),
        ({"stem": "kmer", "stem_kernel": 11}, "stem_kernel: expected k from 1 to 10, or several, got 11"),
        ({"stem": "conv", "stem_stride": 0}, "stem_stride: expected at least 1, got 0"),
        ({"stem": "conv", "stem_dim": 0}, "stem_dim: expected at least 1, got 0"),
        ({"stem": "kmer", "stem_kernel": 3, "stem_dim": -2}, "stem_dim: expected at least 1, got -2"),
        ({"stem_stride": 2}, "stem_stride=2 merges bases, which stem='embedding' does not"),
        ({"position": True}, "need the longest sequence: max_length"),
        ({"pool": "place"}, "need the longest sequence: max_length"),
        ({"pretrained": True}, "there are no published weights yet"),
        ({"pol": "mean"}, "unknown argument 'pol', did you mean 'pool'"),
        ({"mixer": "vmi"}, "did you mean 'vim'"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        mambaverse.create_model("caduceus_ph_d32_n2", **overrides)
    assert message in str(caught.value)


def test_sequences_longer_than_the_places_are_refused() -> None:
    model = small(position=True, max_length=10)
    with pytest.raises(UserError, match="sequences of 20 bases: the model has places for 10 only"):
        model(batch())


def test_compiled_models_agree() -> None:
    model, ids = small("caduceus_ps_d32_n2"), batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))


@pytest.mark.parametrize("stem", STEMS[1:], ids=lambda stem: str(stem["stem"]))
def test_compiled_models_read_sequences_of_any_length(stem: dict[str, Any]) -> None:
    model = small(**stem, depth=1)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for length in (24, 25, 7, 40):  # groups of bases that are full, and not
        torch.testing.assert_close(compiled(batch(length)), model(batch(length)))
