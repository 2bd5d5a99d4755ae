import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from digit.core.config import from_dict
from digit.core.errors import DigitError
from digit.core.transforms import Transform, build_transform, center_crop, random_resized_crop, resize_shorter


def _noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height"), [(50, 40), (40, 50), (33, 97), (32, 32), (20, 31)])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear", "lanczos", "box"])
def test_resize_and_center_crop_agree_with_torchvision(width, height, filter):
    image = _noise(width, height)
    theirs = v2.Compose([v2.Resize(32, v2.InterpolationMode(filter)), v2.CenterCrop(32)])(image)
    ours = build_transform(Transform(size=32, filter=filter))(image, np.random.default_rng(0))
    assert np.array_equal(ours, center_crop(resize_shorter(image, 32, filter), 32))
    # of an odd margin and of half a pixel in the long side the two libraries round differently
    if (max(width, height) * 32 / min(width, height)) % 1 == 0:
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert ours.size == theirs.size == (32, 32)


@pytest.mark.parametrize("crop", ["center", "random", "random-resized"])
def test_result_is_square_and_repeats_with_the_generator(crop):
    step = build_transform(Transform(size=24, crop=crop, flip=True))
    for width, height in [(50, 40), (24, 24), (31, 200), (10, 9)]:
        image = _noise(width, height)
        first, second = (np.asarray(step(image, np.random.default_rng(5))) for _ in range(2))
        assert first.shape == (24, 24, 3)
        assert np.array_equal(first, second)


def test_random_crop_reaches_every_place():
    step = build_transform(Transform(size=2, crop="random"))
    image = Image.fromarray(np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3))
    rng = np.random.default_rng(0)
    assert {np.asarray(step(image, rng))[0, 0, 0] for _ in range(100)} == {0, 3, 6}


def test_flip_mirrors_half_the_time():
    step = build_transform(Transform(size=4, flip=True))
    image = _noise(4, 4)
    rng = np.random.default_rng(0)
    results = [np.asarray(step(image, rng)) for _ in range(400)]
    plain = sum(np.array_equal(result, np.asarray(image)) for result in results)
    mirrored = sum(np.array_equal(result, np.asarray(image)[:, ::-1]) for result in results)
    assert plain + mirrored == 400
    assert 150 < plain < 250  # five standard deviations


def test_random_resized_crop_covers_the_asked_area():
    """Of a picture whose pixels tell their place, the part that was cut can be read back."""
    size, scale = 200, (0.25, 0.5)
    y, x = np.mgrid[0:size, 0:size]
    image = Image.fromarray(np.stack([x, y, x * 0], axis=-1).astype(np.uint8))
    areas, aspects = [], []
    for seed in range(200):
        part = np.asarray(random_resized_crop(image, 50, scale, np.random.default_rng(seed)), dtype=float)
        width, height = (np.ptp(part[..., channel]) * 50 / 49 + 1 for channel in (0, 1))
        areas.append(width * height / size**2)
        aspects.append(width / height)
    assert 0.22 < min(areas) < 0.3
    assert 0.45 < max(areas) < 0.55
    assert min(aspects) > 0.70
    assert max(aspects) < 1.42
    assert abs(np.mean(np.log(aspects))) < 0.06


def test_crop_none_refuses_another_size():
    step = build_transform(Transform(size=8, crop="none"))
    rng = np.random.default_rng(0)
    assert step(_noise(8, 8), rng).size == (8, 8)
    with pytest.raises(DigitError, match="9x8 pixels was met where 8x8 is expected"):
        step(_noise(9, 8), rng)


@pytest.mark.parametrize(
    "values", [{"size": 0}, {"size": 8, "crop": "middle"}, {"size": 8, "scale": [0.9, 0.1]}, {"sizes": 8}]
)
def test_wrong_config_is_refused(values):
    with pytest.raises(DigitError, match="does not describe a valid Transform"):
        from_dict(Transform, values, "preset test")


def test_is_random():
    assert not Transform(size=8).is_random
    assert Transform(size=8, flip=True).is_random
    assert Transform(size=8, crop="random").is_random


def test_transforms_do_not_touch_the_global_generators():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    build_transform(Transform(size=8, crop="random-resized", flip=True))(_noise(20, 20), np.random.default_rng(0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
