import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from digit.core.config import from_dict
from digit.core.errors import DigitError
from digit.encoders.loading import small_conv, small_vit
from digit.models.discriminator import Discriminator, DiscriminatorConfig
from digit.models.lpips import BACKBONES
from digit.training.losses.adversarial import (
    augment,
    discriminator_hinge,
    generator_hinge,
    gradient_ratio,
    lecam,
    ramp,
)
from digit.training.losses.images import ImageObjective
from digit.training.losses.perceptual import EncoderView, LpipsDistance, feature_distance
from digit.training.losses.quantizer import EmaQuantizer, rotate
from digit.training.neighbours import neighbour_accuracy
from digit.training.views import ViewDraws, Views, apply_views, draw_views


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- views
# -----------------------------------------------------------------------------------------------------------------

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


# -- the quantizer
# ---------------------------------------------------------------------------------------------------------


def quantizer(codes: int = 16, dim: int = 4, **changes: object) -> EmaQuantizer:
    codebook = nn.Parameter(torch.zeros(codes, dim), requires_grad=False)
    return EmaQuantizer(codebook, **{"decay": 0.9, "dead_below": 0.03, "gradient": "straight-through", **changes})


def latents(batch: int = 8, dim: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, dim, 4, 4, generator=generator(seed))


def test_codes_are_the_nearest_and_the_gradient_passes_straight() -> None:
    torch.manual_seed(0)
    part, z = quantizer(), latents().requires_grad_()
    codes, tokens, commitment = part(z)
    flat = z.detach().flatten(2).transpose(1, 2)
    distances = torch.cdist(flat, part.codebook[None].expand(len(flat), -1, -1))
    torch.testing.assert_close(distances.gather(2, tokens[:, :, None]), distances.min(2, keepdim=True).values)
    torch.testing.assert_close(codes.flatten(2).transpose(1, 2), part.codebook[tokens])
    torch.testing.assert_close(commitment, F.mse_loss(codes.detach(), z))
    wanted = torch.randn(codes.shape, generator=generator(3))
    (codes * wanted).sum().backward()
    torch.testing.assert_close(z.grad, wanted)


def test_rotation_gives_the_codes_and_turns_the_gradient() -> None:
    z, codes = (
        torch.randn(5, 7, 4, generator=generator()).requires_grad_(),
        torch.randn(5, 7, 4, generator=generator(1)),
    )
    out = rotate(z, codes)
    torch.testing.assert_close(out, codes, atol=1e-5, rtol=1e-5)
    wanted = torch.randn(5, 7, 4, generator=generator(2))
    (out * wanted).sum().backward()
    scale = codes.norm(dim=-1) / z.detach().norm(dim=-1)
    # a rotation and a scaling keep lengths up to the scale, and the angle between gradient and code becomes that to the
    # latent
    torch.testing.assert_close(z.grad.norm(dim=-1), wanted.norm(dim=-1) * scale)
    torch.testing.assert_close(
        F.cosine_similarity(z.grad, z.detach(), dim=-1),
        F.cosine_similarity(wanted, codes, dim=-1),
        atol=1e-4,
        rtol=1e-4,
    )


def test_codebook_moves_by_the_closed_form() -> None:
    torch.manual_seed(0)
    part = quantizer(codes=3, dead_below=0.0)
    part(latents(seed=0))
    part.update()
    uses, sums = part.uses.clone(), part.sums.clone()
    _, tokens, _ = part(latents(seed=1))
    part.update()
    decay = min(0.9, 2 / 11)
    flat = latents(seed=1).flatten(2).transpose(1, 2).reshape(-1, 4)
    for code in range(3):
        taken = flat[tokens.flatten() == code]
        expected_uses = decay * uses[code] + (1 - decay) * len(taken)
        expected_sums = decay * sums[code] + (1 - decay) * taken.sum(0)
        torch.testing.assert_close(part.uses[code], expected_uses)
        torch.testing.assert_close(part.codebook[code], expected_sums / expected_uses, atol=1e-4, rtol=1e-4)


