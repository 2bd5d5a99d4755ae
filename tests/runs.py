"""What the tests of trainings do again and again."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from digit.core.files import read_tensors
from digit.training.health import SPEED
from digit.training.logs import read_metrics
from digit.training.loop import train
from digit.training.task import Batch, Stream, Task, TrainingConfig


def settings(**changes: object) -> TrainingConfig:
    values = {"steps": 30, "batch_size": 16, "lr": 3e-3, "schedule": "constant", "warmup_steps": 0, "log_every": 1}
    return TrainingConfig(**{**values, "validate_every": 0, **changes})


def learn(task: Task, config: TrainingConfig, out: Path, resume: bool = False) -> Path:
    return train(task, config, out, device="cpu", show=False, resume=resume)


def lines(out: Path) -> list[dict[str, Any]]:
    """The metrics without those that are a matter of time."""
    return [{name: value for name, value in line.items() if name not in SPEED} for line in read_metrics(out)]


def curve(out: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_metrics(out) if name in line]


def fell(values: list[float], over: int = 5) -> float:
    """The last values as a share of the first."""
    return sum(values[-over:]) / sum(values[:over])


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


def resumed(make: Callable[[int], Task], config: TrainingConfig, out: Path) -> dict[str, torch.Tensor]:
    """A run, and one that goes on from its first checkpoint with other first weights: both end in the same weights,
    which are returned, and not in those of the checkpoint."""
    half = f"step-{config.checkpoint_every:07d}"
    learn(make(0), config, out / "whole")
    shutil.copytree(out / "whole" / "checkpoints" / half, out / "cut" / "checkpoints" / half)
    learn(make(1), config, out / "cut", resume=True)
    last = f"checkpoints/step-{config.steps:07d}/modules.safetensors"
    for file in (last, "model/model.safetensors"):
        assert same(read_tensors(out / "cut" / file), read_tensors(out / "whole" / file))
    end = read_tensors(out / "whole" / last)
    assert not same(end, read_tensors(out / "whole" / "checkpoints" / half / "modules.safetensors"))
    return end


def batches(task: Task, **changes: int) -> list[Batch]:
    return list(task.batches(Stream(**{"start": 0, "stop": 6, "batch_size": 32, "seed": 3, **changes})))


def pure_batches(task: Task) -> list[Batch]:
    """Batches, which depend on seed and step alone: not on where a run begins, nor on how many processes share it."""
    whole, late, first, second = (
        batches(task),
        batches(task, start=4),
        *(batches(task, rank=r, world=2) for r in (0, 1)),
    )
    for step in (4, 5):
        assert same(late[step - 4], whole[step])
    for step in (1, 4):
        assert same({name: torch.cat([first[step][name], second[step][name]]) for name in whole[0]}, whole[step])
    assert not same(batches(task, seed=4)[0], whole[0])
    return whole
