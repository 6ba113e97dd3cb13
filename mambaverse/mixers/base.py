"""The contract of a mixer: (B, L, D) in, (B, L, D) out, mixing along L; what it can do stands in class attributes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Optional, Tuple  # noqa: UP035 (TorchScript reads these annotations)

import torch
from torch import Tensor, nn


class Mixer(nn.Module):
    """Base class of every sequence mixer.

    The least a mixer defines is `__init__(self, dim, ..., device=None, dtype=None)` and `mix(self, x)`. One that
    carries a state also defines `mix_sequence`, `init_state` and `step`, and sets `supports_state`.

    Attributes:
        causal: y[t] depends on x[..t] alone. A class attribute, or set in `__init__`.
        needs_spatial_shape: `mix_sequence` needs `spatial_shape` (H, W), the grid of the tokens, H · W = L.
        supports_state: `mix_sequence` takes and returns a state, and `step` continues from it.
        supports_cu_seqlens: `mix_sequence` takes packed sequences. Where False, the base class splits them, runs equal
            lengths as one batch and joins them again, which is exact for any mixer.
    """

    causal: bool = True
    needs_spatial_shape: bool = False
    supports_state: bool = False
    supports_cu_seqlens: bool = False

    def forward(
        self,
        x: Tensor,
        state: Optional[Tensor] = None,  # noqa: UP045 (in Python also a nested tuple of tensors)
        cu_seqlens: Optional[Tensor] = None,  # noqa: UP045
        spatial_shape: Optional[Tuple[int, int]] = None,  # noqa: UP006, UP045
        return_state: bool = False,
    ) -> Tensor:
        """Mix x along its length; called by keyword.

        Args:
            x: Tokens (B, L, D); with `cu_seqlens` (1, L, D).
            state: What came before x, as `init_state` or an earlier call returned it; None: nothing.
            cu_seqlens: Boundaries (S + 1,) int32 of S packed sequences: 0, ..., L. A state then has S rows.
            spatial_shape: (H, W) of the tokens' grid, H · W = L.
            return_state: Whether to return (y, state) rather than y.

        Returns:
            y (B, L, D), in x's dtype; with `return_state` a pair of it and the state after each sequence's last token.

        Raises:
            ValueError: for what the mixer declares that it does not support.
        """
        if torch.jit.is_scripting():
            return self.mix(x)
        return self._dispatch(x, state, cu_seqlens, spatial_shape, return_state)

    def mix(self, x: Tensor) -> Tensor:
        """Mix x (B, L, D), each row one whole sequence. The only method that TorchScript compiles."""
        raise NotImplementedError

    @torch.jit.ignore
    def mix_sequence(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Any]:
        """Mix x with all that the mixer supports, and return (y, final state); arguments as for `forward`."""
        raise NotImplementedError(f"{type(self).__name__} declares support that its mix_sequence does not implement")

    @torch.jit.ignore
    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """Return the state before the first token: a tensor or nested tuple of tensors, batch first.

        Args:
            batch_size: Number of sequences, B.
            device: Where; None: the parameters' device.
            dtype: Of the parts that hold inputs, such as a convolution's window; sums stay fp32. None: the parameters'.
        """
        raise ValueError(f"{type(self).__name__} keeps no state (supports_state is False)")

    @torch.jit.ignore
    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Advance by one token x_t (B, D): return (y_t (B, D), state). The state passed in may be updated in place."""
        raise ValueError(f"{type(self).__name__} cannot be run step by step (supports_state is False)")

    @torch.jit.ignore
    def _dispatch(
        self,
        x: Tensor,
        state: Any,
        cu_seqlens: Tensor | None,
        spatial_shape: tuple[int, int] | None,
        return_state: bool,
    ) -> Any:
        name = type(self).__name__
        if x.ndim != 3:
            raise ValueError(f"{name}: expected x of shape (B, L, D), got {tuple(x.shape)}")
        if not self.supports_state and (state is not None or return_state):
            raise ValueError(f"{name} keeps no state (supports_state is False)")
        if self.needs_spatial_shape:
            if spatial_shape is None:
                raise ValueError(f"{name} needs spatial_shape=(H, W), the grid of its tokens")
            if spatial_shape[0] * spatial_shape[1] != x.shape[1]:
                raise ValueError(f"{name}: spatial_shape {tuple(spatial_shape)} does not hold L = {x.shape[1]} tokens")
        if cu_seqlens is not None and not self.supports_cu_seqlens:
            return self._split_and_join(x, state, cu_seqlens, return_state)
        if state is None and cu_seqlens is None and not return_state and not self.needs_spatial_shape:
            return self.mix(x)
        y, final = self.mix_sequence(x, state, cu_seqlens, spatial_shape)
        return (y, final) if return_state else y

    def _split_and_join(self, x: Tensor, state: Any, cu_seqlens: Tensor, return_state: bool) -> Any:
        """Run packed sequences through a mixer that knows no packing: equal lengths together, each length once."""
        if x.shape[0] != 1:
            raise ValueError(f"{type(self).__name__}: with cu_seqlens the batch is 1, got x of {tuple(x.shape)}")
        if self.needs_spatial_shape:
            raise ValueError(f"{type(self).__name__} takes one grid of tokens, not packed sequences (cu_seqlens)")
        bounds = cu_seqlens.tolist()
        groups: dict[int, list[int]] = {}
        for i, (start, stop) in enumerate(pairwise(bounds)):
            groups.setdefault(stop - start, []).append(i)
        rows: list[Tensor | None] = [None] * (len(bounds) - 1)
        states: list[Any] = [None] * (len(bounds) - 1)
        for length, members in groups.items():
            batch = torch.stack([x[0, bounds[i] : bounds[i] + length] for i in members])
            part = None if state is None else _map(state, lambda t, members=members: t[members])
            out = self._dispatch(batch, part, None, None, return_state)
            y, final = out if return_state else (out, None)
            for row, i in enumerate(members):
                rows[i] = y[row]
                states[i] = _map(final, lambda t, row=row: t[row]) if return_state else None
        joined = torch.cat([row for row in rows if row is not None])[None] if rows else torch.zeros_like(x)
        return (joined, _stack(states)) if return_state else joined


def _map(state: Any, function: Any) -> Any:
    """Apply `function` to every tensor of a nested tuple."""
    return function(state) if isinstance(state, Tensor) else tuple(_map(part, function) for part in state)


def _stack(states: list[Any]) -> Any:
    """Stack nested tuples of tensors, one a sequence, into one nested tuple, batch first."""
    first = states[0]
    if isinstance(first, Tensor):
        return torch.stack(states)
    return tuple(_stack([s[i] for s in states]) for i in range(len(first)))
