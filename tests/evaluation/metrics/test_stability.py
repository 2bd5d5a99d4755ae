import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from digit.core.errors import DigitError
from digit.core.images import to_tensor
from digit.evaluation import paper
from digit.evaluation.metrics.noise import Change, NoiseModel, add_noise
from digit.evaluation.metrics.stability import NOISE, OTHERS, Estimate, Stability, stability
from digit.evaluation.model_source import open_images
from digit.evaluation.results import Result


@pytest.fixture(scope="module")
def images(cifar512):
    return open_images(cifar512, num=48)


def test_agrees_with_counting_by_hand(pipe, cifar512):
    """One level, image by image, in plain numpy: nearest code by brute force, means over positions, interval over
    images."""
    images = open_images(cifar512, num=8)
    law, change = NoiseModel(seed=5, signal="variance", clip=False), Change(kind="noise", level=10)
    rows = {row.space: row for row in stability(pipe, images, [change], law, batch_size=7).values}
    found = {"semantic": [], "vq": []}
    for number in range(len(images)):
        clean = to_tensor(images[number].image)[None]
        noisy = add_noise(clean, 10, [number], law)
        spaces = {"semantic": (pipe.encoder, pipe.codebook.centroids), "vq": (pipe.vqgan.latents, pipe.vqgan.codebook)}
        for name, (encode, codes) in spaces.items():
            a, b = (encode(x)[0].detach().double().numpy() for x in (clean, noisy))
            c = codes.detach().double().numpy()
            old, new = (np.square(x[:, None] - c[None]).sum(-1).argmin(1) for x in (a, b))

            def cosine(x, y):
                return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)

            found[name].append([(old != new).mean(), cosine(a, b).mean(), cosine(c[old], c[new]).mean()])
            c = c - c.mean(0)
            found[name][-1].append(cosine(c[old], c[new]).mean())
    for name, row in rows.items():
        values = np.array(found[name])
        for column, estimate in enumerate((row.changed, row.cosine_features, row.cosine_codes, row.cosine_centred)):
            half = 1.96 * values[:, column].std(ddof=1) / math.sqrt(8)
            assert estimate.mean == pytest.approx(values[:, column].mean(), abs=1e-5)
            assert estimate.high - estimate.mean == pytest.approx(half, abs=1e-5)
        assert row.realised_snr == pytest.approx(10, abs=0.3)


def test_nothing_done_changes_nothing(pipe, images):
    quiet = [Change(kind="noise", level=math.inf), Change(kind="shift", level=0), Change(kind="brightness", level=1)]
    for row in stability(pipe, images, quiet).values:
        assert row.changed == Estimate(0, 0, 0)
        assert row.cosine_features.mean == pytest.approx(1, abs=1e-6)
        assert row.cosine_codes.mean == pytest.approx(1, abs=1e-6)
        assert row.cosine_centred.mean == pytest.approx(1, abs=1e-6)
        assert row.realised_snr is None


def test_more_noise_changes_more(pipe, images):
    rows = stability(pipe, images, NOISE).values
    for space in ("semantic", "vq"):
        mine = [row for row in rows if row.space == space]
        assert [row.change.level for row in mine] == list(paper.SNRS)
        changed, cosine = [row.changed.mean for row in mine], [row.cosine_features.mean for row in mine]
        assert 0 < changed[0] < changed[-1] <= 1
        assert cosine[0] > cosine[-1]
        assert all(row.changed.low <= row.changed.mean <= row.changed.high for row in mine)


def test_batch_size_does_not_matter(pipe, images):
    changes = [NOISE[2], *OTHERS[:1]]
    one, other = (stability(pipe, images, changes, batch_size=size).values for size in (20, 48))
    for a, b in zip(one, other, strict=True):
        assert a.changed.mean == pytest.approx(b.changed.mean, abs=1e-3)  # a near tie may fall otherwise
        assert a.cosine_features.mean == pytest.approx(b.cosine_features.mean, abs=1e-5)


def test_one_kind_of_tokens_is_enough(pipe, vq_pipe, images):
    assert {row.space for row in stability(vq_pipe, images, NOISE[:1]).values} == {"vq"}
    semantic = stability(pipe.with_parts(vqgan=None, decoders={}), images, NOISE[:1])
    assert {row.space for row in semantic.values} == {"semantic"}


def test_the_papers_table_stands_beside_ours(pipe, images):
    result = stability(pipe, images, [NOISE[0], NOISE[7], Change(kind="noise", level=12)])
    found = {(row.space, row.level): row.paper_value("changed") for row in result.values}
    assert found["vq", 30] == 0.187
    assert found["semantic", 0.01] == 0.721
    assert found["vq", 12] is None
    first = result.values[0]
    assert first.paper_value("cosine_codes") == first.paper_value("cosine_features") == 0.975
    table = {(row["Tokens"], row["Change"]): row for row in result.rows()}
    assert table["VQ tokens", "noise at 30 dB"]["Paper: changed"] == 0.187
    assert table["VQ tokens", "noise at 12 dB"]["Paper: cosine"] is None


def test_a_saved_result_says_how_it_was_measured_and_opens_again(pipe, images, tmp_path):
    saved = stability(pipe, images, [NOISE[0], NOISE[4], *OTHERS], NoiseModel(clip=False)).save(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["noise"] == {"signal": "power", "clip": False, "seed": 0}
    assert result["data"]["images"] == 48
    assert len(result["values"]) == 2 * (2 + len(OTHERS))
    assert result["values"][0].keys() >= {"space", "kind", "level", "realised_snr", "changed", "cosine_centred"}
    assert result["model"]["parts"]["encoder"]["parameters"] > 0
    assert "not clipped" in result["notes"][0]
    assert result["plots"] == ["stability.png"]
    assert Image.open(tmp_path / "stability.png").width > 1200
    again = Result.load(tmp_path / "result.json")
    assert isinstance(again, Stability)
    assert again.values == saved.values
    assert again.rows() == saved.rows()
    assert "model tiny" in again.provenance()
    assert "48 images" in again.provenance()


def test_too_little_is_explained(pipe, cifar512):
    with pytest.raises(DigitError, match="at least 2"):
        stability(pipe, open_images(cifar512, num=1))
    with pytest.raises(DigitError, match="makes no tokens"):
        stability(pipe.with_parts(vqgan=None, decoders={}, codebook=None), open_images(cifar512, num=2))
    with pytest.raises(DigitError, match="has 512"):
        open_images(cifar512, num=600)


def test_part_of_a_dataset_is_spread_over_it(cifar512):
    part, whole = open_images(cifar512, num=64), open_images(cifar512)
    assert [part[i].key for i in range(64)] == [whole[8 * i].key for i in range(64)]
    assert len(set(part.labels)) == 10


def test_interval_covers_the_mean_of_a_known_distribution():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(1000):
        estimate = Estimate.of(torch.rand(200, generator=generator, dtype=torch.float64))
        hits += estimate.low <= 0.5 <= estimate.high
    assert 925 <= hits <= 975  # 95% of 1,000, give or take
