"""A linear layer whose output is cut into parts, without the copy that joins their gradients again.

torch works out the gradient of the whole: it writes the parts' gradients side by side, and multiplies them. In a mixer
the parts are as wide as the tokens' channels, and that copy moves as many bytes as a scan. Here each wide part is
multiplied where it lies,

    dx = Σ dy[part] W[part],   dW[part] = dy[part]ᵀ x

The sum dx is rounded once more for each part than that of one product would be, in the dtype of x. Under autocast on a
GPU dW comes in float32, as it is summed, where torch rounds it to the dtype of x first.

On a GPU, products of 16-bit numbers whose rows are no multiple of 16 bytes take three times as long, and a mixer's
projection has a few columns more than that, one for each head's Δ. So zeros fill up what such a row lacks, and are cut
off again: of the output, which then lies at 16 bytes too, and of the gradient of the narrow parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.kernels.library import differentiable_once
from mambaverse.mixers._common import is_plain
from mambaverse.mixers.base import Mixer

NARROW = 8  # a part of less than an eighth of the whole is joined with its neighbours: a product costs more than a copy
_ROW = 16  # bytes of which a row should have a multiple


def project(layer: nn.Linear, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the parts, of these sizes, of layer(x) (..., Σ sizes).

    A layer that is not `nn.Linear` itself (one of peft's, a quantized one), or that has hooks, is called as it is, and
    so is every layer where a compiler or torch.func sees the whole, and on a CPU where no gradient is recorded.
    """
    if not joins([layer], x):
        return torch.split(layer(x), list(sizes), dim=-1)
    return _project(x, layer.weight, layer.bias, sizes)


def joins(layers: Sequence[nn.Linear], x: Tensor) -> bool:
    """Return whether a product of ours may take the place of these layers' own: see `project`."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return (torch.is_grad_enabled() or x.is_cuda) and all(is_plain(layer, nn.Linear) for layer in layers)


def project_each(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """Return the output of x (..., D) for each of `weights`, with its bias, by one product of all of them."""
    weight, bias = torch.cat(list(weights)), None if biases is None else torch.cat(list(biases))
    return _project(x, weight, bias, [len(weight) for weight in weights])


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    kind, dtype = x.device.type, None
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)  # as F.linear would, but for autograd to see
    if not torch.is_grad_enabled():
        return _split_linear(x, *_cast(weight, bias, dtype), tuple(sizes))
    parts: tuple[Tensor, ...] = _SplitLinear.apply(x, weight, bias, tuple(sizes), dtype)
    return parts


class Projected(Mixer):
    """A mixer whose layer `in_proj` makes all that it mixes."""

    if TYPE_CHECKING:
        in_proj: nn.Linear

    def _parts(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the parts of `in_proj` of x (B, L, D), of these sizes, from Python and from TorchScript alike."""
        if torch.jit.is_scripting():
            return list(torch.split(self.in_proj(x), sizes, dim=-1))
        else:
            return list(project(self.in_proj, x, sizes))


def _split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    missing = _missing(x, len(weight))
    if not missing:
        return F.linear(x, weight, bias).split(sizes, dim=-1)
    bias = None if bias is None else F.pad(bias, [0, missing])
    return F.linear(x, F.pad(weight, [0, 0, 0, missing]), bias).split((*sizes, missing), dim=-1)[:-1]


def _missing(x: Tensor, columns: int) -> int:
    """Return how many columns a row of x's dtype lacks to a whole number of 16 bytes, where that is worth a copy."""
    each = _ROW // x.element_size()
    return -columns % each if x.is_cuda and x.element_size() == 2 and x.shape[-1] % each == 0 else 0


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    return (weight, bias) if dtype is None else (weight.to(dtype), None if bias is None else bias.to(dtype))


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...], dtype: torch.dtype | None
    ) -> Any:
        ctx.sizes = sizes
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.uncast = None if dtype is None else weight  # what is saved then is a copy, which no graph knows
        weight, bias = _cast(weight, bias, dtype)
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return _split_linear(x, weight, bias, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _SplitLinear._gradients(ctx, gradients)
        with torch.no_grad():  # create_graph=True
            found = _SplitLinear._gradients(ctx, gradients)
        return differentiable_once("a mixer's input projection", found, (*gradients, *ctx.saved_tensors, ctx.uncast))

    @staticmethod
    def _gradients(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        rows, starts = x.reshape(-1, x.shape[-1]), [0, *accumulate(ctx.sizes)]
        dx = None
        dweight = weight.new_empty(weight.shape, dtype=of_weight) if wants_weight else None
        dbias = weight.new_empty(len(weight), dtype=of_bias) if wants_bias else None
        for group in _groups(ctx.sizes):
            first, stop = starts[group[0]], starts[group[-1] + 1]
            parts = [_as_rows(gradients[i], ctx.sizes[i], rows) for i in group]
            narrow = (stop - first) * NARROW < len(weight)
            missing = _missing(x, stop - first) if narrow else 0
            if missing:
                parts.append(rows.new_zeros(len(rows), missing))
            dy = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            if wants_x:
                w = weight[first:stop] if not missing else F.pad(weight[first:stop], [0, 0, 0, missing])
                dx = dy @ w if dx is None else dx.addmm_(dy, w)
            if dweight is not None:
                _write_product(dy.T, rows, dweight[first:stop])
            if dbias is not None:
                torch.sum(dy[:, : stop - first], 0, dtype=of_bias, out=dbias[first:stop])
        return None if dx is None else dx.view(x.shape), dweight, dbias, None, None


def _write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write the first rows of a b to `out`; of 16-bit numbers on a GPU in float32, if it is, without a rounding."""
    whole = len(a) == len(out)
    if whole and a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and a.element_size() == 2 and out.dtype == torch.float32:
        if whole:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        else:
            out.copy_(torch.mm(a, b, out_dtype=torch.float32)[: len(out)])
    else:
        out.copy_((a @ b)[: len(out)])


def _as_rows(dy: Tensor | None, size: int, rows: Tensor) -> Tensor:
    return rows.new_zeros(len(rows), size) if dy is None else dy.reshape(-1, size)


def _groups(sizes: Sequence[int]) -> list[list[int]]:
    """Return the numbers of the parts that are multiplied together: a wide one alone, narrow neighbours."""
    groups: list[list[int]] = []
    was_narrow = False
    for i, size in enumerate(sizes):
        narrow = size * NARROW < sum(sizes)
        if narrow and was_narrow:
            groups[-1].append(i)
        else:
            groups.append([i])
        was_narrow = narrow
    return groups
