"""lti_conv on the GPU: cuFFT for the convolution, batched float64 products for its kernel; no Triton kernel of ours.

The file has the name that GPU backends have. Kernel, states and the gradients of the system are two operations with the
powers of A_bar = w at the positions t = i J + j, each of which is a product of w^(i J) and w^j:

    evaluate(v)[t] = Re Σ_n v_n w_n^t        moments(x) = Σ_t x[t] w^t  and  Σ_t x[t] t w^(t-1)

With V = C B_bar, u * v the causal convolution and u ⋆ dy the correlation, summed over the batch:

    y = u * evaluate(V) + evaluate(C w h0) + D u              h[L] = w^L h0 + B_bar m,  m, m' = moments(flip(u))
    dV = conj(k),  dw = conj(V k'),  k, k' = moments(u ⋆ dy)  du = evaluate(V) ⋆ dy + flip(evaluate(B_bar conj(g)))

with g the gradient of h[L]. Powers and products are complex128: a rounding of A_bar acts at every step. The FFTs are
float32, so that a NaN anywhere in a channel is one everywhere in it. Any device; same signatures and results as
reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mambaverse.kernels.lti_conv.reference import no_state, state_dtype

MAX_TEMPORARY = 2**23  # complex numbers, 128 MB, of one product: channels are taken so many at a time


def forward(
    u: Tensor,
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    wants_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return y and the final state, as `reference.forward`."""
    powers = _Powers.of(A_bar, u.shape[1])
    x = _in_order(u, reverse)
    y = _convolve(x, powers.evaluate((C * B_bar)[None]))
    if initial_state is not None:
        y += powers.evaluate(C * A_bar * initial_state)
    if D is not None:
        y += D.float()[:, None] * x
    y = _as_given(y, u, reverse)
    if not wants_state:
        return y, no_state(u)
    final_state = B_bar * powers.moments(x.flip(-1))[0]
    if initial_state is not None:
        final_state += powers.last * initial_state
    return y, final_state.to(state_dtype(u))


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    u: Tensor,
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, A_bar, B_bar, C, D and initial_state, as `reference.backward`."""
    length = u.shape[1]
    powers = _Powers.of(A_bar, length)
    x = _in_order(u, reverse)
    dD, dinitial = u.new_empty(0), u.new_empty(0)
    dstate = torch.zeros((len(u), *A_bar.shape), dtype=torch.complex128, device=u.device)
    if dy is None:
        du, dA, dB, dC = torch.zeros_like(x), *(torch.zeros_like(A_bar) for _ in range(3))
        dD = dD if D is None else torch.zeros_like(D)
    else:
        g = _in_order(dy, reverse)
        V = C * B_bar
        du = _convolve(g.flip(-1), powers.evaluate(V[None])).flip(-1)
        k, slope = (m[0] for m in powers.moments(_correlate(g, x)[None]))
        dA, dB, dC = (V * slope).conj(), (C * k).conj(), (B_bar * k).conj()
        if D is not None:
            du += D.float()[:, None] * g
            dD = (g.double() * x).sum((0, 2)).to(D.dtype)
        if initial_state is not None:
            q, slope = powers.moments(g)
            dstate += (C * A_bar * q).conj()
            dC += (A_bar * initial_state * q).sum(0).conj()
            dA += (C * initial_state * (q + A_bar * slope)).sum(0).conj()
    if dfinal_state is not None:
        m, slope = powers.moments(x.flip(-1))
        du += powers.evaluate(B_bar * dfinal_state.conj()).flip(-1)
        dB += (dfinal_state * m.conj()).sum(0)
        dA += (dfinal_state * (B_bar * slope).conj()).sum(0)
        dstate += powers.last.conj() * dfinal_state
        if initial_state is not None:
            dA += (dfinal_state * (length * powers.before_last * initial_state).conj()).sum(0)
    if initial_state is not None:
        dinitial = dstate.to(initial_state.dtype)
    dA, dB, dC = (t.resolve_conj().contiguous() for t in (dA, dB, dC))
    return _as_given(du, u, reverse), dA, dB, dC, dD, dinitial


@dataclass(frozen=True)
class _Powers:
    """w^t for t below `length` = I J or a little less, as products of `high`, w^(i J), and `low`, w^j."""

    length: int
    low: Tensor  # (D, N, J)
    high: Tensor  # (D, N, I)
    last: Tensor  # w^length (D, N)
    before_last: Tensor  # w^(length - 1), zeros for no positions

    @staticmethod
    def of(w: Tensor, length: int) -> _Powers:
        J = max(1, round(length**0.5))
        low, step = _powers(w, J)
        high, _ = _powers(step, -(-max(length, 1) // J))
        if not length:
            return _Powers(length, low, high, torch.ones_like(w), torch.zeros_like(w))
        i, j = divmod(length - 1, J)
        before_last = high[..., i] * low[..., j]
        return _Powers(length, low, high, before_last * w, before_last)

    def evaluate(self, v: Tensor) -> Tensor:
        """Return Re Σ_n v_n w_n^t: v (B, D, N) complex -> (B, D, L) float32."""
        batch, dim, states = v.shape
        I = self.high.shape[-1]  # noqa: E741
        out = torch.empty((batch, dim, self.length), dtype=torch.float32, device=v.device)
        for c in _blocks(dim, batch * I * max(states, self.low.shape[-1] // 2)):
            left = v[:, c, None].to(torch.complex128) * self.high[c].mT  # (B, d, I, N)
            left = torch.cat((left.real, -left.imag), -1).transpose(0, 1).flatten(1, 2)
            right = torch.cat((self.low[c].real, self.low[c].imag), 1)
            product = (left @ right).unflatten(1, (batch, I)).transpose(0, 1)
            out[:, c] = product.flatten(-2)[..., : self.length]
        return out

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ_t x[t] w^t and its derivative by w, Σ_t x[t] t w^(t-1): x (B, D, L) -> (B, D, N) complex128."""
        batch, dim, _ = x.shape
        J, I, states = self.low.shape[-1], self.high.shape[-1], self.low.shape[1]  # noqa: E741
        x = torch.nn.functional.pad(x, (0, I * J - self.length)).unflatten(-1, (I, J))
        values, slopes = (torch.empty((batch, dim, states), dtype=torch.complex128, device=x.device) for _ in range(2))
        for c in _blocks(dim, batch * I * max(2 * states, J)):
            low, high = self.low[c], self.high[c]
            low_both = torch.cat((low, _derivative(low)), 1)  # (d, 2N, J)
            rows = x[:, c].double().transpose(0, 1).flatten(1, 2)  # (d, B I, J)
            sums = torch.view_as_complex(
                (rows @ torch.view_as_real(low_both.mT).flatten(2)).unflatten(-1, (2 * states, 2))
            )
            sums = sums.unflatten(1, (batch, I)).transpose(0, 1)  # (B, d, I, 2N)
            inner, inner_slope = sums[..., :states], sums[..., states:]
            outer = _derivative(high) * (J * low[..., -1:])  # of w^(i J): i J w^(i J - 1)
            values[:, c] = (inner * high.mT).sum(-2)
            slopes[:, c] = (inner * outer.mT + inner_slope * high.mT).sum(-2)
        return values, slopes


