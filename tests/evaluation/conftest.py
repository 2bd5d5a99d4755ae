import os

import metric_weights
import pytest
import torch
from torch import nn

import tiny
from digit.core.files import cache_folder
from digit.evaluation.metrics.inception import PUBLISHED, Activations, InceptionWeights, untrained
from digit.evaluation.model_source import image_batches, open_images
from digit.evaluation.studies.points import Reference
from digit.models.codebook import Codebook
from digit.pipeline.pipeline import DigitPipeline

USERS_CACHE = os.environ.get("DIGIT_CACHE")


@pytest.fixture
def users_cache(monkeypatch):
    """The user's own cache with the FID network in it, so that network tests download once and not at every run."""
    if USERS_CACHE is None:
        monkeypatch.delenv("DIGIT_CACHE")
    else:
        monkeypatch.setenv("DIGIT_CACHE", USERS_CACHE)
    if not any((cache_folder() / name).is_file() for name in PUBLISHED.cached):
        metric_weights.cache_inception()


class PoolingExtractor:
    """A small real network in place of InceptionV3: 4 x 4 average pooling, 48 features, a fixed linear classifier, and
    12 spatial features from 2 x 2 pooling.
    """

    width = 48
    backend = "pooling"

    def __init__(self, head: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        classifier = torch.randn(10, 48, generator=generator)
        self.weights = InceptionWeights({"fc.weight": classifier} if head else {}, "pooling", "0" * 64)

    def __call__(self, images):
        features, spatial = (nn.functional.adaptive_avg_pool2d(images.float() / 255, n).flatten(1) for n in (4, 2))
        logits = features @ self.weights.tensors["fc.weight"].T if self.weights.has_head else None
        return Activations(features, logits, spatial)


@pytest.fixture(scope="session")
def pooling():
    return PoolingExtractor()


@pytest.fixture
def pooling_without_head():
    return PoolingExtractor(head=False)


@pytest.fixture(scope="session")
def random_inception() -> InceptionWeights:
    """InceptionV3 of the real layout with random weights that keep the scale of the activations."""
    torch.manual_seed(0)
    network = untrained(["2048"])
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return InceptionWeights.of(network.state_dict(), "random")


@pytest.fixture(scope="session")
def small_images() -> torch.Tensor:
    """(8, 3, 32, 48) uint8, smooth enough to differ after pooling; not square, so that a swapped axis shows."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(8, 3, 4, 6, generator=generator)
    return (nn.functional.interpolate(coarse, (32, 48), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


# ---- a tiny model whose codebooks are drawn from real features -------------------------------------------------------


def with_real_codes(pipe, cifar512):
    """Random centroids lie far from all features, and one of them would take every token."""
    images = torch.cat([batch.images for batch in image_batches(open_images(cifar512, num=32), tiny.SIZE, 32)])
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        latents = pipe.vqgan.latents(images).flatten(0, 1)
        pipe.vqgan.codebook.data = latents[torch.randperm(len(latents), generator=generator)[: tiny.CODES]].clone()
        if pipe.encoder is not None:
            features = pipe.encoder(images).flatten(0, 1)
            chosen = features[torch.randperm(len(features), generator=generator)[: tiny.CLUSTERS]]
            pipe = pipe.with_parts(codebook=Codebook.from_centroids(chosen))
    return pipe


@pytest.fixture(scope="session")
def pipe(cifar512):
    """Semantic tokens, ten classes, both decoders, random weights."""
    parts = {"prior": tiny.token_model("prior", num_classes=10), "class_names": []}
    return with_real_codes(tiny.pipeline().with_parts(**parts), cifar512)


@pytest.fixture(scope="session")
def vq_pipe(cifar512):
    """The baseline: the prior predicts VQ tokens."""
    prior = tiny.token_model("prior", num_classes=10, vocab_size=tiny.CODES)
    return with_real_codes(DigitPipeline(vqgan=tiny.vqgan(), prior=prior, space="vq", name="tiny-vq"), cifar512)


@pytest.fixture(scope="session")
def model_folder(pipe, tmp_path_factory):
    return pipe.save_pretrained(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def reference(request, cifar512, pooling):
    """The real images, measured as the ``OPTIONS`` of a test file say."""
    return Reference.of(str(cifar512), pooling, request.module.OPTIONS)
