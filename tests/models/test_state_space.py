"""Mamba-2 blocks: against the paper's equations, step by step against all at once, and as a token model."""

import pytest
import torch
import torch.nn.functional as F

import tiny
from digit.core.config import from_dict, to_dict
from digit.core.errors import DigitError
from digit.models.state_space import StateSpaceBlock, StateSpaceConfig, scan
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import NO_LABEL, TokenModel

SHAPE = {"dim": 16, "depth": 2, "state_dim": 6, "head_dim": 8}


def build(role="prior", prefix=0, **changes) -> TokenModel:
    return tiny.loud(role, prefix, vocab=11, length=8, state_space={**SHAPE, **changes})


def equations(block: StateSpaceBlock, x: torch.Tensor) -> torch.Tensor:
    """The block as the paper writes it, one place, head and image after the other; x: (B, T, D)."""
    c, weights = block.config, dict(block.named_parameters())
    e, n = c.inner_dim, c.state_dim
    out = []
    for image in x:
        states = [torch.zeros(c.head_dim, n, dtype=x.dtype) for _ in range(c.heads)]
        window = [torch.zeros(e + 2 * n, dtype=x.dtype)] * c.conv_width
        for token in image:
            normed = token / (token.square().mean() + c.norm_eps).sqrt() * weights["norm.weight"]
            z, xbc, dt = (weights["inner.weight"] @ normed).split([e, e + 2 * n, c.heads])
            window = [*window[1:], xbc]
            conv = F.silu(sum(w * past for w, past in zip(weights["conv"], window, strict=True)) + weights["conv_bias"])
            values, b, read = conv.split([e, n, n])
            y = []
            for h in range(c.heads):
                step = torch.log1p(torch.exp(dt[h] + weights["dt_bias"][h]))
                u = values[h * c.head_dim : (h + 1) * c.head_dim]
                decay = torch.exp(-step * torch.exp(weights["a_log"][h]))
                states[h] = decay * states[h] + step * torch.outer(u, b)
                y.append(states[h] @ read + weights["d"][h] * u)
            gated = torch.cat(y) * F.silu(z)
            gated = gated / (gated.square().mean() + c.norm_eps).sqrt() * weights["gated_norm.weight"]
            out.append(token + weights["out.weight"] @ gated)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("width", [1, 4])
def test_a_block_is_the_papers_recurrence(width):
    torch.manual_seed(0)
    block = StateSpaceBlock(StateSpaceConfig(**SHAPE, conv_width=width)).double().requires_grad_(False)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(block(x), equations(block, x), rtol=1e-10, atol=1e-10)


def test_long_sequences_lose_no_digits_and_go_on_from_a_state():
    """At 257 places with the strongest decay that models begin with, in float32 against float64."""
    torch.manual_seed(0)
    x, b, c = torch.randn(1, 257, 2, 4), torch.randn(1, 257, 3), torch.randn(1, 257, 3)
    log_decay = -1.6 * torch.rand(1, 257, 2) ** 3
    exact, last = scan(x.double(), log_decay.double(), b.double(), c.double(), torch.zeros(1, 2, 4, 3).double())
    found, _ = scan(x, log_decay, b, c)
    assert float((found - exact).abs().max()) < 1e-4
    state, pieces = torch.zeros(1, 2, 4, 3), []
    for cut in (slice(0, 100), slice(100, 101), slice(101, 257)):
        y, state = scan(x[:, cut], log_decay[:, cut], b[:, cut], c[:, cut], state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1).double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(state.double(), last, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("role", "prefix"), [("prior", 0), ("ar", 5)])
@pytest.mark.parametrize("known", [0, 1, 3])
def test_prefill_and_steps_equal_the_forward_pass(role, prefix, known):
    model = build(role, prefix)
    tokens, labels = torch.randint(11, (3, 8)), torch.tensor([0, NO_LABEL, 2])
    given = torch.randint(9, (3, prefix)) if prefix else None
    whole = model(tokens, labels, given)  # (B, n + 1, V)
    cache = model.new_cache(3)
    size = sum(t.numel() for t in (*cache.inputs, *cache.states))
    for _ in range(2):  # a cache is used again
        logits = [model.prefill(cache, 3, labels, given, tokens[:, :known])]
        for i in range(known, 8):
            logits.append(model.step(cache, tokens[:, i], torch.tensor(i)))
        torch.testing.assert_close(torch.stack(logits, 1), whole[:, known:], rtol=1e-5, atol=1e-5)
    assert size == 3 * model.config.backbone.cache_numbers(8) == 3 * model.config.backbone.cache_numbers(800)


def test_rows_of_a_cache_are_views():
    model = build()
    tokens = torch.randint(11, (3, 8))
    cache = model.new_cache(3)
    model.prefill(cache.rows(1, 3), 2, None, None, tokens[1:])
    assert not any(t[0].any() for t in (*cache.inputs, *cache.states))
    assert all(t[1:].any() for t in (*cache.inputs, *cache.states))


def test_the_future_is_not_seen():
    model = build()
    tokens = torch.randint(11, (2, 8))
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 11
    torch.testing.assert_close(model(tokens)[:, :5], model(other)[:, :5])
    assert not torch.allclose(model(tokens)[:, 5:], model(other)[:, 5:])


def test_it_is_saved_and_loaded(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "prior")
    again = TokenModel.from_pretrained(tmp_path / "prior")
    tokens = torch.randint(11, (2, 8))
    assert again.config == model.config
    assert torch.equal(again(tokens), model(tokens))
    assert "2 Mamba-2 blocks of width 16, 4 heads with a state of 6 x 8; 8 tokens of 11" in repr(again)


def test_configs_from_before_open_unchanged():
    values = to_dict(tiny.token_model().config)
    values.pop("state_space")
    assert from_dict(TokenModelConfig, values, "old").transformer.dim == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "masked"}, "reads row by row; expected role prior or ar"),
        ({"role": "random"}, "reads row by row; expected role prior or ar"),
        ({"init": "authors"}, "init normal"),
        ({"transformer": tiny.TRANSFORMER}, "either transformer or state_space"),
        ({"state_space": None}, "either transformer or state_space"),
        ({"state_space": {**SHAPE, "head_dim": 7}}, "head_dim=7 does not divide"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    values = {"role": "prior", "vocab_size": 4, "length": 4, "state_space": SHAPE, **changes}
    with pytest.raises(DigitError, match=message):
        from_dict(TokenModelConfig, values, "test")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_short_training_learns(checkpointing):
    """Sequences that repeat their first four tokens: the second half is learnt, and the first cannot be."""
    torch.manual_seed(0)
    values = {"role": "prior", "vocab_size": 4, "length": 8, "state_space": {**SHAPE, "dim": 32}}
    model = TokenModel(from_dict(TokenModelConfig, values, "toy"))
    model.backbone.checkpointing = checkpointing
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(150 if not checkpointing else 20):
        first = torch.randint(4, (64, 4))
        loss, _ = model.loss(torch.cat([first, first], 1))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    if not checkpointing:
        assert losses[-1] < 0.5 * torch.tensor(4.0).log().item() + 0.05
