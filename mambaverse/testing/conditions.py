"""The checks of the conformance kit under other conditions: long, on any grid, in training, silent and loud, on meta.

As those of `mambaverse.testing.checks`: each takes a `Subject` and raises AssertionError where a promise does not hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambaverse.mixers import Mixer
from mambaverse.testing.subject import (
    LENGTH,
    Subject,
    call,
    rms,
    seeded,
    tensors,
)


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
    from mambaverse.blocks import reset_parameters  # loads timm

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
