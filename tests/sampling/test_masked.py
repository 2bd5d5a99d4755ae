"""The masked engine: schedules, partial masks, guidance, and exactness where it can be computed."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digit.sampling import SamplingParams, sample
from digit.sampling.masked import masked_after

SCHEDULES = ["cosine", "linear", "sqrt"]


def test_the_papers_schedule():
    """256 tokens in 8 steps, as the authors' decoder leaves them (251 236 212 181 142 97 49 0)."""
    masked, left = torch.tensor([256]), []
    for step in range(8):
        masked = masked_after("cosine", 8, step, torch.tensor([256]), masked)
        left.append(masked.item())
    assert left == [251, 236, 212, 181, 142, 97, 49, 0]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(1, 40), st.integers(0, 300))
def test_schedules_shrink_to_nothing(schedule, steps, total):
    masked, whole = torch.tensor([total]), torch.tensor([total])
    for step in range(steps):
        after = masked_after(schedule, steps, step, whole, masked)
        assert 0 <= after <= masked
        if masked > 1:
            assert after < masked
        masked = after
    assert masked.item() == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3, 12, 30])
def test_every_token_is_drawn_and_kept_ones_stay(tiny, schedule, steps):
    model = tiny("masked", classes=0)
    left = []
    out = sample(
        model,
        range(5),
        params=SamplingParams(steps=steps, mask_schedule=schedule),
        callback=lambda n, tokens, mask: left.append((tokens.clone(), mask.clone())),
    )
    assert len(left) == steps
    assert not left[-1][1].any()
    for (before, hidden), (after, still) in pairwise(left):
        assert torch.equal(before[~hidden], after[~hidden])
        assert not (still & ~hidden).any()
    assert torch.equal(left[-1][0], out)


@pytest.mark.parametrize("guided", [False, True])
def test_a_partial_mask_keeps_the_rest(tiny, guided):
    model = tiny("masked", prefix=6)
    g = torch.Generator().manual_seed(0)
    tokens, mask = torch.randint(24, (6, 12), generator=g), torch.rand(6, 12, generator=g) < 0.4
    mask[0], mask[1] = False, True  # nothing, and everything
    prefix, labels = torch.randint(9, (6, 6), generator=g), torch.arange(6) % 4
    s = SamplingParams(steps=4, cfg_scale=2.0 if guided else 1.0)
    out = sample(model, range(6), 0, s, labels, prefix, tokens, mask)
    assert torch.equal(out[~mask], tokens[~mask])
    # the hidden tokens themselves must not leak into what replaces them
    other = torch.where(mask, (tokens + 1) % 24, tokens)
    assert torch.equal(out, sample(model, range(6), 0, s, labels, prefix, other, mask))


def test_one_step_is_independent_draws(tiny):
    """With one step every token comes from its own distribution given all hidden: frequencies at each place."""
    model = tiny("masked", classes=0, length=4)
    n = 8000
    p = model(torch.zeros(1, 4, dtype=torch.long), mask=torch.ones(1, 4, dtype=torch.bool))[0].softmax(-1)  # (4, V)
    out = sample(model, range(n), params=SamplingParams(steps=1))
    for place in range(4):
        counts = torch.bincount(out[:, place], minlength=24) / n
        assert (counts - p[place]).abs().max() < 5 * math.sqrt(0.25 / n)


def test_one_token_a_step_is_the_joint_distribution(tiny):
    """Two binary tokens trained to be equal: drawn at once they are independent, one after the other they agree."""
    model = tiny("masked", classes=0, vocab=2, length=2).train().requires_grad_(True)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    tokens = torch.tensor([[0, 0], [1, 1]]).repeat(3, 1)
    masks = torch.tensor([[1, 1], [1, 0], [0, 1]], dtype=torch.bool).repeat_interleave(2, 0)
    for _ in range(200):
        loss, _ = model.loss(tokens, mask=masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    together = sample(model, range(4000), params=SamplingParams(steps=1, choice_temperature=4.5))
    after = sample(model, range(4000), params=SamplingParams(steps=2, choice_temperature=4.5))
    assert 0.45 < (together[:, 0] == together[:, 1]).float().mean() < 0.55
    assert (after[:, 0] == after[:, 1]).float().mean() > 0.98
    assert 0.45 < after[:, 0].float().mean() < 0.55


def test_choice_temperature_zero_keeps_the_most_confident(tiny):
    model = tiny("masked", classes=0)
    steps = []
    sample(
        model,
        range(3),
        params=SamplingParams(steps=12, choice_temperature=0, temperature=0),
        callback=lambda n, tokens, mask: steps.append((tokens.clone(), mask.clone())),
    )
    everything = torch.ones(3, 12, dtype=torch.bool)
    logp = model(torch.zeros(3, 12, dtype=torch.long), mask=everything).log_softmax(-1).amax(-1)
    first_kept = ~steps[0][1]
    for row in range(3):
        assert logp[row][first_kept[row]].min() >= logp[row][~first_kept[row]].max()


def test_guidance_moves_towards_the_label(tiny):
    """Guided log-probability ratio between label and none grows with the scale."""
    model = tiny("masked")
    labels = torch.zeros(200, dtype=torch.long)
    everything, nothing = torch.ones(200, 12, dtype=torch.bool), torch.zeros(200, 12, dtype=torch.long)
    ratio = model(nothing, labels, mask=everything).log_softmax(-1) - model(nothing, None, mask=everything).log_softmax(
        -1
    )

    def mean(scale):
        out = sample(model, range(200), params=SamplingParams(steps=1, cfg_scale=scale), labels=labels)
        return ratio.gather(-1, out[..., None]).mean()

    assert mean(0.0) < mean(1.0) < mean(4.0)


@pytest.mark.parametrize(
    ("tokens", "steps", "temperature"), [(256, 8, 4.5), (1024, 16, 7.14), (64, 4, 2.83), (1, 1, 0.71)]
)
def test_steps_and_choice_temperature_go_with_the_tokens_unless_given(tokens, steps, temperature):
    """16 x 16 tokens are what the literature tuned for; its 32 x 32 take 15 steps and 7."""
    found = SamplingParams().of("masked", tokens)
    assert found.steps == steps
    assert found.choice_temperature == pytest.approx(temperature, abs=0.01)
    given = SamplingParams(steps=8, choice_temperature=0)
    assert given.of("masked", tokens) == given
    assert SamplingParams().of("ar", tokens).steps is None


def test_few_tokens_take_few_steps(tiny):
    seen = []
    sample(tiny("masked", classes=0), range(2), callback=lambda n, *_: seen.append(n))
    assert seen == [1, 2]  # 8 * sqrt(12 / 256)