def test_the_first_batch_places_the_codes_on_its_clusters() -> None:
    torch.manual_seed(0)
    centres = torch.randn(8, 4, generator=generator()) * 10
    which = torch.randint(8, (64, 16), generator=generator(1))
    noise = torch.randn(64, 16, 4, generator=generator(2)) * 0.1
    z = (centres[which] + noise).transpose(1, 2).unflatten(2, (4, 4))
    part = quantizer(codes=64)
    _, _, commitment = part(z)
    assert float(commitment) < 0.05  # clusters are 100 times farther apart


def test_parts_of_a_batch_move_the_codebook_like_the_whole() -> None:
    whole, parts = quantizer(), quantizer()
    z = latents(16)
    for part in (whole, parts):
        torch.manual_seed(0)
        part(z)
        part.update()
    torch.manual_seed(1)
    whole(z)
    whole.update()
    torch.manual_seed(1)
    parts(z[:8])
    parts(z[8:])
    parts.update()
    torch.testing.assert_close(parts.codebook, whole.codebook)


def test_dead_codes_are_revived() -> None:
    torch.manual_seed(0)
    part = quantizer(codes=64)
    for step in range(10):
        part(latents(32, seed=step))
        part.update()
    with torch.no_grad():
        part.codebook[:40] = 1e3  # far from every latent
        part.sums[:40] = part.uses[:40, None] * 1e3
    before = part(latents(32, seed=100))[1].unique().numel()
    part._recent.clear()
    assert before <= 24
    for step in range(100):
        part(latents(32, seed=step))
        part.update()
    after = part.eval()(latents(32, seed=100))[1].unique().numel()
    assert after >= 58
    assert float(part.codebook.abs().max()) < 10
    assert float(part.statistics()["codebook_use"]) > 0.9
    assert 40 < float(part.statistics()["perplexity"]) <= 64


def test_without_revival_dead_codes_stay_dead() -> None:
    torch.manual_seed(0)
    part = quantizer(codes=64, dead_below=0.0)
    part(latents(32))
    with torch.no_grad():
        part.codebook[:40] = 1e3
        part.sums[:40] = part.uses[:40, None] * 1e3
    for step in range(30):
        part(latents(32, seed=step))
        part.update()
    assert part.eval()(latents(32, seed=100))[1].unique().numel() <= 24


def test_eval_changes_nothing() -> None:
    torch.manual_seed(0)
    part = quantizer()
    part(latents())
    part.update()
    before = {name: value.clone() for name, value in part.state_dict().items()}
    part.eval()(latents(seed=5))
    assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())
    assert not part._recent


