"""The isotropic backbone: `depth` equal blocks of one mixer, or of a repeated pattern of mixers, and a last norm.

Vim, the DNA models, AuM and language models are this stack with different stems and heads. State-dict names are those
of mamba_ssm and Vim: `layers.{i}.norm`, `layers.{i}.mixer`, `norm_f`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mambaverse.blocks import Block, Norm, Sum, build_mixer, check_stack, layer_pattern, reset_parameters
from mambaverse.errors import UserError
from mambaverse.kernels.backend import recomputed

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


class Isotropic(nn.Module):
    """`depth` blocks on tokens of `dim` channels.

    Args:
        dim: Channels D.
        depth: Number of blocks.
        mixer: A mixer's name, or a pattern of names that is repeated over the layers.
        mixer_args: Arguments keyed by mixer: {"ssd": {"d_state": 64}}.
        causal: Whether a token may only see those before it.
        directions: 1 leaves a causal mixer of a bidirectional stack in one direction.
        norm: "rms" or "layer".
        eps: Of the norms.
        mlp_ratio: Width of an MLP in each block, in units of D; 0: none.
        drop_path_rate: Rate of the last block; it grows linearly from 0 at the first.
        layer_scale: First value of a learnt factor on the branches; None: no factor.
        residual_in_fp32: Carry the residual sum in fp32.
        block: What is repeated, a `Block` or a subclass.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: unknown mixer or argument; a mixer that does not fit (see `build_mixer`); sizes below 0.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        mixer: str | Sequence[str] = "s6",
        mixer_args: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        causal: bool,
        directions: int | None = None,
        norm: str = "rms",
        eps: float = 1e-5,
        mlp_ratio: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        residual_in_fp32: bool = True,
        block: type[Block] = Block,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_stack([depth], mlp_ratio, drop_path_rate, eps)
        self.dim, self.depth, self.causal = dim, depth, causal
        self.grad_checkpointing = False
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        mixers = [
            build_mixer(name, dim, mixer_args, causal=causal, directions=directions, **dd)
            for name in layer_pattern(mixer, depth)
        ]
        self.needs_spatial_shape = any(m.needs_spatial_shape for m in mixers)
        self.layers = nn.ModuleList(
            block(dim, m, norm, eps, mlp_ratio, rate, layer_scale, residual_in_fp32, **dd)
            for m, rate in zip(mixers, rates, strict=True)
        )
        self.norm_f: Norm | Sum = Norm(dim, norm, eps, **dd)
        self.rescale_residual_branches()

    @torch.jit.ignore
    def blocks(self) -> list[Block]:
        """Return `layers`, typed."""
        return [cast(Block, layer) for layer in self.layers]

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw all weights anew, as a model built on the meta device needs after `to_empty`."""
        for module in (*self.layers, self.norm_f):
            reset_parameters(module)
        self.rescale_residual_branches()

    @torch.jit.ignore
    def rescale_residual_branches(self) -> None:
        """Divide each branch's last matrix by √(number of branches), so that their sum keeps its scale (GPT-2)."""
        branches = sum(1 if layer.mlp is None else 2 for layer in self.blocks())
        with torch.no_grad():
            for name, parameter in self.layers.named_parameters():
                if name.endswith(("out_proj.weight", "mlp.fc2.weight")):
                    parameter.div_(math.sqrt(branches))

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Run the stack.

        Args:
            x: Tokens (B, L, D).
            lengths: Of a padded batch, (B,): tokens from `lengths[b]` on are padding, change nothing and come back as
                zeros. The batch is packed, so padding costs nothing. Eager mode only.
            cu_seqlens: Boundaries (S + 1,) int32 of packed sequences; then B is 1.

        Returns:
            Tokens (B, L, D) after the last norm.

        Raises:
            ValueError: lengths that are none, or both `lengths` and `cu_seqlens`.
        """
        if not torch.jit.is_scripting() and (lengths is not None or cu_seqlens is not None):
            return self._forward_packed(x, lengths, cu_seqlens)
        return self.forward_layers(x)

    def forward_layers(self, x: Tensor, spatial_shape: tuple[int, int] | None = None) -> Tensor:
        """Run the blocks and the last norm on tokens (B, L, D), which may be those of a grid `spatial_shape` (H, W)."""
        residual: Tensor | None = None
        for layer in self.layers:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, residual = recomputed(layer, x, residual, spatial_shape)
            else:
                x, residual = layer(x, residual, spatial_shape)
        return self.norm_f(x, residual)[0]

    @torch.jit.ignore
    def forward_state(self, x: Tensor, states: Sequence[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """Run x (B, L, D) on from `states`, one a layer (None: the start); returns (tokens, new states)."""
        return self._run(x, states=states, return_state=True)

    @torch.jit.ignore
    def init_states(self, batch_size: int) -> list[Any]:
        """Return the states before the first token, one a layer."""
        return [layer.mixer.init_state(batch_size) for layer in self.blocks()]

    @torch.jit.ignore
    def step(self, x_t: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Advance by one token x_t (B, D); returns (token (B, D), new states)."""
        self._check_states(states)
        residual: Tensor | None = None
        finals = []
        for layer, state in zip(self.blocks(), states, strict=True):
            x_t, residual, final = layer.step(x_t, residual, state)
            finals.append(final)
        return self.norm_f(x_t, residual)[0], finals

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would harm: each mixer's own list."""
        return {
            f"layers.{i}.mixer.{name}"
            for i, layer in enumerate(self.blocks())
            for name in layer.mixer.no_weight_decay()
        }

    @torch.jit.ignore
    def _run(
        self,
        x: Tensor,
        states: Sequence[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, list[Any]]:
        if states is not None:
            self._check_states(states)
        residual: Tensor | None = None
        finals = []
        for i, layer in enumerate(self.blocks()):
            state = None if states is None else states[i]
            arguments = (x, residual, state, cu_seqlens, None, return_state)
            if self.grad_checkpointing:
                x, residual, final = recomputed(layer.forward_sequence, *arguments)
            else:
                x, residual, final = layer.forward_sequence(*arguments)
            finals.append(final)
        return self.norm_f(x, residual)[0], finals

    @torch.jit.ignore
    def _check_states(self, states: Sequence[Any]) -> None:
        if not isinstance(states, list | tuple) or len(states) != len(self.layers):
            given = f"{len(states)}" if isinstance(states, list | tuple) else f"a {type(states).__name__}"
            raise ValueError(f"states: expected a list of {len(self.layers)}, one a layer, got {given}")

    @torch.jit.ignore
    def _forward_packed(self, x: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is not None:
            if lengths is not None:
                raise ValueError("give lengths (of a padded batch) or cu_seqlens (of packed sequences), not both")
            return self._run(x, cu_seqlens=cu_seqlens)[0]
        lengths = check_lengths(lengths, x.shape[0], x.shape[1])
        kept = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]  # (B, L)
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(x.device, torch.int32)
        y = self._run(x[kept][None], cu_seqlens=bounds)[0]
        out = torch.zeros_like(x, dtype=y.dtype)
        out[kept] = y[0]
        return out


def check_lengths(lengths: Any, batch: int, length: int, least: int = 0) -> Tensor:
    """Return `lengths`, or raise ValueError: none of a padded batch of so many sequences, from `least` to L each."""
    _shortest(lengths, batch, length, least)
    return lengths


def padded_lengths(lengths: Any, batch: int, length: int) -> Tensor | None:
    """Return checked `lengths` (B,), at least 1 each, of a batch that holds padding; None where it holds none."""
    return None if lengths is None or _shortest(lengths, batch, length, 1) == length else lengths


def _shortest(lengths: Any, batch: int, length: int, least: int) -> int:
    """Return the least of checked `lengths`; L where there are none."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in INTEGERS:
        given = lengths.dtype if isinstance(lengths, Tensor) else repr(lengths)
        raise ValueError(f"lengths: expected a tensor ({batch},) of whole numbers, got {given}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected shape ({batch},), one a sequence, got {tuple(lengths.shape)}")
    if not batch:
        return length
    low, high = torch.stack(lengths.aminmax()).tolist()  # at once: each read waits for a GPU
    if low < least or high > length:
        raise ValueError(f"lengths: expected values from {least} to L = {length}, got {lengths.tolist()}")
    return int(low)


def check_floats(x: Any, expected: str, model: nn.Module) -> None:
    """Raise UserError, with what is `expected`, unless x is a tensor of floats; float64 beside such weights alone.

    Under autocast, too, which translates between shorter floats only; without it torch refuses what differs.
    """
    if not isinstance(x, Tensor):
        raise UserError(f"expected {expected}, as a tensor, got {x!r:.40}")
    if not x.is_floating_point() or (x.dtype == torch.float64 and not _is_double(model)):
        given = str(x.dtype).removeprefix("torch.")
        raise UserError(f"expected {expected}, as floats like the weights, got {given}")


def _is_double(model: nn.Module) -> bool:
    return any(parameter.dtype == torch.float64 for parameter in model.parameters())
