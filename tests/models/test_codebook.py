import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digit.core.errors import DigitError
from digit.encoders import small_conv
from digit.models import codebook as module
from digit.models.codebook import Codebook, nearest
from digit.pipeline.tokenizer import SemanticTokenizer


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_nearest_is_the_brute_force_one(points, clusters, dim, seed):
    torch.manual_seed(seed)
    x, c = torch.randn(points, dim), torch.randn(clusters, dim)
    ids = nearest(x, c)
    assert ids.dtype == torch.int64
    distances = torch.cdist(x.double(), c.double())
    assert torch.allclose(distances.gather(1, ids[:, None])[:, 0], distances.amin(1), atol=1e-4)


def test_ties_go_to_the_lowest_id():
    c = torch.tensor([[5.0, 5], [1, 0], [0, 1], [1, 0], [-1, 0]])
    assert nearest(torch.tensor([[1.0, 0], [0, 0], [0.5, 0.5]]), c).tolist() == [1, 1, 1]


def test_chunks_do_not_show_and_bound_memory(monkeypatch):
    torch.manual_seed(0)
    x, c = torch.randn(3, 50, 6), torch.randn(70, 6)
    whole = nearest(x, c)
    assert whole.shape == (3, 50)
    sizes = []
    argmin = torch.Tensor.argmin
    monkeypatch.setattr(torch.Tensor, "argmin", lambda self, *a: sizes.append(self.numel()) or argmin(self, *a))
    for limit in (1, 70, 700, 1 << 24):
        sizes.clear()
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", limit)
        assert torch.equal(nearest(x, c), whole)
        # a row of K distances is the least that can be held
        assert max(sizes) <= max(limit, 70)


def test_half_precision_rounds_and_float_does_not():
    # |x|^2 is near 4,096, where halves step by 4: two centroids that differ by less fall together, and the lower id
    # wins
    x = torch.full((1, 64), 8.0)
    far, near = torch.full((64,), 8.0), torch.full((64,), 8.0)
    far[0], near[0] = 8.5, 8.25
    c = torch.stack([far, near])
    assert nearest(x, c).tolist() == [1]
    assert nearest(x, c, half=True).tolist() == [0]
    assert Codebook.from_centroids(c).assign(x).tolist() == [1]
    assert Codebook.from_centroids(c, half_precision=True).assign(x).tolist() == [0]


def test_assignment_is_float32_whatever_comes_in():
    torch.manual_seed(0)
    book = Codebook.from_centroids(torch.randn(300, 8))
    x = torch.randn(40, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(book.assign(x), nearest(x.float(), book.centroids))


def test_codebook_of_the_wrong_width():
    book = Codebook.from_centroids(torch.zeros(4, 7))
    with pytest.raises(DigitError, match="8 wide and the codebook 7"):
        book.assign(torch.zeros(2, 8))
    with pytest.raises(DigitError, match="feature width is 192 in the encoder and 7 in the codebook"):
        SemanticTokenizer(small_conv(), book)


def test_saved_is_loaded(tmp_path):
    torch.manual_seed(0)
    book = Codebook.from_centroids(torch.randn(9, 5), {"seed": 3}, half_precision=True)
    book.save_pretrained(tmp_path / "codebook")
    loaded = Codebook.from_pretrained(tmp_path / "codebook")
    assert torch.equal(loaded.centroids, book.centroids)
    assert loaded.config == book.config
    assert loaded.provenance == {"seed": 3}
    assert torch.equal(loaded.lookup(torch.tensor([[2, 0]])), book.centroids[[2, 0]][None])
