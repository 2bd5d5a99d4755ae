"""The autoregressive engine against sampling without a cache, and what must not change a picture."""

import math

import pytest
import torch
from scipy.stats import chisquare

from digit.core.errors import DigitError
from digit.models.token_model import NO_LABEL
from digit.sampling import SamplingParams, sample
from digit.sampling.engines.acceleration import accelerate, engine_cache, engine_name, release
from digit.sampling.logits import draw, guide, kept_probabilities, scales
from digit.sampling.rng import uniforms

PLAIN = SamplingParams(top_k=10)
GUIDED = SamplingParams(top_k=10, cfg_scale=3.0)
STATES = {"dim": 32, "depth": 2, "state_dim": 8, "head_dim": 16}
KINDS = {
    "prior": {},
    "ar": {"role": "ar", "prefix": 6},
    "masked": {"role": "masked", "prefix": 6},
    "residual prior": {"codebook_depth": 3},
    "state-space prior": {"state_space": STATES},
    "state-space ar": {"role": "ar", "prefix": 6, "state_space": STATES},
}
IN_ORDER = [kind for kind in KINDS if kind != "masked"]


def inputs(model, batch):
    g = torch.Generator().manual_seed(1)
    c = model.config
    prefix = torch.randint(c.prefix_vocab_size, (batch, c.prefix_length), generator=g) if c.prefix_length else None
    return torch.arange(batch) % 4, prefix


def without_cache(model, batch, settings, labels, prefix, given=None, mask=None):
    """The definition: every token from a whole forward pass."""
    length = model.config.length
    u = uniforms(0, range(batch), model.config.role, (length,))
    tokens = torch.zeros(batch, 0, dtype=torch.long)
    for i, scale in enumerate(scales(settings, length)):
        logits = model(tokens, labels, prefix)[:, -1]
        if scale != 1:
            logits = guide(logits, model(tokens, torch.full_like(labels, NO_LABEL), prefix)[:, -1], scale)
        new = draw(logits, u[:, i], settings) + i % model.config.codebook_depth * model.config.codes
        if given is not None and i < given.shape[1]:
            new = given[:, i] if mask is None else torch.where(mask[:, i], new, given[:, i])
        tokens = torch.cat([tokens, new[:, None]], 1)
    return tokens


