import pytest
import torch
from torch import nn

from digit.evaluation.inception import InceptionWeights, _checked, _network


class PoolingExtractor:
    """A small real network in place of InceptionV3: 4 x 4 average pooling, 48 features, and a fixed linear classifier."""

    width = 48
    backend = "pooling"

    def __init__(self, head: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        classifier = torch.randn(10, 48, generator=generator)
        self.weights = InceptionWeights({"fc.weight": classifier} if head else {}, "pooling", "0" * 64)

    def __call__(self, images):
        features = nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        return features, features @ self.weights.tensors["fc.weight"].T if self.weights.has_head else None


@pytest.fixture
def pooling():
    return PoolingExtractor()


@pytest.fixture
def pooling_without_head():
    return PoolingExtractor(head=False)


@pytest.fixture(scope="session")
def random_inception() -> InceptionWeights:
    """InceptionV3 of the real layout with random weights that keep the scale of the activations."""
    torch.manual_seed(0)
    network = _network(["2048"])
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return _checked(network.state_dict(), "random")


@pytest.fixture(scope="session")
def small_images() -> torch.Tensor:
    """(8, 3, 32, 48) uint8, smooth enough to differ after pooling; not square, so that a swapped axis shows."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(8, 3, 4, 6, generator=generator)
    return (nn.functional.interpolate(coarse, (32, 48), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)
