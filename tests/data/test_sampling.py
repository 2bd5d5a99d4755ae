import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digit.core.errors import DigitError
from digit.core.transforms import Transform
from digit.data.dataset import open_dataset
from digit.data.sampling import Batches, OrderedSampler, StepSampler, sample_rng


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_every_epoch_is_a_permutation(length, batch, seed):
    sampler = StepSampler(length, batch, seed)
    steps = -(-3 * length // batch)
    stream = np.concatenate([sampler.indices(step) for step in range(steps)])
    epochs = np.concatenate([sampler.epochs(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epochs == epoch].tolist()[:length]) == list(range(length))
    assert (np.diff(epochs) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 200),
    share=st.integers(1, 8),
    world=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    step=st.integers(0, 10**6),
)
def test_ranks_share_the_batch_of_one_process(length, share, world, seed, step):
    whole = StepSampler(length, share * world, seed).indices(step)
    parts = [StepSampler(length, share * world, seed, rank, world).indices(step) for rank in range(world)]
    assert all(len(part) == share for part in parts)
    assert np.concatenate(parts).tolist() == whole.tolist()


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 100), batch=st.integers(1, 30), seed=st.integers(0, 2**31), steps=st.permutations(range(12))
)
def test_indices_are_a_pure_function_of_the_step(length, batch, seed, steps):
    """Asking in any order, of any object, gives the same."""
    fresh = {step: StepSampler(length, batch, seed).indices(step).tolist() for step in range(12)}
    one = StepSampler(length, batch, seed)
    assert all(one.indices(step).tolist() == fresh[step] for step in steps)


def test_seeds_and_epochs_differ():
    a, b = StepSampler(1000, 1000, 0), StepSampler(1000, 1000, 1)
    assert not np.array_equal(a.indices(0), b.indices(0))
    assert not np.array_equal(a.indices(0), a.indices(1))


def test_permutations_are_frozen():
    """A run that is resumed under a later release must go on with the same images."""
    assert StepSampler(10, 6, seed=3).indices(0).tolist() == FROZEN_INDICES
    assert sample_rng(1, 2, 3).integers(1000, size=4).tolist() == FROZEN_DRAWS


FROZEN_INDICES = [9, 6, 0, 2, 1, 4]
FROZEN_DRAWS = [787, 115, 682, 592]


@pytest.mark.parametrize("arguments", [(0, 4, 0), (10, 0, 0), (10, 5, 0, 0, 2), (10, 4, 0, 2, 2)])
def test_impossible_samplers_are_refused(arguments):
    with pytest.raises(DigitError):
        StepSampler(*arguments)


def test_ordered_sampler_passes_once():
    sampler = OrderedSampler(10, 4)
    assert sampler.steps == 3
    assert [sampler.indices(step).tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_sample_rng_streams_are_distinct_and_repeat():
    triples = list(itertools.product(range(3), repeat=3))
    draws = {triple: tuple(sample_rng(*triple).random(4)) for triple in triples}
    assert len(set(draws.values())) == len(triples)
    assert all(tuple(sample_rng(*triple).random(4)) == drawn for triple, drawn in draws.items())
    # neighbouring streams are not correlated
    x = np.array([sample_rng(0, 0, i).random(64) for i in range(400)])
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 0.03
    assert abs(x.mean() - 0.5) < 0.01


@pytest.mark.parametrize("crop", ["center", "random-resized"])
@pytest.mark.parametrize("decoded", [True, False])
def test_batches_are_the_same_for_any_number_of_workers(cifar512, crop, decoded):
    dataset = open_dataset(cifar512)
    if not decoded:
        dataset.image_size = None  # as of a folder: each image is read and decoded when it is needed
    sampler = StepSampler(len(dataset), 48, seed=1)
    transform = Transform(size=24, crop=crop, flip=True)
    runs = [
        list(Batches(dataset, sampler, transform, 7, start=8, stop=14, workers=workers, prefetch=1))
        for workers in (0, 1, 5)
    ]
    assert len(runs[0]) == 6
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.indices, b.indices)


def test_batches_do_not_depend_on_the_number_of_processes(cifar512):
    dataset = open_dataset(cifar512)
    transform = Transform(size=32, crop="random-resized", flip=True)
    whole = Batches(dataset, StepSampler(512, 64, 0), transform, seed=3).batch(9)
    parts = [Batches(dataset, StepSampler(512, 64, 0, rank, 4), transform, seed=3).batch(9) for rank in range(4)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_a_run_can_start_anywhere(cifar512):
    dataset, sampler, transform = open_dataset(cifar512), StepSampler(512, 32, 0), Transform(size=32, flip=True)
    whole = list(Batches(dataset, sampler, transform, stop=20))
    rest = list(Batches(dataset, sampler, transform, start=13, stop=20))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[13:], rest, strict=True))


def test_batches_carry_the_right_images(cifar512):
    dataset = open_dataset(cifar512)
    pixels, labels = dataset.arrays()
    seen = []
    for batch in Batches(dataset, OrderedSampler(len(dataset), 100), Transform(size=32), dtype=torch.uint8):
        assert batch.images.dtype == torch.uint8
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), pixels[batch.indices])
        assert np.array_equal(batch.labels, labels[batch.indices])
        seen += batch.indices.tolist()
    assert seen == list(range(512))
    first = next(iter(Batches(dataset, OrderedSampler(8, 8), Transform(size=32))))
    assert first.images.dtype == torch.float32
    assert torch.equal(first.images, torch.from_numpy(pixels[:8]).permute(0, 3, 1, 2) / 255)


def test_the_augmentation_changes_from_epoch_to_epoch(cifar512):
    dataset = open_dataset(cifar512).subset(range(16))
    batches = Batches(dataset, StepSampler(16, 16, 0), Transform(size=32, crop="random-resized"), stop=2)
    first, second = ({int(i): image for i, image in zip(b.indices, b.images, strict=True)} for b in batches)
    assert all(not torch.equal(first[i], second[i]) for i in range(16))


def test_an_endless_iteration_can_be_left(cifar512):
    dataset = open_dataset(cifar512)
    for count, batch in enumerate(Batches(dataset, StepSampler(512, 16, 0), Transform(size=32))):
        assert len(batch.labels) == 16
        if count == 50:
            break


def test_an_error_in_a_worker_reaches_the_caller(cifar512, tmp_path):
    from PIL import Image

    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"broken")
    with pytest.raises(DigitError, match=r"b\.png is not an image"):
        list(Batches(open_dataset(tmp_path), OrderedSampler(3, 1), Transform(size=8)))
