"""The k-NN check of the probe against scikit-learn's."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from digit.training.tasks.encoder import neighbour_accuracy


@pytest.fixture(scope="module")
def points():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (400,), generator=generator)
    values = torch.randn(5, 8, generator=generator)[labels] + torch.randn(400, 8, generator=generator)
    return values[:300], labels[:300], values[300:], labels[300:]


@pytest.mark.parametrize("neighbours", [1, 7, 20])
def test_counting_votes_is_scikit_learns(points, neighbours):
    train, labels, queries, truth = points
    reference = KNeighborsClassifier(neighbours, metric="cosine").fit(train.numpy(), labels.numpy())
    expected = reference.score(queries.numpy(), truth.numpy())
    assert neighbour_accuracy(*points, neighbours, math.inf) == pytest.approx(expected, abs=1e-9)


def test_weighted_votes_are_scikit_learns(points):
    train, labels, queries, truth = points
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = reference.fit(train.numpy(), labels.numpy()).score(queries.numpy(), truth.numpy())
    assert neighbour_accuracy(*points, 20, 0.07) == pytest.approx(expected, abs=1e-9)


def test_an_image_is_its_own_nearest_neighbour(points):
    train, labels, *_ = points
    assert neighbour_accuracy(train, labels, train, labels, 1) == 1