@pytest.mark.parametrize("kind", IN_ORDER)
@pytest.mark.parametrize(
    "settings",
    [
        PLAIN,
        SamplingParams(temperature=0),
        SamplingParams(top_p=0.7, temperature=1.4),
        GUIDED,
        SamplingParams(cfg_scale=2.5, cfg_schedule="linear"),
        SamplingParams(cfg_scale=2.5, cfg_interval=(0.4, 1.0), top_k=10),
        SamplingParams(cfg_scale=2.5, cfg_interval=(0.0, 0.5), top_k=10),
        SamplingParams(cfg_scale=2.5, cfg_interval=(0.3, 0.7), top_p=0.9),
        SamplingParams(cfg_scale=0.0, top_k=5),
    ],
    ids=str,
)
def test_the_cache_changes_nothing(tiny, kind, settings):
    model = tiny(**KINDS[kind])
    labels, prefix = inputs(model, 5)
    assert torch.equal(
        sample(model, range(5), 0, settings, labels, prefix), without_cache(model, 5, settings, labels, prefix)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_an_image_is_the_same_in_any_batch(tiny, kind, settings):
    model = tiny(**KINDS[kind])
    labels, prefix = inputs(model, 64)

    def run(numbers):
        part = None if prefix is None else prefix[numbers]
        return sample(model, numbers, 5, settings, labels[numbers], part)

    whole = run(list(range(64)))
    assert torch.equal(torch.cat([run(list(range(i, min(i + 7, 64)))) for i in range(0, 64, 7)]), whole)
    for i in (0, 13, 63):
        assert torch.equal(run([i]), whole[[i]])
    assert torch.equal(run([40, 3, 17]), whole[[40, 3, 17]])
    assert not torch.equal(sample(model, range(64), 6, settings, labels, prefix), whole)


@pytest.mark.parametrize("settings", [PLAIN, GUIDED, SamplingParams(cfg_scale=2.5, cfg_interval=(0.6, 1.0))], ids=str)
@pytest.mark.parametrize("kind", IN_ORDER)
@pytest.mark.parametrize("n", [1, 5, 11, 12])
def test_first_tokens_are_kept(tiny, kind, settings, n):
    model = tiny(**KINDS[kind])
    labels, prefix = inputs(model, 3)
    given = torch.randint(24, (3, n), generator=torch.Generator().manual_seed(3))
    out = sample(model, range(3), 0, settings, labels, prefix, given)
    assert torch.equal(out[:, :n], given)
    assert torch.equal(out, without_cache(model, 3, settings, labels, prefix, given))


@pytest.mark.parametrize("kind", ["prior", "state-space prior"])
@pytest.mark.parametrize("settings", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_tokens_outside_the_mask_are_forced(tiny, kind, settings):
    model = tiny(**KINDS[kind])
    labels, _ = inputs(model, 4)
    g = torch.Generator().manual_seed(3)
    given, mask = torch.randint(24, (4, 12), generator=g), torch.rand(4, 12, generator=g) < 0.5
    mask[:, :2] = False  # a common start, which is prefilled
    out = sample(model, range(4), 0, settings, labels, given=given, mask=mask)
    assert torch.equal(out[~mask], given[~mask])
    assert torch.equal(out, without_cache(model, 4, settings, labels, None, given, mask))
    assert torch.equal(sample(model, range(4), 0, settings, labels, given=given, mask=torch.zeros_like(mask)), given)


def test_the_unguided_half_is_not_computed_where_the_scale_is_one(tiny, monkeypatch):
    model = tiny()
    rows = []
    step = model.step
    monkeypatch.setattr(
        model, "step", lambda cache, token, *rest: (rows.append(len(token)), step(cache, token, *rest))[1]
    )
    sample(model, range(3), 0, SamplingParams(cfg_scale=2, cfg_interval=(0.5, 0.8)), torch.tensor([0, 1, 2]))
    assert rows == [3] * 5 + [6] * 4 + [3] * 2


@pytest.mark.parametrize("seeds", [0, [3, 3, 9]], ids=["of the run", "of each image"])
def test_a_state_space_model_runs_plain_whatever_was_chosen(tiny, seeds):
    model = tiny(**KINDS["state-space prior"])
    plain = sample(model, range(3), seeds, GUIDED, torch.tensor([0, 1, 2]))
    accelerate(model, compile=True)
    assert torch.equal(sample(model, range(3), seeds, GUIDED, torch.tensor([0, 1, 2])), plain)
    assert engine_name(model) == "plain"
    if isinstance(seeds, list):
        alone = sample(model, [1], [3], GUIDED, torch.tensor([1]))
        assert torch.equal(alone, plain[[1]])


def test_a_semantic_prefix_is_computed_once_for_both_halves(tiny, monkeypatch):
    model = tiny("ar", prefix=6)
    labels, prefix = inputs(model, 3)
    seen = []
    embed = model.embed_prefix
    monkeypatch.setattr(model, "embed_prefix", lambda p: (seen.append(tuple(p.shape)), embed(p))[1])
    sample(model, range(3), 0, GUIDED, labels, prefix)
    assert seen == [(3, 6)]


def test_caches_are_reused_between_calls(tiny):
    model = tiny()
    sample(model, range(3), 0, PLAIN)
    first = engine_cache(model).engine
    sample(model, range(3), 1, PLAIN)
    assert engine_cache(model).engine is first
    sample(model, range(4), 1, PLAIN)
    assert engine_cache(model).engine is not first
    release(model)
    assert engine_cache(model).engine is None


@pytest.mark.parametrize("role", ["prior", "masked"])
@pytest.mark.parametrize(
    "settings",
    [
        SamplingParams(),
        SamplingParams(top_k=6),
        SamplingParams(top_p=0.7),
        SamplingParams(temperature=0.6),
        SamplingParams(cfg_scale=2.0),
        SamplingParams(cfg_scale=2.0, top_k=12, top_p=0.9, temperature=1.2),
    ],
    ids=str,
)
def test_sampled_frequencies_fit_the_exact_distribution(tiny, role, settings):
    """20,000 images of one token: chi-square against the guided, filtered distribution computed from a forward pass."""
    model = tiny(role, length=1)
    n, label = 20_000, torch.tensor([2])
    hidden = torch.ones(1, 1, dtype=torch.bool) if role == "masked" else None
    tokens = torch.zeros(1, 1 if role == "masked" else 0, dtype=torch.long)
    logits = guide(
        model(tokens, label, mask=hidden)[:, -1],
        model(tokens, torch.tensor([NO_LABEL]), mask=hidden)[:, -1],
        settings.cfg_scale,
    )
    p, ids = kept_probabilities(logits, settings)
    exact = torch.zeros(1, 24).scatter(1, ids, p)[0] if ids is not None else p[0]
    s = settings if role == "prior" else SamplingParams(**{**vars(settings), "steps": 1})
    out = sample(model, range(n), 0, s, label.expand(n))
    counts = torch.bincount(out[:, 0], minlength=24)
    assert counts[exact == 0].sum() == 0
    kept = exact > 5 / n  # chi-square wants a few in every cell
    expected = (exact[kept] / exact[kept].sum() * counts[kept].sum()).double()
    assert (
        chisquare(counts[kept].double().numpy(), (expected / expected.sum() * counts[kept].sum()).numpy()).pvalue > 1e-4
    )


def test_a_trained_model_reproduces_a_known_joint_distribution(tiny):
    """Three binary tokens, the third the exclusive or of the others nine times in ten: the frequencies of all eight
    come back."""
    p = torch.tensor([[[0.36, 0.04], [0.02, 0.18]], [[0.03, 0.27], [0.09, 0.01]]])  # (2, 2, 2), sums to 1
    model = tiny(classes=0, vocab=2, length=3).train().requires_grad_(True)
    torch.manual_seed(0)
    combos = torch.cartesian_prod(*[torch.arange(2)] * 3)  # (8, 3)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(300):  # the expected loss itself: all eight sequences by their weights
        logp = model(combos)[:, :-1].log_softmax(-1).gather(-1, combos[..., None]).sum((1, 2))
        loss = -(p.flatten() * logp).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = -(p * p.log()).sum().item()
    assert loss.item() - entropy < 0.002
    out = sample(model.eval(), range(20_000))
    counts = torch.bincount((out * torch.tensor([4, 2, 1])).sum(1), minlength=8)
    torch.testing.assert_close(counts / 20_000, p.flatten(), rtol=0, atol=0.012)


@pytest.mark.parametrize(
    ("build", "call", "message"),
    [
        ({}, {"labels": torch.tensor([4])}, "The label 4 was given; this model knows 0 to 3"),
        ({"classes": 0}, {"labels": torch.tensor([1])}, "this model is unconditional"),
        ({}, {"params": GUIDED}, "needs class labels"),
        ({"classes": 0}, {"params": GUIDED}, "has no classes"),
        ({"role": "ar", "prefix": 6}, {}, "has none tokens; this model expects 6"),
    ],
)
def test_wrong_requests_are_explained(tiny, build, call, message):
    with pytest.raises(DigitError, match=message):
        sample(tiny(**build), [0], **call)


def test_callbacks_see_every_token(tiny):
    seen = []
    out = sample(tiny(), range(2), callback=lambda n, tokens: seen.append((n, tokens.clone())))
    assert [n for n, _ in seen] == list(range(1, 13))
    for n, tokens in seen:
        assert torch.equal(tokens[:, :n], out[:, :n])


@pytest.mark.parametrize("native", [True, False], ids=["C++", "PyTorch"])
def test_no_token_is_ever_of_a_wrong_depth(tiny, native):
    for shape in ({}, {"state_space": STATES}):
        model = tiny(codebook_depth=3, **shape)
        accelerate(model, native=native)
        for settings in (SamplingParams(temperature=math.inf), SamplingParams(temperature=math.inf, cfg_scale=5.0)):
            out = sample(model, range(200), 0, settings, torch.arange(200) % 4)  # (200, 12)
            assert torch.equal(out // 8, (torch.arange(12) % 3).expand(200, -1))
            assert len(out.unique()) == 24


def test_no_value_is_ever_outside_the_vocabulary(tiny):
    out = sample(tiny(), range(200), params=SamplingParams(temperature=math.inf))
    assert out.min() >= 0
    assert out.max() < 24
    assert len(out.unique()) == 24
