import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from digit.clustering.discretisers import Discretisation
from digit.core.errors import DigitError
from digit.evaluation.metrics.probe import split_off
from digit.evaluation.metrics.stability import NOISE, stability
from digit.evaluation.model_source import image_batches, open_images
from digit.evaluation.studies.ranking import candidates, rank_tokens
from digit.evaluation.studies.stages import Stages
from digit.models.codebook import Codebook
from digit.pipeline.pipeline import DigitPipeline
from digit.training.tasks.encoder import neighbour_accuracy


@pytest.fixture(scope="module")
def stages(cifar512, tmp_path_factory):
    train, test = split_off(open_images(cifar512, num=192), 0.25)
    return Stages(tmp_path_factory.mktemp("tokens"), train, test, batch_size=50, given_device="cpu")


def pixels(dataset):
    return torch.cat([batch.images for batch in image_batches(dataset, 32, 64)])


def patches(images):
    """(B, 16, 192) by slicing, row by row."""
    cut = [images[:, :, y : y + 8, x : x + 8].flatten(1) for y in range(0, 32, 8) for x in range(0, 32, 8)]
    return torch.stack(cut, 1).double().numpy()


def test_agrees_with_plain_numpy(pipe, stages):
    """Every column by hand: residual tokens of depth 2, ridge regression over the whole matrix at once."""
    kind = Discretisation(kind="residual", depth=2)
    entries = candidates({"a": pipe}, [8], stages, [kind, Discretisation()])
    assert list(entries) == ["a, K = 8, residual, depth 2", "a, K = 8, kmeans"]
    found = {line["name"]: line for line in rank_tokens(entries, stages).values}
    line, book = found["a, K = 8, residual, depth 2"], entries["a, K = 8, residual, depth 2"].codebook
    sides = [pixels(images) for images in (stages.train_images, stages.test_images)]
    tokens = [book.assign(pipe.encoder(x)) for x in sides]  # (B, 16, 2)
    codes = [sum(book.tables[d][ids[..., d]] for d in (0, 1)) for ids in tokens]
    shares = [np.bincount(tokens[0][..., d].flatten(), minlength=8) / tokens[0][..., d].numel() for d in (0, 1)]
    entropies = [-sum(p * math.log2(p) for p in share if p) for share in shares]
    assert (line["vocabulary"], line["tokens"]) == (8, 32)
    assert line["usage"] == pytest.approx(np.mean(np.stack(shares) > 0))
    assert line["entropy"] == pytest.approx(np.mean(entropies), abs=1e-6)
    assert line["bits_per_image"] == pytest.approx(16 * sum(entropies), abs=1e-4)
    x, y = codes[0].flatten(0, 1).double().numpy(), patches(sides[0]).reshape(-1, 192)
    mx, my = x.mean(0), y.mean(0)
    penalty = 1e-3 * np.square(x - mx).mean() * len(x)
    weights = np.linalg.solve((x - mx).T @ (x - mx) + penalty * np.eye(x.shape[1]), (x - mx).T @ (y - my))
    truth = patches(sides[1])
    decoded = (codes[1].double().numpy() - mx) @ weights + my
    ratio = np.square(truth - my).sum() / np.square(truth - decoded).sum()
    assert line["worth"] == pytest.approx(3 * 32 * 32 / 2 * math.log2(ratio) / line["bits_per_image"], rel=1e-3)
    rounded = np.round(decoded.clip(0, 1) * 255) - np.round(truth * 255)
    errors = np.square(rounded).mean((1, 2))
    assert line["psnr"] == pytest.approx(float((10 * np.log10(255**2 / errors)).mean()), abs=1e-2)
    labels = [torch.as_tensor(images.labels) for images in (stages.train_images, stages.test_images)]
    expected = neighbour_accuracy(codes[0].mean(1), labels[0], codes[1].mean(1), labels[1])
    assert line["knn"] == pytest.approx(expected, abs=0.021)  # one image of 48, whose neighbours tie
    rows = stability(entries["a, K = 8, kmeans"], stages.test_images, NOISE).values
    assert list(found["a, K = 8, kmeans"]["changed_by_level"].values()) == pytest.approx([r.changed.mean for r in rows])


def test_more_bits_decode_better_and_nothing_is_done_twice(pipe, vq_pipe, stages, tmp_path, monkeypatch):
    fine, coarse = candidates({"a": pipe}, [2, 48], stages).values()
    constant = Codebook.from_centroids(
        torch.stack([torch.zeros(fine.codebook.config.dim), torch.full((fine.codebook.config.dim,), 1e6)])
    )
    entries = {
        "constant": fine.with_parts(codebook=constant),
        "coarse": fine,
        "fine": coarse,
        **candidates({"b": vq_pipe}, [], stages),
    }
    ranking = rank_tokens(entries, stages).save(tmp_path)
    lines = {line["name"]: line for line in ranking.values}
    assert [line["worth"] for line in ranking.values] == sorted((v["worth"] for v in lines.values()), reverse=True)
    assert lines["constant"]["psnr"] < lines["coarse"]["psnr"] < lines["fine"]["psnr"]
    assert lines["constant"]["bits_per_image"] == 0 == lines["constant"]["worth"] == lines["constant"]["changed"]
    assert lines["b, 20 VQ codes"]["vocabulary"] == 20
    assert lines["fine"]["changed"] > lines["coarse"]["changed"] > 0
    assert json.loads((tmp_path / "result.json").read_text())["values"] == ranking.values
    assert len(ranking.rows()) == 4
    assert Image.open(tmp_path / "screen.png").width > 900
    monkeypatch.setattr("digit.evaluation.studies.ranking.measure", lambda *_: pytest.fail("done twice"))
    assert rank_tokens(entries, stages).values == ranking.values


def test_images_without_classes_and_grids_that_do_not_fit(pipe, stages, monkeypatch):
    images = stages.train_images.subset(range(20))
    images.labels = np.full(20, -1)
    other = Stages(stages.out / "unlabelled", images, images, given_device="cpu")
    tokenizer = DigitPipeline(encoder=pipe.encoder, codebook=pipe.codebook)
    ranking = rank_tokens({"a": tokenizer}, other)
    assert ranking.values[0]["knn"] is None
    assert "k-NN, % ↑" not in ranking.rows()[0]
    monkeypatch.setattr(pipe.encoder, "grid", (5, 5))
    with pytest.raises(DigitError, match="32 px cannot be cut into 5 x 5 patches"):
        rank_tokens({"a": tokenizer.with_parts(codebook=Codebook.from_centroids(torch.zeros(3, 16)))}, other)
