"""Steps can be recorded: nothing in them waits for the device or depends on numbers in its shapes. No GPU is needed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from capture import Graph, HostSync, no_host_sync, on_a_fake_gpu, stub_cuda_graphs
from digit.sampling import SamplingParams
from digit.sampling.engines import decode
from digit.sampling.engines.decode import DecodeEngine
from digit.sampling.logits import DrawParams
from digit.sampling.masked import sample_masked
from digit.sampling.random_order import _steps

BATCH = 4
DRAWS = {
    "top-k": (10, False),
    "top-p": (0, True),
    "top-k and top-p": (10, True),
    "all": (0, False),
    "most likely": (0, None),
}
KINDS = {
    "prior": {},
    "post-norm prior": {"norm": "post"},
    "ar": {"role": "ar", "prefix": 6},
    "residual prior": {"codebook_depth": 3},
}
BAD: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: bool((x > 0).any()),
    "list": lambda x: x.tolist(),
    "places": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "write by mask": lambda x: x.index_put_((x > 0,), torch.ones_like(x[:1])),
    "unique": lambda x: x.unique(),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: x + torch.ones(3, device="cpu").to("cuda"),
    "a number of the host": lambda x: x + torch.tensor(1.0, device="cpu"),
    "written from the host": lambda x: x.copy_(torch.zeros(3, device="cpu")),
}


def params(engine: DecodeEngine, top_k: int, top_p: bool | None) -> DrawParams:
    state = engine.state
    return DrawParams(0.0 if top_p is None else state.temperature, top_k, state.top_p if top_p else 1.0)


@pytest.fixture(autouse=True)
def _no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no addresses, by which an engine knows its weights again."""
    monkeypatch.setattr(decode, "version", lambda model: ())


@pytest.mark.parametrize("act", BAD.values(), ids=BAD)
def test_what_waits_is_found(act: Callable[[Tensor], object]) -> None:
    """The check itself: each of these ends a recording with an error."""
    with on_a_fake_gpu(), pytest.raises(HostSync), no_host_sync():
        act(torch.zeros(3))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_no_word_from_the_host(tiny, kind: str, guided: bool, draw: tuple[int, bool | None]) -> None:
    model = tiny(**KINDS[kind])
    with on_a_fake_gpu(model):
        engine = DecodeEngine(model, BATCH, guided)
        with no_host_sync():
            engine.decode_one_token(model, 3, guided, params(engine, *draw))
        assert engine.state.tokens.device.type == "cuda"


def test_a_step_that_waits_is_found(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    step = model.step
    monkeypatch.setattr(model, "step", lambda cache, token, index, reach: step(cache, token, int(index), reach))
    with on_a_fake_gpu(model):
        engine = DecodeEngine(model, BATCH, False)
        with pytest.raises(HostSync), no_host_sync():
            engine.decode_one_token(model, 3, False, params(engine, 10, False))


def test_a_number_of_the_host_in_a_recording_gives_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for graphs replays what was recorded, not the code: a place that was read by the host stays."""
    stub_cuda_graphs(monkeypatch)
    place, out = torch.zeros((), dtype=torch.long), torch.zeros(4)

    def recorded(step: Callable[[], object]) -> list[float]:
        graph = Graph()
        place.zero_()
        out.zero_()
        with torch.cuda.graph(graph, pool=None):
            step()
        assert (int(place), out.tolist()) == (0, [0.0] * 4)  # recorded, not run
        for _ in range(3):
            graph.replay()
        return out.tolist()

    def good() -> None:
        out.index_copy_(0, place.view(1), torch.ones(1))
        place.add_(1)

    def bad() -> None:
        out[int(place)] = 1.0
        place.add_(1)

    assert recorded(good) == [1.0, 1.0, 1.0, 0.0]
    assert recorded(bad) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("labels", [False, True], ids=["plain", "guided"])
def test_masked_iterations_have_no_word_from_the_host(tiny, labels: bool) -> None:
    model = tiny("masked", prefix=6)
    settings = SamplingParams(top_k=10, cfg_scale=3.0 if labels else 1.0).of("masked", 12)
    with on_a_fake_gpu(model):
        uniform = torch.rand(BATCH, 4, 2, 12)
        classes = torch.zeros(BATCH, dtype=torch.long) if labels else None
        prefix = torch.zeros(BATCH, 6, dtype=torch.long)
        given, mask = torch.zeros(BATCH, 12, dtype=torch.long), torch.ones(BATCH, 12, dtype=torch.bool)
        with no_host_sync():
            tokens = sample_masked(model, uniform, settings, classes, prefix, given, mask)
        assert (tokens.shape, tokens.device.type) == ((BATCH, 12), "cuda")


@pytest.mark.parametrize("labels", [False, True], ids=["plain", "guided"])
def test_steps_in_random_order_have_no_word_from_the_host(tiny, labels: bool) -> None:
    """Which images take their steps together is asked of the device once, before the steps."""
    model = tiny("random")
    settings = SamplingParams(top_p=0.9, steps=4, cfg_scale=3.0 if labels else 1.0).of("random", 12)
    with on_a_fake_gpu(model):
        uniform, tokens = torch.rand(BATCH, 12), torch.zeros(BATCH, 12, dtype=torch.long)
        classes = torch.zeros(BATCH, dtype=torch.long) if labels else None
        order = torch.rand(BATCH, 12).argsort(1)
        with no_host_sync():
            drawn = list(_steps(model, uniform, settings, classes, tokens, order, 12))
        assert sum(places.shape[1] for places, _ in drawn) == 12
