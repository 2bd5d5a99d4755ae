import pytest
import torch

from digit.core.config import from_dict
from digit.training.views import ViewDraws, Views, apply_views, draw_views


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PLAIN = {"scale": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "gray": 0.0}


def views_of(images: torch.Tensor, seed: int = 0, **changes: object) -> torch.Tensor:
    views = from_dict(Views, {"size": images.shape[-1], **changes}, "test")
    return apply_views(images, draw_views(len(images), views, generator(seed)), views.size)


def test_a_whole_square_view_is_the_image_and_a_flip_its_mirror() -> None:
    images = torch.rand(64, 3, 8, 8, generator=generator())
    for flip, expected in ((0.0, images), (1.0, images.flip(3))):
        draws = draw_views(64, from_dict(Views, {**PLAIN, "flip": flip}, "test"), generator())
        # the aspect ratio is random, so of a crop of all the area only its square case is the image
        whole = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).repeat(64, 1, 1)
        whole[:, 0, 0] = draws.crop[:, 0, 0].sign()
        torch.testing.assert_close(apply_views(images, draws._replace(crop=whole), 8), expected, atol=1e-5, rtol=0)


def test_crops_stay_inside_and_cover_the_area_asked_for() -> None:
    draws = draw_views(4000, Views(scale=(0.3, 0.6)), generator())
    width, height = draws.crop[:, 0, 0].abs(), draws.crop[:, 1, 1]
    assert bool(
        (draws.crop[:, 0, 2].abs() + width <= 1 + 1e-6).all() and (draws.crop[:, 1, 2].abs() + height <= 1 + 1e-6).all()
    )
    area = width * height
    assert 0.3 - 1e-5 <= area.min() < 0.31
    assert 0.59 < area.max() <= 0.6 + 1e-5
    assert draws.crop[:, 0, 0].sign().mean().abs() < 0.05  # half of them are mirrored


def test_colour_changes_are_the_known_ones() -> None:
    images = torch.rand(16, 3, 8, 8, generator=generator()) * 0.4 + 0.3  # nothing is clamped
    whole = {**PLAIN, "jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}

    def recolored(**changes: float) -> tuple[torch.Tensor, ViewDraws]:
        draws = draw_views(16, from_dict(Views, {**whole, **changes}, "test"), generator())
        draws = draws._replace(crop=torch.eye(2, 3).repeat(16, 1, 1))
        return apply_views(images, draws, 8), draws

    torch.testing.assert_close(recolored()[0], images, atol=1e-5, rtol=0)
    luma = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    gray = recolored(gray=1.0)[0]
    torch.testing.assert_close(gray, luma.expand_as(gray), atol=1e-5, rtol=0)
    brighter, draws = recolored(brightness=0.2)
    torch.testing.assert_close(brighter, images * draws.color[:, 0, 0].view(-1, 1, 1, 1), atol=1e-5, rtol=0)
    contrasted, draws = recolored(contrast=0.2)
    mean = luma.mean((2, 3), keepdim=True)
    factor = draws.contrast.view(-1, 1, 1, 1)
    torch.testing.assert_close(contrasted, factor * images + (1 - factor) * mean, atol=1e-5, rtol=0)
    turned, _ = recolored(hue=0.5)  # a turn of the hue keeps the luma
    turned_luma = (turned * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(turned_luma, luma, atol=2e-3, rtol=0)
    assert (turned - images).abs().mean() > 0.02


def test_blur_smooths_some_images_and_leaves_the_others() -> None:
    images = torch.rand(64, 3, 16, 16, generator=generator())
    draws = draw_views(64, from_dict(Views, {**PLAIN, "size": 32, "blur": 0.5}, "test"), generator())
    draws = draws._replace(crop=torch.eye(2, 3).repeat(64, 1, 1))
    out = apply_views(images, draws, 16)
    blurred = draws.sigma > 0.5
    assert 5 < int(blurred.sum()) < 50
    torch.testing.assert_close(out[draws.sigma == 0], images[draws.sigma == 0], atol=1e-5, rtol=0)
    assert bool((out[blurred].var((1, 2, 3)) < 0.7 * images[blurred].var((1, 2, 3))).all())


def test_noise_reaches_some_images_and_moves_no_other_draw() -> None:
    images = torch.full((400, 3, 8, 8), 0.5)
    quiet, noisy = (from_dict(Views, {**PLAIN, "size": 8, "noise": share}, "test") for share in (0.0, 0.5))
    before, draws = draw_views(400, quiet, generator()), draw_views(400, noisy, generator())
    for name in ("crop", "color", "contrast", "sigma"):
        assert torch.equal(getattr(before, name), getattr(draws, name)), name
    found = (apply_views(images, draws, 8) - 0.5).flatten(1).std(1)
    reached = found > 1e-6
    assert 160 < int(reached.sum()) < 240
    assert found[reached].mean().item() == pytest.approx(0.075, abs=0.01)
    assert 0.13 < found.max() < 0.19
    assert apply_views(images, before, 8).std() < 1e-6


def test_views_of_a_seed_are_the_same_and_in_range() -> None:
    images = torch.rand(32, 3, 32, 32, generator=generator())
    first, again, other = (views_of(images, seed, size=24, blur=0.5, noise=0.5) for seed in (1, 1, 2))
    assert first.shape == (32, 3, 24, 24)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= first.min() < first.max() <= 1
