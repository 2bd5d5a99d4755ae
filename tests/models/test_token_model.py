"""The token model: what each role predicts, cached equals uncached, labels, masks, errors."""

from functools import partial

import pytest
import torch

from digit.core.config import from_dict, to_dict
from digit.core.errors import DigitError
from digit.models.component import load_component, save_component
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import NO_LABEL, TokenModel
from digit.models.transformer import TransformerConfig
from tiny import loud

IDS = torch.zeros(1, 8, dtype=torch.long)
build = partial(loud, vocab=11, length=8, classes=0, dim=16, heads=2)


def inputs(model: TokenModel, batch=3):
    c = model.config
    tokens = torch.randint(c.vocab_size, (batch, c.length))
    prefix = torch.randint(c.prefix_vocab_size, (batch, c.prefix_length)) if c.prefix_length else None
    labels = torch.tensor([0, NO_LABEL, 2][:batch]) if c.num_classes else None
    return tokens, labels, prefix


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize(("role", "prefix", "classes"), [("prior", 0, 0), ("prior", 0, 4), ("ar", 5, 0), ("ar", 5, 4)])
@pytest.mark.parametrize("known", [0, 1, 3])
def test_prefill_and_steps_equal_the_forward_pass(role, prefix, classes, norm, known):
    model = build(role, prefix, classes=classes, scale=4.0, norm=norm)
    tokens, labels, given_prefix = inputs(model)
    whole = model(tokens, labels, given_prefix)  # (B, n + 1, V)
    cache = model.new_cache(3)
    logits = [model.prefill(cache, 3, labels, given_prefix, tokens[:, :known])]
    for i in range(known, 7):
        logits.append(model.step(cache, tokens[:, i], torch.tensor(i)))
    torch.testing.assert_close(torch.stack(logits, 1), whole[:, known:8], rtol=1e-4, atol=1e-5)


def test_no_label_and_no_labels_are_the_start_vector():
    model = build(classes=4)
    tokens, _, _ = inputs(model)
    torch.testing.assert_close(model(tokens), model(tokens, torch.full((3,), NO_LABEL)))
    assert not torch.allclose(model(tokens), model(tokens, torch.tensor([0, 1, 2])))


def test_masked_tokens_are_hidden_and_the_others_seen():
    model = build("masked", prefix=5)
    tokens, _, prefix = inputs(model)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[:, 2] = True
    other = tokens.clone()
    other[:, 2] = (other[:, 2] + 1) % 11
    torch.testing.assert_close(model(tokens, None, prefix, mask), model(other, None, prefix, mask))
    other[:, 3] = (other[:, 3] + 1) % 11
    assert not torch.allclose(model(tokens, None, prefix, mask), model(other, None, prefix, mask))
    assert model(tokens, None, prefix, mask).shape == (3, 8, 11)


def test_the_prefix_matters():
    model = build("ar", prefix=5)
    tokens, _, prefix = inputs(model)
    assert not torch.allclose(model(tokens, None, prefix), model(tokens, None, (prefix + 1) % 9))


def test_loss_is_the_mean_negative_log_likelihood():
    model = build(classes=4)
    tokens, labels, _ = inputs(model)
    loss, parts = model.loss(tokens, labels)
    logp = model(tokens, labels)[:, :-1].log_softmax(-1).gather(-1, tokens[..., None])
    torch.testing.assert_close(loss, -logp.mean())
    assert set(parts) == {"nll", "accuracy"}


def test_masked_loss_counts_masked_places_only():
    model = build("masked")
    tokens, _, _ = inputs(model)
    mask = torch.rand(3, 8) < 0.5
    loss, _ = model.loss(tokens, mask=mask)
    logp = model(tokens, mask=mask).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(loss, -logp[mask].mean())
    with pytest.raises(DigitError, match="needs the mask"):
        model.loss(tokens)


