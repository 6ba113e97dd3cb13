"""The conformance kit says what is wrong with mixers that are wrong in one respect, or under one condition, alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambaverse.mixers import Mixer
from tests.test_testing_kit import Decay, Grid, assert_named


class ReadsItsInputDense(Decay):
    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x if x.stride(-1) == 1 else x.as_strided(x.shape, torch.empty(x.shape).stride()))


class HalvesASmallGradient(Decay):
    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        self.gain = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) * (1 + 0.01 * (self.gain + self.gain.detach()))


class _ReadsGradientsDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy.as_strided(dy.shape, torch.empty(dy.shape).stride())


class ReadsGradientsDense(Decay):
    def mix(self, x: Tensor) -> Tensor:
        y: Tensor = _ReadsGradientsDense.apply(super().mix(x))
        return y


class LosesItsGradientInBf16(Decay):
    def mix(self, x: Tensor) -> Tensor:
        y = super().mix(x)
        return y.detach() + 0.5 * (y - y.detach()) if y.dtype == torch.bfloat16 else y


class StepsInFp32(Decay):
    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, h = super().step(x_t, state)
        return y.float(), h


class WidensUnderAutocast(Decay):
    def mix(self, x: Tensor) -> Tensor:
        y = super().mix(x)
        return y.double() if torch.is_autocast_enabled("cpu") else y


class KeepsAViewOfItsInput(Decay):
    def mix_sequence(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
        before = torch.zeros_like(x[:, 0]) if state is None else state
        return self.proj(x + torch.cat([before[:, None], x[:, :-1]], 1)), x[:, -1]

    def _step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.proj(x_t + state), state.copy_(x_t)


class PacksBadly(Decay):
    supports_cu_seqlens = True

    def mix_sequence(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
        if cu_seqlens is None:
            return super().mix_sequence(x, state)
        before = self.init_state(len(cu_seqlens) - 1) if state is None else state
        outputs, states = [x[:, :0]], []
        for i, row in enumerate(x.split(cu_seqlens.diff().tolist(), 1)):
            y, h = row, self.empty(before[i : i + 1])
            if row.shape[1] > 0:
                y, h = super().mix_sequence(row, before[i : i + 1])
            outputs.append(self.output(y))
            states.append(h)
        return torch.cat(outputs, 1), torch.cat(states)

    def output(self, y: Tensor) -> Tensor:
        return y

    def empty(self, h: Tensor) -> Tensor:
        return h


class PacksWithHalfTheGradient(PacksBadly):
    def output(self, y: Tensor) -> Tensor:
        return 0.5 * (y + y.detach())


class PacksAndForgetsEmptyOnes(PacksBadly):
    def empty(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)


class GrowsItsStateDict(Decay):
    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        self.register_buffer("positions", torch.zeros(0))

    def mix(self, x: Tensor) -> Tensor:
        self.positions = torch.arange(x.shape[1])
        return super().mix(x)


class CannotBeCopiedApart(Decay):
    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        proj = self.proj
        self.run = lambda x: proj(x)

    def mix(self, x: Tensor) -> Tensor:
        y: Tensor = self.run(x).cumsum(1)
        return y


class LeavesABuffer(Decay):
    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        self.register_buffer("scale", torch.ones(dim, device=device, dtype=dtype), persistent=False)


class DrawsOtherwise(Decay):
    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        nn.init.normal_(self.proj.weight, std=0.02)


class KeepsItsStateOnTheCpu(Decay):
    def init_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, self.proj.weight.shape[0], dtype=dtype or self.proj.weight.dtype)


class LeaksWhenLong(Decay):
    def mix(self, x: Tensor) -> Tensor:
        y = super().mix(x)
        return y + 0.1 * y.mean(1, keepdim=True) if x.shape[1] > 16 else y


class ForgetsAtChunks(Decay):
    def mix_sequence(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
        outputs: list[Tensor] = []
        for chunk in x.split(64, 1):
            y, h = super().mix_sequence(chunk, None if outputs else state)
            outputs.append(y)
        return torch.cat(outputs, 1), h


class StepsWronglyAfterAWhile(Decay):
    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, h = super().step(x_t, state[0])
        return y * (1.0 if state[1].max() < 16 else 1.1), (h, state[1] + 1)

    def mix_sequence(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
        h, t = self.init_state(len(x)) if state is None else state if isinstance(state, tuple) else (state, 0)
        y, h = super().mix_sequence(x, h)
        return (y, (h, t + x.shape[1])) if state is None or isinstance(state, tuple) else (y, h)

    def init_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Any:
        return super().init_state(batch_size, device, dtype), torch.zeros(batch_size, device=device)


class PacksFewTokensOnly(Decay):
    supports_cu_seqlens = True
    supports_state = False

    def mix_sequence(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
        rows = x.split(cu_seqlens.diff().tolist(), 1) if x.shape[1] < 64 else [x]
        return torch.cat([self.mix(row) for row in rows if row.shape[1]], 1), None

    def mix(self, x: Tensor) -> Tensor:
        return Decay.mix_sequence(self, x)[0]


class IgnoresTheGrid(Grid):
    def mix_sequence(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
        return self.proj(x + x.mean(1, keepdim=True)), None


class KeepsTheFirstGrid(Grid):
    def mix_sequence(self, x: Tensor, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
        self.grid = getattr(self, "grid", spatial_shape)
        return super().mix_sequence(x, spatial_shape=self.grid)


class LeaksInTraining(Decay):
    def mix(self, x: Tensor) -> Tensor:
        y = super().mix(x)
        return y + 0.1 * y.mean(1, keepdim=True) if self.training else y


class LeaksBehindDropout(LeaksInTraining):
    def mix(self, x: Tensor) -> Tensor:
        return super().mix(nn.functional.dropout(x, 0.1, self.training))


class DividesByNothing(Decay):
    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x / x.norm(dim=-1, keepdim=True))


class Overflows(Decay):
    def mix(self, x: Tensor) -> Tensor:
        weights = self.proj(x).exp()
        return (weights * x).cumsum(1) / weights.cumsum(1)


BROKEN = [
    (ReadsItsInputDense, "shapes", "y of a strided x, channels before length"),
    (HalvesASmallGradient, "gradients", "gradients differ from finite differences, that of gain by"),
    (ReadsGradientsDense, "gradients", "where that of y is strided"),
    (LosesItsGradientInBf16, "dtypes", "gradient of x in bfloat16, against fp32"),
    (StepsInFp32, "dtypes", "torch.float32 where torch.bfloat16 was expected"),
    (WidensUnderAutocast, "dtypes", "under bfloat16 autocast is torch.float64; expected bfloat16 or float32"),
    (KeepsAViewOfItsInput, "step", "step wrote to x_t, or to the x of the forward whose state it was given"),
    (PacksWithHalfTheGradient, "packed", "gradient of x packed, against separate"),
    (PacksAndForgetsEmptyOnes, "packed", "a batch that continues where packed sequences were empty"),
    (GrowsItsStateDict, "state_dict", "forward changes the shapes of the state dict: {'positions': (0,), "),
    (CannotBeCopiedApart, "state_dict", "y of a deep copy, after the original's parameters changed"),
    (LeavesABuffer, "meta", "reset_parameters leaves scale as it was"),
    (DrawsOtherwise, "meta", "times as large as __init__"),
    (KeepsItsStateOnTheCpu, "meta", "init_state(2) on meta holds a tensor (2, 8) on cpu"),
    (LeaksWhenLong, "long", "y before token 130 of 261, after the tokens from it on changed"),
    (ForgetsAtChunks, "long", "in chunks of 130 and 131, against one"),
    (StepsWronglyAfterAWhile, "long", "40 tokens step by step, against forward"),
    (PacksFewTokensOnly, "long", "packed sequences of [70, 130, 0, 61], against separate"),
    (IgnoresTheGrid, "grid", "y is the same for (3, 4), (4, 3), (1, 12), (12, 1)"),
    (KeepsTheFirstGrid, "grid", "y of spatial_shape=(4, 3) after other grids, against a new mixer's"),
    (LeaksInTraining, "training", "y in training, against eval"),
    (LeaksBehindDropout, "training", "but in training tokens before 6 depend on later ones"),
    (DividesByNothing, "loudness", "y is not finite for x = 0"),
    (Overflows, "loudness", "y is not finite for x = 100"),
]


@pytest.mark.parametrize(("mixer", "check", "message"), BROKEN, ids=lambda v: getattr(v, "__name__", None))
def test_a_mixer_that_is_all_but_sound_is_caught(mixer: type[Mixer], check: str, message: str) -> None:
    assert_named(mixer, check, message)
