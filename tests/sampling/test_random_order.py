"""Random-order sampling against its definition without a cache, and its two ends: row by row, and all at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digit.models.token_model import NO_LABEL
from digit.sampling import SamplingParams, sample
from digit.sampling.logits import draw, guide, scales
from digit.sampling.random_order import counts
from digit.sampling.rng import uniforms

LABELS = torch.tensor([0, 3, 1])
ASKED = [
    {},
    {"top_k": 10},
    {"top_p": 0.7, "temperature": 1.4},
    {"cfg_scale": 3.0, "top_k": 10},
    {"cfg_scale": 2.5, "cfg_schedule": "linear"},
    {"cfg_scale": 2.5, "cfg_interval": (0.3, 0.7)},
]


def without_cache(model, params, given=None, mask=None):
    """The definition, row by row: every token from a forward pass of its own."""
    length, u = model.config.length, uniforms(0, range(3), "random", (2, model.config.length))
    rows = []
    for row in range(3):
        free = torch.ones(length, dtype=torch.bool) if mask is None else mask[row]
        tokens = torch.zeros(1, length, dtype=torch.long) if given is None else given[row : row + 1].clone()
        places = list(range(length)) if params.order == "raster" else u[row, 0].argsort().tolist()
        known, later = ([p for p in places if free[p] == value] for value in (False, True))
        amounts = counts(params.of("random", length), len(later))
        for amount, scale in zip(amounts, scales(params, len(amounts)), strict=True):
            asked, later = later[:amount], later[amount:]
            drawn = []
            for place in asked:
                order = torch.tensor([[*known, place]])
                logits = model(tokens, LABELS[row : row + 1], order=order)[:, -1]
                if scale != 1:
                    logits = guide(logits, model(tokens, torch.tensor([NO_LABEL]), order=order)[:, -1], scale)
                drawn.append(draw(logits, u[row, 1, place][None], params))
            tokens[0, asked] = torch.cat(drawn)
            known += asked
        rows.append(tokens)
    return torch.cat(rows)


@pytest.mark.parametrize("order", ["random", "raster"])
@pytest.mark.parametrize("steps", [1, 3, 5, 12, 99])
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_the_cache_changes_nothing(tiny, asked, steps, order):
    model, params = tiny("random"), SamplingParams(steps=steps, order=order, **asked)
    assert torch.equal(sample(model, range(3), 0, params, LABELS), without_cache(model, params))


@pytest.mark.parametrize("asked", ASKED[2:5], ids=str)
def test_one_token_a_step_row_by_row_is_the_ar_path_of_the_same_network(tiny, asked):
    """Each token from all before it, from a whole forward pass, as autoregressive sampling is defined."""
    model, params = tiny("random"), SamplingParams(steps=12, order="raster", **asked)
    u, tokens = uniforms(0, range(3), "random", (2, 12))[:, 1], torch.zeros(3, 12, dtype=torch.long)
    for i, scale in enumerate(scales(params, 12)):
        logits = model(tokens[:, : i + 1], LABELS)[:, i]
        if scale != 1:
            logits = guide(logits, model(tokens[:, : i + 1])[:, i], scale)
        tokens[:, i] = draw(logits, u[:, i], params)
    assert torch.equal(sample(model, range(3), 0, params, LABELS), tokens)


@pytest.mark.parametrize("order", ["random", "raster"])
def test_kept_tokens_are_conditioned_on_exactly(tiny, order):
    """Any mask, another for each image: what is sampled has seen every kept token, wherever it stands."""
    model, g = tiny("random"), torch.Generator().manual_seed(0)
    params = SamplingParams(steps=4, order=order, cfg_scale=2.0)
    tokens, mask = torch.randint(24, (3, 12), generator=g), torch.rand(3, 12, generator=g) < 0.5
    out = sample(model, range(3), 0, params, LABELS, given=tokens, mask=mask)
    assert torch.equal(out, without_cache(model, params, tokens, mask))
    mask[:] = torch.arange(12) < 2  # the first two, of which a model from left to right would see nothing
    ends = torch.cat([sample(model, range(3), seed, params, LABELS, given=tokens, mask=mask) for seed in range(20)])
    others = torch.where(mask, tokens, (tokens + 1) % 24)
    after = torch.cat([sample(model, range(3), seed, params, LABELS, given=others, mask=mask) for seed in range(20)])
    assert (ends[:, :2] != after[:, :2]).any()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["cosine", "linear", "sqrt"]), st.integers(1, 300), st.integers(0, 300))
def test_every_step_draws_and_all_are_drawn(schedule, steps, total):
    found = counts(SamplingParams(steps=steps, mask_schedule=schedule), total)
    assert len(found) == min(steps, total)
    assert sum(found) == total
    assert all(amount > 0 for amount in found)


def test_as_many_steps_as_tokens_are_one_each_and_the_cosine_starts_slowly():
    assert counts(SamplingParams(steps=64), 64) == [1] * 64
    few = counts(SamplingParams(steps=8), 64)
    assert few == sorted(few)
    assert few == [2, 3, 6, 8, 10, 11, 12, 12]  # 62 59 53 45 35 24 12 0 stay: floor(64 cos(pi t / 16))


def test_each_image_has_an_order_of_its_own(tiny):
    seen = []
    sample(tiny("random"), range(50), 0, SamplingParams(steps=12), callback=lambda n, tokens, mask: seen.append(~mask))
    first = seen[0].int().argmax(1)
    assert len(first.unique()) == 12
    assert [int(known.sum()) for known in seen] == [50 * n for n in range(1, 13)]
