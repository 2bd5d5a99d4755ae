import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from digit.core.config import load_preset
from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.data.token_cache import TokenCache
from digit.training.build import build_task
from digit.training.health import Counts, Guard, Meter, forward_flops, peak_flops
from digit.training.task import Step

BATCH = {"index": torch.arange(20, 24)}


def check(guard: Guard, losses: list[float], norm: float = 1.0, optimizer: str = "model") -> None:
    for number, loss in enumerate(losses):
        guard.note(torch.tensor(loss), torch.tensor(norm), BATCH, Step(number, 100), optimizer)
    guard.check()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops(tmp_path: Path, loss: float) -> None:
    with pytest.raises(DigitError, match=f"loss became {loss} at step 2, on the images 20, 21, 22, 23 .*No checkpoint"):
        check(Guard(tmp_path), [3.0, 3.0, loss])
    assert read_json(tmp_path / "diverged.json") == {
        "step": 2, "loss": str(loss), "gradient_norm": "1.0", "images": [20, 21, 22, 23]
    }  # fmt: skip


def test_gradients_may_overflow_under_loss_scaling_only(tmp_path: Path) -> None:
    check(Guard(tmp_path, scaled=True), [3.0], norm=math.inf)
    with pytest.raises(DigitError, match="gradient became inf at step 0"):
        check(Guard(tmp_path), [3.0], norm=math.inf)


def test_a_spike_stops_with_the_step_the_images_and_the_checkpoint_before(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-0000010").mkdir(parents=True)
    guard = Guard(tmp_path, max_spike=2.0)
    with pytest.raises(
        DigitError, match=r"jumped to 6\.1, .*2 times the median 3 of the last 40 steps.*images 20.*step-0000010"
    ):
        check(guard, [2.9, 3.1, 3.0, 3.0] * 10 + [6.1])
    assert 6.1 not in guard.recent


def test_what_is_no_spike(tmp_path: Path) -> None:
    check(Guard(tmp_path, max_spike=2.0), [9.0] + [3.0] * 18 + [6.1])  # too early to tell
    check(Guard(tmp_path, max_spike=2.0), [3.0] * 40 + [5.9] * 3 + [0.1])
    check(Guard(tmp_path, max_spike=2.0), [3.0] * 40 + [30.0], optimizer="discriminator")
    check(Guard(tmp_path), [3.0] * 40 + [30.0])  # off
    slow_rise = [1.05**i for i in range(100)]
    check(Guard(tmp_path, max_spike=4.0), slow_rise)


def test_the_meter_counts_the_models_work() -> None:
    model = tiny.token_model("prior")
    cpu = torch.device("cpu")
    found = Meter(torch.nn.ModuleDict({"model": model}), cpu, "no", 2).read(10.0)
    assert found["tokens_per_second"] == 160
    assert found["mfu"] == pytest.approx(30 * forward_flops(model.config) / (2 * peak_flops(cpu, "no")))
    assert 0.05 < found["memory_gib"] < 100
    assert set(Meter(torch.nn.Linear(2, 2), cpu, "no", 1).read(1.0)) == {"examples_per_second", "memory_gib"}


def test_counts_of_unigrams_and_bigrams() -> None:
    generator = torch.Generator().manual_seed(0)
    train, held_out = (torch.randint(5, (n, 8), generator=generator) for n in (30, 7))
    counts = Counts(train.split(11), vocab_size=6)
    assert counts.use == pytest.approx(5 / 6)
    frequency = torch.bincount(train.flatten(), minlength=6).double() + 1
    frequency /= frequency.sum()
    assert counts.unigram_nll(held_out) == pytest.approx(-float(frequency[held_out].log().mean()))
    follow = torch.zeros(6, 6).double()
    for row in train.tolist():
        for a, b in itertools.pairwise(row):
            follow[a, b] += 1
    after = (follow + math.sqrt(6) * frequency) / (follow.sum(1, keepdim=True) + math.sqrt(6))
    total = sum(math.log(frequency[row[0]]) + sum(math.log(after[a, b]) for a, b in itertools.pairwise(row))
                for row in held_out.tolist())  # fmt: skip
    assert counts.bigram_nll(held_out) == pytest.approx(-total / held_out.numel())


def test_bigrams_tell_a_chain_that_unigrams_cannot() -> None:
    """Each token is the one before it plus 1 or plus 2: ln 2 nats, where the frequencies alone are flat."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 3, (400, 32), generator=generator)
    tokens = steps.cumsum(1) % 16
    counts = Counts([tokens[:300]], vocab_size=16)
    assert counts.unigram_nll(tokens[300:]) == pytest.approx(math.log(16), abs=0.02)
    assert counts.bigram_nll(tokens[300:]) == pytest.approx(math.log(2), abs=0.12)


def test_sequences_of_one_token() -> None:
    counts = Counts([torch.tensor([[0], [1], [1]])], vocab_size=2)
    assert (
        counts.bigram_nll(torch.tensor([[1]]))
        == counts.unigram_nll(torch.tensor([[1]]))
        == pytest.approx(-math.log(3 / 5))
    )


def test_a_flipped_bit_in_the_cache_stops_before_training(token_cache: TokenCache, tmp_path: Path) -> None:
    shutil.copytree(token_cache.folder, tmp_path / "cache")
    file = tmp_path / "cache" / "shard-00001" / "semantic.npy"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    preset = load_preset("cifar10-tiny-prior")
    with pytest.raises(DigitError, match=r"shard-00001/semantic\.npy is damaged: remove the folder"):
        build_task("prior", preset, tmp_path / "cache", "test")
