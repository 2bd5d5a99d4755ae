"""Steps recorded as CUDA graphs. On the CPU the recordings are those of :mod:`capture`, with the same bookkeeping."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from capture import stub_cuda_graphs
from devices import CUDA, DEVICES, agreement
from digit.models.token_model import TokenModel
from digit.sampling import SamplingParams, sample
from digit.sampling.engines import acceleration, decode
from digit.sampling.engines.acceleration import accelerate, compile_seconds, engine_cache, engine_name, release
from digit.sampling.engines.decode import CudaGraphEngine, DecodeEngine

Run = Callable[..., Tensor]
KINDS = {"prior": {}, "ar": {"role": "ar", "prefix": 6}, "residual prior": {"codebook_depth": 3}}
SETTINGS = {
    "top-k": SamplingParams(top_k=10),
    "top-p": SamplingParams(top_p=0.8, temperature=1.3),
    "most likely": SamplingParams(temperature=0),
    "guided": SamplingParams(top_k=10, cfg_scale=3.0),
    "guidance on and off": SamplingParams(top_k=10, cfg_scale=2.5, cfg_interval=(0.3, 0.7)),
    "guidance from the middle": SamplingParams(top_p=0.8, cfg_scale=2.5, cfg_interval=(0.5, 1.0)),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With graphs: on the CPU the stand-ins."""
    if request.param == "cpu":
        stub_cuda_graphs(monkeypatch)
    return request.param


@pytest.fixture
def run(device: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(kind of engine, model, images, settings)`` samples with it, whatever would be chosen on this device."""

    def sampled(kind: type[DecodeEngine], model: TokenModel, count: int, settings: SamplingParams, seed=0) -> Tensor:
        for name in ("DecodeEngine", "CudaGraphEngine"):
            monkeypatch.setattr(acceleration, name, kind)
        accelerate(model, native=False)
        if type(engine_cache(model).engine) is not kind:
            release(model)
        labels, prefix = inputs(model, count)
        tokens = sample(model, range(count), seed, settings, labels, prefix)
        assert type(engine_cache(model).engine) is kind
        return tokens.cpu()

    return sampled


def inputs(model: TokenModel, count: int) -> tuple[Tensor, Tensor | None]:
    """Labels, and a prefix where the model takes one."""
    length = model.config.prefix_length
    return torch.arange(count) % 4, (torch.arange(count * length).view(count, length) % 9 if length else None)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_give_the_tokens_of_plain_ones(tiny, device, run, monkeypatch, kind, settings) -> None:
    """In float32; over several borders of the cache's length, with batches that fit the recordings and one that does
    not."""
    monkeypatch.setattr(decode, "GRAPH_STRIDE", 5)
    model = tiny(**KINDS[kind]).to(device)
    expected = {count: run(DecodeEngine, model, count, settings) for count in (5, 2, 7)}
    found = {count: run(CudaGraphEngine, model, count, settings) for count in (5, 2, 7)}
    for count, tokens in expected.items():
        assert torch.equal(found[count], tokens), count
    assert len(expected[7].unique()) > 1


def test_the_recordings_are_one_for_each_reach_and_kind_of_step(tiny, device, run, monkeypatch) -> None:
    monkeypatch.setattr(decode, "GRAPH_STRIDE", 5)
    model = tiny("ar", prefix=6).to(device)
    run(CudaGraphEngine, model, 4, SETTINGS["guidance on and off"])
    engine = engine_cache(model).engine
    # 6 + 12 positions; steps 1 to 11 need 8 to 18 of them, and 4 to 8 are guided, which need 11 to 15
    assert {key[:2] for key in engine._recorded} == {(10, False), (15, True), (18, False)}
    assert int(engine.state.place) == 12
    recorded, seconds = dict(engine._recorded), compile_seconds(model)
    run(CudaGraphEngine, model, 4, SamplingParams(top_k=10, cfg_scale=4.0, cfg_interval=(0.3, 0.7), temperature=0.8))
    run(CudaGraphEngine, model, 3, SETTINGS["guidance on and off"])
    assert engine_cache(model).engine is engine
    assert engine._recorded == recorded
    assert compile_seconds(model) == seconds
    run(CudaGraphEngine, model, 4, SETTINGS["top-p"])  # another kind of draw
    assert {key[0] for key in engine._recorded.keys() - recorded.keys()} == {10, 15, 18}
    if device == "cpu":
        assert sum(graph.replays for graph in engine._recorded.values()) == 4 * 11


def test_the_length_of_a_recording_in_earnest(tiny, device, run) -> None:
    model = tiny("ar", prefix=6, length=140, depth=1).to(device)
    settings = SETTINGS["top-k"]
    plain = run(DecodeEngine, model, 3, settings)
    assert torch.equal(run(CudaGraphEngine, model, 3, settings), plain)
    assert {key[0] for key in engine_cache(model).engine._recorded} == {128, 146}
    assert engine_name(model) == "plain as CUDA graphs"


def test_changed_weights_are_recorded_anew(tiny, device, run) -> None:
    model = tiny().to(device)
    before = run(CudaGraphEngine, model, 3, SETTINGS["top-k"])
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.flip(0))
    after = run(CudaGraphEngine, model, 3, SETTINGS["top-k"])
    assert not torch.equal(after, before)
    assert torch.equal(run(DecodeEngine, model, 3, SETTINGS["top-k"]), after)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)], indirect=True)  # test_compiled.py has the CPU's
def test_compiled_steps(tiny, device, run) -> None:
    """Compiled kernels add up in another order, so a token in a hundred may differ, and what follows it in its
    image."""
    model, settings = tiny("ar", prefix=6, depth=1).to(device), SETTINGS["guidance on and off"]
    expected = run(DecodeEngine, model, 16, settings)
    accelerate(model, compile=True, native=False)
    labels, prefix = inputs(model, 16)
    assert agreement(sample(model, range(16), 0, settings, labels, prefix), expected) > 0.98
    assert engine_name(model) == "compiled as CUDA graphs"
    seconds = compile_seconds(model)
    assert agreement(sample(model, range(3), 0, settings, labels[:3], prefix[:3]), expected[:3]) > 0.98
    assert compile_seconds(model) == seconds > 0


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_agrees_with_float32(tiny, device, run, monkeypatch, kind) -> None:
    """A rounding near a boundary changes a token, and what follows it. Recording is no part of the difference: steps
    of the same reach are the same."""
    monkeypatch.setattr(decode, "GRAPH_STRIDE", 1)
    model, settings = tiny(**KINDS[kind]).to(device), SETTINGS["guidance on and off"]
    full = run(CudaGraphEngine, model, 200, settings)
    half = run(CudaGraphEngine, model.to(torch.bfloat16), 200, settings)
    assert agreement(half[:, 0], full[:, 0]) > 0.8
    assert agreement(half, full) > 0.5
    assert agreement(run(DecodeEngine, model, 200, settings), half) > 0.98
