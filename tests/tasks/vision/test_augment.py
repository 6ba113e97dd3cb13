"""Augmentation: every draw comes from the generator that is handed in, and does what it is called."""

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup

from mambaverse.errors import UserError
from mambaverse.tasks.vision.augment import Augment, fit, mix, shifted

Draw = Callable[[int], torch.Generator]
STATISTICS: dict[str, Any] = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
EACH = [
    pytest.param({"crop_padding": 4}, id="padding"),
    pytest.param({"crop_scale": [0.2, 0.8]}, id="resized crop"),
    pytest.param({"flip": 0.5}, id="flip"),
    pytest.param({"rand_augment": "rand-m9-mstd0.5-inc1"}, id="RandAugment"),
    pytest.param({"rand_augment": "rand-m5-n3-tweights"}, id="RandAugment by weights"),
    pytest.param({"erase": 0.5}, id="erase"),
]


@pytest.fixture
def image(draw: Draw) -> torch.Tensor:
    return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=draw(0))


@pytest.mark.parametrize("options", EACH)
def test_the_generator_alone_decides(options: dict, image: torch.Tensor, draw: Draw) -> None:
    augment = Augment(32, **STATISTICS, **options)
    before = image.clone()
    first = [augment(image, draw(i)) for i in range(20)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    again = [pickle.loads(pickle.dumps(augment))(image, draw(i)) for i in reversed(range(20))][::-1]
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert len({tuple(a.flatten().tolist()) for a in first}) > (1 if "flip" in options else 5)
    assert image.equal(before)
    assert all(a.shape == (3, 32, 32) and a.dtype == torch.uint8 for a in first)


@pytest.mark.parametrize("options", EACH)
def test_the_global_generators_are_left_as_they_were(options: dict, image: torch.Tensor, draw: Draw) -> None:
    def states() -> str:
        return repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))

    augment, before = Augment(32, **STATISTICS, **options), states()
    augment(image, draw(3))
    mix(torch.rand(4, 3, 8, 8, generator=draw(0)), torch.arange(4), Mixup(0.8, 1.0, num_classes=4), draw(1))
    assert states() == before


def test_without_a_generator_nothing_is_drawn(image: torch.Tensor) -> None:
    augment = Augment(32, **STATISTICS, crop_padding=4, flip=1.0, erase=1.0, rand_augment="rand-m9")
    assert augment(image, None).equal(image)


def test_a_padded_crop_is_a_shift_by_up_to_the_padding(image: torch.Tensor, draw: Draw) -> None:
    padded = F.pad(image, (2, 2, 2, 2))
    crops = {(y, x): padded[:, y : y + 32, x : x + 32] for y in range(5) for x in range(5)}
    augment = Augment(32, crop_padding=2)
    drawn = [augment(image, draw(i)) for i in range(300)]
    found = {place for place, crop in crops.items() for one in drawn if one.equal(crop)}
    assert found == set(crops)  # all 25 places come up, and
    assert all(any(one.equal(crop) for crop in crops.values()) for one in drawn)  # nothing else does
    assert shifted(image, 2, -1).equal(crops[0, 3])


def test_a_flip_mirrors_left_and_right_as_often_as_asked(image: torch.Tensor, draw: Draw) -> None:
    results = [Augment(32, flip=0.25)(image, draw(i)) for i in range(800)]
    assert all(r.equal(image) or r.equal(image.flip(-1)) for r in results)
    assert sum(r.equal(image.flip(-1)) for r in results) / 800 == pytest.approx(0.25, abs=0.05)


def test_a_resized_crop_takes_the_asked_share_of_the_area(draw: Draw) -> None:
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(1, 64, 64)  # the span of values is the crop's width
    augment = Augment(32, crop_scale=[0.25, 0.25])
    widths = [(int(out.max()) - int(out.min())) / 4 for out in (augment(ramp, draw(i)) for i in range(200))]
    assert min(widths) > 64 * 0.5 * (3 / 4) ** 0.5 - 4 and max(widths) < 64 * 0.5 * (4 / 3) ** 0.5 + 2
    assert max(widths) - min(widths) > 5


