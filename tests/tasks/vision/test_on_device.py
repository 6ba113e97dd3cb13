"""Images that are varied where the model is: the key alone decides, and each operation is what it is called."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from mambaverse.config import ConfigError
from mambaverse.engine.data import Job, Loader
from mambaverse.engine.task import BatchSet
from mambaverse.tasks.vision import on_device
from mambaverse.tasks.vision.config import VisionDataConfig
from mambaverse.tasks.vision.images import ArrayImages
from mambaverse.tasks.vision.on_device import CHOICES, DeviceAugment, DeviceImages, uniform

CPU = torch.device("cpu")
ALL = DeviceAugment(crop_padding=4, flip=0.5, trivial=True, cutout=8, fill=(120.0, 110.0, 100.0))


def images(count: int = 40, channels: int = 3, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(count, channels, 6, 6, generator=generator)
    return (255 * torch.nn.functional.interpolate(rough, size=size, mode="bicubic").clamp(0, 1)).byte()


def finish(x: Tensor, targets: Tensor, generator: Any) -> dict[str, Tensor]:
    return {"image": x, "target": targets}


def sample_set(augment: DeviceAugment | None = ALL) -> DeviceImages:
    return DeviceImages(ArrayImages(images(), torch.arange(40) % 10), augment, finish)


def test_uniform_numbers_are_even_and_unrelated() -> None:
    u = uniform(2**62 + 12345, torch.arange(50_000), CHOICES)
    assert (u >= 0).all() and (u < 1).all()
    assert torch.allclose(u.mean(0), torch.tensor(0.5), atol=0.01)
    assert torch.allclose(u.std(0), torch.tensor(12**-0.5), atol=0.01)
    others = torch.cat([u, uniform(2**62 + 12346, torch.arange(50_000), CHOICES), u.roll(1, 0)], 1)
    assert (np.corrcoef(others.T.numpy()) - np.eye(3 * CHOICES)).max() < 0.02


def test_a_sample_is_the_same_in_any_batch_and_another_with_another_key() -> None:
    samples = sample_set()
    whole = samples.batch(range(40), 7, None, CPU)["image"]
    for part in ([3], [39, 3, 17]):
        assert samples.batch(part, 7, None, CPU)["image"].equal(whole[part])
    other = samples.batch(range(40), 8, None, CPU)["image"]
    assert (whole != other).flatten(1).any(1).sum() > 35


def test_the_loader_makes_batches_of_it_from_seed_and_epoch() -> None:
    samples = sample_set()
    assert isinstance(samples, BatchSet)
    loader = Loader(samples, lambda rows, generator: {}, 3, CPU, num_workers=2)  # it needs no workers
    first, again, later, plain = (
        next(loader.run(iter([job])))[1]["image"] for job in (Job([1, 2], 0), Job([1, 2], 0), Job([1, 2], 1), Job([1]))
    )
    assert first.equal(again)
    assert not first.equal(later)
    assert plain.equal(images()[1:2].float())


@pytest.mark.parametrize("channels", [1, 3])
def test_every_value_stays_in_range(channels: int) -> None:
    augment = DeviceAugment(4, 0.5, trivial=True, cutout=7, fill=(99.0,) * channels)
    for key in range(20):
        x = augment(images(channels=channels), uniform(key, torch.arange(40), CHOICES))
        assert x.shape == (40, channels, 32, 32) and x.dtype == torch.float32
        assert x.min() >= 0 and x.max() <= 255


def test_crops_and_flips() -> None:
    x, u = images(3), torch.zeros(3, CHOICES)
    u[:, 0] = torch.tensor([0.5, 0.0, 0.999])  # not moved, 4 down, 4 up
    u[:, 1:3] = torch.tensor([[0.5, 0.9], [0.5, 0.9], [0.5, 0.1]])  # the last is flipped
    moved = DeviceAugment(crop_padding=4, flip=0.5)(x, u)
    assert moved[0].equal(x[0].float())
    assert moved[1, :, 4:].equal(x[1, :, :-4].float()) and not moved[1, :, :4].any()
    assert moved[2, :, :-4].equal(x[2, :, 4:].flip(-1).float())


def test_cutout_overwrites_one_square() -> None:
    u = torch.full((1, CHOICES), 0.5)
    cut = DeviceAugment(cutout=8, fill=(1.0, 2.0, 3.0))(images(1), u)
    changed = (cut != images(1).float()).any(1)[0].nonzero()
    assert changed.amin(0).tolist() == [12, 12] and changed.amax(0).tolist() == [19, 19]
    assert cut[0, :, 15, 15].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("operation", "pillow", "error"),
    [
        (on_device._equalize, ImageOps.equalize, 0.0),
        (on_device._autocontrast, ImageOps.autocontrast, 1.01),
        (
            lambda x: on_device._blend(on_device._grey(x), x, torch.tensor(1.6)),
            lambda p: ImageEnhance.Color(p).enhance(1.6),
            2,
        ),
        (
            lambda x: on_device._blend(on_device._smooth(x), x, torch.tensor(0.4)),
            lambda p: ImageEnhance.Sharpness(p).enhance(0.4),
            2,
        ),
        (lambda x: on_device._posterize(x, torch.tensor(0.5)), lambda p: ImageOps.posterize(p, 5), 0.0),
    ],
    ids=["equalize", "autocontrast", "color", "sharpness", "posterize"],
)
def test_colours_change_as_in_pillow(
    operation: Callable[..., Tensor], pillow: Callable[..., Any], error: float
) -> None:
    x = images(8)
    pictures = [pillow(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in x]
    expected = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]).float()
    assert (operation(x.float()) - expected).abs().max() <= error


def test_a_flat_image_survives_every_operation() -> None:
    flat = torch.full((40, 3, 8, 8), 77, dtype=torch.uint8)
    for key in range(10):
        assert ALL(flat, uniform(key, torch.arange(40), CHOICES)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trivial_augment": True}, "data.trivial_augment: is done where the model is; set data.on_device=true"),
        ({"on_device": True, "rand_augment": "rand-m9"}, "so set data.rand_augment=null"),
        ({"on_device": True, "erase": 0.5}, "so set data.erase=0"),
        ({"on_device": True, "cutout": -1}, "data.cutout: expected at least 0, got -1"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisionDataConfig(name="cifar10", **options)
