"""The checks of the conformance kit under other conditions: long, on any grid, in training, silent and loud, on meta.

As those of `mambaverse.testing.checks`: each takes a `Subject` and raises AssertionError where a promise does not hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambaverse.mixers import Mixer
from mambaverse.mixers._common import reset_parameters
from mambaverse.testing.subject import (
    LENGTH,
    LONG,
    TOLERANCE,
    Skip,
    Subject,
    call,
    rms,
    run_and_differentiate,
    same,
    same_gradients,
    seeded,
    slope_error,
    tensors,
)

CUT = 130  # of LONG tokens: beside any multiple of a power of 2
LOUD = 100.0  # more than a norm in front of a mixer of fewer than 10,000 channels lets through


def check_long(subject: Subject) -> None:
    """What holds of a few tokens holds of hundreds: each row alone, causality, gradients, packing, the state."""
    mixer = subject.build()
    x = subject.tokens(5, LONG)
    with torch.no_grad():
        y = call(mixer, x)
        same(f"the last row of a batch of 5 of {LONG} tokens, run alone", call(mixer, x[4:]), y[4:])
        if mixer.causal:
            changed = torch.cat([x[:, :CUT], subject.tokens(5, LONG - CUT, seed=5)], 1)
            what = f"y before token {CUT} of {LONG}, after the tokens from it on changed"
            same(what, call(mixer, changed)[:, :CUT], y[:, :CUT])
            same(f"y of the first 128 of {LONG} tokens, run alone", call(mixer, x[:, :128]), y[:, :128])
        if not mixer.needs_spatial_shape:
            lengths = [70, CUT, 0, LONG - CUT - 70]
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(device=x.device, dtype=torch.int32)
            separate = torch.cat([call(mixer, row) for row in x[:1].split(lengths, 1) if row.shape[1]], 1)
            same(f"packed sequences of {lengths}, against separate", call(mixer, x[:1], cu_seqlens=bounds), separate)
    weight = subject.tokens(2, LONG, seed=2)
    whole = run_and_differentiate(mixer, x[:2], weight, [LONG])
    leaves = {"x": x[:2].clone(), **dict(mixer.named_parameters())}
    pairs = {name: (leaf, whole[f"gradient of {name}"]) for name, leaf in leaves.items()}
    norm = sum(gradient.square().sum().item() for _, gradient in pairs.values()) ** 0.5
    if not (error := slope_error(mixer, leaves["x"], weight, pairs)) < 0.02 * norm:
        raise AssertionError(
            f"gradients over {LONG} tokens differ from finite differences by {error / norm:.1%} of them"
        )
    if mixer.supports_state:
        parts = run_and_differentiate(mixer, x[:2], weight, [CUT, LONG - CUT])
        same_gradients(f"in chunks of {CUT} and {LONG - CUT}, against one", parts, whole)
        _check_long_steps(mixer, x[:2], whole["y"])


@torch.no_grad()
def _check_long_steps(mixer: Mixer, x: Tensor, y: Tensor) -> None:
    """Compare forward with 40 steps, a forward up to token 256, and steps to the end."""
    state, outputs = mixer.init_state(x.shape[0]), []
    for t in range(40):
        y_t, state = mixer.step(x[:, t], state)
        outputs.append(y_t)
    same("40 tokens step by step, against forward", torch.stack(outputs, 1), y[:, :40])
    y_more, state = call(mixer, x[:, 40:256], state=state, return_state=True)
    same("forward from the state that 40 steps left", y_more, y[:, 40:256])
    for t in range(256, LONG):
        y_t, state = mixer.step(x[:, t], state)
        same(f"step {t} from the state that forward left", y_t, y[:, t])


def check_grid(subject: Subject) -> None:
    """A mixer that needs the grid of its tokens takes any, wide or tall, and what it gives depends on it alone."""
    mixer = subject.build()
    if not mixer.needs_spatial_shape:
        raise Skip("needs_spatial_shape is False")
    x, results = subject.tokens(), {}
    for grid in ((3, 4), (4, 3), (1, LENGTH), (LENGTH, 1)):
        results[grid] = mixer(x=x, spatial_shape=grid)
        what = f"y of spatial_shape={grid} after other grids, against a new mixer's"
        same(what, results[grid], subject.build()(x=x, spatial_shape=grid))
    if all(torch.equal(y, results[3, 4]) for y in results.values()):
        raise AssertionError(f"needs_spatial_shape=True, but y is the same for {', '.join(map(str, results))}")


def check_training(subject: Subject) -> None:
    """In training y and its gradients are those of eval mode, or where something is drawn (dropout), still causal."""
    mixer, x, weight = subject.build().train(), subject.tokens().requires_grad_(), subject.tokens(seed=2)
    before = [buffer.clone() for buffer in mixer.buffers()]
    with seeded(0):
        y = call(mixer, x)
    with seeded(1):
        drawn = not torch.equal(call(mixer, x), y)
    learns = not all(map(torch.equal, mixer.buffers(), before))  # running statistics
    if not (drawn or learns):
        expected = run_and_differentiate(mixer.eval(), x, weight, [LENGTH])
        same_gradients("in training, against eval", run_and_differentiate(mixer.train(), x, weight, [LENGTH]), expected)
    elif mixer.causal:
        cut = LENGTH // 2
        gradient = torch.autograd.grad((y * weight)[:, :cut].sum(), x)[0]
        leak = gradient[:, cut:].norm().item() / gradient.norm().item()
        if leak > TOLERANCE:
            raise AssertionError(f"causal=True, but in training tokens before {cut} depend on later ones ({leak:.0e})")


def check_loudness(subject: Subject) -> None:
    """Of silence (x = 0) and of an x of a hundred times the usual size, y and all gradients are finite."""
    mixer, weight = subject.build(), subject.tokens(seed=2)
    for loudness in (0.0, LOUD):
        for name, value in run_and_differentiate(mixer, loudness * subject.tokens(), weight, [LENGTH]).items():
            if not torch.isfinite(value).all():
                raise AssertionError(f"{name} is not finite for x = {loudness:g} · randn")


def check_meta(subject: Subject) -> None:
    """Built on the meta device it holds no data, runs, and `to_empty` with `reset_parameters` makes it whole.

    That is the mixer's own, or, where it has none, those of the modules that it is made of: a backbone calls them. It
    fills buffers too, and draws parameters as `__init__` does.
    """
    mixer = subject.make("meta", torch.bfloat16)
    for name, value in _values(mixer):
        if not value.is_meta:
            raise AssertionError(f"{name} is on {value.device} although device='meta' was given")
        if value.is_floating_point() and value.dtype != torch.bfloat16:
            raise AssertionError(f"{name} is {value.dtype} although dtype=bfloat16 was given")
    x = torch.empty(2, LENGTH, subject.dim, device="meta", dtype=torch.bfloat16)
    results = {"forward": call(mixer, x)}
    if mixer.supports_state:
        states = {"init_state(2) on meta": mixer.init_state(2)}
        states["init_state(2, device='meta')"] = subject.build().init_state(2, device="meta")
        for what, part in ((what, part) for what, state in states.items() for part in tensors(state)):
            if not part.is_meta:
                raise AssertionError(f"{what} holds a tensor {tuple(part.shape)} on {part.device}")
        results["forward from a state"], state = call(mixer, x, state=mixer.init_state(2), return_state=True)
        y_t, _ = mixer.step(x[:, 0], state)
        results["step"] = y_t[:, None].expand_as(x)
    for what, y in results.items():
        if not y.is_meta or y.shape != x.shape or y.dtype != x.dtype:
            raise AssertionError(f"{what} on meta gave {tuple(y.shape)} {y.dtype} on {y.device}")
    mixer = subject.make("meta").to_empty(device=subject.device)
    with torch.no_grad(), seeded(0):
        for value in [*mixer.parameters(), *mixer.buffers()]:
            value.fill_(float("nan") if value.is_floating_point() or value.is_complex() else 1)
        reset_parameters(mixer)
    with seeded(0):
        made = subject.make()
    with seeded(1):
        other = dict(_values(subject.make()))
    reset = dict(_values(mixer))
    for name, value in _values(made):
        if not torch.isfinite(reset[name]).all():
            raise AssertionError(f"reset_parameters leaves {name} as it was")
        drawn = not torch.equal(value, other[name])
        if not drawn and not torch.allclose(reset[name], value):
            raise AssertionError(
                f"reset_parameters gives {name} other values than __init__, which always gives the same"
            )
        ratio = rms(reset[name]) / rms(value) if drawn else 1.0
        if value.numel() >= 64 and not 2 / 3 < ratio < 3 / 2:
            raise AssertionError(f"reset_parameters draws {name} {ratio:.2g} times as large as __init__")
    if not torch.isfinite(call(mixer, subject.tokens())).all():
        raise AssertionError("y is not finite after to_empty and reset_parameters")


def _values(mixer: Mixer) -> list[tuple[str, Tensor]]:
    return [*mixer.named_parameters(), *mixer.named_buffers()]
