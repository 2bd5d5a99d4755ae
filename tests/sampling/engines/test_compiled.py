"""Faster steps give the same tokens: compiled, in other formats, with narrow weights; and without a compiler the plain
step runs."""

import logging

import pytest
import torch
from torch import nn

from digit.core.errors import DigitError
from digit.sampling import SamplingParams, sample
from digit.sampling.engines import decode
from digit.sampling.engines.acceleration import accelerate, compile_seconds, engine_cache
from digit.sampling.engines.decode import Int8Linear, quantized

GUIDED = SamplingParams(top_k=10, cfg_scale=2.5, cfg_interval=(0.3, 0.8))


def test_compiled_and_plain_steps_give_the_same_tokens(tiny):
    """A decoder, so that the prefix is in it; with and without guidance; neither other settings nor changed weights
    need a new compilation.
    """
    model = tiny("ar", prefix=6, depth=1)
    labels, prefix = torch.arange(5) % 4, torch.arange(30).view(5, 6) % 9
    requests = [SamplingParams(top_k=10), SamplingParams(top_k=10, temperature=0.7), GUIDED]
    plain = [sample(model, range(5), 1, s, labels, prefix) for s in requests]
    accelerate(model, compile=True)
    for s, expected in zip(requests[:2], plain[:2], strict=True):
        assert torch.equal(sample(model, range(5), 1, s, labels, prefix), expected)
    once = compile_seconds(model)
    assert once > 0.1
    assert engine_cache(model).engine.name == "compiled"
    # a smaller batch fills up the compiled one, and its pictures are the same
    assert torch.equal(sample(model, range(2), 1, requests[0], labels[:2], prefix[:2]), plain[0][:2])
    assert compile_seconds(model) == once
    assert torch.equal(sample(model, range(5), 1, GUIDED, labels, prefix), plain[2])

    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.flip(0))
    changed = sample(model, range(5), 1, requests[0], labels, prefix)
    accelerate(model)
    assert torch.equal(sample(model, range(5), 1, requests[0], labels, prefix), changed)
    assert not torch.equal(changed, plain[0])


def test_without_a_compiler_the_plain_step_runs_and_says_so(tiny, monkeypatch, caplog):
    import torch._inductor.config as inductor

    model = tiny(length=5, depth=1, dim=16)
    expected = sample(model, range(3))
    decode._say_once.cache_clear()
    accelerate(model, compile=True)
    broken = {"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False, "force_disable_caches": True}
    with inductor.patch(broken), caplog.at_level(logging.WARNING, "digit"):
        assert torch.equal(sample(model, range(3)), expected)
        assert torch.equal(sample(model, range(4))[:3], expected)
    lines = [r.message for r in caplog.records if "uncompiled" in r.message]
    assert len(lines) == 1
    assert "\n" not in lines[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_formats_sample_nearly_the_same(tiny, dtype):
    """In one image of many a token near a boundary changes, and what follows it."""
    model = tiny()
    full = sample(model, range(200), params=GUIDED, labels=torch.arange(200) % 4)
    half = sample(model.to(dtype), range(200), params=GUIDED, labels=torch.arange(200) % 4)
    assert (full[:, 0] == half[:, 0]).float().mean() > 0.95
    assert (full == half).float().mean() > 0.6


def test_an_int8_layer_is_near_its_original():
    torch.manual_seed(0)
    linear = nn.Linear(256, 64)
    x = torch.randn(10, 256)
    narrow = Int8Linear(linear)(x)
    error = (narrow - linear(x)).norm() / linear(x).norm()
    assert narrow.dtype == torch.float32
    assert error < 0.01
    assert Int8Linear(linear)(x[0]).shape == (64,)


@pytest.mark.parametrize(("inputs", "outputs"), [(100, 64), (64, 70), (37, 5)])
def test_an_int8_layer_may_have_any_shape(inputs, outputs):
    """PyTorch's kernel reads beyond the end of these, and the process dies."""
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, outputs), torch.randn(3, inputs)
    assert (Int8Linear(linear)(x) - linear(x)).norm() < 0.02 * linear(x).norm()


def test_a_quantized_model_shares_everything_but_its_matrices(tiny):
    model = tiny()
    narrow = quantized(model)
    assert narrow.token_embedding.weight is model.token_embedding.weight
    assert narrow.transformer.blocks[0].attention.qkv.bias is model.transformer.blocks[0].attention.qkv.bias
    assert not any(isinstance(m, nn.Linear) for m in narrow.modules())
    assert any(isinstance(m, nn.Linear) for m in model.modules())
    tokens = torch.randint(24, (4, 12))
    a, b = (m(tokens).log_softmax(-1) for m in (model, narrow))
    divergence = (a.exp() * (a - b)).sum(-1)
    assert divergence.mean() < 0.01


def test_int8_sampling_is_nearly_the_same(tiny):
    model = tiny()
    full = sample(model, range(200), params=SamplingParams(top_k=10))
    accelerate(model, quantize="int8")
    narrow = sample(model, range(200), params=SamplingParams(top_k=10))
    assert (full[:, 1] == narrow[:, 1]).float().mean() > 0.9
    accelerate(model)
    assert torch.equal(sample(model, range(200), params=SamplingParams(top_k=10)), full)


def test_unknown_quantization_is_refused(tiny):
    with pytest.raises(DigitError, match="quantize = int4 was given; expected int8"):
        accelerate(tiny(), quantize="int4")


def test_models_are_not_kept_alive(tiny):
    import gc
    import weakref

    model = tiny()
    sample(model, range(3))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
