"""The transformer: cached equals uncached, causality, both norms, against torch's own layers."""

import pytest
import torch
from torch import nn

from digit.models.transformer import KVCache, Transformer, TransformerConfig


def build(**fields) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**{"dim": 32, "depth": 3, "heads": 4, **fields})).eval()


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_cached_positions_equal_the_whole_sequence(norm):
    model, x = build(norm=norm), torch.randn(2, 9, 32)
    whole = model(x)
    cache = KVCache(model.config, 2, 12, "cpu", torch.float32)
    first = model(x[:, :4], cache, torch.arange(4))
    rest = [model(x[:, i : i + 1], cache, torch.tensor(i)) for i in range(4, 9)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, rtol=1e-5, atol=1e-6)


def test_a_short_reach_reads_the_same_cache():
    model, x = build(), torch.randn(2, 5, 32)
    caches = [KVCache(model.config, 2, 12, "cpu", torch.float32) for _ in range(2)]
    model(x[:, :4], caches[0], torch.arange(4))
    model(x[:, :4], caches[1], torch.arange(4), 4)
    full = model(x[:, 4:], caches[0], torch.tensor(4))
    short = model(x[:, 4:], caches[1], torch.tensor(4), 6)
    torch.testing.assert_close(full, short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_causal_outputs_ignore_what_follows(norm):
    model, x = build(norm=norm), torch.randn(1, 6, 32)
    changed = x.clone()
    changed[:, 4:] += torch.randn(2, 32)  # a constant would vanish in the norm
    torch.testing.assert_close(model(x)[:, :4], model(changed)[:, :4])
    assert not torch.allclose(model(x)[:, 4:], model(changed)[:, 4:])


def test_without_causality_everything_is_seen():
    model, x = build(causal=False), torch.randn(1, 6, 32)
    changed = x.clone()
    changed[:, 5] += torch.randn(32)
    assert not torch.allclose(model(x)[:, 0], model(changed)[:, 0])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_is_torchs_encoder_layer(norm):
    """PyTorch's reference layer, with our weights in it, gives the same numbers."""
    model = build(norm=norm, depth=1, causal=False)
    block = model.blocks[0]
    layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=norm == "pre").eval()
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(block.attention.qkv.weight)
        layer.self_attn.in_proj_bias.copy_(block.attention.qkv.bias)
        for ours, theirs in (
            (block.attention.out, layer.self_attn.out_proj),
            (block.ffn_in, layer.linear1),
            (block.ffn_out, layer.linear2),
        ):
            theirs.weight.copy_(ours.weight)
            theirs.bias.copy_(ours.bias)
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(block(x), layer(x), rtol=1e-5, atol=1e-6)


def test_states_are_the_inputs_of_every_block():
    model, x = build(), torch.randn(1, 6, 32)
    states = model.states(x)
    assert len(states) == 4
    torch.testing.assert_close(states[0], x)
    torch.testing.assert_close(model.norm(states[-1]), model(x))


def test_checkpointing_gives_the_same_gradients():
    model, x = build().train(), torch.randn(2, 5, 32)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.checkpointing = True
    model(x).square().sum().backward()
    for a, p in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads=5 does not divide dim=32"):
        TransformerConfig(dim=32, depth=1, heads=5)


def test_a_cache_is_allocated_once_for_every_block():
    cache = KVCache(build().config, 2, 12, "cpu", torch.bfloat16)
    assert cache.length == 12
    assert sum(t.nbytes for t in (*cache.keys, *cache.values)) == 2 * 3 * 2 * 12 * 32 * 2


@pytest.mark.parametrize(("training", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_attention_of_a_bfloat16_training_on_a_cpu_is_in_float32(monkeypatch, training, dtype):
    """Its backward pass is two to eight times as fast then; without gradients bfloat16 is the faster one."""
    model, x, seen = build(), torch.randn(2, 6, 32), []
    attend = nn.functional.scaled_dot_product_attention

    def watched(*inputs, **options):
        found = attend(*inputs, **options)
        seen.append(found.dtype)  # autocast decides behind the call
        return found

    expected = model(x)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        found = model(x)
    assert set(seen) == {dtype}
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.05)
