from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny
from digit.data.dataset import ImageDataset, open_dataset
from digit.data.token_cache import TokenCache, Views, build_token_cache


@pytest.fixture(scope="session")
def token_cache(cifar512: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """The 512 images as 4 x 4 semantic tokens of 12 and 4 x 4 VQ tokens of 20, in two views and two shards."""
    cache = build_token_cache(
        tiny.pipeline(), open_dataset(cifar512), tmp_path_factory.mktemp("tokens") / "cache", Views(), shard_size=300
    )
    assert cache is not None
    return cache


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on two threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(cifar512: Path) -> ImageDataset:
    """Real photographs, as a dataset."""
    return open_dataset(cifar512)
