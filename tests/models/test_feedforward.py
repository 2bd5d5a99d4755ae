import pytest
import torch

from digit.core.config import from_dict
from digit.core.errors import DigitError
from digit.models.component import load_component, save_component
from digit.models.feedforward import _FILTERS, FeedForwardConfig, FeedForwardDecoder, _smooth
from digit.sampling import SamplingParams, sample
from digit.sampling.rng import pixel_latents

SHAPE = {
    "prefix_vocab_size": 12,
    "grid": (4, 4),
    "noise_dim": 8,
    "transformer": {"dim": 32, "depth": 2, "heads": 2, "causal": False},
}
PIXELS = {"pixels": {"resolution": 32, "widths": (16, 8, 8), "patch": 2, "groups": 4}}


def decoder(**changes) -> FeedForwardDecoder:
    torch.manual_seed(0)
    values = {**SHAPE, **(PIXELS if changes.get("head") != "vq" else {"vocab_size": 20}), **changes}
    return FeedForwardDecoder(from_dict(FeedForwardConfig, values, "test")).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(12, (3, 16), generator=torch.Generator().manual_seed(1))


def test_pixels_and_vq_logits(tokens: torch.Tensor) -> None:
    images = decoder()(tokens)
    assert images.shape == (3, 3, 32, 32)
    assert 0.2 < float(images.detach().mean()) < 0.8  # begins around grey
    assert decoder(head="vq")(tokens).shape == (3, 16, 20)


@pytest.mark.parametrize(("smoothing", "border"), [("binomial", 1), ("flat", 2)])
def test_images_hold_no_net(smoothing: str, border: int) -> None:
    model = decoder(pixels={**PIXELS["pixels"], "smoothing": smoothing})
    out = model.head.conv_out
    torch.nn.init.zeros_(out.weight)
    out.bias.data = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(3)  # the four pixels of a patch, a chessboard
    images = model(torch.zeros(1, 16, dtype=torch.long))
    inner = slice(border, -border)  # at the border a pixel sees itself again
    torch.testing.assert_close(images[..., inner, inner], torch.full_like(images, 0.5)[..., inner, inner])


@pytest.mark.parametrize(("smoothing", "kept"), [("binomial", 1 / 2), ("flat", 3 / 4)])
def test_what_the_fixed_filter_keeps(smoothing: str, kept: float) -> None:
    places = torch.arange(32.0)
    waves = torch.stack([torch.ones(32), (torch.pi / 2 * places).cos(), (torch.pi * places).cos()])  # (3, 32)
    images = waves[:, None].expand(3, 32, 32)[None]  # each colour a wave along the rows, of no, 4 and 2 pixels
    smoothed = _smooth(images, _FILTERS[smoothing])[0, :, :, 2:-2]
    expected = torch.tensor([1.0, kept, 0.0])[:, None, None] * images[0, :, :, 2:-2]
    torch.testing.assert_close(smoothed, expected, atol=1e-6, rtol=0)


def test_a_grid_need_not_be_square_and_every_token_counts() -> None:
    values = {**PIXELS["pixels"], "widths": (16,), "patch": 8}
    with pytest.raises(DigitError, match="2 x 4 tokens becomes 16 x 32 pixels"):
        decoder(grid=(2, 4), pixels=values)
    model = decoder()
    one = torch.zeros(1, 16, dtype=torch.long)
    for place in (0, 15):
        other = one.clone()
        other[0, place] = 5
        changed = (model(one) - model(other)).abs().sum((0, 1))  # (32, 32)
        row, column = divmod(int(changed.argmax()), 32)
        assert (row < 16) == (column < 16) == (place == 0)  # most where the token stands
        assert float(changed.detach().min()) > 0  # and a little everywhere, for it looks both ways


