"""Guidance: the shape of every schedule, the interval, and the combination."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digit.core.config import from_dict
from digit.core.errors import DigitError
from digit.sampling import SamplingParams
from digit.sampling.logits import guide, scales

SCHEDULES = ["constant", "linear", "cosine", "power-cosine"]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SCHEDULES), st.floats(0, 10), st.integers(1, 300), st.floats(0.2, 4))
def test_scales_run_between_one_and_the_asked_scale(schedule, scale, count, power):
    s = scales(SamplingParams(cfg_scale=scale, cfg_schedule=schedule, cfg_power=power), count)
    assert len(s) == count
    low, high = min(1, scale), max(1, scale)
    assert all(low - 1e-9 <= x <= high + 1e-9 for x in s)
    steps = [b - a for a, b in pairwise(s)]
    assert all(x >= -1e-9 for x in steps) or all(x <= 1e-9 for x in steps)  # monotone
    if schedule == "constant":
        assert s == pytest.approx([scale] * count)
    elif count > 1:
        assert s[0] == 1
        assert s[-1] == pytest.approx(scale)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0, 0.9), st.floats(0.05, 1))
def test_outside_the_interval_the_scale_is_exactly_one(count, low, width):
    high = min(1.0, low + width)
    s = scales(SamplingParams(cfg_scale=3, cfg_interval=(low, high)), count)
    for i, x in enumerate(s):
        assert x == (3 if low <= i / count < high else 1)


def test_power_one_is_the_cosine_schedule():
    a = scales(SamplingParams(cfg_scale=4, cfg_schedule="power-cosine", cfg_power=1), 20)
    assert a == pytest.approx(scales(SamplingParams(cfg_scale=4, cfg_schedule="cosine"), 20))


def test_guide_extrapolates():
    c, u = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])
    assert torch.equal(guide(c, u, 1.0), c)
    assert torch.equal(guide(c, u, 0.0), u)
    assert torch.equal(guide(c, u, 2.0), torch.tensor([2.0, 1.0]))
    assert guide(c.bfloat16(), u.bfloat16(), 2.0).dtype == torch.float32


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.4), (-0.1, 1), (0, 1.1)])
def test_an_interval_must_be_one(interval):
    with pytest.raises(DigitError, match="expected two fractions"):
        from_dict(SamplingParams, {"cfg_interval": interval}, "test")
