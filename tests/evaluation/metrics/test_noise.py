import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFilter
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter1d

from digit.core.errors import DigitError
from digit.core.images import to_pil, to_tensor
from digit.evaluation.metrics.noise import (
    Change,
    NoiseModel,
    add_noise,
    apply_change,
    blur,
    normals,
    perturb_tokens,
    realised_snr,
    shift,
    signal_power,
)
from digit.models.codebook import nearest


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(6, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("signal", ["power", "variance"])
@pytest.mark.parametrize("snr", [30, 20, 10, 1, 0.01, -5])
def test_noise_has_the_power_that_was_asked(images, snr, signal):
    law = NoiseModel(signal=signal, clip=False)
    noise = add_noise(images, snr, range(6), law) - images
    # 3,072 draws: the relative error of a variance is sqrt(2 / 3072) = 2.6%
    power = images.double().square().mean((1, 2, 3)) if signal == "power" else images.double().flatten(1).numpy().var(1)
    found = 10 * torch.log10(torch.as_tensor(power) / noise.double().square().mean((1, 2, 3)))
    assert (found - snr).abs().max() < 0.5
    assert (realised_snr(images, images + noise, signal) - snr).abs().max() < 0.5


def test_clipping_keeps_pixels_and_weakens_noise(images):
    noisy = add_noise(images, 1, range(6), NoiseModel(clip=True))
    assert noisy.min() == 0
    assert noisy.max() == 1
    assert (realised_snr(images, noisy, "power") > 1).all()


def test_noise_belongs_to_the_image_and_not_to_the_batch(images):
    law = NoiseModel(clip=False)
    whole = add_noise(images, 10, range(6), law)
    single = torch.cat([add_noise(images[i : i + 1], 10, [i], law) for i in range(6)])
    assert torch.equal(whole, single)
    assert not torch.equal(add_noise(images, 10, range(6), NoiseModel(clip=False, seed=1)), whole)
    assert not torch.equal(normals(0, [0], (4,)), normals(0, [1], (4,)))


def test_levels_are_one_draw_scaled(images):
    law = NoiseModel(clip=False)
    loud, soft = (add_noise(images, snr, range(6), law) - images for snr in (0, 20))
    torch.testing.assert_close(loud, 10 * soft, atol=1e-5, rtol=1e-4)


def test_noise_is_standard_normal():
    draws = normals(0, range(16), (4096,)).double()
    assert abs(float(draws.mean())) < 0.02
    assert abs(float(draws.var()) - 1) < 0.02
    assert abs(float((draws**4).mean()) - 3) < 0.15


@pytest.mark.parametrize(
    "change",
    [
        Change(kind="noise", level=math.inf),
        Change(kind="blur", level=0),
        Change(kind="shift", level=0),
        Change(kind="brightness", level=1),
    ],
)
def test_no_change_is_no_change(images, change):
    assert torch.equal(apply_change(images, change, range(6)), images)


def test_blur_is_scipys(images):
    expected = images.double().numpy()
    for axis in (2, 3):
        expected = gaussian_filter1d(expected, 1.2, axis=axis, mode="nearest", radius=4)
    torch.testing.assert_close(blur(images, 1.2).double(), torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_blur_resembles_pillows(images):
    # Pillow approximates a Gaussian by box filters: the same picture to a few grey levels
    theirs = torch.stack([to_tensor(to_pil(x).filter(ImageFilter.GaussianBlur(1))) for x in images])
    assert (blur(images, 1.0) - theirs).abs().max() < 0.05


def test_shift_repeats_the_edge(images):
    moved = shift(images, 2)
    assert torch.equal(moved[..., 2:], images[..., :-2])
    assert torch.equal(moved[..., 0], images[..., 0])
    assert torch.equal(moved[..., 1], images[..., 0])


def test_jpeg_errs_more_at_lower_quality(images):
    errors = [
        float((apply_change(images, Change(kind="jpeg", level=q), range(6)) - images).abs().mean())
        for q in (95, 50, 10)
    ]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.1


def test_brightness_multiplies_and_clips(images):
    assert torch.equal(
        apply_change(images, Change(kind="brightness", level=1.5), range(6)), (images * 1.5).clamp(max=1)
    )


@pytest.mark.parametrize(
    ("kind", "level"),
    [
        ("jpeg", 0),
        ("jpeg", 50.5),
        ("shift", 0.5),
        ("shift", -1),
        ("blur", -1),
        ("brightness", -0.1),
        ("noise", math.nan),
    ],
)
def test_impossible_levels_are_refused(kind, level):
    with pytest.raises(ValidationError, match="cannot have the level"):
        Change(kind=kind, level=level)


def test_power_and_variance_differ_by_the_squared_mean(images):
    mean = images.double().mean((1, 2, 3))
    difference = signal_power(images, "power").double() - signal_power(images, "variance").double()
    torch.testing.assert_close(difference, mean**2, atol=1e-6, rtol=1e-5)


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codes():
    return torch.randn(20, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def features():
    return torch.randn(8, 16, 5, generator=torch.Generator().manual_seed(1))


def test_no_share_or_one_neighbour_changes_nothing(features, codes):
    tokens = nearest(features, codes)
    assert torch.equal(perturb_tokens(features, codes, 0, 20, range(8)), tokens)
    assert torch.equal(perturb_tokens(features, codes, 1, 1, range(8)), tokens)


@settings(max_examples=20, deadline=None)
@given(neighbours=st.integers(1, 20), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_replacements_are_among_the_nearest(features, codes, neighbours, share, seed):
    tokens = perturb_tokens(features, codes, share, neighbours, range(8), seed)
    order = torch.cdist(features.double(), codes.double()).argsort(-1).argsort(-1)  # (8, 16, 20) rank of each code
    assert int(order.gather(2, tokens[..., None]).max()) < neighbours


def test_share_and_uniformity_are_as_asked(codes):
    features = torch.randn(64, 256, 5, generator=torch.Generator().manual_seed(2))
    changed = (perturb_tokens(features, codes, 0.5, 4, range(64)) != nearest(features, codes)).float().mean()
    # 16,384 tokens, half of them drawn from four codes of which one is their own
    assert abs(float(changed) - 0.5 * 3 / 4) < 0.02
    order = torch.cdist(features, codes).argsort(-1).argsort(-1)
    ranks = order.gather(2, perturb_tokens(features, codes, 1, 4, range(64))[..., None]).flatten()
    assert (ranks.bincount(minlength=4).float() / len(ranks) - 0.25).abs().max() < 0.02


def test_batches_do_not_matter_for_tokens(features, codes):
    whole = perturb_tokens(features, codes, 0.7, 5, range(8))
    assert torch.equal(whole[3:4], perturb_tokens(features[3:4], codes, 0.7, 5, [3]))


def test_impossible_perturbations_are_explained(features, codes):
    with pytest.raises(DigitError, match="codebook has 20"):
        perturb_tokens(features, codes, 0.5, 21, range(8))
    with pytest.raises(DigitError, match="expected 0 to 1"):
        perturb_tokens(features, codes, 1.5, 2, range(8))
