"""What the first edition wrote (commit f5d9f53: a dataset of two shards, and a token cache of it) still opens."""

import json
from pathlib import Path

import numpy as np

from digit.data.dataset import open_dataset
from digit.data.token_cache import open_token_cache

FOLDER = Path(__file__).parent / "first_edition"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())  # what that commit read from them


def test_datasets():
    for split, fingerprint in EXPECTED["fingerprints"].items():
        dataset = open_dataset(FOLDER / "dataset", split)
        dataset.verify()
        assert dataset.fingerprint == fingerprint
        assert dataset.classes == ("cats", "dogs")
        assert dataset.labels.tolist() == EXPECTED["labels"][split]
        assert [int(np.asarray(s.image, dtype=np.int64).sum()) for s in dataset] == EXPECTED["pixel_sums"][split]


def test_token_caches():
    cache = open_token_cache(FOLDER / "tokens")
    cache.verify()
    assert cache.fingerprint == EXPECTED["cache"]
    assert cache.views == ["center", "flip", "crop0"]
    assert cache.labels.tolist() == EXPECTED["cache_labels"]
    for kind, tokens in EXPECTED["tokens"].items():
        assert cache.tokens(kind, np.arange(len(cache)), 2).tolist() == tokens
