"""A mixer under test, the tokens that it is fed, and how two results are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mambaverse.kernels.testing import relative_rms
from mambaverse.mixers import Mixer, create_mixer

LENGTH = 12  # tokens of a sequence: longer than a usual convolution window
GRID = (3, 4)  # of them, for a mixer that needs it
LONG = 261  # 9 · 29: more than two chunks of 128 or one of 256, and a multiple of neither
JITTER = 0.1  # added to every parameter, so that one that starts at 0 or 1 takes part
TOLERANCE = 2e-5  # relative RMS between two fp32 runs, each of which may be 1e-5 from the truth


class Skip(Exception):  # noqa: N818 (nothing went wrong)
    """A check that does not apply here; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A mixer under test: how to build it and what to feed it.

    Attributes:
        mixer: A registered name, "package.module:Class", or a `Mixer` class.
        dim: Channels D.
        arguments: Its other arguments.
        device: Where the checks run.
    """

    mixer: str | type[Mixer]
    dim: int = 16
    arguments: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def __str__(self) -> str:
        name = self.mixer if isinstance(self.mixer, str) else self.mixer.__name__
        return f"{name}({', '.join([f'dim={self.dim}', *(f'{k}={v!r}' for k, v in self.arguments.items())])})"

    def make(self, device: str | None = None, dtype: torch.dtype | None = None) -> Mixer:
        """Return a new mixer as the class makes it."""
        arguments = {**self.arguments, "device": device or self.device, "dtype": dtype}
        if isinstance(self.mixer, str):
            return create_mixer(self.mixer, self.dim, **arguments)
        return self.mixer(self.dim, **arguments)

    def build(self, seed: int = 0) -> Mixer:
        """Return the mixer in eval mode, its parameters drawn with `seed` and moved off any special values."""
        with seeded(seed):
            mixer = self.make("cpu").eval()
            with torch.no_grad():
                for parameter in mixer.parameters():
                    parameter.add_(JITTER * torch.randn_like(parameter))
        return mixer.to(self.device)

    def tokens(self, batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
        """Return random tokens (B, L, D)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length, self.dim, generator=generator).to(self.device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside the block and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def call(mixer: Any, x: Tensor, **arguments: Any) -> Any:
    """Run the mixer as backbones do: by keyword, with a grid where it needs one; x has to stay as it is."""
    if mixer.needs_spatial_shape:
        height = max(h for h in range(1, x.shape[1] + 1) if x.shape[1] % h == 0 and h * h <= x.shape[1])
        arguments["spatial_shape"] = (height, x.shape[1] // height)
    kept = x.detach().clone()
    result = mixer(x=x, **arguments)
    if not (x.is_meta or torch.equal(x, kept)):
        given = f" with {', '.join(arguments)}" if arguments else ""
        raise AssertionError(f"forward{given} wrote to its input x {tuple(x.shape)}")
    return result


def same(what: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE, least_scale: float = 0.0) -> None:
    """Raise AssertionError unless shapes and dtypes are equal and the RMS difference is within the tolerance.

    Args:
        what: What is compared, for the message.
        actual: Any shape.
        expected: Same shape and dtype.
        tolerance: Allowed RMS difference, relative to the RMS of `expected`,
        least_scale: or to this if it is more.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)} where {tuple(expected.shape)} was expected")
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{what}: {actual.dtype} where {expected.dtype} was expected")
    if not torch.isfinite(actual).all():
        raise AssertionError(f"{what}: not finite")
    error = relative_rms(actual, expected)
    if 0 < rms(expected) < least_scale:
        error *= rms(expected) / least_scale
    if not error <= tolerance:
        raise AssertionError(f"{what}: relative RMS difference {error:.1e}, allowed {tolerance:.0e}")


def rms(x: Tensor) -> float:
    """Return the root of the mean square."""
    return x.detach().double().square().mean().sqrt().item()


def refuses(what: str, action: Callable[[], Any]) -> None:
    """Raise AssertionError unless `action` raises a ValueError with a message."""
    try:
        action()
    except ValueError as error:
        if not str(error):
            raise AssertionError(f"{what}: the ValueError has no message") from error
    except Exception as error:
        raise AssertionError(f"{what}: expected a ValueError that says so, got {type(error).__name__}") from error
    else:
        raise AssertionError(f"{what}: expected a ValueError, got an answer")


def tensors(state: Any) -> list[Tensor]:
    """Return the tensors of a nested tuple."""
    return [state] if isinstance(state, Tensor) else [t for part in state for t in tensors(part)]


def needs(mixer: Mixer, attribute: str) -> None:
    """Raise Skip unless the mixer declares that it supports this."""
    if not getattr(mixer, attribute):
        raise Skip(f"{attribute} is False (that it refuses is checked elsewhere)")


def run_and_differentiate(
    mixer: Mixer, x: Tensor, weight: Tensor, lengths: list[int], run: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Return y and all gradients of (y · weight).sum() of a run in chunks of these lengths, the state carried over."""
    mixer.zero_grad()
    x = x.detach().clone().requires_grad_()
    state, outputs = None, []
    for i, part in enumerate(x.split(lengths, dim=1) if len(lengths) > 1 else [x]):
        arguments = {"state": state} if i else {}
        if i < len(lengths) - 1:
            y, state = call(mixer, part, return_state=True, **arguments)
        else:
            y = call(mixer, part, **arguments) if run is None else run(part)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    if not y.requires_grad:
        raise AssertionError("y requires no gradient although x and the parameters do: something cuts it off")
    (y * weight).sum().backward()
    gradients = {f"gradient of {n}": p.grad.clone() for n, p in mixer.named_parameters() if p.grad is not None}
    mixer.zero_grad()
    return {"y": y.detach(), "gradient of x": x.grad, **gradients}  # type: ignore[dict-item]


def same_gradients(
    what: str, actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """Compare results of `run_and_differentiate`; one that all but cancels is held to a tenth of the largest."""
    least_scale = 0.1 * max(rms(value) for value in expected.values())
    for name, value in expected.items():
        if actual.get(name) is None:
            raise AssertionError(f"{name} {what}: there is none")
        same(f"{name} {what}", actual[name], value, tolerance, least_scale)


def slope_error(mixer: Mixer, x: Tensor, weight: Tensor, leaves: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Return by how much gradients miss the slope of (y · weight).sum() along a random direction of their leaves."""
    with seeded(3), torch.no_grad():
        directions = {name: torch.randn(leaf.shape).to(leaf) for name, (leaf, _) in leaves.items()}
        slope = sum((gradient * directions[name]).sum().item() for name, (_, gradient) in leaves.items())
        losses = []
        for step in (1e-3, -2e-3):  # to one side of where the gradient was taken, then to the other
            for name, (leaf, _) in leaves.items():
                leaf.add_(step * directions[name])
            losses.append((call(mixer, x).double() * weight.double()).sum().item())
        for name, (leaf, _) in leaves.items():
            leaf.add_(1e-3 * directions[name])
    return abs((losses[0] - losses[1]) / 2e-3 - slope)


def rows_of(state: Any, rows: slice) -> Any:
    """Return these rows of a state."""
    return state[rows] if isinstance(state, Tensor) else tuple(rows_of(part, rows) for part in state)