# -- the discriminator
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(), (4, 5)])
def test_discriminator_judges_patches_and_learns_to_tell(dims: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    judge = Discriminator(DiscriminatorConfig(channels=8, levels=2, feature_channels=8), dims)
    real = torch.rand(32, 3, 16, 16, generator=generator())
    fake = F.avg_pool2d(real, 3, 1, 1)
    layers = [[torch.randn(32, d, 8, 8, generator=generator(s)) + 0.5 * s for d in dims] for s in (0, 1)]
    assert [tuple(logits.shape) for logits in judge(real, layers[0])] == [(32, 1, 4, 4), *[(32, 1, 8, 8) for _ in dims]]
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    losses = []
    for _ in range(60):
        loss = discriminator_hinge(judge(real, layers[0]), judge(fake, layers[1]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert generator_hinge(judge(fake, layers[1])) > generator_hinge(judge(real, layers[0]))


def test_hinge_and_ramp_are_the_written_ones() -> None:
    real, fake = [torch.tensor([2.0, 0.0])], [torch.tensor([-2.0, 1.0])]
    assert float(discriminator_hinge(real, fake)) == pytest.approx((0.5 + 1.0) / 2)
    assert float(generator_hinge(fake)) == pytest.approx(0.5)
    # a map counts as much as a larger one
    assert float(generator_hinge([torch.ones(100), -torch.ones(2)])) == pytest.approx(0)
    assert [ramp(p, 0.3, 0.1) for p in (0.0, 0.29, 0.35, 0.4, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert ramp(0.3, 0.3, 0.0) == 1.0


# -- perceptual
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: small_conv(widths=(8, 16, 32)), lambda: small_vit(dim=48, depth=2)])
def test_encoder_distance_grows_with_damage_and_gives_gradients(make: object) -> None:
    torch.manual_seed(0)
    view = EncoderView(make(), 32)  # type: ignore[operator]
    images = torch.rand(4, 3, 32, 32, generator=generator())
    noise = torch.randn(images.shape, generator=generator(1))
    features = view(images)
    assert [layer.shape[1] for layer in features] == view.dims
    assert features[-1].shape[2:] == (8, 8)
    torch.testing.assert_close(features[0].norm(dim=1), torch.ones(4, *features[0].shape[2:]))
    values = [float(feature_distance(view(images + s * noise), features)) for s in (0.0, 0.05, 0.2)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[0] < values[1] < values[2]
    damaged = (images + 0.1 * noise).requires_grad_()
    feature_distance(view(damaged), features).backward()
    assert float(damaged.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in view.parameters())


def test_perceptual_encoder_wants_pictures_of_its_size() -> None:
    with pytest.raises(DigitError, match="images of 32 pixels, those that are to be made have 64"):
        EncoderView(small_conv(widths=(8, 16, 32)), 64)


def test_lpips_without_weights_says_where_to_put_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path))
    monkeypatch.setitem(BACKBONES, "vgg", replace(BACKBONES["vgg"], url="https://127.0.0.1:9/vgg16.pth"))
    with pytest.raises(DigitError, match=r"Tried .*lpips-vgg\.safetensors.*set objective\.perceptual to"):
        LpipsDistance()


# -- neighbours
# ------------------------------------------------------------------------------------------------------------


def test_neighbours_find_the_class_and_weigh_votes() -> None:
    centres = torch.eye(5)
    labels = torch.arange(5).repeat(40)
    memory = centres[labels] + 0.1 * torch.randn(200, 5, generator=generator())
    queries = centres[labels] + 0.1 * torch.randn(200, 5, generator=generator(1))
    assert neighbour_accuracy(memory, labels, queries, labels) == 1.0
    shuffled = labels[torch.randperm(200, generator=generator(2))]
    assert neighbour_accuracy(memory, shuffled, queries, labels) < 0.5
    # one very near neighbour outweighs two far ones
    far = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert neighbour_accuracy(far, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.1]]), torch.tensor([0]), 3) == 1.0


def test_neighbours_of_random_features_are_at_chance() -> None:
    x = torch.randn(1000, 16, generator=generator())
    labels = torch.randint(10, (1000,), generator=generator(1))
    assert math.isclose(neighbour_accuracy(x[:500], labels[:500], x[500:], labels[500:]), 0.1, abs_tol=0.06)


@settings(deadline=None)  # the machine may be busy
@given(shift=st.integers(1, 4), seed=st.integers(0, 99))
def test_image_and_picture_are_moved_alike(shift: int, seed: int) -> None:
    objective = ImageObjective(shift=shift)
    batch = objective.draw(3, torch.Generator().manual_seed(seed))
    y, x = batch["shift"][0].tolist()
    assert 0 <= min(y, x) <= max(y, x) <= 2 * shift
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    moved = objective.moved(pictures, batch)
    assert moved.shape == pictures.shape
    whole = slice(2 * shift, 16 - 2 * shift)  # what no shift brings near a side
    seen = moved[..., whole, whole]
    rows, columns = (slice(whole.start + d - shift, whole.stop + d - shift) for d in (y, x))
    torch.testing.assert_close(seen, pictures[..., rows, columns], rtol=0, atol=0)


def test_without_a_shift_nothing_is_drawn_or_moved() -> None:
    objective, pictures = ImageObjective(), torch.rand(2, 3, 8, 8)
    assert set(objective.draw(2, torch.Generator())) == {"flip"}
    assert objective.moved(pictures, {}) is pictures


def test_a_judge_does_not_mind_the_scale_of_features() -> None:
    torch.manual_seed(0)
    judge = Discriminator(DiscriminatorConfig(channels=4, levels=1, feature_channels=4), (6,)).eval()
    images, layer = torch.rand(2, 3, 8, 8), torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(judge(images, [layer])[1], judge(images, [layer * 0.1])[1], rtol=1e-3, atol=1e-4)


