"""How kernels are judged: relative RMS error by dtype against float64, NaN-filled outputs, every gradient.

A result passes if RMS(actual - expected) / RMS(expected) <= 1e-5 (float32), 2e-3 (float16), 5e-3 (bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Return RMS(actual - expected) / RMS(expected); 0 for empty tensors, the absolute RMS where `expected` is 0."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} where {tuple(expected.shape)} was expected")
    if actual.numel() == 0:
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, e = actual.detach().to(wide), expected.detach().to(wide)
    scale = e.abs().square().mean().sqrt().item()
    error = (a - e).abs().square().mean().sqrt().item()
    return error / scale if scale > 0 else error


def assert_close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise AssertionError unless `actual` is finite and within the tolerance of `dtype` (default: its own).

    Args:
        name: What is compared, for the message.
        actual: Any shape.
        expected: Same shape, best in float64.
        dtype: Whose tolerance holds; the coarsest dtype among the inputs where a sum or a state is fp32.
    """
    bound = TOLERANCE[(dtype or actual.dtype).to_real()]
    if not torch.isfinite(torch.view_as_real(actual) if actual.is_complex() else actual).all():
        raise AssertionError(f"{name}: not finite")
    error = relative_rms(actual, expected)
    if not error <= bound:
        raise AssertionError(f"{name}: relative RMS error {error:.2e}, allowed {bound:.0e}")


@contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Make `torch.empty*` return NaNs inside the block, so that an output which is never written cannot pass."""
    names = ("empty", "empty_like", "empty_strided")
    originals = {name: getattr(torch, name) for name in names}

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            out = original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() or out.is_complex() else out

        return call

    try:
        for name, original in originals.items():
            setattr(torch, name, poisoned(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def assert_captured(step: Callable[[], Sequence[Tensor]]) -> None:
    """Raise AssertionError unless a CUDA graph of `step` replays to the bit what a call of it returns."""
    step()  # compiles
    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    for tensor in actual:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if not torch.equal(a, e):
            raise AssertionError(f"tensor {i} of a replayed graph differs from that of a call")


def outputs_and_gradients(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    seed: int = 0,
    cotangents_as: Sequence[torch.dtype] = (),
    **flags: Any,
) -> dict[str, Tensor]:
    """Run `function(**inputs, **flags)` and backpropagate fixed random cotangents through all of its outputs.

    Args:
        function: Returns a tensor or a tuple of tensors.
        inputs: Name to tensor (or None); floating tensors get gradients.
        seed: Seeds the cotangents, which are drawn in float64: equal for every dtype, but for their rounding to it.
        cotangents_as: Dtypes that they are rounded to first, so that a wide run gets those of a narrow one.
        flags: Passed through.

    Returns:
        "out0", "out1", ... and "d<name>" for each floating input.
    """
    leaves = {k: v.detach().clone().requires_grad_() if _differentiable(v) else v for k, v in inputs.items()}
    out = function(**leaves, **flags)
    outs = [o for o in (out if isinstance(out, Sequence) else (out,)) if o is not None]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, dtype=torch.float64, generator=generator) for o in outs]
    cotangents = [c.to(d) for c, d in zip(cotangents, cotangents_as or [torch.float64] * len(outs), strict=True)]
    cotangents = [c.to(o) for c, o in zip(cotangents, outs, strict=True)]
    torch.autograd.backward(outs, cotangents)
    results = {f"out{i}": o.detach() for i, o in enumerate(outs)}
    for name, leaf in leaves.items():
        if _differentiable(leaf):
            if leaf.grad is None:
                raise AssertionError(f"no gradient for {name}")
            results[f"d{name}"] = leaf.grad
    return results


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
