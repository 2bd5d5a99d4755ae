import itertools
import math

import pytest

from digit.core.config import from_dict
from digit.core.errors import DigitError
from digit.training.task import TrainingConfig


def config(**values: object) -> TrainingConfig:
    return from_dict(TrainingConfig, {"steps": 1000, "batch_size": 8, **values}, "test")


def test_the_papers_schedule() -> None:
    paper = config(steps=125_000, lr=3e-4)
    rates = [paper.learning_rate(step, 125_000) for step in (0, 3125, 6250, 25_000, 125_000)]
    expected = [1e-7, (1e-7 + 3e-4) / 2, 3e-4, 1.5e-4, 3e-4 * math.sqrt(6250 / 125_000)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_inverse_square_root_never_jumps() -> None:
    paper = config(lr=3e-4, warmup_steps=100)
    rates = [paper.learning_rate(step, 1000) for step in range(1000)]
    assert max(rates) == rates[100] == 3e-4
    assert all(abs(a - b) <= 3e-4 / 100 for a, b in itertools.pairwise(rates))


def test_cosine() -> None:
    cosine = config(schedule="cosine", lr=1.0, final_lr=0.1, warmup_steps=200, warmup_from=0.0)
    rates = [cosine.learning_rate(step, 1000) for step in (0, 100, 200, 400, 600, 800, 1000, 1200)]
    half, low = 0.45 * math.cos(math.pi / 4), 0.55
    assert rates == pytest.approx([0, 0.5, 1, low + half, low, low - half, 0.1, 0.1], abs=1e-12)


def test_constant() -> None:
    constant = config(schedule="constant", lr=0.5, warmup_steps=0)
    assert {constant.learning_rate(step, 1000) for step in range(1000)} == {0.5}


@pytest.mark.parametrize(
    ("examples", "epochs", "steps"), [(100, 2, 25), (101, 2, 26), (5, 0.5, 1), (1_281_167, 400, 64_058_350)]
)
def test_epochs(examples: int, epochs: float, steps: int) -> None:
    assert from_dict(TrainingConfig, {"epochs": epochs, "batch_size": 8}, "test").total_steps(examples) == steps


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epochs": 3}, "exactly one of steps and epochs"),
        ({"steps": None}, "exactly one of steps and epochs"),
        ({"warmup_steps": 0}, "warmup_steps > 0"),
        ({"accumulation": 3}, "accumulation=3 does not divide batch_size=8"),
        ({"lr": -1}, "lr = -1"),
        ({"precision": "fp8"}, "precision = 'fp8'"),
        ({"warm_up": 5}, "did you mean 'warmup_"),
    ],
)
def test_bad_configs_get_a_sentence(values: dict[str, object], words: str) -> None:
    with pytest.raises(DigitError, match=words):
        config(**values)
