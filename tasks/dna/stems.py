"""From ids to tokens: one token a base, motifs found by a convolution, or a vector for each k-mer.

Every stem has `word_embeddings`, the module whose output (B, L, d), or (B, L, number of k, d), stands for the bases;
`spans` says how many bases, from that one on, each vector speaks for. Padding gives zeros, as does what lies outside of
a sequence, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.backbones.isotropic import INTEGERS, check_lengths
from mambaverse.blocks import check_counts
from mambaverse.errors import UserError
from mambaverse.tasks.dna.tokens import PAD, VOCAB_SIZE, A, T

STD = 0.02  # of learnt vectors, as in Caduceus


def as_ids(ids: Any, lengths: Any = None, least: int = 0) -> Tensor:
    """Return ids (B, L), L at least `least`, as int64.

    Raises:
        ValueError: what are no ids (by their values too, where `_readable`), or lengths that are none of such a batch.
    """
    if not isinstance(ids, Tensor):
        raise UserError(f"ids: expected a tensor (B, L) of whole numbers, as tokens.encode makes them, got {ids!r:.40}")
    if ids.ndim != 2 or ids.dtype not in INTEGERS:
        given = f"{tuple(ids.shape)} {str(ids.dtype).removeprefix('torch.')}"
        raise UserError(f"ids: expected (B, L) of whole numbers, as tokens.encode makes them, got {given}")
    if ids.shape[1] < least:
        raise UserError(f"ids: expected at least {least} base a sequence, got (B, L) = {tuple(ids.shape)}")
    if lengths is not None:
        check_lengths(lengths, ids.shape[0], ids.shape[1], least=1)
    if _readable(ids) and ids.numel():
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= VOCAB_SIZE:
            raise UserError(f"ids: expected values from 0 to {VOCAB_SIZE - 1}, got {low} to {high}")
    return ids.long()


def _readable(x: Tensor) -> bool:
    """Return whether values may be read: no GPU is waited for, and nothing fakes or records what is computed."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return type(x) is Tensor and x.device.type == "cpu" and not torch._C._len_torch_dispatch_stack()


class Embedding(nn.Module):
    """One learnt vector for each kind of base."""

    spans = (1,)

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB_SIZE, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        nn.init.normal_(self.word_embeddings.weight, std=STD)

    def forward(self, ids: Tensor) -> Tensor:
        """Return tokens (B, L, D) of ids (B, L)."""
        return self.word_embeddings(ids)


class OneHot(nn.Module):
    """A, C, G, T as unit vectors; all other ids, N and padding among them, as zeros."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return (B, L, 4), fp32, of ids (B, L)."""
        return (ids[..., None] == torch.arange(A, T + 1, device=ids.device)).float()


class ConvStem(nn.Module):
    """A convolution over one-hot bases, GELU, and `stride` places of it projected to one token.

    Args:
        dim: Channels D of a token.
        kernel: Width of the convolution in bases, odd.
        stride: Bases a token.
        width: Motifs, the channels of the convolution; None: D.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    spans = (1,)

    def __init__(
        self,
        dim: int,
        kernel: int,
        stride: int,
        width: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _check_width(width)
        self.stride, width = stride, width or dim
        self.word_embeddings = OneHot()
        self.conv = nn.Conv1d(4, width, kernel, padding=kernel // 2, **dd)
        self.merge = nn.Linear(width * stride, dim, **dd)

    def forward(self, ids: Tensor) -> Tensor:
        """Return tokens (B, ceil(L / stride), D) of ids (B, L)."""
        bases = self.word_embeddings(ids).to(self.conv.weight.dtype)
        x = F.gelu(self.conv(bases.transpose(1, 2))).transpose(1, 2)  # (B, L, width)
        return self.merge(_grouped(x * (ids != PAD)[:, :, None], self.stride).flatten(2))


class KmerStem(nn.Module):
    """A learnt vector for each k-mer that begins at a base, `stride` of which make one token.

    With several k the vectors of the k-mers that begin at one base are added. A k-mer that touches an N, or reaches
    over the end, has no vector: zeros.

    Args:
        dim: Channels D of a token.
        kernel: k, or several.
        stride: Bases a token.
        width: Channels of a k-mer's vector; `stride` of them are joined and projected to D, in their order. None: D,
            and the mean of the vectors is the token, whatever their order.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        kernel: int | Sequence[int],
        stride: int,
        width: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _check_width(width)
        self.spans = (kernel,) if isinstance(kernel, int) else tuple(kernel)
        self.stride = stride
        unknown = sum(4**k for k in self.spans)
        self.word_embeddings = nn.Embedding(unknown + 1, width or dim, padding_idx=unknown, **dd)
        self._init_vectors()
        self.merge = None if width is None else nn.Linear(width * stride, dim, **dd)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self._init_vectors()
        if self.merge is not None:
            self.merge.reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        """Return tokens (B, ceil(L / stride), D) of ids (B, L)."""
        vectors = self.word_embeddings(self.numbers(ids)).sum(2)
        grouped = _grouped(vectors, self.stride)  # (B, M, stride, width)
        return grouped.mean(2) if self.merge is None else self.merge(grouped.flatten(2))

    @torch.no_grad()
    def _init_vectors(self) -> None:
        nn.init.normal_(self.word_embeddings.weight, std=STD)
        self.word_embeddings.weight[-1].zero_()

    def numbers(self, ids: Tensor) -> Tensor:
        """Return the rows of the k-mers that begin at each base, (B, L, number of k); where there is none the last."""
        return kmer_rows(ids, self.spans)


def kmer_rows(ids: Tensor, spans: Sequence[int]) -> Tensor:
    """Return the row of the k-mer of each of `spans` that begins at each base: (B, L, number of k), int64.

    Rows count the k-mers of the first k, then those of the next; a k-mer that touches an N, or reaches over the end,
    has the row behind them all.

    Args:
        ids: (B, L).
        spans: The k.
    """
    length, longest = ids.shape[1], max(spans)
    none = sum(4**k for k in spans)
    digits = F.pad(ids, (0, longest - 1), value=PAD) - A
    number, known = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
    rows: dict[int, Tensor] = {}
    for i in range(longest):
        digit = digits[:, i : i + length]
        number = 4 * number + digit
        known = known & (digit >= 0) & (digit < 4)
        if i + 1 in spans:
            start = sum(4**k for k in spans[: list(spans).index(i + 1)])
            rows[i + 1] = torch.where(known, number + start, none)
    return torch.stack([rows[k] for k in spans], dim=2)


def _check_width(width: int | None) -> None:
    if width is not None:
        check_counts(1, stem_dim=width)


def _grouped(x: Tensor, stride: int) -> Tensor:
    """Return (B, ceil(L / stride), stride, d) of x (B, L, d), zeros behind its end."""
    x = x.contiguous()  # a pad of none keeps other strides, which a compiled graph for any L does not expect
    return F.pad(x, (0, 0, 0, -x.shape[1] % stride)).unflatten(1, (-1, stride))
