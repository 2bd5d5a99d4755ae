"""Sampling on a GPU: by every role the tokens of the CPU, in bfloat16 nearly so, and nothing waits within a step."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from devices import DEVICES, agreement
from digit.models.token_model import TokenModel
from digit.sampling import SamplingParams, sample
from digit.sampling.engines.acceleration import accelerate
from digit.sampling.engines.decode import DecodeEngine
from digit.sampling.masked import sample_masked

GUIDED = {"top_k": 10, "cfg_scale": 2.5, "cfg_interval": (0.3, 0.8)}
STATES = {"dim": 32, "depth": 2, "state_dim": 8, "head_dim": 16}
KINDS = {
    "prior": ({}, GUIDED),
    "ar": ({"role": "ar", "prefix": 6}, {"top_p": 0.8}),
    "residual prior": ({"codebook_depth": 3}, GUIDED),
    "state-space prior": ({"state_space": STATES}, GUIDED),
    "masked decoder": ({"role": "masked", "prefix": 6}, {"steps": 4, **GUIDED}),
    "masked prior": ({"role": "masked"}, {"steps": 12, "top_p": 0.9}),
    "random-order prior": ({"role": "random"}, {"steps": 5, **GUIDED}),
}
IMAGES = 128


def tokens(model: TokenModel, settings: dict[str, object]) -> Tensor:
    """Of 128 images, in PyTorch on every device."""
    accelerate(model, native=False)
    length = model.config.prefix_length
    prefix = torch.arange(IMAGES * length).view(IMAGES, length) % 9 if length else None
    found = sample(model, range(IMAGES), 0, SamplingParams(**settings), torch.arange(IMAGES) % 4, prefix)
    assert found.device.type == model.start.device.type
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "settings"), KINDS.values(), ids=KINDS)
def test_every_device_and_format_gives_the_same_tokens(tiny, device: str, shape: dict, settings: dict) -> None:
    """In float32 but for roundings in the last bit, of which one in ten thousand changes a token and what follows it;
    bfloat16 changes more, in these models of large random weights."""
    model = tiny(**shape)
    expected = tokens(model, settings)
    full = tokens(model.to(device), settings)
    assert agreement(full, expected) > 0.98
    assert agreement(tokens(model.to(torch.bfloat16), settings), full) > 0.5
    shuffled = expected[torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))]
    assert agreement(shuffled, expected) < 0.5  # what no agreement is


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """On CUDA a RuntimeError where the host waits for the device."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_waits_within_a_step(tiny, device: str) -> None:
    """A plain step, and all iterations of a masked decoder."""
    prior, masked = tiny().to(device), tiny("masked", prefix=6).to(device)
    engine = DecodeEngine(prior, 4, True)
    settings = SamplingParams(top_k=10, top_p=0.9, cfg_scale=3.0)
    everywhere = torch.ones(4, 12, dtype=torch.bool, device=device)
    uniform = torch.rand(4, 12, device=device)
    labels = torch.arange(4, device=device)
    with torch.inference_mode():
        draw = engine.begin(uniform, torch.zeros_like(everywhere, dtype=torch.long), everywhere, [3.0] * 12, settings)
        engine.prefill(prior, 1, labels, None, draw, True)
        engine.decode_one_token(prior, 2, True, draw)  # sets libraries up
        with without_waiting(device):
            for index in range(3, 6):
                engine.decode_one_token(prior, index, True, draw)
        assert int(engine.state.place) == 6
        uniforms, prefix = torch.rand(4, 5, 2, 12, device=device), torch.zeros(4, 6, dtype=torch.long, device=device)
        arguments = (masked, uniforms, settings.of("masked", 12), labels, prefix, torch.zeros_like(prefix).repeat(1, 2))
        expected = sample_masked(*arguments, everywhere)
        with without_waiting(device):
            found = sample_masked(*arguments, everywhere)
        assert torch.equal(found, expected)
