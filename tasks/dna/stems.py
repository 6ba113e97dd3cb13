"""From ids to tokens: one token a base, motifs found by a convolution, or a vector for each k-mer.

Every stem has `word_embeddings`, the module whose output (B, L, d) stands for the bases, one vector at each; `span`
says how many bases, from that one on, a vector speaks for. Padding gives zeros, as does what lies outside of a
sequence, and changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.tasks.dna.tokens import PAD, VOCAB_SIZE, A, T

STD = 0.02  # of learnt vectors, as in Caduceus


class Embedding(nn.Module):
    """One learnt vector for each kind of base."""

    span = 1

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB_SIZE, dim, device=device, dtype=dtype)
        nn.init.normal_(self.word_embeddings.weight, std=STD)

    def forward(self, ids: Tensor) -> Tensor:
        """Return tokens (B, L, D) of ids (B, L)."""
        return self.word_embeddings(ids)


class OneHot(nn.Module):
    """A, C, G, T as unit vectors; all other ids, N and padding among them, as zeros."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        table = F.one_hot(torch.arange(VOCAB_SIZE), VOCAB_SIZE)[:, A : T + 1]
        self.table: Tensor
        self.register_buffer("table", table.to(device, dtype or torch.get_default_dtype()), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return (B, L, 4) of ids (B, L)."""
        return F.embedding(ids, self.table)


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

    span = 1

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
        self.stride, width = stride, width or dim
        self.word_embeddings = OneHot(**dd)
        self.conv = nn.Conv1d(4, width, kernel, padding=kernel // 2, **dd)
        self.merge = nn.Linear(width * stride, dim, **dd)

    def forward(self, ids: Tensor) -> Tensor:
        """Return tokens (B, ceil(L / stride), D) of ids (B, L)."""
        x = F.gelu(self.conv(self.word_embeddings(ids).transpose(1, 2))).transpose(1, 2)  # (B, L, width)
        return self.merge(_grouped(x * (ids != PAD)[:, :, None], self.stride).flatten(2))


class KmerStem(nn.Module):
    """A learnt vector for each k-mer that begins at a base, `stride` of which make one token.

    A k-mer that touches an N, or reaches over the end, has no vector: zeros.

    Args:
        dim: Channels D of a token.
        kernel: k.
        stride: Bases a token.
        width: Channels of a k-mer's vector; `stride` of them are joined and projected to D, in their order. None: D,
            and the mean of the vectors is the token, whatever their order.
        device: Of the parameters.
        dtype: Of the parameters.
    """

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
        self.span, self.stride, self.unknown = kernel, stride, 4**kernel
        self.word_embeddings = nn.Embedding(4**kernel + 1, width or dim, padding_idx=4**kernel, **dd)
        nn.init.normal_(self.word_embeddings.weight, std=STD)
        with torch.no_grad():
            self.word_embeddings.weight[self.unknown].zero_()
        self.merge = None if width is None else nn.Linear(width * stride, dim, **dd)

    def forward(self, ids: Tensor) -> Tensor:
        """Return tokens (B, ceil(L / stride), D) of ids (B, L)."""
        vectors = _grouped(self.word_embeddings(self.numbers(ids)), self.stride)  # (B, M, stride, width)
        return vectors.mean(2) if self.merge is None else self.merge(vectors.flatten(2))

    def numbers(self, ids: Tensor) -> Tensor:
        """Return the number of the k-mer at each base, (B, L); 4^k where there is none."""
        length = ids.shape[1]
        digits = F.pad(ids, (0, self.span - 1), value=PAD) - A
        number, known = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
        for i in range(self.span):
            digit = digits[:, i : i + length]
            number = 4 * number + digit
            known &= (digit >= 0) & (digit < 4)
        return torch.where(known, number, self.unknown)


def _grouped(x: Tensor, stride: int) -> Tensor:
    """Return (B, ceil(L / stride), stride, d) of x (B, L, d), zeros behind its end."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % stride)).unflatten(1, (-1, stride))