def explicitly(model: TokenModel, tokens, order, labels):
    """Log-probabilities (n,) of a row's tokens in an order: each from a sequence of its own, put together by hand."""
    c, at, found = model.config, model.position_embedding.weight, []
    class_vector = model.start if labels == NO_LABEL else model.class_embedding.weight[labels]
    for i, place in enumerate(order):
        sequence = [class_vector * c.embedding_scale + at[0]]
        for known in order[:i]:
            token = model.token_embedding.weight[tokens[known]] * c.embedding_scale
            sequence += [model.instruction + at[1 + known], token + at[1 + known]]
        sequence.append(model.instruction + at[1 + place])
        logits = model.head(model.transformer(torch.stack(sequence)[None])[0, -1])
        found.append(logits.log_softmax(-1)[tokens[place]])
    return torch.stack(found)


def some_orders(batch=3, length=8):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(4)).argsort(1)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("raster", [False, True])
def test_the_likelihood_of_a_random_order_is_that_of_a_loop_without_a_cache(norm, raster):
    model = build("random", classes=4, scale=4.0, norm=norm)
    tokens, labels, _ = inputs(model)
    order = torch.arange(8).expand(3, -1) if raster else some_orders()
    by_hand = torch.stack([explicitly(model, *row) for row in zip(tokens, order, labels, strict=True)])  # (3, n)
    logits = model(tokens, labels, order=None if raster else order)
    found = logits.log_softmax(-1).gather(-1, tokens.gather(1, order)[..., None])
    torch.testing.assert_close(found.squeeze(-1), by_hand, rtol=1e-4, atol=1e-5)
    loss, parts = model.loss(tokens, labels, order=order)
    torch.testing.assert_close(loss, -by_hand.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["nll"], loss)


@pytest.mark.parametrize("amounts", [[1] * 8, [8], [1, 3, 4], [3, 1, 2, 2]], ids=str)
def test_several_places_asked_at_once_are_each_asked_alone(amounts):
    """Whatever was asked for together before: the cache is that of one token a step."""
    model = build("random", classes=4, scale=4.0)
    tokens, labels, _ = inputs(model)
    order, cache, known, cached = some_orders(), model.new_cache(3), 0, None
    for amount in amounts:
        part = order[:, : known + amount]
        unknown = torch.ones(3, 8, dtype=torch.bool).scatter(1, order[:, :known], False)
        logits = model.query(cache, tokens.masked_fill(unknown, 0), part, known, cached, labels)
        for i in range(amount):
            alone = torch.cat([order[:, :known], part[:, known + i : known + i + 1]], 1)
            expected = model(tokens, labels, order=alone)[:, -1]
            torch.testing.assert_close(logits[:, i], expected, rtol=1e-4, atol=1e-5)
        cached, known = known, known + amount


def test_tokens_that_come_later_in_the_order_are_not_seen():
    model = build("random")
    tokens, _, _ = inputs(model)
    order = some_orders()
    other = tokens.scatter(1, order[:, 5:], (tokens.gather(1, order[:, 5:]) + 1) % 11)
    a, b = model(tokens, order=order), model(other, order=order)
    torch.testing.assert_close(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6], b[:, 6])


def test_label_dropout_replaces_the_asked_share():
    model = build(classes=4)
    labels = torch.randint(4, (20000,))
    dropped = model.drop_labels(labels, torch.Generator().manual_seed(0))
    share = (dropped == NO_LABEL).float().mean().item()
    assert abs(share - model.config.class_dropout) < 0.01
    assert ((dropped == labels) | (dropped == NO_LABEL)).all()


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ({}, (torch.zeros(1, 9).long(),), "9 tokens an image were given; this model was built for 8"),
        ({}, (IDS, torch.tensor([1])), "unconditional model"),
        ({}, (IDS, None, IDS[:, :5]), "expects none"),
        ({}, (IDS, None, None, IDS == 0), "only role 'masked'"),
        ({"role": "ar", "prefix": 5}, (IDS,), "has none tokens; this model expects 5"),
        ({}, (IDS, None, None, None, IDS), "only role 'random' takes one"),
        ({"role": "random"}, (IDS, None, None, IDS == 0), "only role 'masked'"),
    ],
)
def test_wrong_inputs_are_explained(kind, given, message):
    with pytest.raises(DigitError, match=message):
        build(**kind)(*given)


