"""Editing pictures through their tokens: what must stay stays, what must change changes, in every kind of model."""

import pytest
import torch

import tiny
from digit.core.errors import DigitError
from digit.pipeline.editing import cells, continue_rows, edit_images, edit_region, vary


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(0))


def grids(pipe, images):
    return pipe.tokenizer.encode(images), pipe.vqgan.encode(images)


def test_a_cell_is_touched_by_any_of_its_pixels():
    region = torch.zeros(2, 32, 32, dtype=torch.bool)
    region[0, 8, 31] = True  # second row of 8 px, last column
    region[1, :8] = True
    assert cells(region, (4, 4)).nonzero().tolist() == [[0, 7], [1, 0], [1, 1], [1, 2], [1, 3]]


@pytest.mark.parametrize("decoder", ["ar", "masked"])
def test_the_kept_region_keeps_its_tokens(pipe, images, decoder):
    region = torch.zeros(tiny.SIZE, tiny.SIZE, dtype=torch.bool)
    region[10:20, 4:30] = True
    tokens = edit_region(pipe, images, region, tiny.request(range(6), seed=1, decoder=decoder))
    semantic, vq = grids(pipe, images)
    free = cells(region[None], (4, 4)).expand(6, -1)
    assert torch.equal(tokens.semantic[~free], semantic[~free])
    assert torch.equal(tokens.vq[~free], vq[~free])
    assert (tokens.semantic[free] != semantic[free]).any()
    assert (tokens.vq[free] != vq[free]).any()
    other = edit_region(pipe, images, region, tiny.request(range(6), seed=2, decoder=decoder))
    assert not torch.equal(other.vq, tokens.vq)
    again = edit_region(pipe, images[2:3], region, tiny.request([2], seed=1, decoder=decoder))
    assert torch.equal(again.vq, tokens.vq[2:3])


@pytest.mark.parametrize("keep_pixels", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_the_first_rows_are_kept(pipe, images, rows, keep_pixels):
    tokens = continue_rows(pipe, images, rows, tiny.request(range(6), top_k=8), keep_pixels)
    semantic, vq = grids(pipe, images)
    assert torch.equal(tokens.semantic[:, : rows * 4], semantic[:, : rows * 4])
    assert torch.equal(tokens.vq[:, : rows * 4], vq[:, : rows * 4]) == (keep_pixels or rows == 0)
    assert not torch.equal(tokens.semantic, semantic)


def test_continuing_is_sampling_with_given_first_tokens(pipe, images):
    from digit.sampling import sample

    semantic, _ = grids(pipe, images)
    expected = sample(pipe.prior, range(6), 3, pipe.settings.get("prior"), given=semantic[:, :8])
    assert torch.equal(continue_rows(pipe, images, 2, tiny.request(range(6), seed=3)).semantic, expected)


@pytest.mark.parametrize("fraction", [0.01, 0.25, 1.0])
def test_variations_change_the_asked_share_of_places(pipe, images, fraction):
    tokens = vary(pipe, images, fraction, tiny.request(range(6), seed=5))
    semantic, _ = grids(pipe, images)
    changed = (tokens.semantic != semantic).sum(1)
    assert (changed <= max(1, round(fraction * 16))).all()
    assert changed.any()
    assert torch.equal(vary(pipe, images[3:4], fraction, tiny.request([3], seed=5)).semantic, tokens.semantic[3:4])


@pytest.mark.parametrize("role", ["masked", "random"])
def test_other_priors_keep_what_stands_anywhere(images, role):
    pipe = tiny.pipeline(role=role)
    region = torch.zeros(tiny.SIZE, tiny.SIZE, dtype=torch.bool)
    region[:12, 4:30] = True
    asked = tiny.request(range(6), seed=1, decoder="masked", steps=3)
    tokens = edit_region(pipe, images, region, asked)
    semantic, vq = grids(pipe, images)
    free = cells(region[None], (4, 4)).expand(6, -1)
    assert torch.equal(tokens.semantic[~free], semantic[~free])
    assert torch.equal(tokens.vq[~free], vq[~free])
    assert (tokens.semantic[free] != semantic[free]).any()
    again = edit_region(pipe, images[2:3], region, tiny.request([2], seed=1, decoder="masked", steps=3))
    assert torch.equal(again.vq, tokens.vq[2:3])
    below = images.clone()
    below[:, :, 24:] = images[[1, 2, 3, 4, 5, 0], :, 24:]
    other = edit_region(pipe, below, region, asked).semantic
    assert (other[free] != tokens.semantic[free]).any()  # what is kept below is seen above
    rows = continue_rows(pipe, images, 2, asked, True)
    assert torch.equal(rows.semantic[:, :8], semantic[:, :8])
    varied = vary(pipe, images, 0.25, asked).semantic
    assert ((varied != semantic).sum(1) <= 4).all()


def test_a_baseline_in_vq_space_is_edited_too(images):
    baseline = tiny.pipeline().with_parts(
        space="vq",
        decoders={},
        encoder=None,
        codebook=None,
        class_names=[],
        prior=tiny.token_model(vocab_size=tiny.CODES),
    )
    region = torch.zeros(tiny.SIZE, tiny.SIZE, dtype=torch.bool)
    region[:, 16:] = True
    everything = tiny.request(range(6))
    vq, free = baseline.vqgan.encode(images), cells(region[None], (4, 4))[0]
    for tokens, kept in (
        (edit_region(baseline, images, region, everything), ~free),
        (continue_rows(baseline, images, 2, everything), torch.arange(16) < 8),
    ):
        assert tokens.semantic is None
        assert torch.equal(tokens.vq[:, kept], vq[:, kept])
        assert not torch.equal(tokens.vq, vq)
    assert (vary(baseline, images, 0.25, everything).vq != vq).sum(1).max() <= 4


def test_wrong_requests_are_explained(pipe, images, tmp_path):
    asked = tiny.request(range(6))
    nothing = torch.zeros(tiny.SIZE, tiny.SIZE, dtype=torch.bool)
    for call, message in [
        (lambda: edit_region(pipe, images, nothing, asked), "marks nothing"),
        (lambda: continue_rows(pipe, images, 4, asked), "4 rows were given to continue from; this model's grid has 4"),
        (lambda: vary(pipe, images, 0.0, asked), "A fraction of 0.0"),
        (
            lambda: edit_images(pipe, [tmp_path] * 6, images, tmp_path, 1, asked, [0, 1], fraction=0.5),
            "2 labels were given for 6 images",
        ),
    ]:
        with pytest.raises(DigitError, match=message):
            call()