def _powers(w: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return w^0 .. w^(count - 1) in a last dimension, and w^count."""
    powers, step = torch.ones_like(w)[..., None], w  # step is w^(length of powers)
    while powers.shape[-1] < count:
        powers = torch.cat((powers, powers * step[..., None]), -1)
        step = step * step
    return powers[..., :count], powers[..., count - 1] * w


def _derivative(powers: Tensor) -> Tensor:
    """Return k s^(k-1) for s^0 .. s^(K-1) in the last dimension."""
    k = torch.arange(powers.shape[-1], device=powers.device)
    return torch.nn.functional.pad(powers[..., :-1], (1, 0)) * k


def _blocks(dim: int, each: int) -> list[slice]:
    """Cut the channels, `each` complex numbers a channel."""
    width = max(1, MAX_TEMPORARY // max(each, 1))
    return [slice(first, first + width) for first in range(0, dim, width)]


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution of x (B, D, L) and kernel (1, D, L)."""
    if not x.numel():
        return torch.zeros_like(x)
    size = _fft_size(x)
    product = torch.fft.rfft(x, size) * torch.fft.rfft(kernel, size)
    return torch.fft.irfft(product, size)[..., : x.shape[-1]].contiguous()


def _correlate(g: Tensor, x: Tensor) -> Tensor:
    """Return Σ_b Σ_t g[b, :, t] x[b, :, t - l] for each lag l, (D, L)."""
    if not x.numel():
        return torch.zeros(x.shape[1:], device=x.device)
    size = _fft_size(x)
    product = (torch.fft.rfft(g, size) * torch.fft.rfft(x, size).conj()).sum(0)
    return torch.fft.irfft(product, size)[..., : x.shape[-1]]


def _fft_size(x: Tensor) -> int:
    """The least power of 2, or three quarters of one, that holds two sequences."""
    whole = 1 << (2 * x.shape[-1] - 1).bit_length()
    return whole * 3 // 4 if whole * 3 // 4 >= 2 * x.shape[-1] else whole


def _in_order(u: Tensor, reverse: bool) -> Tensor:
    """Return u (B, L, D) as (B, D, L) float32, in the order of the recurrence."""
    x = u.float().mT
    return x.flip(-1) if reverse else x.contiguous()


def _as_given(y: Tensor, u: Tensor, reverse: bool) -> Tensor:
    return (y.flip(-1) if reverse else y).mT.to(u.dtype, memory_format=torch.contiguous_format).contiguous()