def test_lecam_is_zero_on_the_right_side_and_squared_beyond() -> None:
    averages = torch.tensor([[1.0, -1.0]])  # of real and fake logits
    apart = lecam([torch.full((2, 1, 3, 3), -1.5)], [torch.full((2, 1, 3, 3), 1.5)], averages)
    assert apart == 0  # real below the average fake, fake above the average real: nothing to pull back
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    expected = ((2 + 1) ** 2 + (0 + 1) ** 2) / 2 + ((1 + 3) ** 2 + 0) / 2
    assert lecam([real], [fake], averages) == pytest.approx(expected)


def test_gradient_ratio_is_that_of_the_norms_and_capped() -> None:
    at = torch.tensor([3.0, 4.0], requires_grad=True)
    assert gradient_ratio(5 * at.sum(), at.sum(), at, limit=10) == pytest.approx(5, rel=1e-4)
    assert gradient_ratio(50 * at.sum(), at.sum(), at, limit=10) == 10
    assert not gradient_ratio(at.sum(), at.sum(), at, limit=10).requires_grad


@pytest.mark.parametrize("kind", ["color", "translation", "cutout"])
def test_augmentations_change_images_and_pass_gradients(kind: str) -> None:
    torch.manual_seed(0)
    images = torch.rand(8, 3, 16, 16, generator=generator()).requires_grad_()
    changed = augment(images, [kind])
    assert changed.shape == images.shape
    assert bool((changed != images).flatten(1).any(1).sum() >= 6)  # a move may be by nothing
    changed.sum().backward()
    assert images.grad is not None
    assert bool(images.grad.abs().sum() > 0)
    torch.manual_seed(0)
    torch.testing.assert_close(augment(images, [kind]), changed)


def test_a_translation_moves_every_image_as_a_whole() -> None:
    torch.manual_seed(1)
    images = torch.rand(4, 3, 16, 16, generator=generator())
    for image, moved in zip(images, augment(images, ["translation"]), strict=True):
        padded = F.pad(image, (2,) * 4, value=0.5)
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(padded[:, y : y + 16, x : x + 16], moved)]
        assert len(found) == 1


def test_codes_of_unit_length_stay_so_and_are_chosen_by_cosine() -> None:
    codebook = nn.Parameter(F.normalize(torch.randn(16, 4, generator=generator()), dim=-1))
    quantizer = EmaQuantizer(codebook, 0.9, 0.03, "straight-through", normalize=True).train()
    for step in range(3):
        latents = 3 * torch.randn(2, 4, 6, 6, generator=generator(step))
        codes, tokens, _ = quantizer(latents)
        flat = codes.flatten(2).transpose(1, 2).detach()
        torch.testing.assert_close(flat.norm(dim=-1), torch.ones(2, 36))
        used = (F.normalize(latents, dim=1).flatten(2).transpose(1, 2).unsqueeze(2) * flat.unsqueeze(2)).sum(-1)
        assert used.mean() > 0.5
        torch.testing.assert_close(codebook.norm(dim=-1), torch.ones(16))
    quantizer.eval()
    _, tokens, _ = quantizer(latents)
    cosine = F.normalize(latents, dim=1).flatten(2).transpose(1, 2) @ codebook.T
    assert torch.equal(tokens, cosine.argmax(-1))


def test_group_norm_needs_widths_it_can_divide_and_bounds_nothing() -> None:
    with pytest.raises(DigitError, match="in multiples of 8"):
        from_dict(DiscriminatorConfig, {"norm": "group", "channels": 12}, "test")
    network = Discriminator(DiscriminatorConfig(norm="group", channels=8, feature_channels=0, lecam=0.1))
    assert sum(isinstance(module, nn.GroupNorm) for module in network.modules()) == 2  # not right after the pixels
    assert network.averages.shape == (1, 2)
    assert network(torch.rand(2, 3, 16, 16))[0].shape == (2, 1, 4, 4)
