"""Batches that fit memory: measured, and halved when they do not fit after all."""

import pytest
import torch

from digit.core import batching
from digit.core.batching import PROBE, Batcher, is_out_of_memory
from digit.core.errors import DigitError

CPU = torch.device("cpu")
MB = 1 << 20


def run(batcher, count, work):
    return list(batcher.run(range(count), work))


def test_the_first_batch_is_measured_and_sizes_the_rest(monkeypatch):
    """Real allocations of 16 MB an image; with room for 50 images the batch is the multiple of 8 below 0.8 * 50."""
    monkeypatch.setattr(batching, "available", lambda device: 50 * 16 * MB)
    batcher = Batcher(CPU, None, lambda: None)
    sizes = run(batcher, 200, lambda images: torch.ones(len(images) * 16 * MB // 4).sum() and None)
    assert sizes[0] == PROBE
    assert batcher.size in (32, 40)
    assert sum(sizes) == 200


def test_where_memory_is_plenty_the_limit_holds():
    batcher = Batcher(CPU, None, lambda: None)
    assert run(batcher, 100, lambda images: None) == [8, 64, 28]


def test_a_given_size_is_used():
    seen = []
    assert run(Batcher(CPU, 3, lambda: None), 7, seen.append) == [3, 3, 1]
    assert [list(part) for part in seen] == [[0, 1, 2], [3, 4, 5], [6]]


def test_out_of_memory_halves_the_batch_and_goes_on(caplog):
    """The failing allocation is real: more than any machine has."""
    done, released = [], []

    def work(images):
        if len(images) > 5:
            torch.empty(1 << 60, dtype=torch.uint8)
        done.extend(images)

    batcher = Batcher(CPU, 20, lambda: released.append(True))
    assert run(batcher, 23, work) == [5, 5, 5, 5, 3]
    assert done == list(range(23))
    assert len(released) == 2
    assert "A batch of 20 images does not fit into memory; going on with 10 at a time." in caplog.text


def test_the_measured_batch_may_fail_too():
    def work(images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert run(Batcher(CPU, None, lambda: None), 10, work) == [2] * 5


def test_when_not_even_one_fits_it_says_so():
    def work(images):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(DigitError, match="Not even one image at a time fits into the memory of cpu"):
        run(Batcher(CPU, 4, lambda: None), 10, work)


def test_other_errors_are_not_hidden():
    def work(images):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(Batcher(CPU, 4, lambda: None), 10, work)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("x"))
