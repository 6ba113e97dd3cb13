"""The isotropic stack: mixers by name or pattern, padding that changes nothing, state that carries over."""

import pytest
import torch
from torch import nn

from mambaverse.backbones.isotropic import Isotropic
from mambaverse.blocks import Norm, build_mixer, layer_pattern
from mambaverse.errors import UserError
from mambaverse.mixers import Mixer, list_mixers

DIM = 16
SMALL = {
    "s6": {"d_state": 4},
    "ssd": {"d_state": 8, "headdim": 8},
    "mamba3": {"d_state": 8, "headdim": 8, "is_mimo": True, "mimo_rank": 2},
    "s4d": {"d_state": 4},
    "attention": {"num_heads": 2},
}
CAUSAL = ["s6", "ssd", "mamba3", "s4d", "attention"]


class Reversed(Mixer):
    """Looks ahead as its arguments have it, which only an instance tells."""

    def __init__(self, dim: int, ahead: bool = True, device: object = None, dtype: object = None) -> None:
        super().__init__()
        self.causal = not ahead

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1) if self.causal else x.flip(1)


def stack(mixer: str | list[str], *, causal: bool = True, depth: int = 2, **arguments: object) -> Isotropic:
    torch.manual_seed(0)
    return Isotropic(DIM, depth, mixer, SMALL, causal=causal, **arguments).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("mixer", CAUSAL)
