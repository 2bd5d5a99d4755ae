"""Several residual tokens a place, all the way: codebook, cache, prior, decoders, images, and editing them."""

from pathlib import Path

import pytest
import torch

import tiny
from digit import DigitPipeline
from digit.clustering.discretisers import Discretisation
from digit.clustering.kmeans import fit_codebook
from digit.core.config import load_preset
from digit.core.errors import DigitError
from digit.data.dataset import open_dataset
from digit.data.token_cache import TokenCache, Views, build_token_cache, open_token_cache
from digit.evaluation.model_source import image_batches
from digit.models.feedforward import FeedForwardDecoder
from digit.models.token_model import TokenModel
from digit.pipeline.editing import continue_rows, edit_region
from digit.training.auxiliary import neighbours
from digit.training.build import build_task
from digit.training.logs import read_metrics
from digit.training.loop import train

K, DEPTH = 8, 2
SMALL = ["model.transformer.dim=32", "model.transformer.depth=2", "model.transformer.heads=2"]
SHORT = ["training.steps=40", "training.warmup_steps=5", "training.batch_size=16", "training.log_every=1"]


@pytest.fixture(scope="module")
def parts(cifar512: Path) -> DigitPipeline:
    """A tiny encoder, a codebook of 2 x 8 centroids, a VQGAN."""
    encoder = tiny.encoder()
    batches = image_batches(open_dataset(cifar512).subset(range(64)), 32, 32)
    kind = Discretisation(kind="residual", depth=DEPTH)
    book = fit_codebook(encoder, [batch.images for batch in batches], K, discretiser=kind, show=False)
    return DigitPipeline(encoder=encoder, codebook=book, vqgan=tiny.vqgan())


@pytest.fixture(scope="module")
def cache(parts: DigitPipeline, cifar512: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    folder = tmp_path_factory.mktemp("residual") / "cache"
    build_token_cache(parts, open_dataset(cifar512), folder, Views())
    return open_token_cache(folder)


def trained(preset: str, component: str, data: Path, out: Path, *more: str, **given) -> Path:
    task, config = build_task(component, load_preset(preset, [*SMALL, *SHORT, *more]), data, preset, **given)
    folder = train(task, config, out, device="cpu", show=False)
    losses = [line["loss"] for line in read_metrics(out) if "loss" in line]
    assert sum(losses[-5:]) < sum(losses[:5])
    return folder


def test_from_images_to_images(parts: DigitPipeline, cache: TokenCache, cifar512: Path, tmp_path: Path) -> None:
    space = cache.space("semantic")
    assert (space.vocab_size, space.grid, space.depth) == (2 * K, (4, 8), DEPTH)
    prior = TokenModel.from_pretrained(trained("cifar10-tiny-prior-cond", "prior", cache.folder, tmp_path / "prior"))
    assert (prior.config.codebook_depth, prior.config.vocab_size, prior.config.length) == (DEPTH, 2 * K, 32)
    ar = TokenModel.from_pretrained(trained("cifar10-tiny-ar", "decoder", cache.folder, tmp_path / "ar"))
    changes = ["data.held_out_split=null", "data.held_out=51", "training.batch_size=8", "training.steps=12"]
    changes += ["model.pixels.patch=2", "model.pixels.widths=[16,8,8]"]
    folder = trained("cifar10-tiny-onepass", "decoder", cifar512, tmp_path / "onepass", *changes, parts=parts)
    onepass = FeedForwardDecoder.from_pretrained(folder)
    assert (onepass.config.codebook_depth, onepass.config.prefix_length) == (DEPTH, 32)
    made = parts.with_parts(prior=prior, decoders={"ar": ar, "onepass": onepass}, class_names=cache.classes)
    pipe = DigitPipeline.from_pretrained(made.save_pretrained(tmp_path / "model"))
    for decoder in ("ar", "onepass"):
        images = pipe(labels=[0, 3, 5], seed=1, decoder=decoder, cfg_scale=2.0)
        assert [image.size for image in images] == [(32, 32)] * 3
    tokens = pipe.sample_tokens(tiny.request(range(6), [0] * 6, 1)).semantic  # (6, 32)
    assert torch.equal(tokens // K, torch.arange(DEPTH).repeat(16).expand(6, -1))

    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    region = torch.zeros(32, 32, dtype=torch.bool)
    region[9, 9] = True  # one pixel: both tokens of its place, and no other
    given = pipe.tokenizer.encode(pixels)
    edited = edit_region(pipe, pixels, region, tiny.request(range(2), [1, 2], decoder="ar")).semantic
    where = (edited != given).any(0).nonzero().flatten().tolist()
    assert set(where) <= {10, 11}
    assert where
    assert torch.equal(continue_rows(pipe, pixels, 2, tiny.request(range(2), [1, 2])).semantic[:, :16], given[:, :16])


def test_validation_asks_the_right_depth(cache: TokenCache) -> None:
    """An untrained prior knows of each token which of its range it is not: its perplexity is near K, not 2 K."""
    task, _ = build_task("prior", load_preset("cifar10-tiny-prior", [*SMALL, *SHORT]), cache.folder, "test")
    task.modules.eval()
    assert task.validate()["perplexity"] == pytest.approx(K, rel=0.05)


def test_neighbours_are_of_the_same_depth(parts: DigitPipeline) -> None:
    found = neighbours(parts.codebook.centroids, 3, DEPTH)  # (16, 3)
    assert torch.equal(found // K, torch.arange(2 * K)[:, None].expand(-1, 3) // K)
    first = torch.cdist(parts.codebook.tables[1], parts.codebook.tables[1]).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(found[K:, 0] - K, first)


def test_refusals(cache: TokenCache) -> None:
    for change, message in (
        ("model.role=random", "expected role prior, not 'random'"),
        ("model.codebook_depth=1", "codebook_depth = 1"),
    ):
        values = load_preset("cifar10-tiny-prior", [*SMALL, *SHORT, change])
        with pytest.raises(DigitError, match=message):
            build_task("prior", values, cache.folder, "test")
