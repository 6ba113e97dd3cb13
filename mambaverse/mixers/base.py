"""The contract of a mixer: (B, L, D) in, (B, L, D) out, mixing along L; what it can do stands in class attributes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class Mixer(nn.Module):
    """Base class of every sequence mixer.

    The least a mixer defines is `__init__(self, dim, ..., device=None, dtype=None)` and `mix(self, x)`. One that
    carries a state also defines `mix_sequence` and `init_state`, and sets `supports_state`; `step` is then one token
    of `mix_sequence`, unless there is a faster way. One that needs the grid of its tokens sets `needs_spatial_shape`
    and defines `mix_sequence`; for TorchScript also `mix_grid`, which then stands for `mix`. One whose parameters are
    not all made by torch's own layers defines `reset_parameters(self)`, which draws all of them anew, as `__init__`
    does, and fills the buffers: a model built on the meta device calls it. One with a step Δ that depends on the token
    tells it by `step_sizes`, for `mambaverse explain`.

    `mambaverse.testing.check_mixer` checks all that is said here.

    Attributes:
        causal: y[t] depends on x[..t] alone. A class attribute, or set in `__init__`; so are the others.
        needs_spatial_shape: `mix_sequence` needs `spatial_shape` (H, W), the grid of the tokens, H · W = L.
        supports_state: `mix_sequence` takes and returns a state, and `step` continues from it.
        supports_cu_seqlens: `mix_sequence` takes packed sequences. Where False, the base class splits them, runs equal
            lengths as one batch (of a causal mixer similar ones, padded at their ends) and joins them again, which is
            exact for any mixer.
        uncalled: A frozenset of names of layers whose parameters are read without calling them, since a kernel does
            what they would. A layer that computes something else, with parameters of its own, such as an adapter of
            peft, is refused in their place: these would have no effect.
    """

    # Not annotated: TorchScript refuses class annotations that are strings.
    causal = True
    needs_spatial_shape = False
    supports_state = False
    supports_cu_seqlens = False
    uncalled = frozenset[str]()
    __constants__ = ("needs_spatial_shape",)  # TorchScript compiles one of `mix` and `mix_grid`

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get("_modules", {}).get(name) if name in self.uncalled else None
        if old is not None and isinstance(value, nn.Module) and _adds_to(old, value):
            called = ", ".join(child for child, _ in self.named_children() if child not in self.uncalled)
            raise TypeError(
                f"{type(self).__name__}: {name} cannot become a {type(value).__name__}, whose parameters would have no "
                f"effect: a kernel reads those of this {type(old).__name__} without calling it"
                + (f". Layers that are called: {called}" if called else "")
            )
        super().__setattr__(name, value)

    @torch.jit.ignore
    def _refuse_rewritten(self) -> None:
        """Raise TypeError where a hook works out parameters of a layer that is not called; a compiler looks past it."""
        if torch.compiler.is_compiling():
            return
        for name in self.uncalled:
            layer = self._modules.get(name)
            for part in ("weight", "bias"):
                if layer is None or part in layer._parameters or part in getattr(layer, "parametrizations", ()):
                    continue
                value = getattr(layer, part, None)
                if callable(value):  # of torch's quantized layers
                    raise TypeError(
                        f"{type(self).__name__}: {name} has become a {type(layer).__name__}, whose {part} is no "
                        "tensor, and a kernel reads it without calling the layer; leave this layer as it was"
                    )
                if layer._forward_pre_hooks and value is not None:
                    raise TypeError(
                        f"{type(self).__name__}: a hook works out {name}.{part}, as torch.nn.utils.weight_norm and "
                        "prune have it, and never runs: a kernel reads it without calling the layer. "
                        "torch.nn.utils.parametrize and .parametrizations work"
                    )

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,  # in Python also a nested tuple of tensors
        cu_seqlens: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
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
            y (B, L, D), in x's dtype (under autocast, in autocast's or x's); with `return_state` a pair of it and the
            state after each sequence's last token, through which gradients flow.

        Raises:
            ValueError: for what the mixer declares that it does not support.
        """
        if torch.jit.is_scripting():
            if self.needs_spatial_shape:
                assert spatial_shape is not None, "this mixer needs spatial_shape=(H, W), the grid of its tokens"
                return self.mix_grid(x, spatial_shape)
            return self.mix(x)
        return self._dispatch(x, state, cu_seqlens, spatial_shape, return_state)

    def mix(self, x: Tensor) -> Tensor:
        """Mix x (B, L, D), each row one whole sequence. The only method that TorchScript compiles."""
        raise NotImplementedError("this mixer defines no mix(self, x)")

    def mix_grid(self, x: Tensor, spatial_shape: tuple[int, int]) -> Tensor:
        """Mix x (B, H · W, D), each row one grid (H, W): what TorchScript compiles of a mixer that needs the grid."""
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
        """Advance by one token x_t (B, D): return (y_t (B, D), state).

        Gradients flow through it as through `forward`. Where none are recorded, such as under `torch.no_grad()`, it is
        faster, and the state passed in may be updated in place.
        """
        if not self.supports_state:
            raise ValueError(f"{type(self).__name__} cannot be run step by step (supports_state is False)")
        if state is None:
            raise ValueError(f"{type(self).__name__}: expected a state, got None; init_state makes the first")
        self._refuse_rewritten()
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x_t, *self.parameters(), *_leaves(state)))
        return Mixer._step(self, x_t, state) if recorded else self._step(x_t, state)

    @torch.jit.ignore
    def _step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Take a step: of an override no gradient is asked, and it may update the state in place."""
        y, state = self.mix_sequence(x_t[:, None], state)
        return y[:, 0], state

    @torch.jit.ignore
    def stack_states(self, states: list[Any]) -> Any:
        """Join the states of S sequences, each without its batch axis, into one, batch first."""
        first = states[0]
        if isinstance(first, Tensor):
            return torch.stack(states)
        return tuple(self.stack_states([state[i] for state in states]) for i in range(len(first)))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters, as in `named_parameters`, that weight decay should leave alone."""
        return set()

    @torch.jit.ignore
    def step_sizes(self, x: Tensor, spatial_shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Return how strongly each token is written into the state: its Δ, where that depends on the token.

        Args:
            x: Tokens (B, L, D), as for `forward`.
            spatial_shape: (H, W) of their grid, for a mixer that needs it.

        Returns:
            Δ ≥ 0 by the name of the scan ("forward", "backward", ...), each (B, L, channels or heads), fp32 at least,
            at the places that the tokens have in x, whatever the order in which the scan reads them. Empty: this mixer
            has no such Δ (attention), or the same for all tokens (S4D).
        """
        return {}

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
        self._refuse_rewritten()
        if x.ndim != 3:
            raise ValueError(f"{name}: expected x of shape (B, L, D), got {tuple(x.shape)}")
        if not self.supports_state and (state is not None or return_state):
            raise ValueError(f"{name} keeps no state (supports_state is False)")
        if cu_seqlens is not None:
            _check_boundaries(name, cu_seqlens)
            if x.shape[0] != 1:
                raise ValueError(f"{name}: with cu_seqlens the batch is 1, got x of shape {tuple(x.shape)}")
            if self.needs_spatial_shape:
                raise ValueError(f"{name} takes one grid of tokens, not packed sequences (cu_seqlens)")
            if not self.supports_cu_seqlens:
                return self._split_and_join(x, state, cu_seqlens, return_state)
        if self.needs_spatial_shape:
            if spatial_shape is None:
                raise ValueError(f"{name} needs spatial_shape=(H, W), the grid of its tokens")
            if len(spatial_shape) != 2 or min(spatial_shape) < 1 or spatial_shape[0] * spatial_shape[1] != x.shape[1]:
                grid = f"spatial_shape {tuple(spatial_shape)}"
                raise ValueError(f"{name}: {grid} does not hold L = {x.shape[1]} tokens; expected (H, W), H · W = L")
        elif state is None and cu_seqlens is None and not return_state:
            return self.mix(x)
        y, final = self.mix_sequence(x, state, cu_seqlens, spatial_shape)
        return (y, final) if return_state else y

    def _split_and_join(self, x: Tensor, state: Any, cu_seqlens: Tensor, return_state: bool) -> Any:
        """Run packed sequences through a mixer that knows no packing: equal lengths together, each length once.

        What follows a sequence changes nothing in a causal mixer but its last state. So where no state is asked for,
        sequences are padded to the longest of those up to twice as short, and those make one batch.
        """
        bounds = cu_seqlens.tolist()
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != x.shape[1] or bounds != sorted(bounds):
            name = type(self).__name__
            raise ValueError(f"{name}: expected cu_seqlens that rise from 0 to L = {x.shape[1]}, got {bounds}")
        if state is not None and any(leaf.ndim and len(leaf) != len(bounds) - 1 for leaf in _leaves(state)):
            rows_given = sorted({len(leaf) for leaf in _leaves(state) if leaf.ndim})
            raise ValueError(
                f"{type(self).__name__}: expected a state of {len(bounds) - 1} rows, one a sequence of cu_seqlens, "
                f"got {' and '.join(map(str, rows_given))}"
            )
        groups: dict[int, list[int]] = {}
        lengths = [stop - start for start, stop in pairwise(bounds)]
        padded = self.causal and not return_state
        for i, length in enumerate(lengths):
            similar = (length - 1).bit_length() + 1 if padded and length else length  # 0 is for empty ones alone
            groups.setdefault(similar, []).append(i)
        rows: list[Tensor | None] = [None] * (len(bounds) - 1)
        states: list[Any] = [None] * (len(bounds) - 1)
        for members in groups.values():
            y, final = None, None if state is None else _map(state, lambda t, members=members: t[members])
            if lengths[members[0]] > 0:
                batch = pad_sequence([x[0, bounds[i] : bounds[i + 1]] for i in members], batch_first=True)
                out = self._dispatch(batch, final, None, None, return_state)
                y, final = out if return_state else (out, None)
            elif return_state and final is None:
                final = self.init_state(len(members), device=x.device, dtype=x.dtype)
            for row, i in enumerate(members):
                rows[i] = None if y is None else y[row, : lengths[i]]
                states[i] = _map(final, lambda t, row=row: t[row]) if return_state else None
        filled = [row for row in rows if row is not None]
        joined = torch.cat(filled)[None] if filled else torch.zeros_like(x)
        return (joined, self.stack_states(states)) if return_state else joined


def _adds_to(old: nn.Module, new: nn.Module) -> bool:
    """Return whether `new` computes something else than `old`, with parameters that `old` has not."""
    known = {id(parameter) for parameter in old.parameters()}
    return type(new).forward is not type(old).forward and any(id(p) not in known for p in new.parameters())


def _check_boundaries(name: str, cu_seqlens: Any) -> None:
    """Raise ValueError unless it is what boundaries are made of; what they are is checked where they are used."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"{name}: expected cu_seqlens as a tensor (S + 1,) int32, got {cu_seqlens!r}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        given = f"{tuple(cu_seqlens.shape)} {str(cu_seqlens.dtype).removeprefix('torch.')}"
        raise ValueError(f"{name}: expected cu_seqlens (S + 1,) int32 or int64 of at least one sequence, got {given}")


def _map(state: Any, function: Any) -> Any:
    """Apply `function` to every tensor of a nested tuple."""
    return function(state) if isinstance(state, Tensor) else tuple(_map(part, function) for part in state)


def _leaves(state: Any) -> list[Tensor]:
    """Return the tensors of a nested tuple."""
    return [state] if isinstance(state, Tensor) else [leaf for part in state for leaf in _leaves(part)]
