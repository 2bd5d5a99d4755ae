"""Filters and the draw: properties for any logits, and frequencies against the exact distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from digit.native import NoCompiler, library
from digit.sampling import SamplingParams
from digit.sampling.engines.native import fast_draw
from digit.sampling.logits import draw, guide, kept_probabilities

logits_rows = st.lists(st.floats(-20, 20, width=32, allow_subnormal=False), min_size=2, max_size=40).map(torch.tensor)


def draws() -> list:
    """The plain draw, and the C++ one where it can be built."""
    try:
        library()
    except NoCompiler:
        return [draw]
    return [draw, fast_draw]


def exact(logits: torch.Tensor, s: SamplingParams) -> torch.Tensor:
    """The filtered, normalised distribution by the definition, over ids, in float64; for logits without ties."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i].item())
    if s.top_k:
        order = order[: s.top_k]
    p = (logits[order].double() / s.temperature).softmax(-1)
    before = p.cumsum(-1) - p
    keep = before < s.top_p
    out = torch.zeros(len(logits), dtype=torch.float64)
    out[torch.tensor(order)] = torch.where(keep, p, 0.0)
    return out / out.sum()


def dense(logits: torch.Tensor, s: SamplingParams) -> torch.Tensor:
    p, ids = kept_probabilities(logits, s)
    if ids is None:
        return p / p.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, ids, p / p.sum(-1, keepdim=True))


SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=5),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=0.01),
    SamplingParams(temperature=1.3, top_k=12, top_p=0.6),
    SamplingParams(top_k=1000),
]


@pytest.mark.parametrize("s", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [16, 300])
def test_filtered_distribution_is_the_definition(s, vocab):
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(0)) * 2
    for row in logits:
        torch.testing.assert_close(dense(row, s).double(), exact(row, s), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("draw", draws())
@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_frequencies_fit_the_exact_distribution(s, draw):
    """Chi-square with 200,000 stratified-free draws; p > 1e-4, so that a wrong filter fails and chance does not."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(24, generator=g) * 1.5
    uniform = torch.rand(200_000, generator=g)
    counts = torch.bincount(draw(logits.expand(len(uniform), -1), uniform, s), minlength=24).double()
    p = exact(logits, s)
    assert counts[p == 0].sum() == 0
    kept = p > 0
    if kept.sum() > 1:
        assert chisquare(counts[kept].numpy(), (p[kept] * len(uniform)).numpy()).pvalue > 1e-4


@settings(max_examples=150, deadline=None)
@given(logits_rows, st.integers(0, 50), st.floats(0.01, 1), st.floats(0.1, 5))
def test_kept_tokens_are_the_likeliest_and_enough(row, k, p, temperature):
    s = SamplingParams(temperature=temperature, top_k=k, top_p=p)
    q = dense(row, s)
    kept, cut = q > 0, q == 0
    assert abs(q.sum().item() - 1) < 1e-5
    if k:
        assert kept.sum() <= k
    full = (row / temperature).softmax(-1)
    if cut.any() and kept.any():
        assert row[kept].min() >= row[cut & (full > 0)].max() if (cut & (full > 0)).any() else True
    if not k:  # the mass that top-p asked for is there
        assert full[kept].sum() >= min(p, 1) - 1e-4
    assert kept[row.argmax()] or full[row.argmax()] == full.max()


@settings(max_examples=150, deadline=None)
@given(logits_rows, st.floats(0, 1, exclude_max=True, width=32), st.integers(0, 50), st.floats(0.01, 1))
def test_a_draw_has_probability(row, u, k, p):
    s = SamplingParams(top_k=k, top_p=p)
    token = draw(row[None], torch.tensor([u]), s)
    assert dense(row, s)[token] > 0
    for fast in draws()[1:]:
        token = fast(row[None], torch.tensor([u]), s)
        # of tokens that are equal at the edge, or become so in float32's exponential, either may be kept; and at the
        # edge of top-p rounding decides
        slightly = SamplingParams(top_k=k, top_p=min(1.0, p + 1e-5))
        equal = torch.isclose(row, row[token], rtol=1e-6, atol=1e-6)
        assert (dense(row, slightly) > 0)[equal].any()


@settings(max_examples=60, deadline=None)
@given(logits_rows, st.floats(0, 1, exclude_max=True, width=32))
def test_temperature_zero_and_top_1_take_the_maximum(row, u):
    best = row.max()
    for one in draws():
        assert row[one(row[None], torch.tensor([u]), SamplingParams(temperature=0))] == best
        taken = row[one(row[None], torch.tensor([u]), SamplingParams(top_k=1))]
        assert torch.isclose(
            taken, best, rtol=1e-6, atol=1e-6
        )  # what float32's exponential makes equal is equal to C++


@pytest.mark.parametrize("draw", draws())
def test_the_largest_uniform_stays_inside(draw):
    u = torch.tensor([1 - 2**-24])
    assert draw(torch.zeros(1, 1000), u, SamplingParams()).item() == 999
    assert draw(torch.tensor([[0.0, 0.0, -1e9]]), u, SamplingParams()).item() == 1


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_guidance_may_come_before_the_draw_in_one_call(s):
    g = torch.Generator().manual_seed(0)
    both, u = torch.randn(400, 30, generator=g), torch.rand(200, generator=g)
    for halves in (both.chunk(2), (both[::2], both[1::2].clone())):  # laid out alike, or not
        tokens = fast_draw(halves[0], u, s, halves[1], 2.5)
        assert (tokens == draw(guide(*halves, 2.5), u, s)).float().mean() > 0.98  # rounding decides at edges


def test_rows_are_independent():
    g = torch.Generator().manual_seed(0)
    logits, u = torch.randn(5, 7, 30, generator=g), torch.rand(5, 7, generator=g)
    s = SamplingParams(top_k=10, top_p=0.7)
    whole = draw(logits, u, s)
    assert whole.shape == (5, 7)
    for i in range(5):
        assert torch.equal(whole[i], draw(logits[i], u[i], s))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("s", [*SETTINGS, SamplingParams(top_p=0.95), SamplingParams(temperature=0)], ids=str)
@pytest.mark.parametrize("vocab", [16, 24, 1000])
def test_the_draw_in_c_takes_the_same_tokens(s, vocab):
    g = torch.Generator().manual_seed(2)
    # rows of a wider tensor, as the padded logits of a step are
    logits, u = (torch.randn(3000, vocab + 8, generator=g) * 2)[:, :vocab], torch.rand(3000, generator=g)
    same = draw(logits, u, s) == fast_draw(logits, u, s)
    assert same.float().mean() >= 0.999  # a number on the edge between two tokens may fall either way
    assert torch.equal(fast_draw(logits, u, s)[7:9], fast_draw(logits[7:9], u[7:9], s))


@pytest.mark.parametrize("draw", draws())
@pytest.mark.parametrize(
    "s", [SamplingParams(top_k=200), SamplingParams(top_k=40, top_p=0.9), SamplingParams(top_p=0.9)], ids=str
)
def test_the_largest_uniform_draws_what_has_probability_whatever_is_rounded(s, draw):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(4000, 1001, generator=g) * 2
    tokens = draw(logits, torch.full((4000,), 1 - 2**-24), s)
    assert int(tokens.max()) < 1001
    p, ids = kept_probabilities(logits, s)
    whole = p if ids is None else torch.zeros_like(logits).scatter(-1, ids, p)
    assert (whole.gather(1, tokens[:, None]) > 0).float().mean() > 0.999  # at the edge of top-p rounding decides
