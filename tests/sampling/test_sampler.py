"""What holds for every kind of prior: images of their own in any batch, seeds, guidance, filters, kept tokens."""

import pytest
import torch
from scipy.stats import chisquare

from digit.models.token_model import NO_LABEL
from digit.sampling import SamplingParams, sample
from digit.sampling.logits import guide, kept_probabilities

ROLES = ["prior", "masked", "random"]
SETTINGS = [SamplingParams(top_k=10, steps=4), SamplingParams(top_k=10, steps=4, cfg_scale=3.0)]
LABELS = torch.arange(40) % 4

kinds = pytest.mark.parametrize("role", ROLES)
guided_or_not = pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "guided"])


@kinds
@guided_or_not
def test_an_image_is_the_same_in_any_batch_and_with_a_seed_of_its_own(tiny, role, settings):
    model = tiny(role)

    def run(numbers, seed=5):
        return sample(model, numbers, seed, settings, LABELS[numbers])

    whole = run(list(range(40)))
    assert torch.equal(torch.cat([run(list(range(i, min(i + 7, 40)))) for i in range(0, 40, 7)]), whole)
    assert torch.equal(run([31, 3, 17]), whole[[31, 3, 17]])
    assert not torch.equal(run(list(range(40)), 6), whole)
    each = sample(model, [0, 3, 0], [8, 5, 9], settings, LABELS[[3, 3, 3]])
    assert torch.equal(each[1], whole[3])
    assert torch.equal(each[2:], sample(model, [0], 9, settings, LABELS[[3]]))


@kinds
@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 6}, {"top_p": 0.7, "temperature": 0.6}, {"cfg_scale": 2.0, "top_k": 12, "top_p": 0.9}],
    ids=str,
)
def test_frequencies_fit_the_guided_and_filtered_distribution(tiny, role, settings):
    """20,000 images of one token: chi-square against the distribution computed from a forward pass."""
    model, n, label = tiny(role, length=1), 20_000, torch.tensor([2])
    params = SamplingParams(steps=1, **settings)
    mask = {"mask": torch.ones(1, 1, dtype=torch.bool)} if role == "masked" else {}
    nothing = torch.zeros(1, 1, dtype=torch.long)
    with_label, without = (model(nothing, labels, **mask)[:, 0] for labels in (label, torch.tensor([NO_LABEL])))
    p, ids = kept_probabilities(guide(with_label, without, params.cfg_scale), params)
    exact = p[0] if ids is None else torch.zeros(1, 24).scatter(1, ids, p)[0]
    counts = torch.bincount(sample(model, range(n), 0, params, label.expand(n))[:, 0], minlength=24)
    assert counts[exact == 0].sum() == 0
    kept = exact > 5 / n  # chi-square wants a few in every cell
    expected = exact[kept].double() / exact[kept].double().sum() * counts[kept].sum()
    assert chisquare(counts[kept].double().numpy(), expected.numpy()).pvalue > 1e-4


@kinds
@guided_or_not
def test_kept_tokens_stay_and_others_know_nothing_of_what_they_replace(tiny, role, settings):
    model, g = tiny(role), torch.Generator().manual_seed(0)
    given, mask = torch.randint(24, (9, 12), generator=g), torch.rand(9, 12, generator=g) < 0.5
    mask[0], mask[1] = False, True  # nothing, and everything

    def run(tokens, rows=slice(None)):
        numbers = list(range(9))[rows]
        return sample(model, numbers, 0, settings, LABELS[numbers], given=tokens[rows], mask=mask[rows])

    out = run(given)
    assert torch.equal(out[~mask], given[~mask])
    assert torch.equal(out, run(torch.where(mask, (given + 1) % 24, given)))
    assert torch.equal(out[1], sample(model, [1], 0, settings, LABELS[[1]])[0])
    assert torch.equal(torch.cat([run(given, slice(i, i + 1)) for i in range(9)]), out)


@kinds
@pytest.mark.parametrize("n", [0, 1, 5, 12])
def test_first_tokens_are_kept(tiny, role, n):
    model, given = tiny(role), torch.randint(24, (3, n), generator=torch.Generator().manual_seed(3))
    out = sample(model, range(3), 0, SETTINGS[1], LABELS[:3], given=given)
    assert torch.equal(out[:, :n], given)
    others = sample(model, range(3), 0, SETTINGS[1], LABELS[:3])
    assert torch.equal(out, others) == (n == 0)


@kinds
def test_callbacks_see_the_tokens_as_they_come(tiny, role):
    seen = []
    out = sample(
        tiny(role), range(2), 0, SETTINGS[0], callback=lambda n, *state: seen.append((n, *map(torch.clone, state)))
    )
    assert [n for n, *_ in seen] == list(range(1, (13 if role == "prior" else 5)))
    for n, tokens, *masked in seen:
        known = ~masked[0] if masked else (torch.arange(12) < n).expand(2, -1)
        assert torch.equal(tokens[known], out[known])
    assert torch.equal(seen[-1][1], out)
