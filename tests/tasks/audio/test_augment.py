"""How training varies clips: what each variation does, and that its draws decide it."""

import pytest
import torch
from torch import Tensor

from mambaverse.tasks.audio.augment import (
    Augment,
    change_speed,
    change_tempo,
    draw_spectrogram,
    mix_waveforms,
    roll,
    spec_augment,
    warp_frequencies,
)
from mambaverse.tasks.audio.fbank import Fbank, FbankOptions, centres
from tests.tasks.audio.conftest import tone


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pitch(x: Tensor) -> float:
    return torch.fft.rfft(x).abs().argmax().item() * 16_000 / len(x)


@pytest.mark.parametrize("factor", [0.8, 0.93, 1.0, 1.1, 1.25])
def test_speed_changes_length_and_pitch_together(factor: float) -> None:
    x = torch.from_numpy(tone(500, 0.5))
    faster = change_speed(x, factor)
    assert len(faster) == round(len(x) / factor)
    assert pitch(faster) == pytest.approx(500 * factor, abs=4)
    assert faster.square().mean().item() == pytest.approx(x.square().mean().item(), rel=0.05)


@pytest.mark.parametrize("samples", [0, 3, -3, 10, -10, 25, -25])
def test_what_rolls_in_is_silence(samples: int) -> None:
    x = torch.arange(1.0, 11.0)
    expected = torch.zeros(10)
    for i in range(10):
        if 0 <= i - samples < 10:
            expected[i] = x[i - samples]
    assert roll(x, samples).equal(expected)


def test_masks_hide_one_stretch_of_bands_and_of_frames_inside_the_clip() -> None:
    lengths = torch.tensor([40, 10] * 100)
    draws = torch.stack([draw_spectrogram(draw(i)) for i in range(200)])
    hidden = spec_augment(torch.ones(200, 40, 16), draws, lengths, 6, 12) == 0
    frames, bands = hidden.all(2), hidden.all(1)
    assert bands.sum(1).min() >= 0 and bands.sum(1).max() == 6
    assert frames.sum(1)[::2].max() == 12 and frames.sum(1)[1::2].max() == 5  # at most half of the clip
    assert not frames[1::2, 10:].any()  # not in the padding
    assert bands.any(0).all() and frames[::2].any(0).all()  # each is hidden at times
    for mask in (bands, frames):
        assert (mask.int().diff(dim=1).abs().sum(1) <= 2).all()  # one stretch


def test_no_masks_change_nothing() -> None:
    x = torch.randn(3, 5, 8)
    assert spec_augment(
        x, torch.stack([draw_spectrogram(draw(i)) for i in range(3)]), torch.tensor([5, 4, 1]), 0, 0
    ).equal(x)


def test_mixed_clips_are_as_long_as_the_longer_and_so_are_their_targets() -> None:
    clips = [torch.full((n,), float(i + 1)) for i, n in enumerate((4, 6, 5))]
    mixed, targets = mix_waveforms(clips, torch.tensor([0, 1, 2]), 3, 0.4, draw(1))
    assert targets.shape == (3, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(3))
    for i, (clip, weights) in enumerate(zip(mixed, targets, strict=True)):
        other = next((j for j in range(3) if j != i and weights[j] > 0), i)
        assert len(clip) == max(len(clips[i]), len(clips[other]))
        assert clip[0].item() == pytest.approx(sum((j + 1) * w for j, w in enumerate(weights.tolist())), rel=1e-5)


def test_the_draws_decide_everything() -> None:
    augment = Augment(3000, speed=0.2, gain_db=6, roll_samples=200, noise=0.1)
    x = torch.from_numpy(tone(500))
    torch.manual_seed(1)
    first = augment(x, draw(7))
    torch.manual_seed(2)
    assert first.equal(augment(x, draw(7))) and not first.equal(augment(x, draw(8))[: len(first)])
    mixed = [mix_waveforms([x, x * 2], torch.tensor([0, 1]), 2, 0.4, draw(3))[1] for _ in range(2)]
    assert mixed[0].equal(mixed[1])


def test_long_clips_are_cut_at_random_places() -> None:
    augment, x = Augment(10), torch.arange(100.0)
    pieces = [augment(x, draw(i)) for i in range(50)]
    assert all(piece.equal(torch.arange(10.0) + piece[0]) for piece in pieces)
    assert len({piece[0].item() for piece in pieces}) > 20
    assert augment(x[:7], draw(0)).equal(x[:7])


def test_levels_and_noise_stay_within_their_bounds() -> None:
    x = torch.from_numpy(tone(500))
    for i in range(20):
        share = (Augment(10**6, gain_db=6)(x, draw(i)) / x).mean().item()
        assert 10**-0.3 <= share <= 10**0.3
        added = Augment(10**6, noise=0.1)(x, draw(i)) - x
        assert added.square().mean().sqrt() <= 0.11 * x.square().mean().sqrt()
    assert Augment(10**6, noise=0.1)(torch.zeros(50), draw(0)).equal(torch.zeros(50))  # silence stays silent


def test_tempo_changes_the_length_and_keeps_the_ends() -> None:
    x = torch.arange(40.0).view(1, 20, 2).repeat(3, 1, 1)
    lengths, factors = torch.tensor([20, 10, 1]), torch.tensor([0.5, 1.25, 2.0])
    new, new_lengths = change_tempo(x, lengths, factors)
    assert new_lengths.tolist() == [40, 8, 1] and new.shape == (3, 40, 2)
    for row, was, length, now in zip(new, x, lengths.tolist(), new_lengths.tolist(), strict=True):
        torch.testing.assert_close(row[0], was[0])
        torch.testing.assert_close(row[now - 1], was[length - 1])
    torch.testing.assert_close(new[0, :, 0], torch.linspace(0, 38, 40))  # between them it is linear
    same, _ = change_tempo(x, lengths, torch.ones(3))
    assert same[0].equal(x[0])


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.15])
def test_warped_frequencies_are_those_of_a_shorter_or_longer_tract(factor: float) -> None:
    options = FbankOptions(bins=64)
    bank, bands = Fbank(options), centres(options)
    x = bank(torch.from_numpy(tone(1500)))[None]
    warped = warp_frequencies(x, torch.tensor([factor]), bands)
    before, after = (bands[row.mean(0).argmax()].item() for row in (x[0], warped[0]))
    assert after / before == pytest.approx(factor, abs=0.04)  # bands are 4 % apart there
    if factor == 1:
        torch.testing.assert_close(warped, x, atol=1e-3, rtol=0)