def test_a_crop_that_fits_nowhere_takes_the_centre(draw: Draw) -> None:
    sliver = torch.zeros(1, 4, 400, dtype=torch.uint8)
    assert Augment(8, crop_scale=[1.0, 1.0])(sliver, draw(0)).shape == (1, 8, 8)


def test_erasing_overwrites_one_rectangle_with_noise_of_the_data(draw: Draw) -> None:
    image = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    augment = Augment(64, [0.5, 0.4, 0.3], [0.05] * 3, erase=1.0)
    results = [augment(image, draw(i)) for i in range(50)]
    shares = [(r != 255).any(0).double().mean().item() for r in results]
    assert min(shares) > 0.015 and max(shares) < 0.35 and sum(shares) / 50 > 0.1
    inside = torch.cat([r[:, (r != 255).any(0)] for r in results], 1).double() / 255
    assert inside.mean(1).tolist() == pytest.approx([0.5, 0.4, 0.3], abs=0.01)
    rows = (results[0] != 255).any(0).any(1).nonzero()
    assert len(rows) == rows.max() - rows.min() + 1  # without a gap


@pytest.mark.parametrize(("height", "width"), [(64, 32), (32, 64), (20, 27), (3, 1000)])
def test_any_size_fits(height: int, width: int) -> None:
    image = torch.full((3, height, width), 77, dtype=torch.uint8)
    assert fit(image, 24).equal(torch.full((3, 24, 24), 77, dtype=torch.uint8))


def test_a_policy_of_no_operation_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.rand_augment: 'rand-n0' takes no operation"):
        Augment(32, **STATISTICS, rand_augment="rand-n0")


def test_rand_augment_takes_grey_images(draw: Draw) -> None:
    grey = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8)
    augment = Augment(28, [0.3], [0.3], rand_augment="rand-m9-n4-mstd0.5-inc1")
    assert all(augment(grey, draw(i)).shape == (1, 28, 28) for i in range(50))


@pytest.mark.parametrize("magnitude", [0, 10])  # where timm asks posterize for no bits
def test_rand_augment_works_at_both_ends(magnitude: int, image: torch.Tensor, draw: Draw) -> None:
    for increasing in (0, 1):
        augment = Augment(32, **STATISTICS, rand_augment=f"rand-m{magnitude}-n4-p1-inc{increasing}")
        for i in range(30):
            augment(image, draw(i))


@pytest.mark.parametrize("wrong", ["rnd-m9", "rand-x9", "rand-m1.5"])
def test_a_wrong_rand_augment_is_named(wrong: str) -> None:
    with pytest.raises(UserError, match=rf"data.rand_augment: '{wrong}' is not a timm RandAugment"):
        Augment(32, **STATISTICS, rand_augment=wrong)


@pytest.mark.parametrize("batch", [1, 2, 5, 8])  # alone, a pair, odd: timm itself takes even ones only
def test_mixing_takes_any_batch_and_keeps_the_weight_of_targets(batch: int, draw: Draw) -> None:
    images, labels = torch.rand(batch, 3, 8, 8), torch.arange(batch) % 4
    mixup = Mixup(0.8, 1.0, num_classes=4, label_smoothing=0.1)
    mixed, targets = mix(images.clone(), labels, mixup, draw(0))
    assert mixed.shape == images.shape and targets.shape == (batch, 4)
    assert targets.sum(1).tolist() == pytest.approx([1.0] * batch)
    again = mix(images.clone(), labels, mixup, draw(0))
    assert again[0].equal(mixed) and again[1].equal(targets)
    if batch % 2:
        assert mixed[-1].equal(images[-1]) and targets[-1].max() == pytest.approx(0.925)
