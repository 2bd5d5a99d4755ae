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
from digit.models.lpips import BACKBONES, Lpips, untrained
from digit.training.losses.energy import Seen, energy
from digit.training.losses.images import (
    ImageLoss,
    ImageObjective,
    augment,
    discriminator_hinge,
    generator_hinge,
    gradient_ratio,
    lecam,
    ramp,
)
from digit.training.losses.perceptual import EncoderView, feature_distance, lpips_layers
from digit.training.task import Step
from digit.training.tasks.encoder import neighbour_accuracy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the discriminator


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


def test_perceptual_encoder_wants_images_of_its_size() -> None:
    with pytest.raises(DigitError, match="images of 32 pixels, those that are to be made have 64"):
        EncoderView(small_conv(widths=(8, 16, 32)), 64)


def test_lpips_layers_are_those_that_lpips_compares() -> None:
    pytest.importorskip("lpips")
    network = untrained("vgg").eval()
    one, other = torch.rand(2, 2, 3, 32, 32)
    layers = zip(lpips_layers(network, one), lpips_layers(network, other), network.lins, strict=True)
    with torch.no_grad():
        distances = sum(head((a - b).square()).mean((2, 3)) for a, b, head in layers).flatten()
        expected = network(one * 2 - 1, other * 2 - 1).flatten()
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-6)


def test_the_energy_distance_looks_through_lpips_and_the_encoder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("lpips")
    lpips = Lpips(untrained("vgg").eval(), "random", torch.device("cpu"))
    monkeypatch.setattr("digit.training.losses.images.load_lpips", lambda _: lpips)
    small_conv().save_pretrained(tmp_path)
    kinds = []

    def spied(*seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
        kinds.append(len(seen[0].layers))
        return energy(*seen)

    monkeypatch.setattr("digit.training.losses.images.energy", spied)
    images, draws = torch.rand(2, 3, 32, 32), torch.rand(4, 3, 32, 32, requires_grad=True)
    for encoder in (None, str(tmp_path)):
        objective = ImageObjective(perceptual="lpips", perceptual_encoder=encoder)
        (loss,) = ImageLoss(objective, 32, energy_weight=1.0)(0.0, {}, draws, images, {}, Step(0, 1), nn.ModuleDict())
        loss.value.backward()
    assert kinds == [5, 5 + len(small_conv().blocks)]
    assert draws.grad is not None
    assert float(draws.grad.abs().sum()) > 0


def test_the_discriminator_sees_what_the_energy_distance_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lpips")
    lpips = Lpips(untrained("vgg").eval(), "random", torch.device("cpu"))
    monkeypatch.setattr("digit.training.losses.images.load_lpips", lambda _: lpips)
    objective = ImageObjective(perceptual="lpips", gan_weight=0.1, gan_start=0.0, gan_warmup=0.0)
    without, loss = ImageLoss(objective, 32).discriminator, ImageLoss(objective, 32, energy_weight=1.0)
    assert without is not None
    assert loss.discriminator is not None
    assert (len(without.features), len(loss.discriminator.features)) == (0, 5)
    images, rebuilt = torch.rand(2, 3, 32, 32), torch.rand(5, 3, 32, 32, requires_grad=True)  # one without an image
    modules, maps = nn.ModuleDict({"discriminator": loss.discriminator}), []
    loss.discriminator.register_forward_hook(lambda _, __, logits: maps.append([len(one) for one in logits]))
    generator_loss, own = loss(0.0, {}, rebuilt, images, {}, Step(0, 1), modules)
    assert maps == [[5] * 6, [5 + 2] * 6]
    own.value.backward()
    assert rebuilt.grad is None
    generator_loss.value.backward()
    assert float(rebuilt.grad[4].abs().sum()) > 0  # type: ignore[index]


def test_lpips_without_weights_says_where_to_put_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path))
    monkeypatch.setitem(BACKBONES, "vgg", replace(BACKBONES["vgg"], url="https://127.0.0.1:9/vgg16.pth"))
    with pytest.raises(DigitError, match=r"Tried .*lpips-vgg\.safetensors.*set objective\.perceptual to"):
        ImageLoss(ImageObjective(perceptual="lpips"), 32)


# -- neighbours


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
def test_image_and_its_copy_are_moved_alike(shift: int, seed: int) -> None:
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


def test_group_norm_needs_widths_it_can_divide_and_bounds_nothing() -> None:
    with pytest.raises(DigitError, match="in multiples of 8"):
        from_dict(DiscriminatorConfig, {"norm": "group", "channels": 12}, "test")
    network = Discriminator(DiscriminatorConfig(norm="group", channels=8, feature_channels=0, lecam=0.1))
    assert sum(isinstance(module, nn.GroupNorm) for module in network.modules()) == 2  # not right after the pixels
    assert network.averages.shape == (1, 2)
    assert network(torch.rand(2, 3, 16, 16))[0].shape == (2, 1, 4, 4)
