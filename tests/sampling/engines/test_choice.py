"""The quicker of the C++ step and the plain one runs, as measured at the first use of a shape."""

import json
import logging
import time

import pytest
import torch

from digit.sampling import sample
from digit.sampling.engines import acceleration as choice
from digit.sampling.engines.acceleration import Acceleration, EngineCache, accelerate, engine_name
from digit.sampling.engines.native import NativeStep
from tiny import loud

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture(autouse=True)
def memory(monkeypatch, tmp_path):
    """A file of its own, and a process that has measured nothing."""
    monkeypatch.setattr(choice, "_file", lambda: tmp_path / "choices.json")
    monkeypatch.setattr(choice, "_known", {})
    return tmp_path / "choices.json"


@pytest.fixture
def slow_native(monkeypatch):
    """A C++ step that takes a hundredth of a second."""
    quick = NativeStep.draw_tokens

    def slow(self, *arguments):
        time.sleep(0.01)
        return quick(self, *arguments)

    monkeypatch.setattr(NativeStep, "draw_tokens", slow)


def test_a_slow_native_step_gives_way(slow_native, memory, caplog):
    model = loud(dim=64, heads=2)
    with caplog.at_level(logging.INFO, "digit"):
        tokens = sample(model, range(3))
    assert engine_name(model) == "plain"
    assert "The C++ step is slower" in caplog.text
    (found,) = json.loads(memory.read_text()).values()
    (times,) = found.values()
    assert times["C++"] >= 0.01 > times["plain"]
    accelerate(model, native=True)  # asked for, it runs nevertheless
    assert torch.equal(sample(model, range(3)), tokens)
    assert engine_name(model) == "C++"


def test_a_shape_is_measured_once(slow_native, memory, monkeypatch):
    sample(loud(dim=64, heads=2), range(3))
    monkeypatch.setattr(choice, "_known", {})  # as another process would begin
    monkeypatch.setattr(choice, "_seconds", lambda *_: pytest.fail("measured again"))
    model = loud(dim=64, heads=2)
    sample(model, range(4))  # rows are rounded up to a power of 2
    assert engine_name(model) == "plain"


def test_other_shapes_are_measured_anew(memory):
    sizes = [(2, False), (3, False), (2, True)]
    for dim in (64, 96):
        model = loud(dim=dim, heads=2)
        for batch, guided in sizes:
            EngineCache(Acceleration()).engine_for(model, batch, guided)
    names = choice.remembered()
    assert len(names) == 4  # of two widths, 2 and 4 rows
    assert all("float32" in name and "rows" in name and "threads" in name for name in names)
    assert choice.shape_class(model, 2, False, "int8") not in names


def test_a_memory_that_cannot_be_written_or_read_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(choice, "_file", lambda: tmp_path / "file" / "choices.json")
    sample(loud(dim=64, heads=2), range(2))
    assert len(choice._known) == 1
    (tmp_path / "broken.json").write_text("not JSON")
    monkeypatch.setattr(choice, "_file", lambda: tmp_path / "broken.json")
    assert choice.remembered() == {}


def test_measuring_leaves_no_trace_in_the_tokens():
    model = loud(dim=64, heads=2)
    first = sample(model, range(3), seed=1)
    assert torch.equal(first, sample(model, range(3), seed=1))
    accelerate(model, native=False)
    assert torch.equal(first, sample(model, range(3), seed=1))