def test_carried_norm_equals_the_plain_block(mixer: str) -> None:
    model = stack(mixer, mlp_ratio=2.0)
    x = torch.randn(2, 9, DIM)
    expected = x
    for layer in model.blocks():
        expected = expected + layer.mixer(x=layer.norm(expected)[0])
        assert layer.mlp is not None
        expected = expected + layer.mlp(layer.norm2(expected)[0])
    torch.testing.assert_close(model(x), model.norm_f(expected)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", [*CAUSAL, ["s6", "attention"]])
def test_padding_changes_nothing(mixer: str | list[str]) -> None:
    for causal in (True, False):
        model = stack(mixer, causal=causal)
        x, lengths = torch.randn(3, 11, DIM), torch.tensor([11, 4, 7])
        y = model(x, lengths=lengths)
        for row, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(y[row, :length], model(x[row : row + 1, :length])[0], atol=2e-5, rtol=1e-4)
            assert (y[row, length:] == 0).all()


@pytest.mark.parametrize("mixer", [*CAUSAL, ["s6", "attention", "ssd"]])
def test_state_carries_across_chunks_and_steps(mixer: str | list[str]) -> None:
    model = stack(mixer, depth=3)
    x = torch.randn(2, 8, DIM)
    with torch.no_grad():
        whole = model(x)
        first, states = model.forward_state(x[:, :5])
        second, _ = model.forward_state(x[:, 5:], states)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=2e-5, rtol=1e-4)
        states = model.init_states(2)
        for t in range(8):
            y_t, states = model.step(x[:, t], states)
            torch.testing.assert_close(y_t, whole[:, t], atol=2e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    x = torch.randn(2, 7, DIM)
    gradients = []
    for enable in (False, True):
        model = stack(["s6", "attention"]).train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("mixer", list_mixers())
def test_every_mixer_fits_a_bidirectional_stack(mixer: str) -> None:
    model = stack(mixer, causal=False, depth=1)
    x = torch.randn(1, 9, DIM, requires_grad=True)
    y = model.forward_layers(x, (3, 3)) if model.needs_spatial_shape else model(x)
    (gradient,) = torch.autograd.grad(y[0, 4].sum(), x)
    assert gradient[0, 0].abs().sum() > 0 and gradient[0, -1].abs().sum() > 0


def test_one_direction_on_request() -> None:
    x = torch.randn(1, 9, DIM, requires_grad=True)
    (gradient,) = torch.autograd.grad(stack("s6", causal=False, directions=1)(x)[0, 4].sum(), x)
    assert gradient[0, -1].abs().sum() == 0


def test_pattern_repeats_over_the_layers() -> None:
    assert layer_pattern(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    model = stack(["s6", "s6", "attention"], depth=4)
    assert [type(layer.mixer).__name__ for layer in model.layers] == ["S6", "S6", "Attention", "S6"]


def test_drop_path_grows_and_residual_branches_are_rescaled() -> None:
    model = stack("attention", depth=3, drop_path_rate=0.2)
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in model.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    single = build_mixer("attention", 256, causal=True)
    deep = Isotropic(256, 16, "attention", causal=True).layers[3].mixer
    assert deep.out_proj.weight.std().item() == pytest.approx(single.out_proj.weight.std().item() / 4, rel=0.05)  # type: ignore[union-attr, operator]


def test_layer_scale_starts_small() -> None:
    model = stack("s6", layer_scale=1e-4)
    x = torch.randn(1, 5, DIM)
    torch.testing.assert_close(model(x), model.norm_f(x)[0], atol=1e-2, rtol=0)


def test_weight_decay_spares_what_the_mixers_name() -> None:
    model = stack("s6")
    names = model.no_weight_decay()
    assert {"layers.0.mixer.A_log", "layers.1.mixer.D"} <= names
    assert names <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("ahead", [True, False])
def test_a_mixer_that_tells_its_direction_when_built_is_wrapped_where_it_must_be(ahead: bool) -> None:
    name = f"{__name__}:Reversed"
    mixer = build_mixer(name, DIM, {name: {"ahead": ahead}}, causal=False)
    assert isinstance(mixer, Reversed) == ahead
    assert ahead or isinstance(build_mixer(name, DIM, {name: {"ahead": ahead}}, causal=True), Reversed)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")  # timm's contract asks for it all the same
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_scripted_norm_equals_the_kernel(kind: str) -> None:
    norm = Norm(DIM, kind)
    nn.init.normal_(norm.weight)
    x, residual = torch.randn(2, 3, DIM), torch.randn(2, 3, DIM)
    scripted = torch.jit.script(norm)
    for arguments in ((x, None), (x, residual)):
        for ours, theirs in zip(norm(*arguments), scripted(*arguments), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixer": "vim", "causal": True}, "looks ahead"),
        ({"mixer": "attention", "mixer_args": {"attention": {"causal": False}}, "causal": True}, "looks ahead"),
        ({"mixer": f"{__name__}:Reversed", "causal": True}, "looks ahead"),
        ({"mixer": "s7", "causal": True}, "unknown mixer 's7', did you mean 's6'"),
        ({"mixer": [], "causal": True}, "got an empty list"),
        ({"mixer": "s6", "mixer_args": {"s6": {"dstate": 4}}, "causal": True}, "did you mean 'd_state'"),
        ({"mixer": "s6", "mixer_args": {"sdd": {"d_state": 4}}, "causal": True}, "no mixer is called 'sdd'"),
        ({"mixer": "s6", "mixer_args": {"d_state": 4}, "causal": True}, "such as {'s6': {...}}, got {'d_state': 4}"),
        ({"mixer": "s6", "mixer_args": {"s6": {"dim": 4}}, "causal": True}, "'dim' of 's6' is the model's"),
        ({"mixer": "vim", "mixer_args": {"vim": {"dtype": None}}, "causal": False}, "'dtype' of 'vim' is the model's"),
        (
            {"mixer": "s6", "mixer_args": {"bidirectional": {"mixer": "ssd"}}, "causal": False},
            "'mixer' of 'bidirectional' is 's6' here, which it wraps; mixer='bidirectional' takes another",
        ),
        ({"mixer": "s6", "mixer_args": 4, "causal": True}, "mixer_args: expected arguments by mixer.*got 4"),
        ({"mixer": "s6", "norm": "batch", "causal": True}, "expected 'rms' or 'layer', got 'batch'"),
        ({"mixer": "s6", "mlp_ratio": "a", "causal": True}, "mlp_ratio: expected 0 for no MLP, or more, got 'a'"),
        ({"mixer": "s6", "drop_path_rate": "x", "causal": True}, "drop_path_rate: expected a probability.*got 'x'"),
        ({"mixer": "s6", "eps": None, "causal": True}, "eps: expected a finite number of at least 0, got None"),
        ({"mixer": "s6", "eps": float("nan"), "causal": True}, "eps: expected a finite number of at least 0, got nan"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Isotropic(DIM, 2, **arguments)


def test_wrong_lengths() -> None:
    model = stack("s6", depth=1)
    with pytest.raises(ValueError, match="expected values from 0 to L = 4"):
        model(torch.randn(2, 4, DIM), lengths=torch.tensor([3, 5]))
    with pytest.raises(ValueError, match="one a sequence"):
        model(torch.randn(2, 4, DIM), lengths=torch.tensor([3]))
    mask, fractions = torch.tensor([True, False]), torch.tensor([1.5, 2.0])
    for given, said in ((mask, "torch.bool"), (fractions, "torch.float32"), ([3, 4], r"\[3, 4\]")):
        with pytest.raises(ValueError, match=rf"lengths: expected a tensor \(2,\) of whole numbers, got {said}"):
            model(torch.randn(2, 4, DIM), lengths=given)
    with pytest.raises(ValueError, match="not both"):
        model(torch.randn(1, 4, DIM), lengths=torch.tensor([4]), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))


def test_a_wrong_number_of_states_is_named() -> None:
    model, x = stack("s6"), torch.randn(1, 4, DIM)
    for states, said in (([None], "1"), ([None] * 3, "3"), (x, "a Tensor"), ({}, "a dict")):
        message = f"states: expected a list of 2, one a layer, got {said}"
        with pytest.raises(ValueError, match=message):
            model.forward_state(x, states)
        with pytest.raises(ValueError, match=message):
            model.step(x[:, 0], states)