def test_noise_belongs_to_the_image_and_moves_it(tokens: torch.Tensor) -> None:
    model = decoder()
    all_at_once = pixel_latents(model.config, [0, 1, 2], seed=3)
    assert torch.equal(all_at_once[2], pixel_latents(model.config, [2], seed=3)[0])
    assert not torch.equal(all_at_once, pixel_latents(model.config, [0, 1, 2], seed=4))
    many = pixel_latents(model.config, range(4000))
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02
    assert torch.equal(pixel_latents(model.config, [0], temperature=0.0), torch.zeros(1, 8))
    assert not torch.allclose(model(tokens, all_at_once), model(tokens))
    with torch.no_grad():
        batch, alone = model(tokens, all_at_once), model(tokens[1:2], all_at_once[1:2])
    torch.testing.assert_close(batch[1:2], alone, atol=1e-5, rtol=1e-5)
    silent = decoder(noise_dim=0)
    assert torch.equal(silent(tokens, pixel_latents(silent.config, [0, 1, 2])), silent(tokens))


def test_every_place_may_make_its_own_of_the_noise() -> None:
    tokens = torch.zeros(1, 16, dtype=torch.long)
    for local, same in ((0, True), (4, False)):
        model = decoder(local_noise=local)
        model.position_embedding.weight.data.zero_()
        states = model._embed(tokens, pixel_latents(model.config, [0]), None)[0]  # (N, D)
        assert torch.equal(states, states[:1].expand_as(states)) == same


def test_classes(tokens: torch.Tensor) -> None:
    model = decoder(num_classes=3)
    free, some = model(tokens), model(tokens, None, torch.tensor([0, -1, 2]))
    assert torch.equal(free[1], some[1])
    assert not torch.allclose(free[0], some[0])
    with pytest.raises(DigitError, match="without classes"):
        decoder()(tokens, None, torch.tensor([0, 1, 2]))
    dropped = model.drop_labels(torch.tensor([1, 1]), torch.tensor([0.05, 0.5]))
    assert dropped.tolist() == [-1, 1]


def test_saved_and_loaded_it_is_the_same(tokens: torch.Tensor, tmp_path) -> None:
    model = decoder(num_classes=2)
    save_component(tmp_path / "decoder", model, model.config)
    again = load_component(tmp_path / "decoder", FeedForwardDecoder, FeedForwardConfig)
    z = pixel_latents(model.config, range(3))
    assert again.config == model.config
    assert torch.equal(again(tokens, z), model(tokens, z))


def test_vq_tokens_of_a_place_depend_on_its_number_alone(tokens: torch.Tensor) -> None:
    model = decoder(head="vq")
    torch.nn.init.normal_(model.head.weight)
    drawn = sample(model, range(3), prefix=tokens)
    assert torch.equal(drawn[1:2], sample(model, [1], prefix=tokens[1:2]))
    greedy = sample(model, range(3), params=SamplingParams(temperature=0), prefix=tokens)
    assert torch.equal(greedy, model(tokens, pixel_latents(model.config, range(3))).argmax(-1))
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 3] = True
    given = torch.full((3, 16), 7)
    kept = sample(model, range(3), prefix=tokens, given=given, mask=mask)
    assert torch.equal(kept[~mask], given[~mask])
    assert torch.equal(kept[mask], drawn[mask])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer": {"dim": 32, "depth": 1, "heads": 2}}, "causal = False"),
        ({"head": "vq", "vocab_size": 0}, "needs vocab_size"),
        ({"vocab_size": 20}, "no vocab_size"),
        ({"pixels": {**PIXELS["pixels"], "groups": 3}}, "groups=3 does not divide"),
        ({"grid": (8, 8)}, "becomes 64 x 64 pixels"),
    ],
)
def test_a_shape_that_cannot_be(changes, message: str) -> None:
    with pytest.raises(DigitError, match=message):
        decoder(**changes)


def test_other_tokens_than_it_reads(tokens: torch.Tensor) -> None:
    with pytest.raises(DigitError, match=r"reads \(B, 16\)"):
        decoder()(tokens[:, :9])