def test_configs_refuse_what_cannot_be():
    good = to_dict(build().config)
    for change, message in [
        ({"role": "masked"}, "needs transformer.causal = False"),
        ({"prefix_length": 4}, "go together"),
        ({"role": "random", "prefix_length": 4, "prefix_vocab_size": 9}, "role 'random' is for priors"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"rolle": "ar"}, "did you mean 'role'"),
    ]:
        with pytest.raises(DigitError, match=message):
            from_dict(TokenModelConfig, {**good, **change}, "test")


@pytest.mark.parametrize("role", ["prior", "masked", "random"])
def test_saved_and_loaded_gives_the_same_logits(tmp_path, role):
    model = build(role, classes=4)
    tokens, labels, _ = inputs(model)
    mask = torch.ones(3, 8, dtype=torch.bool) if role == "masked" else None
    save_component(tmp_path / "m", model, model.config)
    again = load_component(tmp_path / "m", TokenModel, TokenModelConfig)
    assert torch.equal(model(tokens, labels, mask=mask), again(tokens, labels, mask=mask))


def test_init_authors_has_the_distributions_of_fairseq():
    """As fairseq 0.12.2 draws them for DAMO-NLP-SG/DiGIT at cd6d8ca."""
    dim, ffn = 64, 256
    shape = TransformerConfig(dim=dim, depth=3, heads=4, ffn_dim=ffn, norm="post")
    values = {"vocab_size": 300, "length": 256, "prefix_vocab_size": 400, "prefix_length": 256, "num_classes": 200}
    torch.manual_seed(0)
    model = TokenModel(TokenModelConfig(role="ar", init="authors", embedding_scale=8.0, transformer=shape, **values))
    uniform = {
        "attention.qkv.weight": (1.5 / dim) ** 0.5,  # gain 1 / sqrt(2) x sqrt(6 / (D + D)) for each of q, k, v
        "attention.qkv.bias": dim**-0.5,
        "attention.out.weight": (3 / dim) ** 0.5,
        "ffn_in.weight": dim**-0.5,
        "ffn_in.bias": dim**-0.5,
        "ffn_out.weight": ffn**-0.5,
        "ffn_out.bias": ffn**-0.5,
    }
    for block in model.transformer.blocks:
        drawn = dict(block.named_parameters())
        for name, bound in uniform.items():
            assert drawn[name].abs().max() <= bound * (1 + 1e-6), name
            assert drawn[name].abs().max() > 0.9 * bound, name
            if drawn[name].ndim == 2:
                assert drawn[name].std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name
        assert not drawn["attention.out.bias"].any()
        assert (block.attention_norm.weight == 1).all()
    kinds = ("token", "position", "class", "prefix", "prefix_position")
    for name in (*(f"{kind}_embedding" for kind in kinds), "head"):
        weight = getattr(model, name).weight
        assert weight.std().item() == pytest.approx(dim**-0.5, rel=0.03), name
        assert weight.abs().max() > 3 * dim**-0.5, name  # normal, not uniform
    assert model.start.std().item() == pytest.approx(dim**-0.5, rel=0.3)


def test_init_normal_is_what_packaged_models_began_with():
    torch.manual_seed(0)
    shape = TransformerConfig(dim=64, depth=2, heads=4)
    model = TokenModel(TokenModelConfig(role="prior", vocab_size=300, length=256, transformer=shape))
    assert model.config.init == "normal"
    for name, weight in model.named_parameters():
        if "norm" not in name and weight.ndim == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("bias"):
            assert not weight.any(), name
